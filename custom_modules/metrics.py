"""What a synthetic CT is scored by: in-body error in HU and overlap of bone, on the CT's own grid."""

from __future__ import annotations

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric

from custom_modules.transforms import fill_holes_by_slice, largest_opened

BONE_HU = 250.0


def ct_body_mask(ct: np.ndarray, mr: np.ndarray) -> np.ndarray:
    """The voxels that count: the CT above -300 HU, opened, the largest component, holes filled by slice, where the
    MR has signal. (D, H, W) HU and MR to bool."""
    return fill_holes_by_slice(largest_opened(ct > -300)) & (mr > 0)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice overlap of two masks; NaN, not defined, when both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else float("nan")


def score(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Errors of ``pred`` against ``ct``, both (D, H, W) HU, over ``mask``.

    Returns:
        ``mae`` and ``bias`` (mean of pred - ct) in HU; ``bone_mae`` over CT bone (above 250 HU) and ``bone_dice`` of
        the two bone masks; each NaN where it is not defined.
    """
    error = pred.astype(np.float32)[mask] - ct.astype(np.float32)[mask]
    bone = ct[mask] > BONE_HU
    return {
        "mae": float(np.abs(error).mean()) if error.size else float("nan"),
        "bias": float(error.mean()) if error.size else float("nan"),
        "bone_mae": float(np.abs(error[bone]).mean()) if bone.any() else float("nan"),
        "bone_dice": dice(pred[mask] > BONE_HU, bone),
    }


class InBodyScore(CumulativeIterationMetric):
    """One value of :func:`score` as a MONAI metric, for validation during training.

    Called with a list of predictions and one of (CT, MR) pairs, all in [-1, 1]; the mean over volumes where it is
    defined.

    Args:
        name: a key of :func:`score`.
        hu_window: HU of [-1, 1].
    """

    def __init__(self, name: str, hu_window: tuple[float, float]) -> None:
        super().__init__()
        self.name, self.hu_window = name, hu_window

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        low, high = self.hu_window
        values = []
        for pred, target in zip(y_pred, y if y is not None else []):
            hu_pred, hu = (((np.asarray(x) + 1) / 2 * (high - low) + low)[0] for x in (pred, target[:1]))
            mask = ct_body_mask(hu, np.asarray(target[1]) + 1)
            values.append(score(hu_pred, hu, mask)[self.name])
        return torch.tensor(values)[:, None]

    def aggregate(self) -> torch.Tensor:
        return torch.nanmean(self.get_buffer())

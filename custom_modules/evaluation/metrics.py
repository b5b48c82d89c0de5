"""Metrics of a synthetic CT, on the grid of the CT and inside the body: errors in HU, similarity, overlap.

Two protocols define how HU are clipped before: ``paper``, and ``synthrad2025`` of the SynthRAD2025 challenge.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric
from scipy.ndimage import uniform_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from custom_modules.data.hu import TISSUES, Window, tissue

Metric = Callable[..., float]  # of (pred, ct, mask); some take ``window`` and ``outside`` too

PAPER_HU = (-800.0, 800.0)
SYNTHRAD_HU = (-1024.0, 3071.0)
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM (Wang et al. 2003), finest first
SSIM_WINDOW = 7  # voxels; uniform
SMALLEST = (SSIM_WINDOW - 1) * 2 ** (len(SCALES) - 1) + 1  # voxels per side that five scales need


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice overlap of two masks; NaN (not defined) when both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else float("nan")


def mae(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window | None = None) -> float:
    """Mean absolute error in HU."""
    return _mean(np.abs(np.subtract(*_inside(pred, ct, mask, window))))


def bias(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window | None = None) -> float:
    """Mean of pred - ct in HU."""
    return _mean(np.subtract(*_inside(pred, ct, mask, window)))


def rmse(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window | None = None) -> float:
    """Root of the mean squared error in HU."""
    return _mean(np.subtract(*_inside(pred, ct, mask, window)) ** 2) ** 0.5


def tissue_mae(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window | None = None, *, name: str) -> float:
    """Mean absolute error in HU over one tissue of the CT."""
    return mae(pred, ct, mask & tissue(ct, name), window)


def tissue_bias(
    pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window | None = None, *, name: str
) -> float:
    """Mean of pred - ct in HU over one tissue of the CT."""
    return bias(pred, ct, mask & tissue(ct, name), window)


def tissue_dice(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, *, name: str) -> float:
    """Dice overlap of one tissue, defined by its HU in both."""
    return dice(tissue(pred[mask], name), tissue(ct[mask], name))


def psnr(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window = PAPER_HU) -> float:
    """Peak signal-to-noise ratio in dB, HU clipped to ``window``, whose width is the range; infinite without error."""
    a, b = _inside(pred, ct, mask, window)
    if not a.size:
        return float("nan")
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(b, a, data_range=window[1] - window[0]))


def ncc(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window = PAPER_HU) -> float:
    """Normalised cross-correlation (Pearson) of HU clipped to ``window``; not defined where one is constant."""
    a, b = (x - _mean(x) for x in _inside(pred, ct, mask, window))
    power = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / power if power else float("nan")


def ssim(
    pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window = PAPER_HU, outside: float | None = None
) -> float:
    """Structural similarity: mean over the mask of scikit-image's map (7^3, uniform), HU clipped to ``window``, whose
    width is the range.

    Args:
        outside: HU that both are set to outside the mask; None leaves them unchanged.
    """
    if min(ct.shape) < SSIM_WINDOW:
        return float("nan")
    return _mean(_ssim_map(*_prepared(pred, ct, mask, window, outside), window)[mask])


def ms_ssim(
    pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window = SYNTHRAD_HU, outside: float | None = -1024.0
) -> float:
    """Multi-scale structural similarity as the SynthRAD2025 challenge computes it.

    At each of five scales the map of structural similarity, luminance included, is raised to the scale's weight and
    averaged over the mask without a border of 3 voxels; the result is the product. Volumes are padded to 97 voxels per
    side by replicating the edge. The next scale has every other voxel of the mean over 2^3 (with zeros before the first
    voxel) and every other voxel of the mask.
    """
    margins = [((n := max(SMALLEST - size, 0)) // 2, n - n // 2) for size in ct.shape]
    # shifted so that the lowest value is 0: beyond the volume there is air
    a, b = (np.pad(x - window[0], margins, mode="edge") for x in _prepared(pred, ct, mask, window, outside))
    mask = np.pad(mask, margins, mode="edge")
    border = (slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2)),) * 3
    product = 1.0
    for weight in SCALES:
        similarity = _ssim_map(a, b, window)[border][mask[border]].clip(min=0)
        product *= _mean(similarity**weight)
        every_other = (slice(None, None, 2),) * 3
        a, b = (uniform_filter(x, 2, mode="constant")[every_other] for x in (a, b))
        mask = mask[every_other]
    return product


def slice_inconsistency(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, axis: int = -1) -> float:
    """Mean absolute difference of neighbours along ``axis`` in the prediction, divided by that in the CT, where both
    neighbours are in the mask. 1 is as in the CT; more is flicker from slice to slice, less is blur."""
    both = np.minimum(*(np.take(mask, range(n, n + mask.shape[axis] - 1), axis) for n in (0, 1)))
    own, real = (_mean(np.abs(np.diff(x.astype(np.float64), axis=axis))[both]) for x in (pred, ct))
    return own / real if real else float("nan")


def _inside(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window | None) -> tuple[np.ndarray, np.ndarray]:
    """Return both over the mask as float64, clipped to ``window`` if it is given."""
    a, b = (x[mask].astype(np.float64) for x in (pred, ct))
    return (a, b) if window is None else (a.clip(*window), b.clip(*window))


def _prepared(
    pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, window: Window, outside: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return both volumes as float64, clipped to ``window`` and set to ``outside``, unless None, beyond the mask."""
    a, b = (x.astype(np.float64).clip(*window) for x in (pred, ct))
    return (a, b) if outside is None else (np.where(mask, a, outside), np.where(mask, b, outside))


def _ssim_map(a: np.ndarray, b: np.ndarray, window: Window) -> np.ndarray:
    return structural_similarity(a, b, win_size=SSIM_WINDOW, data_range=window[1] - window[0], full=True)[1]


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else float("nan")


METRICS: dict[str, Metric] = {
    **{f.__name__: f for f in (mae, bias, rmse)},
    **{f"{name}_mae": partial(tissue_mae, name=name) for name in TISSUES},
    **{f"{name}_bias": partial(tissue_bias, name=name) for name in TISSUES},
    **{f"{name}_dice": partial(tissue_dice, name=name) for name in TISSUES},
    **{f.__name__: f for f in (psnr, ssim, ms_ssim, ncc)},
}


def protocol(errors: Window | None, similarity: Window, outside: float | None) -> dict[str, Metric]:
    """Return all metrics under one convention.

    Args:
        errors: window to which HU are clipped before errors are computed; None does not clip.
        similarity: window to which HU are clipped before similarities are computed, and their range.
        outside: HU outside the mask, for metrics that compare neighbourhoods; None leaves them unchanged.
    """
    metrics: dict[str, Metric] = {}
    for name, metric in METRICS.items():
        if name in ("psnr", "ncc"):
            metrics[name] = partial(metric, window=similarity)
        elif name in ("ssim", "ms_ssim"):
            metrics[name] = partial(metric, window=similarity, outside=outside)
        else:
            metrics[name] = metric if name.endswith("_dice") else partial(metric, window=errors)
    return metrics


PROTOCOLS = {
    "paper": protocol(PAPER_HU, PAPER_HU, None),
    "synthrad2025": protocol(None, SYNTHRAD_HU, SYNTHRAD_HU[0]),
}


def score(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray, protocol: str = "synthrad2025") -> dict[str, float]:
    """Compute every metric of ``pred`` against ``ct``, both (D, H, W) HU, over ``mask``; NaN where it is not defined.

    Args:
        protocol: a key of :data:`PROTOCOLS`.
    """
    pred, ct = pred.astype(np.float32), ct.astype(np.float32)
    return {name: metric(pred, ct, mask) for name, metric in PROTOCOLS[protocol].items()}


class InBodyScore(CumulativeIterationMetric):
    """One metric as a MONAI metric, for Ignite engines.

    It is called with a list of predictions and one of (CT, mask) pairs, images in [-1, 1]. The result is the mean over
    the volumes where the metric is defined.

    Args:
        name: a key of :data:`METRICS`.
        hu_window: HU of [-1, 1].
        protocol: a key of :data:`PROTOCOLS`; the default arguments of the metric when None.
    """

    def __init__(self, name: str, hu_window: Window, protocol: str | None = None) -> None:
        super().__init__()
        self.metric, self.hu_window = (PROTOCOLS[protocol] if protocol else METRICS)[name], hu_window

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        low, high = self.hu_window
        values = []
        for pred, target in zip(y_pred, y if y is not None else []):
            pred, ct, mask = (np.asarray(x.float().cpu()) for x in (pred[0], target[0], target[1]))
            values.append(self.metric(*((x + 1) / 2 * (high - low) + low for x in (pred, ct)), mask > 0.5))
        return torch.tensor(values)[:, None]

    def aggregate(self) -> torch.Tensor:
        return torch.nanmean(self.get_buffer())

"""What is fitted on patients after training and stored with the weights: HU of dense bone, and SD in HU of error."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor
from scipy.optimize import isotonic_regression

from custom_modules.files import sha256

logger = logging.getLogger(__name__)

DENSE_BONE = 500.0  # HU, where the curve begins; soft tissue, spongy bone and the threshold of bone stay as they are
KNOTS, LEAST_VOXELS = 8, 800  # of the curve; below so many voxels of dense bone there is none
PART_VOXELS = 2**22  # that are moved along it at once
OF_THE_CURVE = ("num_inference_steps", "output")  # settings that change what it corrects


class Calibration:
    """What :func:`~bundle.calibrate.calibrate` stored with the weights.

    Args:
        path: JSON of ``python -m bundle calibrate``; None leaves HU and SD unchanged, and so does, with a warning, a
            missing file.
        checkpoint: weights in use; what was fitted with others is ignored with a warning.
        settings: sampling settings. Where they differ from those of the fit a warning is logged, and HU are left
            unchanged if it is one of those that change the estimate.
    """

    def __init__(self, path: str | Path | None, checkpoint: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, self.checkpoint, self.settings = path, checkpoint, settings

    @cached_property
    def _stored(self) -> dict[str, Any]:
        """What belongs to these weights; empty if nothing does."""
        if not self.path:
            return {}
        if not Path(self.path).is_file():
            logger.warning("HU of bone and SD are not calibrated: no %s", self.path)
            return {}
        stored = json.loads(Path(self.path).read_text())
        if stored["model_sha256"] != sha256(self.checkpoint):
            why = "was fitted with other weights; run wldm calibrate"
            logger.warning("HU of bone and SD are not calibrated: %s %s", self.path, why)
            return {}
        return stored

    def _other_settings(self, names: Sequence[str]) -> str:
        fitted = self._stored.get("settings", {})
        return ", ".join(f"{name} {fitted.get(name)}" for name in names if fitted.get(name) != self.settings[name])

    @cached_property
    def scale(self) -> float | None:
        """The factor on SD of :func:`~custom_modules.evaluation.uncertainty.fit_scale`, or None."""
        if self._stored and (other := self._other_settings(list(self.settings))):
            logger.warning("SD was calibrated with other settings: %s", other)
        return float(self._stored["sd_scale"]) if self._stored else None

    @cached_property
    def bone_curve(self) -> list[list[float]] | None:
        """Knots of :func:`fit_bone_curve`, or None."""
        curve = self._stored.get("bone_curve")
        if curve and (other := self._other_settings([name for name in OF_THE_CURVE if name in self.settings])):
            logger.warning("HU of bone are not calibrated: that was fitted with other settings: %s", other)
            return None
        return curve


def fit_bone_curve(predicted: np.ndarray, truth: np.ndarray, highest: float) -> list[list[float]] | None:
    """Fit what dense bone of a synthetic CT is in the CT.

    The curve is the median of the CT in bins of as many voxels each, made monotone by SciPy's isotonic regression. It
    begins at :data:`DENSE_BONE` and ends at ``highest``, which both stay where they are.

    Args:
        predicted: HU of the synthetic CT within the body.
        truth: HU of the CT at the same voxels.
        highest: HU that the synthetic CT can have at most.

    Returns:
        Pairs of predicted and calibrated HU, both rising; None where there is too little dense bone.
    """
    dense = predicted >= DENSE_BONE
    predicted, truth = predicted[dense], truth[dense]
    if predicted.size < LEAST_VOXELS:
        return None
    edges = np.quantile(predicted, np.linspace(0, 1, KNOTS + 1))
    bins = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, KNOTS - 1)
    knots = np.array([[np.median(x[bins == k]) for x in (predicted, truth)] for k in np.unique(bins)])
    rising = np.clip(isotonic_regression(knots[:, 1]).x, DENSE_BONE, highest)
    ends = [[DENSE_BONE, DENSE_BONE], [highest, highest]]
    return [ends[0], *np.stack([knots[:, 0], rising], axis=1).round(1).tolist(), ends[1]]


def calibrate_bone_(hu: np.ndarray, curve: Sequence[Sequence[float]] | None) -> np.ndarray:
    """Move dense bone along the ``curve`` of :func:`fit_bone_curve`; return ``hu``, contiguous and of any shape. In
    place and part by part, for volumes are large."""
    if curve is None:
        return hu
    flat, (predicted, calibrated) = hu.view(), np.transpose(curve)
    flat.shape = (-1,)  # unlike reshape, never a copy
    for part in np.array_split(flat, 1 + hu.size // PART_VOXELS):
        dense = part > DENSE_BONE
        part[dense] = np.interp(part[dense], predicted, calibrated)
    return hu


class CalibrateBoned(MapTransform):
    """Move HU of dense bone along the curve of the calibration, in place; what is softer stays as it is."""

    def __init__(self, keys: KeysCollection, calibration: Calibration) -> None:
        super().__init__(keys)
        self.calibration = calibration

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            calibrate_bone_(convert_to_tensor(data[key], track_meta=False).numpy(), self.calibration.bone_curve)
        return data


class SplitSpreadd(MapTransform):
    """Move the second channel of a result with two, the standard deviation of the samples, to ``sd`` in calibrated HU.

    Args:
        hu_window: HU of [-1, 1].
        calibration: gives the scale.
    """

    def __init__(self, keys: KeysCollection, hu_window: tuple[float, float], calibration: Calibration) -> None:
        super().__init__(keys)
        self.hu_per_unit, self.calibration = (hu_window[1] - hu_window[0]) / 2, calibration

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            if len(data[key]) == 2:
                scale = self.calibration.scale or 1.0
                data[key], data["sd"] = data[key][:1], data[key][1:] * self.hu_per_unit * scale
        return data

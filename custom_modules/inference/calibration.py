"""The standard deviation of samples in HU, scaled to the error."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from custom_modules.files import sha256

logger = logging.getLogger(__name__)


class Calibration:
    """The scale of :func:`fit_scale` that is stored with the weights.

    Args:
        path: JSON of ``python -m bundle calibrate``; None, or a missing file, leaves SD unchanged.
        checkpoint: weights in use; a scale that was fitted with others is ignored with a warning.
        settings: sampling settings; a warning is logged where they differ from those of the fit.
    """

    def __init__(self, path: str | Path | None, checkpoint: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, self.checkpoint, self.settings = path, checkpoint, settings

    @cached_property
    def scale(self) -> float | None:
        """The factor on SD, or None without one for these weights."""
        if not self.path or not Path(self.path).is_file():
            logger.warning("SD is not calibrated: no %s", self.path)
            return None
        stored = json.loads(Path(self.path).read_text())
        if stored["model_sha256"] != sha256(self.checkpoint):
            logger.warning("SD is not calibrated: %s was fitted with other weights; run bundle calibrate", self.path)
            return None
        other = [f"{k} {stored['settings'].get(k)}" for k, v in self.settings.items() if stored["settings"].get(k) != v]
        if other:
            logger.warning("SD was calibrated with other settings: %s", ", ".join(other))
        return float(stored["sd_scale"])


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

"""The record of each synthetic CT: its input, weights and settings, and how long it took."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import monai
import torch

from custom_modules.config_check import result_settings
from custom_modules.data.volumes import EXTENSIONS, sibling_path, volume_files
from custom_modules.errors import InputError
from custom_modules.files import sha256, to_plain, write_json
from custom_modules.memory import peak_memory_gib


class Sidecar:
    """Writes the record ``a_sct.json`` of ``a_sct.nii.gz``.

    Args:
        output_dir: of the synthetic CTs.
        checkpoint: the weights.
        version: of the bundle.
        device: whose peak memory is recorded.
        calibration: of bone, and of the standard deviation of several samples.
        settings: of the synthesis, such as seed, steps and HU window; when None, those of the running config that
            change the result (:func:`~custom_modules.config_check.result_settings`).
        beside_series: NIfTI is written beside DICOM series, too.
    """

    def __init__(
        self,
        output_dir: str | Path,
        checkpoint: str | Path,
        version: str,
        device: torch.device | str,
        calibration: Any = None,
        settings: Mapping[str, Any] | None = None,
        beside_series: bool = False,
    ) -> None:
        self.output_dir, self.checkpoint, self.version, self.device = Path(output_dir), checkpoint, version, device
        self.settings = result_settings() if settings is None else settings
        self.calibration, self.beside_series = calibration, beside_series

    @cached_property
    def model_sha256(self) -> str | None:
        return sha256(self.checkpoint) if Path(self.checkpoint).is_file() else None

    def is_finished(self, item: Mapping[str, str]) -> bool:
        """Whether ``item["output"]`` exists, with what belongs beside it, and its record names the input
        ``item["image"]``, these weights, these settings and the hash of that output. False if the record cannot be
        read."""
        target = self.output_dir / item["output"]
        record = sibling_path(target, "", ".json")
        beside = [sibling_path(target, "", EXTENSIONS[0])] if self.beside_series and target.is_dir() else []
        if not all(path.exists() for path in (target, record, *beside)):
            return False
        try:
            made = {
                "input_sha256": sha256(volume_files(item["image"])),
                "output_sha256": sha256(target),
                **self._of_all(),
            }
            found = json.loads(record.read_text(encoding="utf-8"))
            return all(found.get(name) == value for name, value in to_plain(made).items())
        except (InputError, OSError, ValueError, AttributeError):  # reading the input will report what is wrong with it
            return False

    def _of_all(self) -> dict[str, Any]:
        curve = self.calibration.bone_curve if self.calibration else None
        made_by = {"model_sha256": self.model_sha256, "version": self.version, "settings": dict(self.settings)}
        return made_by | {"bone_curve": curve}

    def __call__(self, image: str, output: str, guard: Mapping[str, Any] | None, seconds: float) -> None:
        """Record the synthesis of ``output`` (below the output folder) from the file or folder ``image``."""
        sampled = self.settings.get("num_samples", 1) > 1 and self.calibration
        record = {
            "input": str(Path(image).resolve()),
            "input_sha256": sha256(volume_files(image)),
            "output": Path(output).name,
            "output_sha256": sha256(self.output_dir / output),
            **self._of_all(),
            "sd_scale": self.calibration.scale if sampled else None,
            "guard": guard,
            "time_s": round(seconds, 2),
            "peak_memory_gib": round(peak_memory_gib(self.device), 2),
            "device": str(self.device),
            "software": {"python": platform.python_version(), "torch": torch.__version__, "monai": monai.__version__},
        }
        write_json(record, sibling_path(self.output_dir / output, "", ".json"))

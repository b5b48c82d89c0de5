"""The record beside each synthetic CT: of what it was made, by which weights and settings, and how long it took."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import monai
import torch

from custom_modules.volumes import beside


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, or of the files of a folder one after another by name (a DICOM series)."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON whole or not at all; what is not defined (NaN) becomes null, what is infinite ``"inf"``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def peak_memory_gib(device: torch.device | str) -> float:
    """The most memory that this process has held so far: on the GPU where that is the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Sidecar:
    """Writes ``a_sct.json`` beside ``a_sct.nii.gz``.

    Args:
        output_dir: of the synthetic CTs.
        checkpoint: the weights.
        version: of the bundle.
        device: whose memory counts.
        settings: of the synthesis, such as seed, steps and HU window.
        calibration: of the standard deviation, where samples have one.
    """

    def __init__(
        self,
        output_dir: str | Path,
        checkpoint: str | Path,
        version: str,
        device: torch.device | str,
        settings: Mapping[str, Any],
        calibration: Any = None,
    ) -> None:
        self.output_dir, self.checkpoint, self.version, self.device = Path(output_dir), checkpoint, version, device
        self.settings, self.calibration = settings, calibration

    @cached_property
    def model_sha256(self) -> str | None:
        return sha256(self.checkpoint) if Path(self.checkpoint).is_file() else None

    def is_finished(self, item: Mapping[str, str]) -> bool:
        """Whether the record beside ``item["output"]`` tells of the very file ``item["image"]``, these weights and these
        settings."""
        target = self.output_dir / item["output"]
        record = beside(target, "", ".json")
        if not (target.is_file() and record.is_file()):
            return False
        made = {"input_sha256": sha256(item["image"]), **self._of_all()}
        found = json.loads(record.read_text())
        return all(found.get(name) == value for name, value in _plain(made).items())

    def _of_all(self) -> dict[str, Any]:
        return {"model_sha256": self.model_sha256, "version": self.version, "settings": dict(self.settings)}

    def __call__(self, image: str, output: str, guard: Mapping[str, Any] | None, seconds: float) -> None:
        """Record the synthesis of ``output`` (below the output folder) from the file or folder ``image``."""
        sampled = self.settings.get("num_samples", 1) > 1 and self.calibration
        record = {
            "input": str(Path(image).resolve()),
            "input_sha256": sha256(image),
            "output": Path(output).name,
            **self._of_all(),
            "sd_scale": self.calibration.scale if sampled else None,
            "guard": guard,
            "time_s": round(seconds, 2),
            "peak_memory_gib": round(peak_memory_gib(self.device), 2),
            "device": str(self.device),
            "software": {"python": platform.python_version(), "torch": torch.__version__, "monai": monai.__version__},
        }
        write_json(record, beside(self.output_dir / output, "", ".json"))

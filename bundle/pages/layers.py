"""Volumes within a page: NIfTI of 16 bits, compressed, as text, within a limit of size."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from custom_modules.data.grid import resample_to_spacing

LIMIT_MB = 40.0  # of all volumes in one page
GRID_MM = 2.0  # of volumes that are too large on their own grid
STEPS = {"HU": 1.0, "error": 1.0, "SD": 0.1}  # HU per unit as stored


@dataclass(frozen=True)
class Layer:
    """A volume in a page: its name, kind (``MR``, ``HU``, ``error`` or ``SD``), upper end of its grey or colour scale,
    file name, and the gzipped NIfTI in base64."""

    name: str
    kind: str
    high: float
    file: str
    data: str


def layers(
    volumes: Mapping[str, tuple[np.ndarray, str]], affine: np.ndarray, limit_mb: float = LIMIT_MB
) -> tuple[list[Layer], str]:
    """Return volumes on one grid as the viewer takes them, and a sentence on their grid.

    Args:
        volumes: (array (D, H, W), kind) by name.
        affine: voxels to RAS mm.
        limit_mb: of all of them as text. What is larger is resampled to 2 mm; what is larger still is left out, so that
            the list is empty.
    """
    made = [_layer(name, array, kind, affine) for name, (array, kind) in volumes.items()]
    if _megabytes(made) <= limit_mb:
        return made, "Volumes are on their own grid."
    note = f"On their own grid the volumes take {_megabytes(made):.0f} MB, more than {limit_mb:.0f}"
    if (nib.affines.voxel_sizes(affine) < GRID_MM * 0.95).any():
        coarse = {name: (_coarse(array, affine), kind) for name, (array, kind) in volumes.items()}
        made = [
            _layer(name, np.asarray(volume[0]), kind, volume.affine.numpy()) for name, (volume, kind) in coarse.items()
        ]
        if _megabytes(made) <= limit_mb:
            return made, f"{note}: they are resampled to {GRID_MM:g} mm, and values are those of that grid."
        note += f", on one of {GRID_MM:g} mm {_megabytes(made):.0f} MB"
    return [], f"{note}: only the pictures are shown."


def scale_end(array: np.ndarray, kind: str) -> float:
    """Return the upper end of the scale of an MR, error or SD: 99.5 % of what is there lies below it."""
    values = np.abs(array[np.isfinite(array)]) if kind != "MR" else array[np.isfinite(array)]
    if kind != "MR":
        values = values[values > 0]
    end = float(np.percentile(values, 99.5)) if values.size else 0.0
    return max(end, 1e-3) if kind == "MR" else max(50.0 * np.ceil(end / 50), 50.0)


def _coarse(array: np.ndarray, affine: np.ndarray) -> MetaTensor:
    spacing = np.maximum(nib.affines.voxel_sizes(affine), GRID_MM)
    volume = MetaTensor(torch.from_numpy(array.astype(np.float32))[None], affine=torch.from_numpy(affine))
    return resample_to_spacing(volume, spacing.tolist())


def _layer(name: str, array: np.ndarray, kind: str, affine: np.ndarray) -> Layer:
    array = np.nan_to_num(np.asarray(array, dtype=np.float32))
    whole = kind == "MR" and np.abs(array).max() < 2**15 and (array == np.round(array)).all()
    step = STEPS.get(kind) or (1.0 if whole else float(np.abs(array).max()) / 32000)
    stored = np.clip(np.round(array / step), -(2**15), 2**15 - 1).astype(np.int16)
    image = nib.Nifti1Image(stored, affine)
    image.header.set_slope_inter(step, 0)
    image.header.set_xyzt_units("mm")
    data = base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode()
    return Layer(name, kind, scale_end(array, kind), f"{kind}.nii.gz", data)


def _megabytes(made: list[Layer]) -> float:
    return sum(len(layer.data) for layer in made) / 1e6

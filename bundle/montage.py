"""Pictures of axial, coronal and sagittal planes of volumes side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Voxel = tuple[int, int, int]

WINDOWS = {
    "HU": (-300.0, 900.0), "error": (-400.0, 400.0), "SD": (0.0, 300.0), "mu": (0.0, 0.15), "percent": (-20.0, 20.0),
    "few percent": (-5.0, 5.0), "gamma": (0.0, 2.0),
}  # fmt: skip
UNITS = {"mu": "cm⁻¹", "percent": "%", "few percent": "%", "dose": "Gy", "gamma": ""}  # others are in HU
COLOURS = {
    "error": "RdBu_r", "SD": "magma", "percent": "RdBu_r", "few percent": "RdBu_r", "dose": "inferno",
    "gamma": "viridis",
}  # fmt: skip


def _planes(volume: np.ndarray, centre: Voxel) -> list[np.ndarray]:
    """Return the axial, coronal and sagittal plane of an RAS volume in radiological convention: the patient's right on
    the left, anterior or superior up."""
    i, j, k = centre
    return [volume[::-1, :, k].T[::-1], volume[::-1, j, :].T[::-1], volume[i, ::-1, :].T[::-1]]


def montage(
    columns: Mapping[str, tuple[np.ndarray, str]],
    affine: np.ndarray,
    path: str | Path,
    title: str = "",
    centre: Voxel | None = None,
) -> Path:
    """Write a PNG with one row per plane and one column per volume.

    Args:
        columns: title to (volume (D, H, W), kind), kind one of ``MR``, ``HU``, ``error``, ``SD``, or another
            of :data:`UNITS`.
        affine: of all volumes, voxel to RAS mm.
        centre: voxel that the planes go through; the middle of the first volume's foreground when None.
    """
    canonical = {}
    for name, (volume, kind) in columns.items():
        image = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(volume, dtype=np.float32), affine))
        canonical[name] = (image.get_fdata(dtype=np.float32), kind)
        spacing = image.header.get_zooms()
    shape = next(iter(canonical.values()))[0].shape
    aspects = [spacing[1] / spacing[0], spacing[2] / spacing[0], spacing[2] / spacing[1]]
    heights = [shape[1] * spacing[1], shape[2] * spacing[2], shape[2] * spacing[2]]
    width = max(shape[0] * spacing[0], shape[1] * spacing[1])
    scale = 3.2 / width
    figure, axes = plt.subplots(
        3, len(columns), figsize=(3.4 * len(columns), scale * sum(heights) + 0.8), squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.03, "wspace": 0.03, "top": 0.92},
    )  # fmt: skip
    if centre is None:
        centre = _centre(np.asarray(next(iter(canonical.values()))[0]))
    else:
        centre = _in_canonical(centre, affine, next(iter(columns.values()))[0].shape)
    for column, (name, (volume, kind)) in enumerate(canonical.items()):
        low, high = WINDOWS.get(kind, (0.0, float(np.percentile(volume, 99.5))))
        for row, plane in enumerate(_planes(volume, centre)):
            axis = axes[row, column]
            colours = COLOURS.get(kind, "gray")
            axis.imshow(plane, cmap=colours, vmin=low, vmax=high, aspect=aspects[row], interpolation="nearest")
            axis.set_axis_off()
        unit = "" if kind == "MR" else f"\n{low:g} to {float(f'{high:.3g}'):g} {UNITS.get(kind, 'HU')}"
        axes[0, column].set_title(f"{name}{unit}", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=9, y=0.99)
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return Path(path)


def _in_canonical(voxel: Voxel, affine: np.ndarray, shape: tuple[int, ...]) -> Voxel:
    """Return the index in RAS order of a voxel of the volume as stored."""
    to_ras = nib.orientations.inv_ornt_aff(nib.io_orientation(affine), shape)
    i, j, k = (int(c) for c in nib.affines.apply_affine(np.linalg.inv(to_ras), voxel).round())
    return i, j, k


def _centre(volume: np.ndarray) -> Voxel:
    """Return the voxel in the middle of the foreground."""
    inside = np.argwhere(volume > 0.1 * np.percentile(volume, 99))
    i, j, k = (int(c) for c in (np.median(inside, axis=0) if len(inside) else np.array(volume.shape) // 2))
    return i, j, k

"""Linear attenuation at 511 keV from HU, on the grid of a PET, and as Interfile for STIR."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from custom_modules.errors import InputError
from custom_modules.files import atomic_write, write_text

WATER = 0.096  # cm⁻¹ at 511 keV
FWHM = 5.0  # mm, of a whole-body PET, unless the user knows better
SIGMA = 1 / np.sqrt(8 * np.log(2))  # of a Gaussian of FWHM 1
# Carney et al. 2006 (Med Phys 33:976): slope in cm⁻¹ per HU, cm⁻¹ at -1000 HU, and the HU above which they hold
CARNEY = {
    80: (3.64e-5, 6.26e-2, 50), 100: (4.43e-5, 5.44e-2, 52), 110: (4.92e-5, 4.88e-2, 43), 120: (5.10e-5, 4.71e-2, 47),
    130: (5.51e-5, 4.24e-2, 37), 140: (5.64e-5, 4.08e-2, 30),
}  # fmt: skip
# as GE's scanners do, by STIR: cm⁻¹ per HU and cm⁻¹ at 0 HU, above 50 HU
GE = {80: (3.84e-5, 0.0989), 100: (4.56e-5, 0.0985), 120: (5.11e-5, 0.0982), 140: (5.60e-5, 0.0980)}
BURGER = 0.184 * (0.172 - 0.096) / (1000 * (0.428 - 0.184))  # Burger et al. 2002: cm⁻¹ per HU above 0
STIR = 5.73e-5  # cm⁻¹ per HU above 0, STIR's generic table for 120 kVp
MODELS = {"carney": tuple(CARNEY), "ge": tuple(GE), "burger": (), "stir": (120,)}  # and their tube voltages


def attenuation_of(hu: np.ndarray, kvp: int = 120, model: str = "carney") -> np.ndarray:
    """Return the linear attenuation in cm⁻¹ at 511 keV of HU of any shape, float32; air and below are 0.

    Two lines: that of mixtures of air and water, and one for bone, which depends on the tube voltage.

    Args:
        kvp: tube voltage of the CT; ``burger`` does not depend on it.
        model: ``carney``, ``ge``, ``burger`` or ``stir``.

    Raises:
        InputError: for an unknown model, or a voltage that it has no coefficients for.
    """
    if model not in MODELS:
        raise InputError(f"--model {model}: there are {', '.join(MODELS)}")
    if MODELS[model] and kvp not in MODELS[model]:
        raise InputError(f"--kvp {kvp}: {model} has coefficients for {', '.join(map(str, MODELS[model]))} kVp")
    hu = np.asarray(hu, dtype=np.float64)
    if model == "carney":
        slope, offset, threshold = CARNEY[kvp]
        bone = offset + slope * (hu + 1000)
    elif model == "ge":
        (slope, offset), threshold = GE[kvp], 50
        bone = offset + slope * hu
    else:
        threshold, bone = 0, WATER + (BURGER if model == "burger" else STIR) * hu
    return np.maximum(np.where(hu <= threshold, WATER * (1 + hu / 1000), bone), 0).astype(np.float32)


@dataclass(frozen=True)
class Grid:
    """Shape (D, H, W) and affine (4, 4), voxel to RAS mm."""

    shape: tuple[int, ...]
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def smooth(volume: np.ndarray, spacing: np.ndarray, fwhm: float) -> np.ndarray:
    """Smooth (D, H, W) by a Gaussian of ``fwhm`` mm; at the faces the volume goes on as it ends."""
    return ndimage.gaussian_filter(volume, fwhm * SIGMA / np.asarray(spacing), mode="nearest")


def on_grid(volume: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    """Interpolate (D, H, W) linearly on another grid; 0 beyond its faces.

    Raises:
        InputError: when no voxel of ``target`` lies in the volume.
    """
    to_source = np.linalg.inv(grid.affine) @ target.affine
    if not covered(grid, target).any():
        raise InputError("the two volumes do not overlap; are both in the same frame of reference?")
    return ndimage.affine_transform(
        np.asarray(volume, dtype=np.float32), to_source[:3, :3], to_source[:3, 3], target.shape, order=1,
        mode="grid-constant",
    )  # fmt: skip


def covered(grid: Grid, target: Grid) -> np.ndarray:
    """Return which voxels of ``target`` have their centre within the voxels of ``grid``."""
    to_source = np.linalg.inv(grid.affine) @ target.affine
    inside = np.ones(target.shape, dtype=bool)
    indices = np.ix_(*(np.arange(size) for size in target.shape))
    for axis, size in enumerate(grid.shape):
        place = sum(to_source[axis, n] * indices[n] for n in range(3)) + to_source[axis, 3]
        inside &= (place >= -0.5) & (place <= size - 0.5)
    return inside


def upright_grid(grid: Grid, spacing: tuple[float, float, float]) -> Grid:
    """Return the grid of ``spacing`` mm along left-right, front-back and up that just holds ``grid``, RAS order."""
    corners = nib.affines.apply_affine(
        grid.affine, np.array(np.meshgrid(*([-0.5, size - 0.5] for size in grid.shape))).reshape(3, -1).T
    )
    low, high = corners.min(axis=0), corners.max(axis=0)
    shape = np.ceil((high - low) / spacing - 1e-6).astype(int)
    first = (low + high) / 2 - (shape - 1) / 2 * np.asarray(spacing)
    return Grid(tuple(int(size) for size in shape), nib.affines.from_matvec(np.diag(spacing), first))


def write_interfile(mu: np.ndarray, affine: np.ndarray, path: str | Path) -> Path:
    """Write a map in cm⁻¹ as Interfile, a header ``.hv`` and float32 voxels ``.v``, as STIR reads it.

    x goes left, y to the back, z up; offsets are of the first voxel in these directions, mm.

    Raises:
        InputError: for axes that are not along left-right, front-back and up: Interfile has no directions.
    """
    image = nib.Nifti1Image(mu, affine)
    to_lps = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("LPS"))
    image = image.as_reoriented(to_lps)
    axes = (np.diag([-1.0, -1, 1, 1]) @ image.affine)[:3]
    spacing, offset = np.diag(axes[:, :3]), axes[:, 3]
    if np.abs(axes[:, :3] - np.diag(spacing)).max() > 1e-3 * spacing.min():
        raise InputError(f"{path}: the volume is oblique, which Interfile cannot say; give an upright one by --like")
    header, voxels = Path(path).with_suffix(".hv"), Path(path).with_suffix(".v")
    with atomic_write(voxels) as temporary:
        np.asarray(image.dataobj, dtype="<f4").ravel(order="F").tofile(temporary)
    write_text(_interfile_header(voxels.name, image.shape, spacing, offset), header)
    return header


def _interfile_header(name: str, shape: tuple[int, ...], spacing: np.ndarray, offset: np.ndarray) -> str:
    lines = [
        "!INTERFILE :=", "!imaging modality := PT", f"name of data file := {name}", "!version of keys := STIR4.0",
        "!GENERAL DATA :=", "!GENERAL IMAGE DATA :=", "!type of data := PET", "imagedata byte order := LITTLEENDIAN",
        "!PET STUDY (General) :=", "!PET data type := Image", "process status := Reconstructed",
        "!number format := float", "!number of bytes per pixel := 4", "number of dimensions := 3",
    ]  # fmt: skip
    for n, axis in enumerate("xyz", start=1):
        lines += [
            f"matrix axis label [{n}] := {axis}",
            f"!matrix size [{n}] := {shape[n - 1]}",
            f"scaling factor (mm/pixel) [{n}] := {spacing[n - 1]:.6f}",
            f"first pixel offset (mm) [{n}] := {offset[n - 1]:.6f}",
        ]
    lines += ["number of time frames := 1", "image scaling factor [1] := 1", "data offset in bytes [1] := 0"]
    return "\n".join(
        [*lines, "; attenuation at 511 keV in cm-1; research, not for clinical use", "!END OF INTERFILE :=", ""]
    )

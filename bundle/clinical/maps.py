"""``python -m bundle attenuation`` and ``density``: maps of a synthetic CT, or of any CT, for PET and for planning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from custom_modules.clinical.attenuation import FWHM, Grid, attenuation_of, covered, on_grid, smooth, write_interfile
from custom_modules.clinical.density import QUANTITIES, read_hlut
from custom_modules.clinical.study import MARK
from custom_modules.data.hu import check_hu
from custom_modules.data.volumes import read_volume, sibling_path, write_volume
from custom_modules.errors import InputError

TEMPLATE_LIMIT = 0.5  # cm⁻¹; nothing in a couch attenuates more, HU do


def attenuation(
    sct: str, kvp: int = 120, model: str = "carney", like: str | None = None, fwhm: float = FWHM,
    template: str | None = None, interfile: bool = False, output: str | None = None,
) -> None:  # fmt: skip
    """Write the linear attenuation at 511 keV in cm⁻¹ for the attenuation correction of a PET.

    Args:
        sct: a synthetic CT, or any CT in HU: a file or a DICOM series.
        kvp: tube voltage of the CT, for a synthetic one of the training CTs: 80, 100, 110, 120, 130 or 140.
        model: carney (Carney 2006), ge, burger (Burger 2002, any voltage) or stir.
        like: a PET, or another volume, on whose grid the map is written; smoothed first.
        fwhm: mm, resolution of that PET.
        template: a couch or coil on any grid, in cm⁻¹, that is added.
        interfile: write Interfile for STIR too, .hv and .v.
        output: file to write; SCT_mu.nii.gz beside the CT when None.
    """
    if not (np.isfinite(fwhm) and fwhm >= 0):
        raise InputError(f"--fwhm {fwhm}: must be a length in mm")
    hu, grid = read_ct(sct)
    mu = attenuation_of(hu, kvp, model)
    if like is not None:
        target = _grid(read_volume(like))
        mu = moved(smooth(mu, grid.spacing, fwhm), grid, target, f"{like} and {sct}")
        print(f"covered        {100 * covered(grid, target).mean():.0f} % of {like}; the rest is air")
        grid = target
    if template is not None:
        mu = mu + _template(template, grid)
    target_path = Path(output) if output else sibling_path(sct, "_mu", ".nii.gz")
    save_map(mu, grid, target_path, f"mu at 511 keV, cm-1, {model} {kvp} kVp; {MARK}")
    print(f"attenuation    {target_path} ({mu.min():.3f} to {mu.max():.3f} cm-1)")
    if interfile:
        print(f"Interfile      {write_interfile(mu, grid.affine, sibling_path(target_path, '', '.hv'))}")


def density(sct: str, quantity: str = "both", hlut: str | None = None, output_dir: str | None = None) -> None:
    """Write relative electron density and mass density (g/cm³) for treatment planning.

    Args:
        sct: a synthetic CT, or any CT in HU: a file or a DICOM series.
        quantity: electron, mass or both.
        hlut: table of HU and density, a CSV of two columns or matRad's .hlut, in place of the default one; then name
            the quantity.
        output_dir: folder to write to; that of the CT when None.
    """
    if quantity not in (*QUANTITIES, "both") or (hlut is not None and quantity == "both"):
        raise InputError(
            f"--quantity {quantity}: give electron or mass{', or both' if hlut is None else ' with --hlut'}"
        )
    hu, grid = read_ct(sct)
    for name in QUANTITIES if quantity == "both" else (quantity,):
        table = read_hlut(hlut) if hlut is not None else QUANTITIES[name]
        values = table(hu)
        path = sibling_path(sct, "_red" if name == "electron" else "_density", ".nii.gz")
        path = Path(output_dir) / path.name if output_dir else path
        unit = "relative electron density" if name == "electron" else "mass density, g/cm3"
        save_map(values, grid, path, f"{unit}; {MARK}")
        print(f"{name + ' density':<17}{path} ({values.min():.3f} to {values.max():.3f}, {table.name})")


def read_ct(path: str | Path) -> tuple[np.ndarray, Grid]:
    """Return HU (D, H, W) and grid of a CT.

    Raises:
        InputError: for a volume that cannot be read or is not in HU.
    """
    volume = read_volume(path)
    hu = np.asarray(volume[0])
    check_hu(hu, str(path))
    return hu, _grid(volume)


def _grid(volume: MetaTensor) -> Grid:
    return Grid(tuple(volume.shape[1:]), np.asarray(volume.affine, dtype=np.float64))


def moved(values: np.ndarray, grid: Grid, target: Grid, names: str) -> np.ndarray:
    """:func:`on_grid`, with the names of the files in its error."""
    try:
        return on_grid(values, grid, target)
    except InputError as error:
        raise InputError(f"{names}: {error}") from None


def _template(path: str, grid: Grid) -> np.ndarray:
    """Return a couch or coil in cm⁻¹ on ``grid``."""
    volume = read_volume(path)
    values = np.asarray(volume[0])
    if values.min() < 0 or values.max() > TEMPLATE_LIMIT:
        raise InputError(f"{path}: goes from {values.min():g} to {values.max():g}; a template is in cm-1, 0 to 0.5")
    return moved(values, _grid(volume), grid, f"{path} and the map")


def save_map(values: np.ndarray, grid: Grid, path: Path, description: str) -> None:
    """Write (D, H, W) as float32 NIfTI."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[None]
    write_volume(MetaTensor(tensor, affine=torch.from_numpy(grid.affine)), path, description)

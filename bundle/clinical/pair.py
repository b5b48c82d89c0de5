"""A CT and a synthetic CT of the same patient on one upright grid, for comparing what they lead to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bundle.clinical.maps import moved, read_ct
from custom_modules.clinical.attenuation import Grid, upright_grid
from custom_modules.data.body import ct_tissue_mask
from custom_modules.data.hu import AIR_HU
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError


@dataclass(frozen=True)
class Pair:
    """CT and synthetic CT on the CT's grid.

    Attributes:
        ct, sct: (D, H, W), HU; air outside the bodies, so that a couch counts in neither.
        body: of the CT.
        grid: of all three.
    """

    ct: np.ndarray
    sct: np.ndarray
    body: np.ndarray
    grid: Grid

    def upright(self, spacing: float) -> Grid:
        """Return the grid of ``spacing`` mm along the patient's axes that holds both."""
        return upright_grid(self.grid, (spacing, spacing, spacing))


def read_pair(ct: str, sct: str, mr: str | None = None, outline: bool = False) -> Pair:
    """Read CT and synthetic CT. Where the MR is 0, the synthetic CT had nothing to go by: there both are air.

    Args:
        outline: keep the synthetic CT beyond the body of the CT. Otherwise it is air there, as in the image scores,
            for a CT that ends within the body cannot be told from its skin.

    Raises:
        InputError: for volumes that are not in HU, do not overlap, or hold no body.
    """
    (hu, grid), (other, other_grid) = read_ct(ct), read_ct(sct)
    other = moved(other - AIR_HU, other_grid, grid, f"{sct} and {ct}") + AIR_HU
    field = np.ones(grid.shape, dtype=bool)
    if mr is not None:
        image = read_volume(mr)
        to_field = Grid(tuple(image.shape[1:]), np.asarray(image.affine, dtype=np.float64))
        field = moved((np.asarray(image[0]) > 0).astype(np.float32), to_field, grid, f"{mr} and {ct}") > 0.5
    bodies = [ct_tissue_mask(values) & field for values in (hu, other)]
    for body, path in zip(bodies, (ct, sct)):
        if not body.any():
            raise InputError(f"{path}: holds no body, only air")
    if not outline:
        bodies[1] = bodies[0]
    hu, other = (np.where(body, values, AIR_HU) for body, values in zip(bodies, (hu, other)))
    return Pair(hu.astype(np.float32), other.astype(np.float32), bodies[0], grid)

"""The couch under the body, which a CT shows and no MR does."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from scipy import ndimage

from custom_modules.data.body import fill_cavities, keep_parts, without_table
from custom_modules.data.hu import AIR_HU, TISSUE_HU
from custom_modules.errors import InputError

COARSE = 2.0  # mm, the grid on which the body is told from the couch
PLATE = 4.0  # mm, half of what a couch's plates and a mattress' cover are thinner than, and no limb is
SKIN = 3.0  # mm kept around the body: its skin is half air, and the ball rounds its corners


def ct_body(ct: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The body in a CT without the couch: (D, H, W) HU in RAS order to a bool mask.

    Above -300 HU, opened by a ball so that thin plates vanish, what is left grown back within the tissue, all parts of
    at least a fiftieth of the largest but solid parts of a couch, cavities filled: lungs and bowel gas belong to the
    body.
    """
    tissue = ct > TISSUE_HU
    core = within(~within(~tissue, PLATE, spacing), PLATE, spacing) & tissue
    return fill_cavities(without_table(keep_parts(core), ct), upright=True)


def within(mask: np.ndarray, radius: float, spacing: np.ndarray) -> np.ndarray:
    """Voxels at most ``radius`` mm from ``mask``; what may be beyond the volume adds nothing."""
    return ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius if mask.any() else mask


class RemoveCouchd(MapTransform):
    """Set ``keys`` (CT in HU, RAS order) to air outside :func:`ct_body`, widened by 3 mm.

    Raises:
        InputError: when there is no body in the CT.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            ct = data[key]
            steps = [max(1, round(COARSE / float(s))) for s in ct.pixdim]
            coarse = np.asarray(ct[0])[tuple(slice(step // 2, None, step) for step in steps)]
            spacing = np.asarray(ct.pixdim) * steps
            body = within(ct_body(coarse, spacing), SKIN, spacing)
            if not body.any():
                raise InputError(f"no body found in the CT, nothing is above {TISSUE_HU:g} HU")
            for axis, (step, size) in enumerate(zip(steps, ct.shape[1:])):
                body = body.repeat(step, axis).take(range(size), axis, mode="clip")
            data[key] = torch.where(torch.from_numpy(body)[None], ct, float(AIR_HU))
        return data

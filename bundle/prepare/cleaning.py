"""What scanners add to the body: the couch under it in the CT, the coils' bias field over it in the MR."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import itk
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from monai.transforms import MapTransform, ResampleToMatch, Spacing
from scipy import ndimage

from custom_modules.data.body import body_mask, fill_holes_by_slice
from custom_modules.data.hu import AIR_HU, TISSUE_HU
from custom_modules.errors import InputError

COARSE = 2.0  # mm, the grid on which the body is told from the couch
PLATE = 4.0  # mm, half of what a couch's plates and a mattress' cover are thinner than, and no limb is
SKIN = 3.0  # mm kept around the body: its skin is half air, and the ball rounds its corners
PART = 0.02  # of the largest part's volume: a second leg and an arm belong to the body, crumbs of the couch do not
N4_GRID, N4_VOXELS = 4.0, 100_000  # mm, coarser where a volume has more voxels than that
N4_KNOTS, N4_LEVELS = 400.0, 3  # mm, halved at each further level


def ct_body(ct: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The body in a CT without the couch: (D, H, W) HU in RAS order to a bool mask.

    Above -300 HU, opened by a ball so that thin plates vanish, what is left grown back within the tissue, all parts of
    at least a fiftieth of the largest, holes filled slice by slice: lungs and bowel gas belong to the body.
    """
    tissue = ct > TISSUE_HU
    core = _within(~_within(~tissue, PLATE, spacing), PLATE, spacing) & tissue
    labels, _ = ndimage.label(core)
    sizes = np.bincount(labels.ravel())[1:]
    if not sizes.size:
        return core
    parts = np.flatnonzero(sizes >= PART * sizes.max()) + 1
    return fill_holes_by_slice(np.isin(labels, parts))


def _within(mask: np.ndarray, radius: float, spacing: np.ndarray) -> np.ndarray:
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
            body = _within(ct_body(coarse, spacing), SKIN, spacing)
            if not body.any():
                raise InputError(f"no body found in the CT, nothing is above {TISSUE_HU:g} HU")
            for axis, (step, size) in enumerate(zip(steps, ct.shape[1:])):
                body = body.repeat(step, axis).take(range(size), axis, mode="clip")
            data[key] = torch.where(torch.from_numpy(body)[None], ct, float(AIR_HU))
        return data


class CorrectBiasFieldd(MapTransform):
    """Divide ``keys`` (MR) by their bias field, found by N4 (Tustison et al. 2010) in the body at 4 mm or coarser.

    The field is a B-spline in the logarithm with knots 400, 200 and then 100 mm apart: coils vary that slowly, fat and
    muscle of a limb do not. The median signal in the body stays what it was.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = data[key] / bias_field(data[key])
        return data


def bias_field(mr: MetaTensor) -> torch.Tensor:
    """The factor by which coils brighten each voxel of an MR, both (1, D, H, W); 1 at the median of the body."""
    extent = np.array(mr.shape[1:]) * np.asarray(mr.pixdim)
    grid = max(N4_GRID, float(np.cbrt(extent.prod() / N4_VOXELS)))
    spacing = [max(grid, float(s)) for s in mr.pixdim]
    coarse = Spacing(pixdim=spacing, mode="bilinear", padding_mode="border")(mr)
    mask = body_mask(np.asarray(coarse[0])) & (np.asarray(coarse[0]) > 0)
    if not mask.any():
        raise InputError("no body found in the MR, only air or noise")
    image = metatensor_to_itk_image(coarse, channel_dim=0)
    itk_mask = metatensor_to_itk_image(MetaTensor(torch.from_numpy(mask)[None], meta=coarse.meta), dtype=np.uint8)
    n4 = itk.N4BiasFieldCorrectionImageFilter.New(image, MaskImage=itk_mask)
    n4.SetNumberOfControlPoints([int(np.ceil(length / N4_KNOTS)) + 3 for length in extent])  # cubic: three more
    n4.SetNumberOfFittingLevels([N4_LEVELS] * 3)
    n4.SetMaximumNumberOfIterations([20] * N4_LEVELS)
    n4.SetConvergenceThreshold(1e-3)
    n4.Update()
    found = n4.ReconstructBiasField(n4.GetLogBiasFieldControlPointLattice())
    log_field = itk.array_from_image(found).transpose(2, 1, 0)
    log_field = log_field - np.median(log_field[mask])
    field = MetaTensor(torch.from_numpy(np.ascontiguousarray(log_field, dtype=np.float32))[None], meta=coarse.meta)
    return ResampleToMatch(mode="bilinear", padding_mode="border")(field, mr).as_tensor().exp()

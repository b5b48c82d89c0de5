"""What scanners and exports do to the values of an MR: an offset under all of them, the coils' bias field over them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import optional_import

from custom_modules.data.body import body_mask
from custom_modules.data.grid import resample, resample_to_spacing
from custom_modules.errors import InputError

sitk, _ = optional_import("SimpleITK")  # missing where a GPU is lent: packed data are corrected
logger = logging.getLogger(__name__)

OFFSET = 0.1  # of the 99th percentile: air of an MR, noise included, is darker
PILE = 0.1, 0.05  # of the voxels are air at least, and lie within this share of the range above the offset
N4_GRID, N4_VOXELS = 4.0, 12_000  # mm, coarser where a volume has more voxels than that
N4_KNOTS, N4_LEVELS = 400.0, 3  # mm, halved at each further level
N4_ITERATIONS, N4_CONVERGENCE = 20, 1e-3  # of each level at most, and where it ends


def background_offset(mr: np.ndarray) -> float:
    """What has been added to every voxel of an MR (D, H, W), 0 where nothing has.

    The magnitude of an MR is near zero in air and cortical bone. Where no voxel is (those that are exactly zero are
    padding and do not count), or many are far below zero, and a pile of voxels lies at the lower end as air does, that
    end is an offset. A field of view within tissue has no such pile.
    """
    values = mr[mr != 0]
    if not values.size:
        return 0.0
    low, high = np.percentile(values, (0.1, 99))
    share, width = PILE
    is_pile = (values < low + width * (high - low)).mean() > share
    return float(low) if is_pile and abs(low) > OFFSET * max(high, high - low) else 0.0


class SubtractBackgroundd(MapTransform):
    """Subtract :func:`background_offset` from ``keys`` (MR), and say so in the log; padding stays zero."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            mr = data[key]
            offset = background_offset(np.asarray(mr[0]))
            if offset:
                name = mr.meta.get("filename_or_obj", "MR")
                logger.warning(
                    "%s: air is at %.4g, not near 0 as in an MR; %.4g is subtracted everywhere", name, offset, offset
                )
                data[key] = torch.where(mr == 0, mr, (mr - offset).clamp(min=0))
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
    coarse = resample_to_spacing(mr, [max(grid, float(s)) for s in mr.pixdim])
    values = np.asarray(coarse[0])
    mask = body_mask(values) & (values > 0)
    if not mask.any():
        raise InputError("no body found in the MR, only air or noise")
    log_field = n4_log_field(coarse, mask, extent)
    log_field -= np.median(log_field[mask])
    field = MetaTensor(torch.from_numpy(log_field)[None], affine=coarse.affine)
    return resample(field, mr.affine, mr.shape[1:]).as_tensor().exp_()


def n4_log_field(mr: MetaTensor, mask: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Logarithm of the bias field of an MR (1, D, H, W) within ``mask`` by N4, as (D, H, W) float32; ``extent`` in mm.

    By SimpleITK: it is the same filter as ITK's, which takes seconds to load in Python.
    """
    image, inside = (_sitk_image(values, mr) for values in (np.asarray(mr[0], dtype=np.float32), mask.astype(np.uint8)))
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfControlPoints([int(np.ceil(length / N4_KNOTS)) + 3 for length in extent])  # cubic: three more
    n4.SetMaximumNumberOfIterations([N4_ITERATIONS] * N4_LEVELS)
    n4.SetConvergenceThreshold(N4_CONVERGENCE)
    n4.SetNumberOfWorkUnits(1)  # the same field on every machine, and no slower on so few voxels
    n4.Execute(image, inside)
    field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image))
    return np.ascontiguousarray(field.transpose(2, 1, 0), dtype=np.float32)


def _sitk_image(values: np.ndarray, grid: MetaTensor) -> Any:
    """(D, H, W) as an image with the spacing of ``grid``."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    image.SetSpacing([float(step) for step in grid.pixdim])
    return image


class StandardizeMRd(MapTransform):
    """Bring the scale of an MR to that of the training set, whose fat is near 1000.

    MR units are arbitrary. A volume whose 99th percentile already lies in ``accepted`` is left alone, for a
    percentile of a small field of view moves with what is in it; any other one is multiplied so that this percentile
    becomes ``reference``, and the log says so.

    Args:
        reference: the middle of the training set's 99th percentiles.
        accepted: the range of that percentile that counts as standardised already.
    """

    def __init__(
        self, keys: KeysCollection, reference: float = 1050.0, accepted: tuple[float, float] = (900.0, 1250.0)
    ) -> None:
        super().__init__(keys)
        self.reference, self.accepted = reference, accepted

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        data = dict(data)
        for key in self.key_iterator(data):
            image = data[key]
            found = float(np.percentile(np.asarray(image), 99))
            if found <= 0:
                raise InputError(f"the 99th percentile of the MR is {found:g}: no signal to scale")
            if not self.accepted[0] <= found <= self.accepted[1]:
                logger.info("MR rescaled: its 99th percentile was %.4g, now %.4g", found, self.reference)
                data[key] = image * (self.reference / found)
        return data

"""The body in an MR and in a CT."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    KeepLargestConnectedComponent,
    MapTransform,
)
from scipy import ndimage

from custom_modules.errors import InputError

logger = logging.getLogger(__name__)


def fill_holes_by_slice(mask: np.ndarray) -> np.ndarray:
    """Fill the holes of each slice along the last axis of a (D, H, W) mask."""
    return np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(mask, -1, 0)], axis=-1)


def largest_opened(mask: np.ndarray) -> np.ndarray:
    """Open a (D, H, W) mask by one voxel and keep its largest component. Edges count as going on outside, so that a
    body that is cut by the field of view, or only two slices thick, stays."""
    opened = ndimage.binary_opening(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1, 1:-1]
    return np.asarray(KeepLargestConnectedComponent()(torch.from_numpy(opened[None])))[0].astype(bool)


def body_mask(mr: np.ndarray, threshold: float = 0.1, smoothing: float = 1.0) -> np.ndarray:
    """The body in an MR: (D, H, W) in any unit to a bool mask.

    Voxels above ``threshold`` times the 99th percentile of the smoothed volume (sigma ``smoothing`` voxels), opened,
    the largest component, holes filled slice by slice: lungs, cortical bone and airways are dark but inside.
    """
    smooth = ndimage.gaussian_filter(np.asarray(mr, dtype=np.float32), smoothing)
    return fill_holes_by_slice(largest_opened(smooth > threshold * np.percentile(smooth, 99)))


def ball(radius: float, spacing: np.ndarray) -> np.ndarray:
    """Return the voxels within ``radius`` mm of the middle one as a structuring element. Dilation by it equals a
    threshold on a distance transform, without that transform's double precision and indices of every voxel."""
    reach = np.floor(radius / spacing + 1e-6).astype(int)
    offsets = np.indices(2 * reach + 1) - reach.reshape(3, 1, 1, 1)
    return ((offsets * np.reshape(spacing, (3, 1, 1, 1))) ** 2).sum(0) <= radius**2 + 1e-6


class BodyMaskd(MapTransform):
    """Add ``body``: the :func:`body_mask` of the MR in ``keys``, widened by ``margin`` mm, as 0 and 1.

    Raises:
        InputError: when no body is found.
    """

    def __init__(self, keys: KeysCollection, margin: float = 6.0) -> None:
        super().__init__(keys)
        self.margin = margin

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        data = dict(data)
        for key in self.key_iterator(data):
            image = data[key]
            mask = body_mask(np.asarray(image[0]))
            if not mask.any():
                raise InputError("no body found in the volume, only air or noise")
            wide = ndimage.binary_dilation(mask, ball(self.margin, np.asarray(image.pixdim)))
            data["body"] = MetaTensor(torch.from_numpy(wide)[None].float(), affine=image.affine)
        return data


def shoulder_slice(body: np.ndarray) -> int | None:
    """The highest axial slice of the shoulders in a (D, H, W) body mask in RAS order, or None where there are none.

    Looked for in the width (left to right) of each slice: going down, the first that is at least 70 % of the widest
    after one, the neck, that is at most half of it.
    """
    columns = np.asarray(body.any(axis=1))
    width = np.array([np.ptp(np.flatnonzero(c)) + 1 if c.any() else 0 for c in columns.T])
    neck = False
    for k in reversed(range(len(width))):
        neck = neck or 0 < width[k] <= 0.5 * width.max()
        if neck and width[k] >= 0.7 * width.max():
            return k
    return None


class CropAboveShouldersd(MapTransform):
    """Cut ``keys`` above the shoulders (section IV.A); where none are found, leave them whole and say so."""

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        data = dict(data)
        top = shoulder_slice(np.asarray(data["body"][0]) > 0.5)
        if top is None:
            logger.warning("no shoulders found, nothing is cropped above them")
            return data
        data["body"] = data["body"].clone()
        data["body"][..., top + 1 :] = 0
        for key in self.key_iterator(data):
            data[key] = data[key][..., : top + 2]  # one slice without body, so that what was cut comes back as air
        return data


def ct_body_mask(ct: np.ndarray, mr: np.ndarray) -> np.ndarray:
    """The voxels that count: the CT above -300 HU, opened, the largest component, holes filled by slice, where the
    MR has signal. (D, H, W) HU and MR to bool."""
    return fill_holes_by_slice(largest_opened(ct > -300)) & (mr > 0)


class ScoreMaskd(MapTransform):
    """Add ``mask``: :func:`ct_body_mask` of ``label`` (HU) and ``image`` as 0 and 1."""

    def __init__(self) -> None:
        super().__init__(["image", "label"])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        mask = ct_body_mask(np.asarray(data["label"][0]), np.asarray(data["image"][0]))
        return {**data, "mask": MetaTensor(torch.from_numpy(mask)[None].float(), affine=data["label"].affine)}

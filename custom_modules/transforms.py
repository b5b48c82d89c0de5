"""Transforms that training and inference share, on MONAI's dictionaries: ``image`` is the MR, ``label`` the CT."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    KeepLargestConnectedComponent,
    MapTransform,
    Orientationd,
    RandAffined,
    RandBiasFieldd,
    RandFlipd,
    RandScaleIntensityd,
    RandSpatialCropd,
    SelectItemsd,
    Spacingd,
    SpatialPadd,
    Transform,
)
from scipy import ndimage

from custom_modules.errors import InputError
from custom_modules.volumes import ReadVolumed

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
    """The voxels within ``radius`` mm of the middle one, as a structuring element: dilating by it is what
    thresholding a distance transform would give, without the transform's double precision and indices of every voxel."""
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
    columns = body.any(axis=1)
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


class SameGridd(MapTransform):
    """Raise InputError unless all ``keys`` share one grid."""

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        first, *others = (data[key] for key in self.key_iterator(dict(data)))
        for other in others:
            if other.shape != first.shape or not torch.allclose(other.affine, first.affine, atol=1e-2):
                raise InputError(
                    f"{other.meta['filename_or_obj']}: its grid is not that of {first.meta['filename_or_obj']}; "
                    "register and resample the CT to the MR first"
                )
        return dict(data)


class Preprocess(Transform):
    """From files to what the networks see, but for the last intensity scaling (section IV.A).

    Read and check, orient to RAS, resample to ``spacing``, find the body, crop to its rectangular envelope, bring the
    MR to the training set's scale. The CT goes along where there is one.

    Args:
        spacing: in mm.
        label: whether the data have a CT in ``label``, on the grid of the MR.
        crop_above_shoulders: cut away head and neck.
    """

    def __init__(self, spacing: Sequence[float], label: bool = False, crop_above_shoulders: bool = False) -> None:
        keys = ["image", "label"] if label else ["image"]
        self.transform = Compose(
            [
                ReadVolumed(keys),
                SameGridd(keys),
                Orientationd(keys, axcodes="RAS", labels=None),
                Spacingd(keys, pixdim=spacing, mode="bilinear", padding_mode="border"),
                BodyMaskd("image"),
                *([CropAboveShouldersd([*keys, "body"])] if crop_above_shoulders else []),
                CropForegroundd([*keys, "body"], source_key="body", margin=1, allow_smaller=True),
                StandardizeMRd("image"),
            ]
        )

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, torch.Tensor]:
        return self.transform(data)


class Augment(Compose):
    """Flips, affine, MR bias field and brightness (section IV.A), the same for MR and CT where they concern both.

    Args:
        roi_size: take a random crop of this size first, replicating the edge of smaller volumes; whole volumes when
            None.
    """

    def __init__(self, roi_size: Sequence[int] | None = None) -> None:
        keys = ["image", "label"]
        crop = [
            SpatialPadd(keys, spatial_size=roi_size, mode="edge"),
            RandSpatialCropd(keys, roi_size=roi_size, random_size=False),
        ]
        super().__init__(
            [
                SelectItemsd([*keys, "patient"], allow_missing_keys=True),
                *(crop if roi_size else []),
                *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
                RandAffined(
                    keys,
                    prob=0.5,
                    rotate_range=(0.15, 0.15, 0.3),
                    scale_range=(0.1, 0.1, 0.1),
                    mode="bilinear",
                    padding_mode="border",
                ),
                RandBiasFieldd("image", prob=0.3, coeff_range=(-0.1, 0.1)),
                RandScaleIntensityd("image", prob=0.7, factors=0.15),
            ]
        )

"""Transforms that training and inference share, on MONAI's dictionaries: ``image`` is the MR, ``label`` the CT."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    CropForegroundd,
    MapTransform,
    Orientationd,
    RandAffined,
    RandBiasFieldd,
    RandFlipd,
    RandScaleIntensityd,
    RandSpatialCropd,
    SelectItemsd,
    SpatialPadd,
    Transform,
)

from custom_modules.data.body import BodyMaskd, CropAboveShouldersd
from custom_modules.data.grid import SameGridd, ToSpacingd
from custom_modules.data.mr import CorrectBiasFieldd, SubtractBackgroundd
from custom_modules.data.volumes import ReadVolumed
from custom_modules.errors import InputError

logger = logging.getLogger(__name__)


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


class Preprocess(Transform):
    """From files to what the networks see, but for the last intensity scaling (section IV.A).

    Read and check, orient to RAS, subtract a constant background, resample to ``spacing``, correct the coils' shading,
    find the body, crop to its rectangular envelope, bring the MR to the training set's scale. The CT goes along where
    there is one.

    Args:
        spacing: in mm.
        label: whether the data have a CT in ``label``, on the grid of the MR.
        crop_above_shoulders: cut away head and neck.
        mr_reference: see :class:`StandardizeMRd`.
        correct_bias: divide the MR by its bias field, see :class:`~custom_modules.data.mr.CorrectBiasFieldd`.
        allow_ct: let the MR be a CT, see :class:`~custom_modules.data.volumes.ReadVolumed`.
    """

    def __init__(
        self,
        spacing: Sequence[float],
        label: bool = False,
        crop_above_shoulders: bool = False,
        mr_reference: float = 1050.0,
        correct_bias: bool = True,
        allow_ct: bool = True,
    ) -> None:
        keys = ["image", "label"] if label else ["image"]
        self.transform = Compose(
            [
                ReadVolumed(keys, allow_ct=allow_ct),
                SameGridd(keys),
                Orientationd(keys, axcodes="RAS", labels=None),
                SubtractBackgroundd("image"),
                ToSpacingd(keys, spacing),
                *([CorrectBiasFieldd("image")] if correct_bias else []),
                BodyMaskd("image"),
                *([CropAboveShouldersd([*keys, "body"])] if crop_above_shoulders else []),
                CropForegroundd([*keys, "body"], source_key="body", margin=1, allow_smaller=True),
                StandardizeMRd("image", mr_reference),
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

"""Transforms that training and inference share, on MONAI's dictionaries: ``image`` is the MR, ``label`` the CT."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    Compose,
    CropForegroundd,
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
from custom_modules.data.mr import CorrectBiasFieldd, StandardizeMRd, SubtractBackgroundd
from custom_modules.data.regions import CTBodyd, CTRegionsd
from custom_modules.data.volumes import ReadVolumed


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
        regions: add the CT's tissue ``regions``, from which an MR can be simulated. Items without ``image`` have them
            always; their body is that of the CT.
    """

    def __init__(
        self,
        spacing: Sequence[float],
        label: bool = False,
        crop_above_shoulders: bool = False,
        mr_reference: float = 1050.0,
        correct_bias: bool = True,
        allow_ct: bool = True,
        regions: bool = False,
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
                *([CTRegionsd("label")] if regions else []),
            ]
        )
        self.ct_only = Compose(
            [
                ReadVolumed("label"),
                Orientationd("label", axcodes="RAS", labels=None),
                ToSpacingd("label", spacing),
                CTBodyd("label"),
                CropForegroundd(["label", "body"], source_key="body", margin=1, allow_smaller=True),
                CTRegionsd("label"),
            ]
        )

    def __call__(self, data: Mapping[Any, str]) -> dict[Hashable, torch.Tensor]:
        return self.transform(data) if "image" in data else self.ct_only(data)


class Augment(Compose):
    """Flips, affine, MR bias field and brightness (section IV.A), the same for MR and CT where they concern both.

    Args:
        roi_size: take a random crop of this size first, replicating the edge of smaller volumes; whole volumes when
            None.
        simulate: simulates the MR of a CT that has none, and now and then of one that has
            (:class:`~custom_modules.data.simulation.RandSimulateMRd`).
        largest: sides of the random crop that is taken of volumes larger than that.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | None = None,
        simulate: Transform | None = None,
        largest: Sequence[int] | None = None,
    ) -> None:
        keys = ["image", "label"]
        every = [*keys, "regions"]
        crop = [
            SpatialPadd(every, spatial_size=roi_size, mode="edge", allow_missing_keys=True),
            RandSpatialCropd(every, roi_size=roi_size, random_size=False, allow_missing_keys=True),
        ]
        part = [RandSpatialCropd(every, roi_size=largest, random_size=False, allow_missing_keys=True)]
        super().__init__(
            [
                SelectItemsd([*every, "patient"], allow_missing_keys=True),
                *(crop if roi_size else part if largest else []),
                *([simulate] if simulate else []),
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

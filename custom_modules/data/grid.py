"""Grids: comparing those of two volumes, and resampling back to the grid of the input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample
from monai.utils import convert_to_tensor

from custom_modules.errors import InputError

GRID_TOLERANCE = 1e-2  # mm
REGISTER = "register and resample the CT to the MR first"


def same_grid(one: MetaTensor, other: MetaTensor) -> bool:
    """Whether two volumes share shape and affine, to 0.01 mm."""
    affines = [torch.as_tensor(volume.affine, dtype=torch.float64) for volume in (one, other)]
    return one.shape == other.shape and torch.allclose(*affines, atol=GRID_TOLERANCE)


def check_same_grid(volume: MetaTensor, reference: MetaTensor, advice: str = "") -> None:
    """Raise InputError, ending in ``advice``, unless both volumes share one grid (:func:`same_grid`)."""
    if not same_grid(volume, reference):
        names = [item.meta["filename_or_obj"] for item in (volume, reference)]
        raise InputError(f"{names[0]}: its grid is not that of {names[1]}{advice and '; ' + advice}")


class RestoreGridd(MapTransform):
    """Resample ``keys`` once, from the grid of ``source`` back to the grid on which it was read.

    Voxels beyond the outermost samples take the nearest value, so that a field of view that cuts through the body ends
    in tissue, not in air. The grid is filled slab by slab, because resampling needs several times the memory of its
    result.

    Args:
        slab_voxels: approximate number of voxels in a slab.
    """

    def __init__(
        self, keys: KeysCollection, source: str = "image", allow_missing_keys: bool = False, slab_voxels: int = 2**22
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source, self.slab_voxels = source, slab_voxels
        self.resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True, dtype=torch.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        source = data[self.source]
        for key in self.key_iterator(data):
            values = convert_to_tensor(data[key], dtype=torch.float32, track_meta=False)
            affine = torch.as_tensor(source.meta["source_affine"], dtype=torch.float64)
            shape = [int(size) for size in source.meta["source_shape"]]
            data[key] = self._restore(MetaTensor(values, affine=source.affine), affine, shape)
        return data

    def _restore(self, volume: MetaTensor, affine: torch.Tensor, shape: Sequence[int]) -> MetaTensor:
        result = torch.empty(len(volume), *shape)
        thickness = min(max(2, self.slab_voxels // (shape[1] * shape[2])), shape[0])  # PyTorch needs two planes
        for start in range(0, shape[0], thickness):
            start = min(start, shape[0] - thickness)
            slab, moved = result[:, start : start + thickness], affine.clone()
            moved[:3, 3] += start * affine[:3, 0]
            slab.copy_(self.resample(volume, dst_affine=moved, spatial_size=slab.shape[1:]).as_tensor())
        return MetaTensor(result, affine=affine)


class SameGridd(MapTransform):
    """Raise InputError unless all ``keys`` share one grid."""

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        first, *others = (data[key] for key in self.key_iterator(dict(data)))
        for other in others:
            check_same_grid(other, first, REGISTER)
        return dict(data)

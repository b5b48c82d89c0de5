"""Grids: comparing those of two volumes, and resampling back to the grid of the input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset, zoom_affine
from monai.transforms import MapTransform, SpatialResample
from monai.utils import convert_to_tensor, ensure_tuple_rep
from scipy.interpolate import make_interp_spline

from custom_modules.errors import InputError

GRID_TOLERANCE = 1e-2  # mm
SLAB_VOXELS = 2**22  # that are resampled at once
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


def resample(
    volume: MetaTensor,
    affine: torch.Tensor,
    shape: Sequence[int],
    align_corners: bool = False,
    slab_voxels: int = SLAB_VOXELS,
) -> MetaTensor:
    """(C, D, H, W) interpolated on the grid of ``affine`` and ``shape``, float32; beyond the outermost samples the
    nearest.

    The grid is filled slab by slab, for resampling needs several times the memory of what it fills.
    """
    method = SpatialResample(mode="bilinear", padding_mode="border", align_corners=align_corners, dtype=torch.float32)
    affine, shape = torch.as_tensor(affine, dtype=torch.float64), [int(size) for size in shape]
    answer = torch.empty(len(volume), *shape)
    thickness = min(max(2, slab_voxels // (shape[1] * shape[2])), shape[0])  # PyTorch needs two planes
    for start in range(0, shape[0], thickness):
        start = min(start, shape[0] - thickness)
        slab, moved = answer[:, start : start + thickness], affine.clone()
        moved[:3, 3] += start * affine[:3, 0]
        slab.copy_(method(volume, dst_affine=moved, spatial_size=slab.shape[1:]).as_tensor())
    return MetaTensor(answer, affine=affine)


def resample_to_spacing(volume: MetaTensor, spacing: Sequence[float]) -> MetaTensor:
    """(C, D, H, W) on a grid of ``spacing`` mm along the same axes and over the same extent, slab by slab; the header
    goes along."""
    affine = zoom_affine(np.asarray(volume.affine, dtype=np.float64), spacing, diagonal=False)
    shape, offset = compute_shape_offset(volume.shape[1:], np.asarray(volume.affine), affine)
    affine[:3, 3] = offset[:3]
    answer = resample(volume, torch.from_numpy(affine), shape)
    answer.meta = {**volume.meta, "affine": answer.affine}
    return answer


class ToSpacingd(MapTransform):
    """Dictionary form of :func:`resample_to_spacing`."""

    def __init__(self, keys: KeysCollection, spacing: Sequence[float]) -> None:
        super().__init__(keys)
        self.spacing = spacing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = resample_to_spacing(data[key], self.spacing)
        return data


def interpolate(
    volume: MetaTensor, affine: np.ndarray, shape: Sequence[int], order: int, slab_voxels: int = SLAB_VOXELS
) -> MetaTensor:
    """(C, D, H, W) on the grid of ``affine`` and ``shape``, float32, by splines of ``order`` along one axis after the
    other, slab by slab; beyond the outermost samples the nearest. Splines overshoot at edges, and are cut off at the
    least and the greatest value of the volume. Where an affine is sheared, axes are not parallel, and :func:`resample`
    interpolates."""
    to_source = np.linalg.inv(np.asarray(volume.affine, dtype=np.float64)) @ np.asarray(affine, dtype=np.float64)
    axes = np.abs(to_source[:3, :3]).argmax(axis=0)  # of the volume, along each of the grid
    steps, offsets = to_source[axes, range(3)], to_source[axes, 3]
    beside = to_source[:3, :3].copy()
    beside[axes, range(3)] = 0
    if len(set(axes)) < 3 or (np.abs(beside) @ np.asarray(shape)).max() > GRID_TOLERANCE:
        return resample(volume, torch.as_tensor(affine), shape, align_corners=True, slab_voxels=slab_voxels)
    values = volume.as_tensor().permute(0, *(1 + int(axis) for axis in axes))
    first, second, third = (
        _spline_matrix(n, offset + step * np.arange(size), order)
        for n, offset, step, size in zip(values.shape[1:], offsets, steps, map(int, shape))
    )
    answer = torch.empty(len(volume), *map(int, shape))
    thickness = max(1, slab_voxels // (len(second) * len(third)))
    for rows, slab in zip(first.split(thickness), answer.split(thickness, dim=1)):
        slab.copy_(torch.einsum("ai,nijk,bj,ck->nabc", rows, values, second, third))
    return MetaTensor(answer.clamp_(values.min(), values.max()), affine=torch.as_tensor(affine))


def _spline_matrix(n: int, places: np.ndarray, order: int) -> torch.Tensor:
    """Return the matrix (places, n) by which ``n`` samples become those of their interpolating spline at ``places``."""
    order = order if n > order else min(1, n - 1)
    spline = make_interp_spline(np.arange(n), np.eye(n), k=order)
    return torch.from_numpy(spline(places.clip(0, n - 1))).float()


class RestoreGridd(MapTransform):
    """Resample ``keys`` once, from the grid of ``source`` back to the grid it was read on, by :func:`interpolate`: a
    field of view that cuts through the body ends in tissue, not in air.

    Args:
        order: of the splines, one for all keys or one for each; 1 is linear.
        slab_voxels: approximate number of voxels in a slab.
    """

    def __init__(
        self, keys: KeysCollection, source: str = "image", order: int | Sequence[int] = 1,
        allow_missing_keys: bool = False, slab_voxels: int = SLAB_VOXELS,
    ) -> None:  # fmt: skip
        super().__init__(keys, allow_missing_keys)
        self.source, self.slab_voxels = source, slab_voxels
        self.order = ensure_tuple_rep(order, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        source = data[self.source]
        for key, order in self.key_iterator(data, self.order):
            values = convert_to_tensor(data[key], dtype=torch.float32, device="cpu", track_meta=False)
            volume = MetaTensor(values, affine=source.affine)
            grid = source.meta["source_affine"], source.meta["source_shape"]
            data[key] = interpolate(volume, *grid, order, self.slab_voxels)
        return data


class SameGridd(MapTransform):
    """Raise InputError unless all ``keys`` share one grid."""

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        first, *others = (data[key] for key in self.key_iterator(dict(data)))
        for other in others:
            check_same_grid(other, first, REGISTER)
        return dict(data)

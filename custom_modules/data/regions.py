"""Regions of a CT from which an MR is simulated: the inside of bones, their surface, organs, and pieces of the rest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from skimage.segmentation import slic

from custom_modules.data.body import ct_parts, fill_cavities
from custom_modules.data.hu import AIR_HU
from custom_modules.data.organs import TISSUE_WORDS, organ_tissues
from custom_modules.errors import InputError

DENSE_HU, PEAK_HU = 150.0, 500.0  # a skeleton's part goes beyond the second; enhanced vessels do not
COMPACT_HU = 400.0
SMOOTH = 0.7  # voxels; more would close thin discs of the spine
COMPACT_SHARE = 0.12  # of voxels as dense as that: up to 0.10 in the kidneys of one CT, from 0.15 in skeletons
MARROW_HU, MARROW_AREA = 65.0, 3000.0  # red marrow is denser than cord and muscle; mm2 of the inside of a bone
REGION_GRID, REGION_SIZE = 2, 28.0  # voxels that are pooled to find regions, mm along a region
MARROW, SURFACE, FIRST_TISSUE = 1, 2, 3  # labels
FIRST_REGION = FIRST_TISSUE + len(TISSUE_WORDS)
BONE_LABEL = 1 + list(TISSUE_WORDS).index("marrow")  # of organ_tissues


def tissue_regions(
    ct: np.ndarray, body: np.ndarray, spacing: Sequence[float], organs: np.ndarray | None = None
) -> np.ndarray:
    """Label the tissue of a CT (D, H, W): 0 outside the ``body``, 1 inside of bones, 2 their surface, from 3 on organs
    of known tissue, in the order of :data:`~custom_modules.data.organs.TISSUE_WORDS`, and after these supervoxels.

    Supervoxels (SLIC, Achanta et al. 2012) on a grid of half the resolution stand for organs and muscles whose tissue
    is not known.

    Args:
        spacing: mm.
        organs: of :func:`~custom_modules.data.organs.organ_tissues`; where it has a label, that decides what is bone.
    """
    smooth = ndimage.gaussian_filter(ct.astype(np.float32), SMOOTH)
    bone = bone_mask(ct, smooth, body, spacing)
    if organs is not None:
        bone = np.where(organs > 0, organs == BONE_LABEL, bone)
    step = (slice(None, None, REGION_GRID),) * 3
    smoother = ndimage.gaussian_filter(smooth, 0.7)  # pooling must not see the noise
    coarse, inside = np.clip(smoother[step], -200, 200) / 400, (body & ~bone)[step]
    extent = np.prod(np.asarray(spacing) * REGION_GRID) * max(inside.sum(), 1)
    count = max(2, round(extent / REGION_SIZE**3))
    labels = slic(
        coarse, n_segments=count, compactness=0.03, mask=inside, channel_axis=None, enforce_connectivity=False
    )
    fine = labels.repeat(REGION_GRID, 0).repeat(REGION_GRID, 1).repeat(REGION_GRID, 2)
    fine = fine[tuple(slice(n) for n in ct.shape)]
    regions = np.where(body, FIRST_REGION + np.maximum(fine, 0), 0)
    if organs is not None:
        regions = np.where((organs > 0) & (regions > 0), FIRST_TISSUE - 1 + organs.astype(int), regions)
    regions[bone] = SURFACE
    regions[ndimage.binary_erosion(bone, border_value=1)] = MARROW
    return regions.astype(np.int16)


def bone_mask(ct: np.ndarray, smooth: np.ndarray, body: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Bone with its marrow in a CT (D, H, W), of which ``smooth`` is a Gaussian of :data:`SMOOTH` voxels."""
    return enclosed_marrow(skeleton(ct, smooth, body), smooth, spacing)


def skeleton(ct: np.ndarray, smooth: np.ndarray, body: np.ndarray) -> np.ndarray:
    """The dense parts (D, H, W) of a CT that are bone: those that reach the density of compact bone. Kidneys reach it,
    too, where contrast medium fills them, but only a little of them and inside."""
    dense = (smooth > DENSE_HU) & body
    parts, number = ndimage.label(dense)
    index = np.arange(1, number + 1)
    crust, core = (ndimage.binary_erosion(dense, iterations=depth) for depth in (1, 3))
    with np.errstate(invalid="ignore"):  # thin parts have no core: not a number, which is not more than anything
        below, inside = (ndimage.mean(smooth, np.where(where, parts, 0), index) for where in (crust & ~core, core))
    peaks, compact = ndimage.maximum(ct, parts, index), ndimage.mean(ct > COMPACT_HU, parts, index)
    filled = (np.asarray(inside) > below) & (np.asarray(compact) < COMPACT_SHARE)
    return np.concatenate([[False], (np.asarray(peaks) > PEAK_HU) & ~filled])[parts]


def enclosed_marrow(bone: np.ndarray, hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Bone (D, H, W) with the marrow that it encloses in an axial plane (W goes from feet to head); in other planes it
    encloses the discs of the spine, too. The spinal canal and the brain are not as dense as red marrow, or are larger
    than the inside of a bone."""
    cross = ndimage.generate_binary_structure(2, 1)
    area, found = float(spacing[0] * spacing[1]), bone.copy()
    for plane, target in zip(np.moveaxis(bone, 2, 0), np.moveaxis(found, 2, 0)):
        shell = ndimage.binary_closing(plane, cross) | plane
        holes, number = ndimage.label(ndimage.binary_fill_holes(shell) & ~shell)
        small = np.bincount(holes.ravel(), minlength=number + 1) * area < MARROW_AREA
        target |= shell | (small[holes] & (holes > 0))
    return bone | (found & (hu > MARROW_HU))


class CTBodyd(MapTransform):
    """Add the ``body`` of a CT in ``keys`` that has no MR, and clear what lies outside: couch and clothes."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            ct = data[key]
            body = fill_cavities(ct_parts(np.asarray(ct[0])), upright=True)
            if not body.any():
                raise InputError(f"{ct.meta.get('filename_or_obj', 'CT')}: no body found, only air")
            data["body"] = MetaTensor(torch.from_numpy(body)[None].float(), affine=ct.affine)
            data[key] = torch.where(data["body"] > 0, ct, torch.full_like(ct, AIR_HU))
        return data


class CTRegionsd(MapTransform):
    """Add the :func:`tissue_regions` of the CT in ``keys`` as ``regions``, within its own body. ``organs`` is the
    path of a label volume, if there is one."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            ct = data[key]
            body = fill_cavities(ct_parts(np.asarray(ct[0])), upright=True)
            organs = organ_tissues(data["organs"], ct) if "organs" in data else None
            regions = tissue_regions(np.asarray(ct[0]), body, np.asarray(ct.pixdim), organs)
            data["regions"] = MetaTensor(torch.from_numpy(regions)[None], affine=ct.affine)
        return data

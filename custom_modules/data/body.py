"""The body in an MR and in a CT."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from skimage.filters import threshold_otsu

from custom_modules.data.hu import TISSUE_HU
from custom_modules.errors import InputError

logger = logging.getLogger(__name__)

PART = 0.02  # of the largest part's volume: a second leg and an arm belong to the body, crumbs of noise or couch do not
TABLE = 150.0  # HU; the median of a solid part of a couch is above, that of an arm or a leg below
THRESHOLDS = (0.04, 0.1)  # of the 99th percentile, between which the one of air is looked for
LEAST_SIGNAL = 1e-3  # of the 99th percentile; below is what was cleared or padded
EDGE = 6  # voxels next to the faces of a volume that may be dark: the ends of a slab's profile, filtered corners
SAMPLE = 2**20  # voxels that the threshold is found from


def keep_parts(mask: np.ndarray, share: float = PART) -> np.ndarray:
    """The components of a (D, H, W) mask of at least ``share`` of the largest one's volume: both legs and the arms
    beside the trunk are body, crumbs of noise or of a couch are not."""
    labels, number = ndimage.label(mask)
    if number < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= share * sizes.max())[labels]


def without_table(mask: np.ndarray, ct: np.ndarray) -> np.ndarray:
    """A (D, H, W) mask without solid parts of a couch: those beside the largest whose median HU is above that of fat
    and muscle."""
    labels, number = ndimage.label(mask)
    if number < 2:
        return mask
    dense = ndimage.median(ct, labels, range(1, number + 1)) > TABLE
    dense[np.bincount(labels.ravel())[1:].argmax()] = False
    return mask & ~np.append(False, dense)[labels]


def open_mask(mask: np.ndarray) -> np.ndarray:
    """Open a (D, H, W) mask by one voxel. Edges count as going on outside, so that a body that is cut by the field of
    view, or only two slices thick, stays."""
    return ndimage.binary_opening(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1, 1:-1]


def fill_holes_by_slice(mask: np.ndarray) -> np.ndarray:
    """Fill the holes of each slice along the last axis of a (D, H, W) mask."""
    filled = np.empty_like(mask)
    for k in range(mask.shape[-1]):
        filled[..., k] = ndimage.binary_fill_holes(mask[..., k])
    return filled


def fill_cavities(mask: np.ndarray, upright: bool = False) -> np.ndarray:
    """Fill lungs, bowel gas and airways in a (D, H, W) mask of tissue, slices along the last axis.

    A cavity is closed within its slice, or, where a face of the volume cuts it, within that face: a coronal slab goes
    through the lungs, which are open to the front and back of its axial slices but have ribs and diaphragm around them
    in the faces. The gap between two legs, or between arm and trunk, is open at the lower end. The planes next to a
    face are filled like the face itself, for the outermost may be dark.

    Args:
        upright: the last axis goes up (RAS order): faces are closed at their upper edge, for fields of view that end
            within the lungs.
    """
    closed = mask.copy()
    for axis in (0, 1):
        planes = np.moveaxis(closed, axis, 0)
        for k in {*range(min(EDGE, len(planes))), *range(max(0, len(planes) - EDGE), len(planes))}:
            planes[k] = _fill_face(planes[k], upright)
    return fill_holes_by_slice(closed)


def _fill_face(face: np.ndarray, upright: bool) -> np.ndarray:
    """Fill what is enclosed in (H, W), with ``upright`` also by a lid between the outermost tissue in the last
    columns."""
    edge = min(EDGE, face.shape[1] - 1) if upright else 0
    below, above = face[:, : face.shape[1] - edge], face[:, face.shape[1] - edge :]
    lid = between(np.asarray(above.any(axis=1)))
    filled = ndimage.binary_fill_holes(np.concatenate([below, lid[:, None]], axis=1))[:, :-1]
    cavity = between((filled & ~below)[:, -1]) & lid  # from lung to lung, with the spine that fades between them
    return np.concatenate([filled, above | cavity[:, None]], axis=1)


def between(line: np.ndarray) -> np.ndarray:
    """From the first to the last element of a line that is set."""
    return np.logical_or.accumulate(line) & np.logical_or.accumulate(line[::-1])[::-1]


def body_mask(mr: np.ndarray, threshold: float | None = None, smoothing: float = 0.7) -> np.ndarray:
    """The body in an MR: (D, H, W) in any unit and RAS order to a bool mask.

    Voxels above a threshold in the smoothed volume (sigma ``smoothing`` voxels), opened, all parts of at least a
    fiftieth of the largest, cavities filled: lungs, cortical bone and airways are dark but inside.

    Args:
        threshold: a share of the 99th percentile; None: :func:`air_threshold`.
    """
    smooth = ndimage.gaussian_filter(np.asarray(mr, dtype=np.float32), smoothing)
    top = np.percentile(smooth, 99)
    share = air_threshold(smooth, top) if threshold is None else threshold
    return fill_cavities(keep_parts(open_mask(smooth > share * top)), upright=True)


def air_threshold(mr: np.ndarray, top: float) -> float:
    """The share of ``top`` (the 99th percentile) that parts air from tissue, by Otsu's method (1979) on the logarithm
    of what has signal, between 0.04 and 0.1.

    In the logarithm shading by a surface coil is a shift, and tissue far from the coil stays nearer to tissue than to
    air. Where no air is in the field of view the upper limit holds, for then fat is parted from muscle.
    """
    low, high = THRESHOLDS
    values = mr.ravel()[:: max(1, mr.size // SAMPLE)]
    values = values[values > LEAST_SIGNAL * top]
    if top <= 0 or values.size < 2 or values.min() == values.max():
        return high
    return float(np.clip(np.exp(threshold_otsu(np.log(values / top))), low, high))


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
    """The voxels that count: :func:`ct_tissue_mask` where the MR has signal. (D, H, W) HU and MR to bool."""
    return ct_tissue_mask(ct) & (mr > 0)


def ct_tissue_mask(ct: np.ndarray) -> np.ndarray:
    """The body in a CT without a couch, by the rule of :func:`body_mask`: above -300 HU, opened, all parts of at least
    a fiftieth of the largest, holes filled slice by slice. (D, H, W) HU to bool. What is open at the faces stays so:
    there a CT that is cut off cannot be told from a lung."""
    return fill_holes_by_slice(ct_parts(ct))


def ct_parts(ct: np.ndarray) -> np.ndarray:
    """The tissue of a body in a CT, cavities left out: above -300 HU, opened, without small parts and couch."""
    return without_table(keep_parts(open_mask(ct > TISSUE_HU)), ct)


class ScoreMaskd(MapTransform):
    """Add ``mask``: :func:`ct_body_mask` of ``label`` (HU) and ``image`` as 0 and 1."""

    def __init__(self) -> None:
        super().__init__(["image", "label"])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        mask = ct_body_mask(np.asarray(data["label"][0]), np.asarray(data["image"][0]))
        return {**data, "mask": MetaTensor(torch.from_numpy(mask)[None].float(), affine=data["label"].affine)}

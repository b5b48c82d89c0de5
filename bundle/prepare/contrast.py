"""Contrast medium, taken out of CTs without an MR: the MRs that are simulated from them do not show it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

from bundle.prepare.cleaning import within
from custom_modules.data.hu import LEAN_HU
from custom_modules.data.regions import DENSE_HU, SMOOTH, bone_mask

NATIVE = 55.0  # HU; muscle and organs without contrast medium are seldom denser
BLOOD, NOISE = 40.0, 20.0  # HU of blood without it, and of what noise is kept
BLUR = 2.0  # mm, standard deviation: the noise of the CT is finer

# Enhanced blood is dense and even. So is the inside of some bones, but those have a rim that is as dense or denser.
DENSE = 250.0, 700.0  # HU
EVEN, WINDOW = 60.0, 6.0  # HU of standard deviation at most, in cubes of so many mm
LEAST_CORE = 3000.0  # mm3
RIM, RIM_SHARE = (4.0, 8.0), 0.95  # mm around a core; the upper quartile there must be below this share of its median
GROWTH = 8.0  # mm from a core to the wall of its vessel
HEIGHT = 80.0  # mm; the heart with its vessels and the aorta are taller, the heads of femur and humerus are not
# Between the lungs, what is in front of the spine is no bone: where contrast medium mixes, blood is not even.
LUNG, LEAST_LUNG = -500.0, 2e5  # HU, mm3
PLEURA, SPINE = 8.0, 80.0  # mm from ribs and sternum; mm in front of the back of the lungs
VESSELS = 10.0  # mm, the width of vessels that are taken for a part of the lungs


def remove_contrast(ct: np.ndarray, body: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """A CT as it would be without contrast medium, nearly: (D, H, W) HU in RAS order with the mask of its body.

    :func:`enhanced_blood` becomes 40 HU, with its noise up to 20 HU. Other soft tissue, what is no bone by
    :func:`~custom_modules.data.regions.bone_mask`, is lowered by what it has above 55 HU on average around a voxel, so
    that its noise stays. Bone, fat and air are as before. Organs that differ by their contrast medium alone become
    equal.
    """
    sigma = BLUR / np.asarray(spacing)
    blood = enhanced_blood(ct, body, spacing)
    ct = np.where(blood, BLOOD + np.clip(ct - _mean_within(blood, ct, sigma), -NOISE, NOISE), ct)
    bone = bone_mask(ct, ndimage.gaussian_filter(ct, SMOOTH), body, tuple(spacing))
    soft = body & ~bone & (ct > LEAN_HU)
    return np.where(soft & ~blood, ct - _mean_within(soft, np.maximum(ct - NATIVE, 0), sigma), ct)


def _mean_within(mask: np.ndarray, values: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The mean of ``values`` (D, H, W) around each voxel, of those within ``mask`` only."""
    share = ndimage.gaussian_filter(mask.astype(np.float32), sigma)
    return ndimage.gaussian_filter(np.where(mask, values, 0), sigma) / np.maximum(share, 0.05)


def enhanced_blood(ct: np.ndarray, body: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Heart and great vessels that are as dense as bone by contrast medium, (D, H, W); nothing in a CT without it or
    without lungs."""
    lungs, cores = _lungs(ct, body, spacing), _even_cores(ct, spacing)
    if not (lungs.any() and cores.any()):
        return np.zeros_like(cores)
    chest = _between_lungs(lungs, spacing) & (ct > DENSE_HU)
    vessels = ~within(~within(lungs, VESSELS, spacing), VESSELS + PLEURA / 2, spacing)
    grown = within(cores, GROWTH, spacing) | within(chest, spacing.max(), spacing) | vessels
    return grown & (ct > NATIVE)


def _even_cores(ct: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The inside of vessels and chambers in which the contrast medium is well mixed."""
    width = np.maximum(2 * (WINDOW / 2 // spacing) + 1, 3).astype(int).tolist()
    smooth, mean = ndimage.gaussian_filter(ct, BLUR / spacing), ndimage.uniform_filter(ct, width)
    spread = np.sqrt(np.maximum(ndimage.uniform_filter(ct**2, width) - mean**2, 0))
    dense = (smooth > DENSE[0]) & (smooth < DENSE[1])
    even = ndimage.binary_opening(dense & (ndimage.uniform_filter(spread, width) < EVEN))
    parts, _ = ndimage.label(even)
    cores, margin = np.zeros(ct.shape, bool), np.ceil(RIM[1] / spacing).astype(int) + 1
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        around = tuple(slice(max(part.start - m, 0), part.stop + m) for part, m in zip(box, margin))
        part = parts[around] == number
        if part.sum() * np.prod(spacing) < LEAST_CORE:
            continue
        rim = smooth[around][within(part, RIM[1], spacing) & ~within(even[around], RIM[0], spacing)]
        if rim.size and np.percentile(rim, 75) < RIM_SHARE * np.median(smooth[around][part]):
            cores[around] |= part
    groups, _ = ndimage.label(within(cores, GROWTH, spacing))
    boxes = ndimage.find_objects(np.where(cores, groups, 0))
    tall = [bool(box) and (box[2].stop - box[2].start) * spacing[2] >= HEIGHT for box in boxes]
    return cores & np.array([False, *tall])[groups]


def _lungs(ct: np.ndarray, body: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    parts, number = ndimage.label((ndimage.gaussian_filter(ct, BLUR / np.asarray(spacing)) < LUNG) & body)
    large = np.bincount(parts.ravel(), minlength=number + 1) * np.prod(spacing) > LEAST_LUNG
    return large[parts] & (parts > 0)


def _between_lungs(lungs: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """What the lungs enclose in each axial plane, away from ribs and sternum and in front of the spine."""
    found = np.zeros_like(lungs)
    for number in np.flatnonzero(lungs.any((0, 1))):
        plane = lungs[..., number]
        back = int(np.flatnonzero(plane.any(0))[0] + round(SPINE / spacing[1]))
        inside = ~within(~convex_hull_image(plane), PLEURA, spacing[:2])
        found[:, back:, number] = inside[:, back:]
    return found

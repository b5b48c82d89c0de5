"""Hounsfield units: constants, tissue classes, and checks whether a volume is in HU."""

from __future__ import annotations

import numpy as np

from custom_modules.errors import InputError

Window = tuple[float, float]

AIR_HU = -1000  # written outside the body
TISSUE_HU = -300.0  # air, lung and bowel gas are below, other tissue is above
LEAN_HU = -30.0  # fat is below, muscle and organs are above
BONE_HU = 250.0
TISSUES: dict[str, Window] = {
    "air": (-np.inf, TISSUE_HU), "soft": (TISSUE_HU, BONE_HU), "bone": (BONE_HU, np.inf)
}  # fmt: skip


def tissue(ct: np.ndarray, name: str) -> np.ndarray:
    """Return where a CT is ``air`` (to -300 HU), ``soft`` (to 250 HU) or ``bone``."""
    low, high = TISSUES[name]
    return (ct > low) & (ct <= high)


def check_hu(volume: np.ndarray, name: str) -> None:
    """Raise InputError unless (D, H, W) can be Hounsfield units: it has air, and the rest is mostly tissue."""
    low, high = float(volume.min()), float(volume.max())
    inside = volume[volume > TISSUE_HU]
    if low > -150 or high < -150 or high - low < 300 or not -300 <= np.median(inside) <= 700:
        raise InputError(
            f"{name}: {low:g} to {high:g} are not Hounsfield units (fat is -100, air -1000); "
            "apply the rescale slope and intercept"
        )


def is_hu(volume: np.ndarray) -> bool:
    """Whether (D, H, W) can be a CT: :func:`check_hu` accepts it, and more than a hundredth of it is air or lung, not
    only the undershoot of filters at the edges of an MR."""
    try:
        check_hu(volume, "")
    except InputError:
        return False
    return bool((volume < TISSUE_HU).mean() > 0.01)

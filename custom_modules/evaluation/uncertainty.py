"""Uncertainty of a synthetic CT: the standard deviation of its samples in HU, scaled to the error, and how well the two
agree."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, spearmanr

from custom_modules.data.hu import TISSUES, tissue

logger = logging.getLogger(__name__)

LEVELS = (0.5, 0.8, 0.95)  # of the intervals whose coverage is reported
FLOOR_HU = 1.0  # smallest SD, because CTs are stored in whole HU
BINS = 20
FRACTIONS = np.linspace(0, 0.95, 20)  # of voxels left out, most uncertain first


def fit_scale(errors: Sequence[np.ndarray], spreads: Sequence[np.ndarray]) -> float:
    """Fit the scalar that calibrates SD to error (sigma scaling, Laves et al. 2020): the root of the mean of
    (error / SD)^2, which is the maximum likelihood scale of Gaussian errors. All patients have the same weight.

    Args:
        errors, spreads: error and SD of each patient's voxels, in HU.
    """
    ratios = [np.mean((error / np.maximum(spread, FLOOR_HU)) ** 2) for error, spread in zip(errors, spreads)]
    return float(np.sqrt(np.mean(ratios)))


def _z(level: float) -> float:
    """Return the half-width of the central interval of a standard normal distribution."""
    return float(norm.ppf((1 + level) / 2))


def coverage(error: np.ndarray, sd: np.ndarray, level: float) -> float:
    """Fraction of voxels whose error lies in the central ``level`` interval of a normal distribution of ``sd``."""
    if not error.size:
        return float("nan")
    return float(np.mean(np.abs(error) <= _z(level) * np.maximum(sd, FLOOR_HU)))


def ence(error: np.ndarray, sd: np.ndarray, bins: int = BINS) -> float:
    """Expected normalised calibration error (Levi et al. 2022): mean over bins of equal count, by SD, of
    |RMV - RMSE| / RMV, the roots of the mean variance and of the mean squared error."""
    if len(error) < bins:
        return float("nan")
    order = np.argsort(sd)
    rmv, rmse = (
        np.array([np.sqrt(np.mean(part**2)) for part in np.array_split(values[order], bins)])
        for values in (np.maximum(sd, FLOOR_HU), error)
    )
    return float(np.mean(np.abs(rmv - rmse) / rmv))


def spearman(error: np.ndarray, sd: np.ndarray) -> float:
    """Rank correlation of SD with the absolute error; not defined where one of them is constant."""
    if len(error) < 3 or np.ptp(sd) == 0 or np.ptp(np.abs(error)) == 0:
        return float("nan")
    return float(spearmanr(np.abs(error), sd).statistic)


def sparsification(error: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """Mean absolute error of the remaining voxels when those highest in ``ranking`` are left out, at each of
    :data:`FRACTIONS`. Ranked by SD it should fall; ranked by the absolute error itself it is the best possible."""
    if not error.size:
        return np.full(len(FRACTIONS), np.nan)
    falling = np.abs(error)[np.argsort(ranking, kind="stable")]
    means = np.cumsum(falling, dtype=np.float64) / np.arange(1, len(falling) + 1)
    keep = np.maximum(np.round((1 - FRACTIONS) * len(falling)).astype(int), 1)
    return means[keep - 1]


def assess(pred: np.ndarray, ct: np.ndarray, sd: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Compute all of the above for one patient, (D, H, W) HU each, over ``mask``; coverage also by tissue of the CT.

    Returns:
        Numbers by name, and the curves ``sparsification`` and ``oracle`` at :data:`FRACTIONS`.
    """
    error, spread = (x[mask].astype(np.float64) for x in (pred.astype(np.float32) - ct, sd))
    values: dict[str, Any] = {"mean_sd": float(spread.mean()) if spread.size else float("nan")}
    parts = {"": np.ones(error.shape, bool), **{f"{name}_": tissue(ct[mask], name) for name in TISSUES}}
    for prefix, part in parts.items():
        for level in LEVELS:
            values[f"{prefix}coverage_{level * 100:g}"] = coverage(error[part], spread[part], level)
    values.update(ence=ence(error, spread), spearman=spearman(error, spread))
    curve, best = sparsification(error, spread), sparsification(error, np.abs(error))
    # area between the curves divided by the error of all voxels: 0 is a perfect ranking
    values["ause"] = float(np.trapezoid(curve - best, FRACTIONS) / curve[0]) if curve[0] else float("nan")
    return {**values, "sparsification": curve.tolist(), "oracle": best.tolist()}

"""Check before synthesis, with reasons, whether an MR looks like those that the weights were trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.stats import wasserstein_distance
from torch import nn

from custom_modules.errors import InputError
from custom_modules.files import sha256
from custom_modules.tiling import pad_to_windows

logger = logging.getLogger(__name__)

HISTOGRAM = np.linspace(-1, 1, 33)  # bin edges, normalised MR
CROP = 64  # voxels per side of what the autoencoder reconstructs
MARGIN = 6.0  # mm by which BodyMaskd widens the body
SD_FLOOR = 0.05  # of the mean: a measure that is equal in all training patients (the spacing) may differ by this much
UNDER_SKIN = MARGIN + 2, MARGIN + 8  # mm of depth, where there is fat
LIMIT = 3.0  # standard deviations from the training patients
NO_SIGNAL = 0.04  # of the brightest signal in the body, below which a voxel has none

# measure: unit, and whether it is an error, where only larger values are unusual; others are compared by their
# logarithm
MEASURES = {
    "finest spacing": ("mm", False),
    "coarsest spacing": ("mm", False),
    "field of view, left to right": ("mm", False),
    "field of view, back to front": ("mm", False),
    "field of view, foot to head": ("mm", False),
    "body fraction": ("", False),
    "distance of the intensity histogram": ("", True),
    "share of a slice without signal": ("", True),
    "signal under the skin": ("", False),
    "detail, foot to head over in-plane": ("", False),
    "detail, left to right over back to front": ("", False),
    "reconstruction error": ("", True),
}
LEAST_SD = {"share of a slice without signal": 0.01}
HINTS = {
    "share of a slice without signal": "an image of fat alone, of a Dixon method, looks like that",
    "signal under the skin": "an image of water alone, or one with fat suppressed or strong shading, looks like that",
}


def measure(batch: Mapping[str, Any], references: Sequence[Any] | None, network: nn.Module | None) -> dict[str, float]:
    """Measure an MR. Keys of the result are those of :data:`MEASURES`, values are positive.

    Args:
        batch: ``image``, the MR (1, 1, D, H, W) in [-1, 1] on the grid of the networks, with the grid it was read on in
            its metadata, and ``body`` of the same shape.
        references: histograms of the training MRs; the distance to the nearest is left out when None.
        network: has an autoencoder; without one the reconstruction error is left out.
    """
    image, body = (np.asarray(batch[key])[0, 0] for key in ("image", "body"))
    affine, shape = (np.asarray(batch["image"].meta[key]).reshape(s) for key, s in _SOURCE)
    grid = np.linalg.norm(_first(batch["image"].affine)[:3, :3], axis=0)
    depth = _depth(body > 0.5, grid)
    inside = _without_margin(body > 0.5, depth)
    extent = nib.affines.voxel_sizes(affine) * shape
    right, front, head = extent[np.argsort(nib.io_orientation(affine)[:, 0])]
    detail = [_detail(image, inside, axis) for axis in range(3)]
    values = [
        nib.affines.voxel_sizes(affine).min(),
        nib.affines.voxel_sizes(affine).max(),
        right, front, head,
        max(inside.sum(), 1) * grid.prod() / extent.prod(),
        None if references is None else histogram_distance(histogram(image, inside), references),
        _without_signal(image, inside),
        _under_the_skin(image, inside, depth),
        2 * detail[2] / (detail[0] + detail[1]),
        detail[0] / detail[1],
        _reconstruction_error(image, inside, network) if hasattr(network, "autoencoder") else None,
    ]  # fmt: skip
    return {name: float(value) for name, value in zip(MEASURES, values) if value is not None}


_SOURCE = (("source_affine", (4, 4)), ("source_shape", (3,)))


def _first(affine: Any) -> np.ndarray:
    return np.asarray(affine).reshape(-1, 4, 4)[0]


def _depth(body: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return how many mm each voxel of the body is from what is outside; infinite where the body fills the image."""
    if body.all():
        return np.full(body.shape, np.inf)
    return ndimage.distance_transform_edt(body, sampling=spacing)


def _without_margin(body: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the body without the margin that the mask was widened by; with it where nothing would be left."""
    inside = depth > MARGIN
    return inside if inside.any() else body


def histogram(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the histogram of normalised MR intensities inside the body, as fractions."""
    return np.histogram(image[inside], HISTOGRAM)[0] / max(inside.sum(), 1)


def histogram_distance(shares: Sequence[float] | np.ndarray, references: Sequence[Any]) -> float:
    """Return the earth mover's distance between a histogram and the nearest of ``references``, in units of the
    normalised MR."""
    centres = (HISTOGRAM[1:] + HISTOGRAM[:-1]) / 2
    return min(float(wasserstein_distance(centres, centres, shares, reference)) for reference in references)


def _without_signal(image: np.ndarray, inside: np.ndarray) -> float:
    """Return the share of the body that gives no signal in those axial slices that have least of it, the 10 % quantile.
    Lung, bowel gas and cortical bone give none either, but not in every slice."""
    dark = inside & (image + 1 < NO_SIGNAL * _brightest(image, inside))
    body = inside.sum(axis=(0, 1))
    slices = body > 0.2 * body.max()
    return float(np.percentile(dark.sum(axis=(0, 1))[slices] / body[slices], 10))


def _brightest(image: np.ndarray, inside: np.ndarray) -> float:
    """Return the brightest signal of the body, its 99th percentile above the -1 of no signal."""
    return float(np.percentile(image[inside], 99)) + 1


def _under_the_skin(image: np.ndarray, inside: np.ndarray, depth: np.ndarray) -> float | None:
    """Return the signal under the skin, where most people have some fat, as a share of the brightest of the body; None
    where no skin is in the field of view."""
    layer = image[(depth > UNDER_SKIN[0]) & (depth <= UNDER_SKIN[1])]
    if not layer.size:
        return None
    return max((float(np.percentile(layer, 75)) + 1) / max(_brightest(image, inside), 1e-6), 1e-3)


def _detail(image: np.ndarray, inside: np.ndarray, axis: int) -> float:
    """Return the mean absolute difference of neighbours along an axis, in the body."""
    if image.shape[axis] < 2:
        return 1e-6
    difference = np.abs(np.diff(image, axis=axis))
    both = np.delete(inside, 0, axis) & np.delete(inside, -1, axis)
    return float(difference[both].mean()) + 1e-6 if both.any() else 1e-6


@torch.inference_mode()
def _reconstruction_error(image: np.ndarray, inside: np.ndarray, network: nn.Module) -> float:
    """Return the mean absolute error, in the body, with which the autoencoder reconstructs the middle of the MR."""
    centre = np.round(np.mean(np.argwhere(inside), axis=0)).astype(int)
    starts = [int(np.clip(c - CROP // 2, 0, max(n - CROP, 0))) for c, n in zip(centre, image.shape)]
    crop = tuple(slice(s, s + CROP) for s in starts)
    x = torch.from_numpy(np.ascontiguousarray(image[crop], dtype=np.float32))[None, None]
    x = x.to(network.latent_mean.device)
    padded, back = pad_to_windows(x, (1, 1, 1), network.autoencoder.downsampling)
    network.eval()
    again = network.decode(network.encode(padded, "MR"), "MR")[back]
    error = (again - x).abs()[0, 0].float().cpu().numpy()
    return float(error[inside[crop]].mean()) if inside[crop].any() else float(error.mean())


class Measurements:
    """Collects what is measured of training MRs, one by one, into the statistics that :class:`Guard` compares with."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.measured, self.histograms = network, [], []  # type: ignore[var-annotated]

    def add(self, batch: Mapping[str, Any]) -> None:
        """Measure an MR, as :func:`measure` takes it."""
        self.measured.append(measure(batch, None, self.network))
        image, body = (np.asarray(batch[key])[0, 0] for key in ("image", "body"))
        grid = np.linalg.norm(_first(batch["image"].affine)[:3, :3], axis=0)
        self.histograms.append(histogram(image, _without_margin(body > 0.5, _depth(body > 0.5, grid))))

    def statistics(self) -> dict[str, Any]:
        """Return the histograms, and for each measure its range, and its mean and SD on the scale on which it is
        compared. The distance of each histogram is that to the nearest of the others, as for a new patient."""
        for number, values in enumerate(self.measured):
            others = self.histograms[:number] + self.histograms[number + 1 :]
            values["distance of the intensity histogram"] = histogram_distance(self.histograms[number], others)
        measures = {}
        for name in MEASURES:
            values = np.array([each[name] for each in self.measured if name in each])
            if len(values) < 2:
                continue
            scaled = _scaled(name, values)
            floor = max(SD_FLOOR * (scaled.mean() if MEASURES[name][1] else 1), LEAST_SD.get(name, 0.0))
            measures[name] = {
                "low": float(values.min()), "high": float(values.max()),
                "mean": float(scaled.mean()), "sd": float(max(scaled.std(ddof=1), floor)),
            }  # fmt: skip
        histograms = [[round(float(share), 5) for share in shares] for shares in self.histograms]
        return {"patients": len(self.measured), "histograms": histograms, "measures": measures}


def _scaled(name: str, value: Any) -> Any:
    return value if MEASURES[name][1] else np.log(value)


def deviations(values: Mapping[str, float], statistics: Mapping[str, Any]) -> dict[str, float]:
    """Return how far each measure is from the training patients, in their standard deviations. Where only larger values
    are unusual, smaller ones are no deviation."""
    result = {}
    for name, value in values.items():
        training = statistics["measures"].get(name)
        if training is not None:
            z = (_scaled(name, value) - training["mean"]) / training["sd"]
            result[name] = float(max(z, 0) if MEASURES[name][1] else abs(z))
    return result


class Guard:
    """Compares an MR with the training set before synthesis, and warns which measure is outside, and by how much.

    Args:
        statistics: JSON of ``python -m bundle guard``. None turns the guard off, a missing file too, with a warning.
        checkpoint: weights in use; reconstruction is checked only with the weights that the statistics were made with.
        strict: raise an error instead of a warning.
        limit: distance from the training set, in standard deviations, beyond which an MR is outside.
    """

    def __init__(
        self, statistics: str | Path | None, checkpoint: str | Path, strict: bool = False, limit: float = LIMIT
    ) -> None:
        self.strict, self.limit = strict, limit
        self.statistics: dict[str, Any] | None = None
        if statistics and Path(statistics).is_file():
            stored = json.loads(Path(statistics).read_text())
            same = Path(checkpoint).is_file() and stored.get("model_sha256") == sha256(checkpoint)
            if not same:
                stored["measures"].pop("reconstruction error", None)
            self.statistics = stored
        elif statistics:
            logger.warning("inputs are not checked: no %s", statistics)

    def __call__(self, batch: Mapping[str, Any], network: nn.Module | None) -> dict[str, Any] | None:
        """Return ``warnings`` (one line each), ``score`` (the largest deviation), ``deviations`` and ``measures``.

        Raises:
            InputError: when ``strict`` and there is a warning.
        """
        if self.statistics is None:
            return None
        wanted = network if "reconstruction error" in self.statistics["measures"] else None
        values = measure(batch, self.statistics["histograms"], wanted)
        off = deviations(values, self.statistics)
        ranges = self.statistics["measures"]
        warnings = [_sentence(name, values[name], off[name], ranges[name]) for name in off if off[name] > self.limit]
        if warnings and self.strict:
            raise InputError("not like the training MRs: " + "; ".join(warnings))
        name = np.ravel(batch["image"].meta["filename_or_obj"])[0]
        for warning in warnings:
            logger.warning("%s: not like the training MRs: %s", name, warning)
        return {"warnings": warnings, "score": max(off.values(), default=0.0), "deviations": off, "measures": values}


def _sentence(name: str, value: float, deviation: float, training: Mapping[str, float]) -> str:
    unit, span = MEASURES[name][0], f"{training['low']:.3g} to {training['high']:.3g}"
    hint = f"; {HINTS[name]}" if name in HINTS else ""
    return f"{name} is {value:.3g}{unit and ' ' + unit}, in training {span} ({deviation:.1f} SD away){hint}"

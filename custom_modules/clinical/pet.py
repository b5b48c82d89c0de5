"""The error that a synthetic CT causes in a PET: attenuation correction factors along lines of response, and what a
reconstruction with them makes of a known activity. Parallel beams, slice by slice, without noise and scatter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.transform import iradon, radon

from custom_modules.errors import InputError

LESION_RADIUS = 10.0  # mm
LESION_CONTRAST = 4.0  # times the activity of the body around it
LESIONS = 5
LEAST_ACTIVITY = 0.2  # at the edge of the body, where filtered back-projection is uncertain, relative to less
MATTER = 0.02  # cm⁻¹; less is air


@dataclass(frozen=True)
class Ring:
    """A scanner with parallel lines of response in each slice.

    Attributes:
        diameter: mm, of the field of view.
        pitch: mm, between lines of response, between slices, and of the image's pixels.
        angles: number of directions over 180 degrees.
    """

    diameter: float = 700.0
    pitch: float = 4.0
    angles: int = 120

    @property
    def theta(self) -> np.ndarray:
        """Degrees."""
        return np.arange(self.angles) * 180.0 / self.angles

    def project(self, image: np.ndarray) -> np.ndarray:
        """Integrate (N, N) along the lines of response: (N, angles), in units of the image times cm."""
        return radon(image, self.theta, circle=True) * self.pitch / 10

    def reconstruct(self, sinogram: np.ndarray) -> np.ndarray:
        """Filtered back-projection of (N, angles) to (N, N)."""
        image = iradon(sinogram, self.theta, filter_name="ramp", circle=True, output_size=len(sinogram))
        return image / (self.pitch / 10)


@dataclass(frozen=True)
class Field:
    """A square around the middle of what attenuates; lines of response beyond it only meet air.

    Attributes:
        centre: pixel of the volume in the middle of the square.
        half: pixels from there to the edge.
    """

    centre: tuple[int, int]
    half: int

    @staticmethod
    def around(mask: np.ndarray, ring: Ring) -> Field:
        """Return the field that holds a mask (D, H, W).

        Raises:
            InputError: when the mask does not fit in the ring.
        """
        places = np.argwhere(mask.any(axis=2))
        row, column = ((places.min(axis=0) + places.max(axis=0)) / 2).round().astype(int)
        radius = np.linalg.norm(places - (row, column), axis=1).max() + 1
        if radius * ring.pitch > ring.diameter / 2:
            raise InputError(f"the body does not fit in a ring of {ring.diameter:g} mm; give a larger --diameter")
        return Field((int(row), int(column)), int(np.ceil(radius)) + 2)

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """Return the square of each slice of (D, H, W): (slices, N, N)."""
        padded = np.pad(volume, ((self.half, self.half), (self.half, self.half), (0, 0)))
        row, column = self.centre
        size = 2 * self.half + 1
        return padded[row : row + size, column : column + size].transpose(2, 0, 1)

    def put(self, stack: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Undo :meth:`cut`."""
        padded = np.zeros((shape[0] + 2 * self.half, shape[1] + 2 * self.half, shape[2]))
        row, column = self.centre
        size = 2 * self.half + 1
        padded[row : row + size, column : column + size] = stack.transpose(1, 2, 0)
        return padded[self.half : self.half + shape[0], self.half : self.half + shape[1]]


def pet_error(
    true_mu: np.ndarray, mu: np.ndarray, regions: Mapping[str, np.ndarray], ring: Ring, seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Compare attenuation correction by ``mu`` with that by ``true_mu``.

    The activity is 1 in ``regions["body"]``, and :data:`LESION_CONTRAST` in lesions in it. It is attenuated by
    ``true_mu`` and corrected by either map.

    Args:
        true_mu, mu: (D, H, W), cm⁻¹, on a grid of ``ring.pitch`` mm.
        regions: masks of the same shape, ``body`` among them.

    Returns:
        Figures in percent: of the correction factors on lines through the body (``acf``), of the activity by region
        (``suv``) and in the lesions (``lesion``); and volumes (D, H, W): the two reconstructions and their relative
        difference.
    """
    body = regions["body"]
    field = Field.around(body | (true_mu > MATTER) | (mu > MATTER), ring)
    lesions = place_lesions(body, LESION_RADIUS / ring.pitch, seed)
    activity = np.where(lesions > 0, LESION_CONTRAST, body.astype(float))
    ratios, images, factors = [], [], []
    for truth, other, source, inside in zip(*map(field.cut, (true_mu, mu, activity, body.astype(float)))):
        if not inside.any():
            images.append(np.zeros((2, *inside.shape)))
            continue
        lines, wrong = ring.project(truth), ring.project(other)
        measured = ring.project(source) * np.exp(-lines)
        images.append(np.stack([ring.reconstruct(measured * np.exp(line)) for line in (lines, wrong)]))
        through = ring.project(inside) > ring.pitch / 10
        ratios.append(np.expm1(wrong - lines)[through])
        factors.append(np.exp(lines)[through])
    reference, corrected = (field.put(np.stack([image[n] for image in images]), body.shape) for n in (0, 1))
    relative = np.where(body, (corrected - reference) / np.maximum(reference, LEAST_ACTIVITY), 0)
    in_lesions = [_mean_ratio(corrected, reference, lesions == n) for n in np.unique(lesions)[1:]]
    figures = {
        "acf": {**_percent(np.concatenate(ratios)), "mean_true": float(np.concatenate(factors).mean())},
        "suv": {name: _percent(relative[mask & (lesions == 0)]) for name, mask in regions.items()},
        "lesion": _percent(np.array(in_lesions)),
    }
    return figures, {"reference": reference, "corrected": corrected, "relative": relative, "lesions": lesions}


def _mean_ratio(corrected: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    return float(corrected[mask].mean() / reference[mask].mean() - 1)


def _percent(ratios: np.ndarray) -> dict[str, float]:
    """Return mean, mean absolute value, 5th and 95th percentile, and largest absolute value, in percent."""
    if not ratios.size:
        return {}
    low, high = np.percentile(ratios, (5, 95))
    values = {"mean": ratios.mean(), "mean_abs": np.abs(ratios).mean(), "p5": low, "p95": high}
    values["max_abs"] = np.abs(ratios).max()
    return {name: float(100 * value) for name, value in values.items()}


def place_lesions(body: np.ndarray, radius: float, seed: int) -> np.ndarray:
    """Return labels (D, H, W) of up to :data:`LESIONS` balls of ``radius`` voxels inside a mask, apart from each other,
    the same ones for the same mask and seed."""
    room = np.argwhere(ndimage.distance_transform_edt(np.pad(body, 1))[1:-1, 1:-1, 1:-1] > radius + 1)
    labels = np.zeros(body.shape, dtype=np.uint8)
    chosen: list[np.ndarray] = []
    grid = np.moveaxis(np.indices(body.shape), 0, -1)
    for place in np.random.default_rng(seed).permutation(room):
        if all(np.linalg.norm(place - other) > 4 * radius for other in chosen):
            chosen.append(place)
            labels[((grid - place) ** 2).sum(-1) <= radius**2] = len(chosen)
        if len(chosen) == LESIONS:
            break
    return labels

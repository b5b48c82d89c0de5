"""MR simulated from CT, for training and scoring where no MR of the same patient exists.

Each voxel of the CT is divided into air, fat, soft tissue, marrow and mineral by its HU. The signal of each follows
from relaxation times and the signal equation of the sequence. What a CT does not tell apart (muscle, liver, blood) is
drawn at random by region, so that a network learns from shape and surroundings, not from one grey value. Labels of
organs, where there are any, say which region is of what.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from scipy import ndimage

from custom_modules.data.mr import StandardizeMRd
from custom_modules.data.organs import TISSUE_WORDS
from custom_modules.data.regions import FIRST_REGION, FIRST_TISSUE, MARROW, SURFACE
from custom_modules.errors import InputError

Range = Sequence[float]


class Relaxation(NamedTuple):
    """T1 and T2 in ms at 1.5 and 3 T, and the proton density relative to that of water."""

    t1: tuple[float, float]
    t2: tuple[float, float]
    density: float


# de Bazelaire et al. 2004 (Radiology 230:652); muscle: mean of theirs and of Gold et al. 2004 (AJR 183:343), because
# with theirs alone it is darker in T2 than in real MRs; blood, brain: Stanisz et al. 2005 (MRM 54:507); fluid:
# cerebrospinal, Rooney et al. 2007 (MRM 57:308); densities: water content by Woodard and White 1986 (BJR 59:1209)
TISSUES = {
    "fat": Relaxation((343, 382), (58, 68), 0.90),
    "marrow": Relaxation((1000, 1200), (45, 45), 0.70),  # its water, assumed; with its fat T1 is 549 and 586
    "muscle": Relaxation((993, 1159), (31, 30), 0.79),
    "liver": Relaxation((586, 809), (46, 34), 0.71),
    "spleen": Relaxation((1057, 1328), (79, 61), 0.79),
    "kidney": Relaxation((966, 1142), (87, 76), 0.81),
    "pancreas": Relaxation((584, 725), (46, 43), 0.71),
    "blood": Relaxation((1441, 1932), (290, 275), 0.83),
    "brain": Relaxation((1004, 1452), (84, 82), 0.78),  # mean of white and grey matter
    "fluid": Relaxation((4000, 4000), (1500, 1500), 1.00),
}
ORGANS = {"liver": 0.2, "spleen": 0.1, "kidney": 0.15, "pancreas": 0.2, "blood": 0.2, "brain": 0.1, "fluid": 0.05}
FIELDS = 1.5, 3.0  # T
FAT_SHIFT = 3.4e-6 * 42.58e6  # Hz per T, between water and fat

# HU at which the parts of a voxel begin and end (Schneider et al. 2000: fat -98, muscle 14 to 50, cortical bone 1600)
FAT_HU, SOFT_HU, SPONGY_HU = -100.0, 20.0, 120.0
AERATED_HU = -250.0  # less than any fat: air and soft tissue


class Contrast(NamedTuple):
    """Ranges from which the sequence of one volume is drawn.

    Attributes:
        sequence: ``spin_echo`` or ``gradient_echo`` (spoiled).
        repetition_time, echo_time: ms. Gradient echoes take the echo time at which fat has the wanted phase.
        flip_angle: degrees.
        fat_phase: cycles between water and fat, 0 in phase, 0.5 opposed.
        fat_signal, water_signal: what is left of them where one is suppressed.
        fat_t2: factor on the T2 of fat, which echo trains lengthen (Henkelman et al. 1992, JMRI 2:533).
    """

    sequence: str
    repetition_time: Range
    echo_time: Range = (0, 0)
    flip_angle: Range = (90, 90)
    fat_phase: Range = (0, 0)
    fat_signal: Range = (1, 1)
    water_signal: Range = (1, 1)
    fat_t2: Range = (1, 1)


def contrast_of(name: str, settings: Mapping[str, Any]) -> Contrast:
    """Return the contrast that ``settings`` describe, or raise InputError that says what is wrong with ``name``."""
    try:
        contrast = Contrast(**settings)
    except TypeError as error:
        raise InputError(f"contrast '{name}': {error}; a contrast has {', '.join(Contrast._fields)}") from error
    if contrast.sequence not in ("spin_echo", "gradient_echo"):
        raise InputError(f"contrast '{name}': sequence is '{contrast.sequence}', not spin_echo or gradient_echo")
    return contrast


class Parts(NamedTuple):
    """Shares of each voxel: protons at all, fat among them, and mineral; and where there is marrow."""

    protons: np.ndarray
    fat: np.ndarray
    mineral: np.ndarray
    marrow: np.ndarray


def voxel_parts(ct: np.ndarray, regions: np.ndarray, cortical_hu: float = 1300.0) -> Parts:
    """Return the parts of the voxels of a CT (D, H, W) in HU, given its
    :func:`~custom_modules.data.regions.tissue_regions`. At ``cortical_hu`` all is mineral."""
    hu = ndimage.gaussian_filter(ct.astype(np.float32), 0.6)  # the noise of the CT is none of the MR
    tissue = tissue_beside_air(hu)
    fat = np.clip((SOFT_HU - tissue) / (SOFT_HU - FAT_HU), 0, 1) * (tissue >= AERATED_HU)
    mineral = np.clip((hu - SPONGY_HU) / (cortical_hu - SPONGY_HU), 0, 1)
    marrow = regions == MARROW
    bone = marrow | (regions == SURFACE)
    protons = np.clip((hu + 1000) / (np.clip(tissue, FAT_HU, SOFT_HU) + 1000), 0, 1)
    return Parts(protons, fat, mineral * bone, marrow)


def tissue_beside_air(hu: np.ndarray) -> np.ndarray:
    """A CT (D, H, W) in which a voxel that is partly air has the HU of the tissue beside it: half air and half muscle
    has the HU of fat, and lungs would have an outline that no MR shows."""
    air = hu < AERATED_HU
    beside = ndimage.binary_dilation(air, ndimage.generate_binary_structure(3, 3)) & ~air
    return np.where(beside, np.maximum(np.minimum(ndimage.maximum_filter(hu, 5), SOFT_HU), hu), hu)


class SimulateMR(Randomizable):
    """Draws an MR for a CT.

    Args:
        contrasts: by name, the fields of :class:`Contrast` and ``share``, how often it is drawn.
        organs: range of the share of regions of unknown tissue that are no muscle.
        cortical_hu: range of the HU at which a voxel has no signal; below that of cortical bone, because the field
            around mineral is not even. 800 to 1000 fit real limbs (benchmarks/simulation.py).
        marrow_fat: range of the share of fat in marrow; each bone has its own. Vertebrae have 0.2 to 0.6 (Baum et al.
            2015, JMRI 42:1018), the bones of limbs up to 0.95.
        relaxation: relative SD of relaxation times and proton densities between patients.
        dephasing: range of R2' of soft tissue in 1/s at 1.5 T; it grows with the field.
        trabecular: range of the factor on it in trabecular bone, which distorts the field (Wehrli et al. 1991,
            Radiology 179:615). Vertebrae in a gradient echo of 6.5 ms at 3 T have 0.03 to 0.10 of the signal of fat.
        lung: range of the power of its density with which the signal of aerated tissue falls.
        shading: range of the largest factor between bright and dark, a smooth field.
        noise: range of the SD of Rician noise, as a share of the brightest signal.
        slice_thickness: range in mm, along one axis; ``thick_slices`` is the share of volumes with such slices.
    """

    def __init__(
        self,
        contrasts: Mapping[str, Mapping[str, Any]],
        organs: Range = (0.0, 0.4),
        cortical_hu: Range = (600, 1100),
        marrow_fat: Range = (0.15, 0.95),
        relaxation: float = 0.12,
        dephasing: Range = (5, 25),
        trabecular: Range = (1, 16),
        lung: Range = (1.0, 2.5),
        shading: Range = (1.0, 1.5),
        noise: Range = (0.005, 0.04),
        slice_thickness: Range = (3, 8),
        thick_slices: float = 0.6,
    ) -> None:
        if not contrasts:
            raise InputError("no contrasts to simulate; name at least one (configs/whole_body.yaml)")
        shares = {name: dict(settings).get("share", 1) for name, settings in contrasts.items()}
        self.contrasts = {
            name: contrast_of(name, {key: value for key, value in settings.items() if key != "share"})
            for name, settings in contrasts.items()
        }
        self.shares = np.array(list(shares.values()), float) / sum(shares.values())
        self.organs, self.cortical_hu, self.marrow_fat = organs, cortical_hu, marrow_fat
        self.relaxation, self.dephasing, self.trabecular = relaxation, dephasing, trabecular
        self.lung, self.shading, self.noise = lung, shading, noise
        self.slice_thickness, self.thick_slices = slice_thickness, thick_slices

    def __call__(
        self, ct: np.ndarray, regions: np.ndarray, spacing: Sequence[float], contrast: str | None = None
    ) -> np.ndarray:
        """Return the MR of a CT, both (D, H, W), the CT in HU, the MR with its brightest signal near 1000.

        Args:
            regions: of :func:`~custom_modules.data.regions.tissue_regions`.
            spacing: mm.
            contrast: its name; drawn when None.

        Raises:
            InputError: for an unknown contrast.
        """
        if contrast is None:
            contrast = list(self.contrasts)[self.R.choice(len(self.contrasts), p=self.shares)]
        if contrast not in self.contrasts:
            raise InputError(f"no contrast '{contrast}'; there are {', '.join(self.contrasts)}")
        parts = voxel_parts(ct, regions, self._draw(self.cortical_hu))
        signal = self._signal(self.contrasts[contrast], parts, regions)
        signal *= (regions > 0) / max(float(np.percentile(signal[regions > 0], 99.5)), 1e-6) if regions.any() else 0
        signal *= self._shading(signal.shape)
        return 1000 * self._noisy(self._sliced(signal, spacing)).astype(np.float32)

    def _draw(self, limits: Range) -> float:
        return float(self.R.uniform(*limits))

    def _signal(self, contrast: Contrast, parts: Parts, regions: np.ndarray) -> np.ndarray:
        """Magnitude of water and fat, by the signal equations of spin echo and spoiled gradient echo."""
        field = self.R.randint(len(FIELDS))
        time, angle = self._draw(contrast.repetition_time), np.deg2rad(self._draw(contrast.flip_angle))
        phase, gradient = self._draw(contrast.fat_phase), contrast.sequence == "gradient_echo"
        shift = FAT_SHIFT * FIELDS[field] / 1000  # cycles per ms
        # the first echo in phase is at time zero; up to 9 or 11 ms at 1.5 T, 7 or 8 ms at 3 T
        cycles = self.R.randint(0 if phase > 0.25 else 1, 3 + field) + phase
        echo = cycles / shift if gradient else self._draw(contrast.echo_time)
        dephasing = self._draw(self.dephasing) / 1000 * FIELDS[field] / FIELDS[0] if gradient else 0.0
        fat_t2, fat_signal = self._draw(contrast.fat_t2), self._draw(contrast.fat_signal)

        def signal(tissue: str, stronger: float = 1.0) -> float:
            t1, t2, density = TISSUES[tissue]
            vary = np.exp(self.relaxation * self.R.standard_normal(3))
            t1, t2 = t1[field] * vary[0], t2[field] * vary[1] * (fat_t2 if tissue == "fat" else 1)
            weight = np.exp(-time / t1)
            weighted = np.sin(angle) * (1 - weight) / (1 - np.cos(angle) * weight)
            return density * vary[2] ** 0.3 * weighted * np.exp(-echo * (1 / t2 + stronger * dephasing))

        spongy = self._draw(self.trabecular) if gradient else 1.0
        share = self._draw(self.organs)
        count = max(int(regions.max()) + 1, FIRST_REGION)  # a crop may be air alone
        kinds = np.where(
            self.R.random_sample(count) < share, self.R.choice(list(ORGANS), count, p=list(ORGANS.values())), "muscle"
        )
        known = slice(FIRST_TISSUE, FIRST_REGION)
        kinds[known] = list(TISSUE_WORDS)
        muscle = signal("muscle")  # one muscle for the volume, organs of their own
        water = np.array([muscle if kind == "muscle" else signal(kind) for kind in kinds])
        water = water * np.exp(0.4 * self.relaxation * self.R.standard_normal(count))  # between muscles
        water[MARROW], water[SURFACE] = signal("marrow", spongy), muscle
        bones, number = ndimage.label(parts.marrow)
        marrow_fat = np.concatenate([[0.0], self.R.uniform(*self.marrow_fat, number)])[bones]  # 0 outside of marrow
        fat_share = np.maximum(parts.fat, marrow_fat)
        fat = fat_signal * signal("fat") * np.where(parts.marrow, np.exp(-echo * (spongy - 1) * dephasing), 1.0)
        water_signal = ndimage.gaussian_filter(water[regions].astype(np.float32), 0.5) * (1 - fat_share)
        both = self._draw(contrast.water_signal) * water_signal + fat * fat_share * np.exp(2j * np.pi * phase)
        aerated = parts.protons ** self._draw(self.lung)
        return (np.abs(both) * aerated * (1 - parts.mineral)).astype(np.float32)

    def _shading(self, shape: Sequence[int]) -> np.ndarray:
        """A smooth field whose logarithm spans that of a factor drawn from ``shading``."""
        coarse = ndimage.zoom(self.R.standard_normal((4, 4, 4)), 2, order=3, mode="nearest")
        field = ndimage.zoom(coarse, [n / m for n, m in zip(shape, coarse.shape)], order=1, mode="nearest")
        span = max(float(np.ptp(field)), 1e-6)
        return np.exp(np.log(self._draw(self.shading)) * (field - field.mean()) / span).astype(np.float32)

    def _sliced(self, signal: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """The signal as thick slices along one axis show it, interpolated back."""
        if self.R.random_sample() >= self.thick_slices:
            return signal
        axis, thickness = self.R.randint(3), self._draw(self.slice_thickness)
        count = max(2, round(signal.shape[axis] * spacing[axis] / thickness))
        averaged = ndimage.uniform_filter1d(signal, max(1, round(thickness / spacing[axis])), axis, mode="nearest")
        moved = torch.from_numpy(np.ascontiguousarray(np.moveaxis(averaged, axis, 2)))
        flat = moved.reshape(1, -1, moved.shape[2])
        sliced = torch.nn.functional.interpolate(flat, size=count, mode="linear")
        back = torch.nn.functional.interpolate(sliced, size=moved.shape[2], mode="linear")
        return np.moveaxis(back.reshape(moved.shape).numpy(), 2, axis)

    def _noisy(self, signal: np.ndarray) -> np.ndarray:
        """The magnitude of the signal with complex Gaussian noise (Gudbjartsson and Patz 1995)."""
        sigma = self._draw(self.noise)
        real, imaginary = (sigma * self.R.standard_normal(signal.shape).astype(np.float32) for _ in range(2))
        return np.hypot(signal + real, imaginary)


class SimulateMRd(MapTransform):
    """Put a simulated MR on the networks' scale into ``image`` where there is none; the same one for a ``patient`` at
    every call. ``regions`` are taken out."""

    def __init__(self, simulate: SimulateMR, reference: float, contrast: str | None = None, seed: int = 0) -> None:
        super().__init__("label")
        self.simulate, self.contrast, self.seed = simulate, contrast, seed
        self.standardize = StandardizeMRd("image", reference)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if "image" in data:
            return {key: value for key, value in data.items() if key != "regions"}
        self.simulate.set_random_state(zlib.crc32(f"{self.seed} {data['patient']}".encode()))
        return self.simulated(data)

    def simulated(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        ct, regions = data["label"], data.pop("regions")
        values = self.simulate(np.asarray(ct[0]), np.asarray(regions[0]), np.asarray(ct.pixdim), self.contrast)
        data["image"] = MetaTensor(torch.from_numpy(values)[None], affine=ct.affine)
        return self.standardize(data)


class RandSimulateMRd(RandomizableTransform, SimulateMRd):
    """As :class:`SimulateMRd`, at random: always where an item has a CT only, else with probability ``prob``."""

    def __init__(self, simulate: SimulateMR, reference: float, prob: float = 0.0) -> None:
        SimulateMRd.__init__(self, simulate, reference)
        RandomizableTransform.__init__(self, prob)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> RandSimulateMRd:
        self.simulate.set_random_state(seed, state)
        super().set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize(data)
        if "image" in data and not self._do_transform:
            return {key: value for key, value in data.items() if key != "regions"}
        return self.simulated(data)

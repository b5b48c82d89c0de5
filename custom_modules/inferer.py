"""Whole-volume latent sampling: tiled encode, windows blended in the prediction, tiled decode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from monai.inferers import Inferer, sliding_window_inference
from monai.utils import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from custom_modules.memory import free_memory, shrinking, window_batch
from custom_modules.synthesizer import Synthesizer
from custom_modules.tiling import Box, Windows, pad_to_windows, tile_size, tiles, times

TILE_BYTES = 230  # of memory a voxel at the peak of encoding or decoding; generous, see docs/performance.md
LEAST_TILE = 2**21  # voxels; in smaller ones there is little beside the halo
WAVELET_GRID = 4  # latent voxels: the coarsest grid of the two-level transforms, on which tiles have to lie


class LatentSamplingInferer(Inferer):
    """MR to synthetic CT for volumes of any size.

    ``whole``: one latent and one noise field for the patient. In each DDIM step the network's output is computed in
    overlapping windows, blended with a Gaussian, and the step is taken once on the whole latent, so that windows
    never disagree about the sample. ``windows``: every window is encoded, sampled and decoded on its own, and the
    images are blended; kept as the baseline that the first replaces.

    Windows and tiles that hold no body are not computed: they are air. Volumes stay in main memory, only tiles and
    latents go to the network's device. When memory runs out, tiles or batches are halved and the log says so.

    Args:
        roi_size: window, in image voxels; rounded up to what the networks divide by.
        overlap: share of a window that neighbours have in common, in [0, 1).
        margin: image voxels that a volume is continued by on each side, replicating its edge, so that a field of view
            that cuts through the body does not end where the convolutions' zero padding begins.
        sampling: ``whole`` or ``windows``.
        num_inference_steps: DDIM steps.
        num_samples: samples drawn in one pass: the MR is encoded once, and their windows share batches. From two on the
            answer has a second channel, the voxelwise standard deviation of the samples.
        output: ``mean`` of the samples, or the first ``sample``.
        seed: of the noise, which is drawn on the CPU and so is the same on every device; sample k has seed + k, so that
            N samples are those of N runs of one.
        tile_voxels: of the largest tile that is encoded or decoded at once.
        halo: image voxels around each tile that are computed with it and thrown away; with 32 other tiles move the
            answer by 0.02 HU on average (benchmarks/invariance.py, single precision).
        sw_batch_size: windows a batch; chosen by the free memory of the device when None.
        memory_limit: GiB that the process may hold, on CPU of main memory, on CUDA of the device's; what is free when
            None.
        amp: bfloat16 autocast of the denoiser. The autoencoder stays in single precision, without which tiles would differ
            from the whole by rounding.
        progress: show a bar over tiles and windows.

    Raises:
        ValueError: for an unknown ``sampling`` or ``output``, an overlap outside [0, 1), a negative seed or no samples.
    """

    def __init__(
        self,
        roi_size: Sequence[int] = (64, 64, 64),
        overlap: float = 0.25,
        margin: int = 4,
        sampling: str = "whole",
        num_inference_steps: int = 1,
        num_samples: int = 1,
        output: str = "mean",
        seed: int = 0,
        tile_voxels: int = 12_000_000,
        halo: int = 32,
        sw_batch_size: int | None = None,
        memory_limit: float | None = None,
        amp: bool = True,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if sampling not in ("whole", "windows"):
            raise ValueError(f"sampling must be 'whole' or 'windows', got '{sampling}'")
        if output not in ("mean", "sample"):
            raise ValueError(f"output must be 'mean' or 'sample', got '{output}'")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {overlap}")
        if seed < 0 or num_samples < 1:
            raise ValueError(f"seed must be 0 or more and num_samples 1 or more, got {seed} and {num_samples}")
        self.roi_size, self.overlap, self.margin, self.sampling = tuple(roi_size), overlap, margin, sampling
        self.num_inference_steps, self.num_samples, self.seed = num_inference_steps, num_samples, seed
        self.output = output
        self.tile_voxels, self.halo, self.sw_batch_size = int(tile_voxels), halo, sw_batch_size
        self.memory_limit, self.amp, self.progress = memory_limit, amp, progress

    @torch.inference_mode()
    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: Synthesizer, body: Tensor | None = None
    ) -> Tensor:
        """Synthesise one volume.

        Args:
            inputs: MR (1, 1, D, H, W) in [-1, 1].
            network: the bundle's ``network_def``.
            body: mask of the same shape; voxels outside it need not be computed. Everything when None.

        Returns:
            Synthetic CT (1, 1, D, H, W) in [-1, 1]; of several samples (1, 2, D, H, W), the second channel their
            standard deviation on the same scale. Where the inputs are.

        Raises:
            InputError: when memory runs out even with the smallest tiles and batches.
        """
        network.eval()
        mr = convert_to_tensor(inputs, track_meta=False)
        body = torch.ones_like(mr) if body is None else convert_to_tensor(body, track_meta=False).to(mr)
        roi_size = [-(-size // network.downsampling) * network.downsampling for size in self.roi_size]
        (mr, inside), (body, _) = (pad_to_windows(x, roi_size, network.downsampling, self.margin) for x in (mr, body))
        generators = [torch.Generator().manual_seed(self.seed + k) for k in range(self.num_samples)]
        road = self._whole if self.sampling == "whole" else self._windows
        return road(mr, body, network, roi_size, generators)[inside]

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp)

    def _batch(self, network: Synthesizer, roi_size: Sequence[int]) -> int:
        window = math.prod(roi_size) // network.autoencoder.downsampling**3
        return self.sw_batch_size or window_batch(
            network.device, window, network.denoiser.time_channels, self.memory_limit
        )

    def _bar(self, total: int, what: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=what, unit=unit, disable=not self.progress, leave=False)

    def _summary(self, samples: Iterable[Tensor]) -> Tensor:
        """The answer and, of several samples, their standard deviation as a second channel, in one pass over them so
        that only one is held at a time (Welford 1962)."""
        mean: Tensor | float = 0.0
        squares: Tensor | float = 0.0
        for count, sample in enumerate(samples, start=1):
            difference = sample - mean
            mean = mean + difference / count
            squares = squares + difference * (sample - mean)
            first = sample if count == 1 else first
        answer = mean if self.output == "mean" else first
        return answer if count == 1 else torch.cat([answer, (squares / (count - 1)).sqrt()], dim=1)

    # one latent for the patient

    def _whole(
        self, mr: Tensor, body: Tensor, network: Synthesizer, roi_size: list[int], generators: list[torch.Generator]
    ) -> Tensor:
        f = network.autoencoder.downsampling
        body = F.max_pool3d(body, f)[0, 0] > 0
        windows = Windows(body.to(network.device), [size // f for size in roi_size], self.overlap)
        z_mr = self._encode(mr, network, windows.needed)
        z = self._sample(z_mr, network, windows, self._batch(network, roi_size), generators)
        return self._decode(z, network, body)

    def _sample(
        self, z_mr: Tensor, network: Synthesizer, windows: Windows, batch: int, generators: list[torch.Generator]
    ) -> Tensor:
        """CT latents (K, c, d, h, w), one of each generator's noise."""
        noise = torch.cat([torch.randn(z_mr.shape, generator=generator) for generator in generators]).to(z_mr)
        denoise = Denoising(network, z_mr, windows, keep=self.num_inference_steps > 1)
        passes = len(windows.boxes) * len(noise) * self.num_inference_steps
        with self._bar(passes, "denoising", "window") as bar, self._autocast(z_mr.device):

            def predict(z: Tensor, t: int) -> Tensor:
                return shrinking(lambda amount: denoise(z, t, amount, bar), batch, 1, "windows")

            return network.schedule.sample(predict, noise, self.num_inference_steps)

    def _tiles(self, size: Sequence[int], f: int, voxels: int) -> list[tuple]:
        """Tiles of a latent of ``size`` that stand for at most ``voxels`` of the image, halo and all."""
        halo = -(-self.halo // (f * WAVELET_GRID)) * WAVELET_GRID
        return list(tiles(size, tile_size(size, voxels // f**3, halo, WAVELET_GRID), halo))

    def _tile_voxels(self, device: torch.device) -> int:
        return min(self.tile_voxels, max(free_memory(device, self.memory_limit) // TILE_BYTES, LEAST_TILE))

    def _encode(self, mr: Tensor, network: Synthesizer, needed: Tensor) -> Tensor:
        """Z_MR (1, c, d, h, w) on the network's device; zero in tiles where nothing is ``needed``."""
        f, device = network.autoencoder.downsampling, network.device

        def encode(voxels: int) -> Tensor:
            z = torch.zeros(1, network.autoencoder.latent_channels, *needed.shape, device=device)
            parts = [part for part in self._tiles(needed.shape, f, voxels) if needed[part[1]].any()]
            with self._bar(len(parts), "encoding", "tile") as bar:
                for wide, box, inner in parts:
                    z[(..., *box)] = network.encode(mr[(..., *times(wide, f))].to(device), "MR")[(..., *inner)]
                    bar.update()
            return z

        return shrinking(encode, self._tile_voxels(device), LEAST_TILE, "voxels")

    def _decode(self, z: Tensor, network: Synthesizer, body: Tensor) -> Tensor:
        """The samples ``z`` (K, c, d, h, w) decoded tile by tile and summed up in main memory, air in tiles without
        ``body``: the volume exists once, however many samples there are."""
        f = network.autoencoder.downsampling

        def decode(voxels: int) -> Tensor:
            ct = torch.zeros(1, 1 if len(z) == 1 else 2, *(size * f for size in body.shape))
            ct[:, 0] = -1
            parts = [part for part in self._tiles(body.shape, f, voxels) if body[part[1]].any()]
            with self._bar(len(parts) * len(z), "decoding", "tile") as bar:
                for wide, box, inner in parts:
                    samples = self._decoded(z, wide, inner, network, bar)
                    ct[(..., *times(box, f))] = self._summary(samples).to(ct)
            return ct

        return shrinking(decode, self._tile_voxels(z.device), LEAST_TILE, "voxels")

    @staticmethod
    def _decoded(z: Tensor, wide: Box, inner: Box, network: Synthesizer, bar: tqdm) -> Iterator[Tensor]:
        inner = times(inner, network.autoencoder.downsampling)
        for sample in z.split(1):
            yield network.decode(sample[(..., *wide)])[(..., *inner)]
            bar.update()

    # each window on its own

    def _windows(
        self, mr: Tensor, body: Tensor, network: Synthesizer, roi_size: list[int], generators: list[torch.Generator]
    ) -> Tensor:
        def synthesize(stack: Tensor) -> Tensor:
            image, mask = stack.split(1, dim=1)
            inside = mask.flatten(1).any(dim=1)
            ct = torch.full_like(image, -1.0)
            if self.num_samples > 1:
                ct = torch.cat([ct, torch.zeros_like(ct)], dim=1)
            if not inside.any():
                return ct
            z_mr = network.encode(image[inside], "MR")
            # every sample has a generator, so that its noise does not depend on the window batch
            noise = torch.cat([torch.randn(z_mr.shape, generator=generator) for generator in generators]).to(z_mr)
            with self._autocast(z_mr.device):
                condition = network.condition(z_mr.repeat(len(generators), 1, 1, 1, 1))
                z = network.schedule.sample(
                    lambda z, t: network.predict(z, t, condition), noise, self.num_inference_steps
                )
            ct[inside] = self._summary(network.decode(s) for s in z.chunk(len(generators))).to(ct.dtype)
            return ct

        return sliding_window_inference(
            torch.cat([mr, body], dim=1), roi_size, self._batch(network, roi_size), synthesize, self.overlap,
            mode="gaussian", progress=self.progress, sw_device=network.device, device=mr.device,
        )  # fmt: skip


class Denoising:
    """The denoiser's output on whole latents (K, c, d, h, w), computed in windows and blended.

    Args:
        z_mr: (1, c, d, h, w).
        windows: that hold body; the others stand for air.
        keep: what depends on ``z_mr`` only, for the steps to come.
    """

    def __init__(self, network: Synthesizer, z_mr: Tensor, windows: Windows, keep: bool) -> None:
        self.network, self.z_mr, self.windows, self.keep = network, z_mr, windows, keep
        self.air = network.air_latent()
        self.conditions: dict[int, Sequence[Tensor]] = {}

    def __call__(self, z: Tensor, t: int, batch: int, bar: tqdm) -> Tensor:
        """The output at timestep ``t``, ``batch`` windows at once."""
        boxes, shares = self.windows.boxes, self.windows.shares
        output = self.windows.rest * self.network.schedule.output_for(self.air, z, t)
        jobs = [(window, sample) for window in range(len(boxes)) for sample in range(len(z))]
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            noisy = torch.stack([z[(sample, ..., *boxes[window])] for window, sample in part])
            answers = self.network.predict(noisy, t, self._condition([window for window, _ in part]))
            for (window, sample), answer in zip(part, answers):
                output[(sample, ..., *boxes[window])] += shares[window] * answer
            bar.update(len(part))
        return output

    def _condition(self, names: Sequence[int]) -> list[Tensor]:
        """The conditions of the windows ``names`` as one batch."""
        if not self.keep:
            self.conditions = {name: self.conditions[name] for name in names if name in self.conditions}
        new = [name for name in dict.fromkeys(names) if name not in self.conditions]
        if new:
            stack = torch.cat([self.z_mr[(..., *self.windows.boxes[name])] for name in new])
            condition = self.network.condition(stack)
            self.conditions.update(zip(new, zip(*(tensor.split(1) for tensor in condition))))
        return [torch.cat(tensors) for tensors in zip(*(self.conditions[name] for name in names))]

"""Sampling the CT latent of a whole volume: encode, denoise and decode, in tiles where memory asks for them."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from custom_modules.memory import free_memory, halve_when_out_of_memory
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.tiling import Box, pad_to_windows, scale_box, tile_size, tiles, widen

# Bytes of memory per voxel of the image at the peak of encoding or decoding, and of denoising; generous, see
# docs/performance.md
TILE_BYTES, DENOISER_BYTES = 230, 60
LEAST_TILE = 2**21  # voxels; in smaller ones there is little beside the halo
WAVELET_GRID = 4  # latent voxels: the coarsest grid of the two-level transforms, on which tiles have to lie


class LatentSampler(Inferer):
    """What both ways of sampling share: MR to synthetic CT for volumes of any size.

    Tiles and windows that hold no body are not computed: they are air. Volumes stay in main memory, only tiles and
    latents go to the network's device.

    Args:
        num_inference_steps: DDIM steps.
        num_samples: samples drawn in one pass: the MR is encoded once. With two or more the result has a second channel,
            the voxelwise standard deviation of the samples.
        output: ``mean`` of the samples, or the first ``sample``.
        seed: of the noise, which is drawn on the CPU and so is the same on every device; sample k has seed + k, so that
            N samples are those of N runs of one.
        margin: image voxels that a volume is continued by on each side, replicating its edge, so that a field of view
            that cuts through the body does not end where the convolutions' zero padding begins.
        memory_limit: GiB that the process may hold, on CPU of main memory, on CUDA of the device's; what is free when
            None.
        amp: bfloat16 autocast of the denoiser. Faster where the device computes in it; tiles then differ from the whole by
            its rounding. The autoencoder stays in single precision.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown ``output``, a negative seed or no samples.
    """

    def __init__(
        self,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        output: str = "mean",
        seed: int = 0,
        margin: int = 4,
        memory_limit: float | None = None,
        amp: bool = False,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if output not in ("mean", "sample"):
            raise ValueError(f"output must be 'mean' or 'sample', got '{output}'")
        if seed < 0 or num_samples < 1:
            raise ValueError(f"seed must be 0 or more and num_samples 1 or more, got {seed} and {num_samples}")
        self.num_inference_steps, self.num_samples, self.output, self.seed = (
            num_inference_steps,
            num_samples,
            output,
            seed,
        )
        self.margin, self.memory_limit, self.amp, self.progress = margin, memory_limit, amp, progress

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
            standard deviation on the same scale. On the device of the inputs.

        Raises:
            InputError: when memory runs out even with the smallest tiles.
        """
        network.eval()
        mr = convert_to_tensor(inputs, track_meta=False)
        body = torch.ones_like(mr) if body is None else convert_to_tensor(body, track_meta=False).to(mr)
        generators = [torch.Generator().manual_seed(self.seed + k) for k in range(self.num_samples)]
        least, unit = self._least_size(network), network.downsampling
        (mr, inside), (body, _) = (pad_to_windows(x, least, unit, self.margin) for x in (mr, body))
        return self._synthesize(mr, body, network, generators)[inside]

    @abstractmethod
    def _least_size(self, network: Synthesizer) -> list[int]:
        """The smallest volume that can be computed, in image voxels."""

    @abstractmethod
    def _synthesize(self, mr: Tensor, body: Tensor, network: Synthesizer, generators: list[torch.Generator]) -> Tensor:
        """The synthetic CT of a padded MR, with the standard deviation of several samples as a second channel."""

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp)

    def _bar(self, total: int, what: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=what, unit=unit, disable=not self.progress, leave=False)

    def _summary(self, samples: Iterable[Tensor]) -> Tensor:
        """Mean or first sample and, of several samples, their standard deviation as a second channel, in one pass so that
        only one sample is held at a time (Welford 1962)."""
        samples = iter(samples)
        first = mean = next(samples)
        squares, count = torch.zeros_like(first), 1
        for count, sample in enumerate(samples, start=2):  # noqa: B007
            difference = sample - mean
            mean = mean + difference / count
            squares = squares + difference * (sample - mean)
        result = mean if self.output == "mean" else first
        return result if count == 1 else torch.cat([result, (squares / (count - 1)).sqrt()], dim=1)


class WholeVolumeInferer(LatentSampler):
    """One latent and one noise field for the patient, and every DDIM step is taken on all of it.

    What does not fit into memory at once is computed in tiles with a halo around each, so that there are no seams. When
    memory runs out, tiles are halved and the log says so.

    Args:
        tile_voxels: of the largest tile that is encoded or decoded at once. The denoiser, which needs less memory per voxel,
            takes larger ones.
        halo: image voxels around each tile that are computed with it and thrown away, for the denoiser rounded up to
            windows of its attention; how far tiles change the result is in docs/performance.md.
        settings: see :class:`LatentSampler`.
    """

    def __init__(self, tile_voxels: int = 12_000_000, halo: int = 32, **settings) -> None:
        super().__init__(**settings)
        self.tile_voxels, self.halo = int(tile_voxels), halo

    def _least_size(self, network: Synthesizer) -> list[int]:
        return [network.downsampling] * 3

    def _synthesize(self, mr: Tensor, body: Tensor, network: Synthesizer, generators: list[torch.Generator]) -> Tensor:
        body = (F.max_pool3d(body, network.autoencoder.downsampling)[0, 0] > 0).to(network.device)
        z = self._sample(self._encode(mr, network, body), network, body, generators)
        return self._decode(z, network, body)

    def _tiles(self, body: Tensor, network: Synthesizer, voxels: int, grid: int, reach: int = 0) -> list[tuple]:
        """Tiles of the latent that stand for at most ``voxels`` of the image, halo included, and start on ``grid``; those
        with ``body`` no farther than ``reach`` voxels of the latent."""
        f = network.autoencoder.downsampling
        halo, size = -(-self.halo // (f * grid)) * grid, body.shape
        every = tiles(size, tile_size(size, voxels // f**3, halo, grid), halo)
        return [part for part in every if body[widen(part[1], reach, size)].any()]

    def _tile_voxels(self, device: torch.device, voxel_bytes: int) -> int:
        """Of a tile that takes ``voxel_bytes`` per voxel: as many as are asked for, and as there is memory for."""
        free = free_memory(device, self.memory_limit)
        return min(self.tile_voxels * TILE_BYTES // voxel_bytes, max(free // voxel_bytes, LEAST_TILE))

    def _encode(self, mr: Tensor, network: Synthesizer, body: Tensor) -> Tensor:
        """Z_MR (1, c, d, h, w) on the network's device; zero in tiles that are too far from ``body`` to matter to it."""
        f, device, reach = network.autoencoder.downsampling, network.device, network.denoiser.window

        def encode(voxels: int) -> Tensor:
            z = torch.zeros(1, network.autoencoder.latent_channels, *body.shape, device=device)
            parts = self._tiles(body, network, voxels, WAVELET_GRID, reach)
            with self._bar(len(parts), "encoding", "tile") as bar:
                for wide, box, inner in parts:
                    z[(..., *box)] = network.encode(mr[(..., *scale_box(wide, f))].to(device), "MR")[(..., *inner)]
                    bar.update()
            return z

        return halve_when_out_of_memory(encode, self._tile_voxels(device, TILE_BYTES), LEAST_TILE, "voxels")

    def _sample(self, z_mr: Tensor, network: Synthesizer, body: Tensor, generators: list[torch.Generator]) -> Tensor:
        """CT latents (K, c, d, h, w), one from each generator's noise (Eqs. 13 and 14)."""
        noise = torch.cat([torch.randn(z_mr.shape, generator=generator) for generator in generators]).to(z_mr)
        steps, air = self.num_inference_steps, functools.cache(network.air_latent)  # encoding air takes a while

        def sample(voxels: int) -> Tensor:
            parts = self._tiles(body, network, voxels, network.denoiser.window)
            everywhere = sum(body[box].numel() for _, box, _ in parts) == body.numel()

            @functools.lru_cache(maxsize=None if steps > 1 else 0)
            def condition(tile: int) -> Sequence[Tensor]:  # depends on the MR only: the same for all steps
                return network.condition(z_mr[(..., *parts[tile][0])])

            def predict(z: Tensor, t: int) -> Tensor:
                output = torch.empty_like(z) if everywhere else network.schedule.output_for(air(), z, t)
                with self._autocast(z.device):
                    for tile, (wide, box, inner) in enumerate(parts):
                        context = condition(tile)
                        for k in range(len(z)):
                            prediction = network.predict(z[(slice(k, k + 1), ..., *wide)], t, context)
                            output[(k, ..., *box)] = prediction[(0, ..., *inner)]
                            bar.update()
                return output

            with self._bar(steps * len(parts) * len(noise), "denoising", "tile") as bar:
                return network.schedule.sample(predict, noise, steps)

        most = self._tile_voxels(noise.device, DENOISER_BYTES)
        return halve_when_out_of_memory(sample, most, LEAST_TILE, "voxels")

    def _decode(self, z: Tensor, network: Synthesizer, body: Tensor) -> Tensor:
        """The samples ``z`` (K, c, d, h, w) decoded tile by tile and summarised in main memory, air in tiles without
        ``body``: the volume exists once, however many samples there are."""
        f = network.autoencoder.downsampling

        def decode(voxels: int) -> Tensor:
            ct = torch.zeros(1, 1 if len(z) == 1 else 2, *(size * f for size in body.shape))
            ct[:, 0] = -1
            parts = self._tiles(body, network, voxels, WAVELET_GRID)
            with self._bar(len(parts) * len(z), "decoding", "tile") as bar:
                for wide, box, inner in parts:
                    samples = self._decoded(z, wide, inner, network, bar)
                    ct[(..., *scale_box(box, f))] = self._summary(samples).to(ct)
            return ct

        return halve_when_out_of_memory(decode, self._tile_voxels(z.device, TILE_BYTES), LEAST_TILE, "voxels")

    @staticmethod
    def _decoded(z: Tensor, wide: Box, inner: Box, network: Synthesizer, bar: tqdm) -> Iterator[Tensor]:
        inner = scale_box(inner, network.autoencoder.downsampling)
        for sample in z.split(1):
            yield network.decode(sample[(..., *wide)])[(..., *inner)]
            bar.update()

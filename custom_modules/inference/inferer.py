"""Sampling the CT latent of a whole volume: encode, denoise and decode, in tiles where memory is short."""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from custom_modules.errors import InputError
from custom_modules.memory import free_memory, halve_when_out_of_memory
from custom_modules.networks.schedule import DDIMSchedule
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.tiling import Box, pad_to_windows, scale_box, tile_size, tiles, widen

# Peak memory in bytes per voxel of the image, of encoding or decoding, and of denoising; generous, see
# docs/performance.md
TILE_BYTES, DENOISER_BYTES = 230, 60
LEAST_TILE = 2**21  # voxels; smaller tiles would be mostly halo
WAVELET_GRID = 4  # latent voxels: the coarsest grid of the two-level transforms, to which tiles are aligned


class LatentSampler(Inferer):
    """Base class of both ways of sampling: MR to synthetic CT for volumes of any size.

    Tiles and windows that hold no body are not computed: they are air. Volumes are kept in main memory; only tiles and
    latents are moved to the network's device.

    Args:
        output: ``mean``, the estimate in ``num_inference_steps``, or the first ``sample``.
        num_inference_steps: DDIM steps of the estimate, from zeros, the mode of the prior. In one step it is the mean;
            more steps bring it nearer to a sample.
        num_samples: samples drawn in one pass, for which the MR is encoded once. With two or more the result has a
            second channel, the voxelwise standard deviation of the samples.
        sample_steps: DDIM steps of each sample. In one step samples from noise alone hardly differ.
        sample_timestep: where each sample starts: from noise alone when None, as in the paper, otherwise from the
            estimate with noise of that timestep (Eq. 11; SDEdit, Meng et al. 2022).
        seed: of the noise, which is drawn on the CPU and is therefore the same on every device. Sample k has seed + k,
            so that N samples equal those of N runs with one sample each.
        margin: image voxels added on each side by replicating the edge, so that the zero padding of the convolutions
            does not begin where a field of view cuts through the body.
        memory_limit: GiB that the process may use: of main memory on a CPU, of the device's memory on CUDA; what is
            free when None.
        amp: bfloat16 autocast of the denoiser. Faster where the device supports it; tiles then differ from the whole by
            rounding. The autoencoder always computes in single precision.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown ``output``, a negative seed or no samples.
    """

    def __init__(
        self,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        sample_steps: int = 8,
        sample_timestep: int | None = None,
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
        self.num_inference_steps, self.sample_steps = num_inference_steps, sample_steps
        self.sample_timestep = sample_timestep
        self.num_samples, self.output, self.seed = num_samples, output, seed
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
            Synthetic CT (1, 1, D, H, W) in [-1, 1], on the device of the inputs. With several samples (1, 2, D, H, W):
            the second channel is their standard deviation on the same scale.

        Raises:
            InputError: when memory is too small even for the smallest tiles, and for a ``sample_timestep`` that the
                schedule does not have.
        """
        network.eval()
        if (self.sample_timestep or 0) >= (count := network.schedule.num_train_timesteps):
            raise InputError(f"--sample_timestep {self.sample_timestep}: must be below num_train_timesteps, {count}")
        mr = convert_to_tensor(inputs, track_meta=False)
        body = torch.ones_like(mr) if body is None else convert_to_tensor(body, track_meta=False).to(mr)
        generators = [torch.Generator().manual_seed(self.seed + k) for k in range(self.num_samples)]
        least, unit = self._least_size(network), network.downsampling
        (mr, inside), (body, _) = (pad_to_windows(x, least, unit, self.margin) for x in (mr, body))
        return self._synthesize(mr, body, network, generators)[inside]

    @abstractmethod
    def _least_size(self, network: Synthesizer) -> list[int]:
        """Return the smallest size of a volume that can be computed, in image voxels."""

    @abstractmethod
    def _synthesize(self, mr: Tensor, body: Tensor, network: Synthesizer, generators: list[torch.Generator]) -> Tensor:
        """Return the synthetic CT of a padded MR, with the standard deviation of several samples as a second
        channel."""

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp)

    def _bar(self, total: int, what: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=what, unit=unit, disable=not self.progress, leave=False)

    def _draw(
        self,
        z_mr: Tensor,
        generators: Sequence[torch.Generator],
        schedule: DDIMSchedule,
        sample: Callable[[Tensor, int, int | None], Tensor],
    ) -> list[Tensor]:
        """Return the latents of all that :meth:`_summary` needs, each of the shape of ``z_mr`` (N, ...): the estimate,
        if that is the output, and the samples, if they are the output or their deviation is asked for.

        Args:
            sample: maps several such latents (K * N, ...), the number of steps and the first timestep to clean latents.
        """
        estimate = []
        if self.output == "mean" or self.sample_timestep is not None:
            estimate.append(sample(torch.zeros_like(z_mr), self.num_inference_steps, None))
        if self.output == "mean" and self.num_samples == 1:
            return estimate
        z = torch.cat([torch.randn(z_mr.shape, generator=generator) for generator in generators]).to(z_mr)
        if self.sample_timestep is not None:
            z = schedule.add_noise(
                torch.cat(estimate * len(generators)), z, torch.full((len(z),), self.sample_timestep)
            )
        samples = sample(z, self.sample_steps, self.sample_timestep).chunk(len(generators))
        return [*estimate, *samples] if self.output == "mean" else list(samples)

    def _summary(self, images: Iterable[Tensor]) -> Tensor:
        """Return the first of the images of :meth:`_draw` and, if there are several samples, their standard deviation
        as a second channel; in one pass, so that only one sample is in memory at a time (Welford 1962)."""
        images = iter(images)
        result = next(images)
        if self.num_samples == 1:
            return result
        samples = images if self.output == "mean" else itertools.chain([result], images)
        mean, squares, count = torch.zeros_like(result), torch.zeros_like(result), 0
        for count, sample in enumerate(samples, start=1):  # noqa: B007
            difference = sample - mean
            mean = mean + difference / count
            squares = squares + difference * (sample - mean)
        return torch.cat([result, (squares / (count - 1)).sqrt()], dim=1)


class WholeVolumeInferer(LatentSampler):
    """Samples one latent of the whole patient from one noise field; every DDIM step covers all of it.

    What does not fit into memory is computed in tiles with a halo, so that there are no seams. When memory runs out,
    the tiles are halved, with a message in the log.

    Args:
        tile_voxels: size of the largest tile that is encoded or decoded at once. The denoiser, which needs less memory
            per voxel, computes larger ones.
        halo: image voxels around each tile that are computed with it and discarded; for the denoiser rounded up to
            windows of its attention. docs/performance.md says how far tiles change the result.
        settings: see :class:`LatentSampler`.
    """

    def __init__(self, tile_voxels: int = 12_000_000, halo: int = 32, **settings) -> None:
        super().__init__(**settings)
        self.tile_voxels, self.halo = int(tile_voxels), halo

    def _least_size(self, network: Synthesizer) -> list[int]:
        return [network.downsampling] * 3

    def _synthesize(self, mr: Tensor, body: Tensor, network: Synthesizer, generators: list[torch.Generator]) -> Tensor:
        body = (F.max_pool3d(body, network.autoencoder.downsampling)[0, 0] > 0).to(network.device)
        z_mr = self._encode(mr, network, body)

        def sample(z: Tensor, steps: int, first: int | None) -> Tensor:
            return self._sample(z_mr, z, steps, first, network, body)

        return self._decode(torch.cat(self._draw(z_mr, generators, network.schedule, sample)), mr, network, body)

    def _tiles(self, body: Tensor, network: Synthesizer, voxels: int, grid: int, reach: int = 0) -> list[tuple]:
        """Return tiles of the latent that cover at most ``voxels`` of the image, halo included, and start on ``grid``;
        only those with ``body`` within ``reach`` latent voxels."""
        f = network.autoencoder.downsampling
        halo, size = -(-self.halo // (f * grid)) * grid, body.shape
        every = tiles(size, tile_size(size, voxels // f**3, halo, grid), halo)
        return [part for part in every if body[widen(part[1], reach, size)].any()]

    def _tile_voxels(self, device: torch.device, voxel_bytes: int) -> int:
        """Return how many voxels a tile may have that needs ``voxel_bytes`` per voxel, by the settings and by
        memory."""
        free = free_memory(device, self.memory_limit)
        return min(self.tile_voxels * TILE_BYTES // voxel_bytes, max(free // voxel_bytes, LEAST_TILE))

    def _encode(self, mr: Tensor, network: Synthesizer, body: Tensor) -> Tensor:
        """Return Z_MR (1, c, d, h, w) on the network's device; zero in tiles too far from ``body`` to influence it."""
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

    def _sample(
        self,
        z_mr: Tensor,
        start: Tensor,
        steps: int,
        first: int | None,
        network: Synthesizer,
        body: Tensor,
    ) -> Tensor:
        """Return CT latents (K, c, d, h, w) from ``start``, noisy latents at timestep ``first`` (Eqs. 13 and 14), with
        that of air in tiles without body."""

        def sample(voxels: int) -> Tensor:
            parts = self._tiles(body, network, voxels, network.denoiser.window)
            everywhere = sum(body[box].numel() for _, box, _ in parts) == body.numel()

            @functools.lru_cache(maxsize=None if steps > 1 else 0)
            def condition(tile: int) -> Sequence[Tensor]:  # depends on the MR only: the same for all steps
                return network.condition(z_mr[(..., *parts[tile][0])])

            def predict(z: Tensor, t: int) -> Tensor:
                output = torch.empty_like(z) if everywhere else network.schedule.output_for(network.air_latent(), z, t)
                with self._autocast(z.device):
                    for tile, (wide, box, inner) in enumerate(parts):
                        context = condition(tile)
                        for k in range(len(z)):
                            prediction = network.predict(z[(slice(k, k + 1), ..., *wide)], t, context)
                            output[(k, ..., *box)] = prediction[(0, ..., *inner)]
                            bar.update()
                return output

            with self._bar(steps * len(parts) * len(start), "denoising", "tile") as bar:
                return network.schedule.sample(predict, start, steps, first=first)

        most = self._tile_voxels(start.device, DENOISER_BYTES)
        return halve_when_out_of_memory(sample, most, LEAST_TILE, "voxels")

    def _decode(self, z: Tensor, mr: Tensor, network: Synthesizer, body: Tensor) -> Tensor:
        """Decode the latents ``z`` (K, c, d, h, w) of an MR tile by tile, air in tiles without ``body``. Images are
        summarised in main memory, so that the volume exists once, however many samples there are."""
        f = network.autoencoder.downsampling

        def decode(voxels: int) -> Tensor:
            ct = torch.zeros(1, 1 + (self.num_samples > 1), *(size * f for size in body.shape))
            ct[:, 0] = -1
            parts = self._tiles(body, network, voxels, WAVELET_GRID)
            with self._bar(len(parts) * len(z), "decoding", "tile") as bar:
                for wide, box, inner in parts:
                    part = mr[(..., *scale_box(wide, f))].to(z.device)
                    samples = self._decoded(z[(..., *wide)], network.detail(part), scale_box(inner, f), network, bar)
                    ct[(..., *scale_box(box, f))] = self._summary(samples).to(ct)
            return ct

        return halve_when_out_of_memory(decode, self._tile_voxels(z.device, TILE_BYTES), LEAST_TILE, "voxels")

    @staticmethod
    def _decoded(z: Tensor, detail: Tensor | None, inner: Box, network: Synthesizer, bar: tqdm) -> Iterator[Tensor]:
        for sample in z.split(1):
            yield network.decode(sample, detail=detail)[(..., *inner)]
            bar.update()

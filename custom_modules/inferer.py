"""Whole-volume latent sampling: tiled encode, windows blended in the prediction, tiled decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from monai.inferers import Inferer, sliding_window_inference
from monai.utils import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from custom_modules.memory import window_batch
from custom_modules.synthesizer import Synthesizer


def pad_to_windows(x: Tensor, roi_size: Sequence[int], unit: int, margin: int = 0) -> tuple[Tensor, tuple]:
    """Pad (N, C, D, H, W) on both sides by at least ``margin``, to at least ``roi_size`` and to multiples of ``unit``,
    replicating the edge.

    Returns:
        The padded tensor and the index that crops it back.
    """
    sizes = x.shape[2:]
    extra = [max(roi, -(-(size + 2 * margin) // unit) * unit) - size for roi, size in zip(roi_size, sizes)]
    margins = [(e // 2, e - e // 2) for e in extra]
    padded = F.pad(x, [m for pair in reversed(margins) for m in pair], mode="replicate")
    return padded, (..., *(slice(before, before + size) for (before, _), size in zip(margins, sizes)))


class LatentSamplingInferer(Inferer):
    """MR to synthetic CT for volumes of any size.

    ``whole``: one latent and one noise field for the patient. In each DDIM step the network's output is computed in
    overlapping windows, blended with a Gaussian, and the step is taken once on the whole latent, so that windows
    never disagree about the sample. ``windows``: every window is encoded, sampled and decoded on its own, and the
    images are blended; kept as the baseline that the first replaces.

    Windows that hold no body are not computed: their output is the one that stands for air.

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
        tile_size: largest image tile that is encoded or decoded at once, in voxels; rounded down to multiples of
            four times what the networks divide by (64).
        sw_batch_size: windows a batch; chosen by the free memory of the device when None.
        amp: bfloat16 autocast.
        progress: show a bar over the steps.

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
        tile_size: Sequence[int] = (128, 128, 128),
        sw_batch_size: int | None = None,
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
        self.tile_size, self.sw_batch_size = tuple(tile_size), sw_batch_size
        self.amp, self.progress = amp, progress

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
            standard deviation on the same scale.
        """
        network.eval()
        mr = convert_to_tensor(inputs, track_meta=False)
        body = torch.ones_like(mr) if body is None else convert_to_tensor(body, track_meta=False).to(mr)
        roi_size = [-(-size // network.downsampling) * network.downsampling for size in self.roi_size]
        (mr, inside), (body, _) = (pad_to_windows(x, roi_size, network.downsampling, self.margin) for x in (mr, body))
        window = math.prod(size // network.autoencoder.downsampling for size in roi_size)
        batch = self.sw_batch_size or window_batch(mr.device, window, network.denoiser.time_channels)
        generators = [torch.Generator().manual_seed(self.seed + k) for k in range(self.num_samples)]
        with torch.autocast(mr.device.type, dtype=torch.bfloat16, enabled=self.amp):
            road = self._whole if self.sampling == "whole" else self._windows
            ct = road(mr, body, network, roi_size, batch, generators)
        return ct[inside]

    def _steps(self, steps):
        return tqdm(steps, desc="sampling", unit="step", disable=not self.progress)

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

    def _whole(
        self, mr: Tensor, body: Tensor, network: Synthesizer, roi_size: list[int], batch: int,
        generators: list[torch.Generator],
    ) -> Tensor:  # fmt: skip
        f = network.autoencoder.downsampling
        step = 4 * network.downsampling  # so that a quarter of a tile, the overlap, stays on the coarsest grid
        tile_size = [max(size // step, 1) * step for size in self.tile_size]
        z_mr = self._tiled(mr, lambda tile: network.encode(tile, "MR"), tile_size)
        noise = torch.cat([torch.randn(z_mr.shape, generator=generator) for generator in generators]).to(z_mr)
        latent_body = F.max_pool3d(body, f).expand(len(noise), -1, -1, -1, -1)
        z_mr, air = z_mr.expand_as(noise), network.air_latent().expand_as(noise)
        window = [size // f for size in roi_size]

        def predict(z: Tensor, t: int) -> Tensor:
            stack = torch.cat([z, z_mr, network.schedule.output_for(air, z, t), latent_body], dim=1)
            return sliding_window_inference(
                stack, window, batch, lambda w: self._predict_windows(w, network, t), self.overlap, mode="gaussian"
            )

        z = network.schedule.sample(predict, noise, self.num_inference_steps, self._steps)
        return self._summary(self._tiled(s, network.decode, [size // f for size in tile_size]) for s in z.split(1))

    @staticmethod
    def _predict_windows(stack: Tensor, network: Synthesizer, t: int) -> Tensor:
        """Windows of (z, z_mr, output that stands for air, body): the network where there is body, else air."""
        c = network.autoencoder.latent_channels
        z, z_mr, output, body = stack.split([c, c, c, 1], dim=1)
        inside = body.flatten(1).any(dim=1)
        output = output.clone()
        if inside.any():
            output[inside] = network.predict(z[inside], t, z_mr[inside]).to(output.dtype)
        return output

    @staticmethod
    def _tiled(x: Tensor, predictor: Callable[[Tensor], Tensor], tile_size: list[int]) -> Tensor:
        tile = [min(t, size) for t, size in zip(tile_size, x.shape[2:])]
        if list(x.shape[2:]) == tile:
            return predictor(x)
        return sliding_window_inference(x, tile, 1, predictor, overlap=0.25, mode="gaussian", sigma_scale=0.25)

    def _windows(
        self, mr: Tensor, body: Tensor, network: Synthesizer, roi_size: list[int], batch: int,
        generators: list[torch.Generator],
    ) -> Tensor:  # fmt: skip
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
            z_mr = z_mr.repeat(len(generators), 1, 1, 1, 1)
            z = network.schedule.sample(lambda z, t: network.predict(z, t, z_mr), noise, self.num_inference_steps)
            ct[inside] = self._summary(network.decode(s) for s in z.chunk(len(generators))).to(ct.dtype)
            return ct

        stack = torch.cat([mr, body], dim=1)
        return sliding_window_inference(
            stack, roi_size, batch, synthesize, self.overlap, mode="gaussian", progress=self.progress
        )

"""Sampling window by window, which :class:`~custom_modules.inference.inferer.WholeVolumeInferer` replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from custom_modules.inference.inferer import LatentSampler
from custom_modules.memory import window_batch
from custom_modules.networks.synthesizer import Synthesizer


class WindowInferer(LatentSampler):
    """Encodes, samples and decodes every window from its own noise, and blends the images.

    It serves to measure what a single latent per patient gains, and for engines with a fixed input size.

    Args:
        window_size: image voxels; rounded up to a multiple of what the networks divide by.
        overlap: share of a window that neighbours have in common, in [0, 1).
        sw_batch_size: windows computed at once; chosen by the free memory of the device when None.
        settings: see :class:`~custom_modules.inference.inferer.LatentSampler`.

    Raises:
        ValueError: for an overlap outside [0, 1).
    """

    def __init__(
        self,
        window_size: Sequence[int] = (64, 64, 64),
        overlap: float = 0.25,
        sw_batch_size: int | None = None,
        **settings,
    ) -> None:
        super().__init__(**settings)
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {overlap}")
        self.window_size, self.overlap, self.sw_batch_size = tuple(window_size), overlap, sw_batch_size

    def _least_size(self, network: Synthesizer) -> list[int]:
        return [-(-size // network.downsampling) * network.downsampling for size in self.window_size]

    def _synthesize(self, mr: Tensor, body: Tensor, network: Synthesizer, generators: list[torch.Generator]) -> Tensor:
        window = self._least_size(network)
        voxels = math.prod(window) // network.autoencoder.downsampling**3
        batch = self.sw_batch_size or window_batch(
            network.device, voxels, network.denoiser.time_channels, self.memory_limit
        )
        return sliding_window_inference(
            torch.cat([mr, body], dim=1), window, batch, lambda stack: self._windows(stack, network, generators),
            self.overlap, mode="gaussian", progress=self.progress, sw_device=network.device, device=mr.device,
        )  # fmt: skip

    def _windows(self, stack: Tensor, network: Synthesizer, generators: list[torch.Generator]) -> Tensor:
        """Synthesise windows of MR and body (N, 2, D, H, W): CTs (N, 1 or 2, D, H, W)."""
        image, mask = stack.split(1, dim=1)
        inside = mask.flatten(1).any(dim=1)
        ct = torch.full_like(image, -1.0)
        if self.num_samples > 1:
            ct = torch.cat([ct, torch.zeros_like(ct)], dim=1)
        if not inside.any():
            return ct
        z_mr = network.encode(image[inside], "MR")
        with self._autocast(z_mr.device):
            context = network.condition(z_mr)

        def sample(z: Tensor, steps: int, first: int | None) -> Tensor:
            condition = [torch.cat([part] * (len(z) // len(z_mr))) for part in context]
            with self._autocast(z_mr.device):
                return network.schedule.sample(lambda z, t: network.predict(z, t, condition), z, steps, first=first)

        # one generator per sample, so that its noise does not depend on the batch size of windows
        latents, detail = self._draw(z_mr, generators, network.schedule, sample), network.detail(image[inside])
        ct[inside] = self._summary(network.decode(z, detail=detail) for z in latents).to(ct.dtype)
        return ct

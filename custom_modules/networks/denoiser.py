"""The diffusion U-Net of the modality translation stage (Fig. 1), whose skip connections pass through DSCA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn

from custom_modules.networks.blocks import ChannelRMSNorm, ResidualBlock
from custom_modules.networks.dsca import DualSkipConnectionAttention, split_windows

KEYS_AND_VALUES = 4  # tensors that the DSCA of one scale computes from Z_MR


class LatentDenoiser(nn.Module):
    """epsilon_theta(Z_CT^t, t, Z_MR) of Eq. 12, or its velocity form, with one DSCA per scale.

    Args:
        latent_channels: c; the input has 2 c channels, the noisy CT latent and then the MR latent.
        channels: features of each scale, finest first; every scale but the last halves the resolution.
        num_blocks: residual blocks per scale, on the way down and on the way up.
        dsca: False for plain concatenation in the skips (Table II without DSCA).
        attention_channels: see :class:`~custom_modules.networks.dsca.DualSkipConnectionAttention`.
        window: latent voxels along each side of the windows within which DSCA attends, as many as a training crop has;
            rounded up to a multiple of what the scales and the pooling divide by. The windows lie on a fixed grid, so
            that a latent of any size has a single result, which tiles with a halo on that grid give too.
        pooling: factor by which Z_MR is pooled before the keys are computed; 1 for full resolution.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (64, 128, 128),
        num_blocks: int = 2,
        dsca: bool = True,
        attention_channels: int = 64,
        window: int = 16,
        pooling: int = 2,
    ) -> None:
        super().__init__()
        self.latent_channels, self.time_channels = latent_channels, channels[0]
        self.downsampling = 2 ** (len(channels) - 1)
        unit = math.lcm(self.downsampling, pooling)
        self.window, self.pooling = -(-window // unit) * unit, pooling
        embedding = 4 * channels[0]
        self.time_embedding = nn.Sequential(
            nn.Linear(self.time_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.conv_in = nn.Conv3d(2 * latent_channels, channels[0], 3, padding=1)
        self.down, self.downsample, self.up, self.upsample, self.skip = (nn.ModuleList() for _ in range(5))
        for level, width in enumerate(channels):
            last = level == len(channels) - 1
            self.down.append(nn.ModuleList(ResidualBlock(width, width, embedding) for _ in range(num_blocks)))
            self.downsample.append(nn.Identity() if last else nn.Conv3d(width, channels[level + 1], 2, stride=2))
            widths = [2 * width] + [width] * num_blocks
            self.up.append(nn.ModuleList(ResidualBlock(a, b, embedding) for a, b in zip(widths, widths[1:])))
            self.upsample.append(
                nn.Identity() if level == 0 else nn.ConvTranspose3d(width, channels[level - 1], 2, stride=2)
            )
            if dsca:
                self.skip.append(
                    DualSkipConnectionAttention(width, latent_channels, attention_channels, self.window >> level)
                )
        self.middle = ResidualBlock(channels[-1], channels[-1], embedding)
        self.out = nn.Sequential(
            ChannelRMSNorm(channels[0]), nn.SiLU(), nn.Conv3d(channels[0], latent_channels, 3, padding=1)
        )

    def condition(self, z_mr: Tensor) -> tuple[Tensor, ...]:
        """Compute all that depends on Z_MR (N, c, d, h, w) only, so that a sampler does it once: the MR half of the
        first convolution, and for each scale the keys and values of its DSCA, window by window."""
        weight = self.conv_in.weight[:, self.latent_channels :]
        features = F.conv3d(_channels_last(z_mr), weight, self.conv_in.bias, padding=1)
        pooled = F.avg_pool3d(z_mr, [min(self.pooling, size) for size in z_mr.shape[2:]], ceil_mode=True)
        windows = split_windows(pooled, self.window // self.pooling)
        return (features, *(tensor for dsca in self.skip for tensor in dsca.keys_and_values(windows)))

    def denoise(self, z: Tensor, timesteps: Tensor, condition: Sequence[Tensor]) -> Tensor:
        """Predict the noise (or velocity) of a batch.

        Args:
            z: noisy CT latent (N, c, d, h, w); d, h and w multiples of ``downsampling``.
            timesteps: (N,) integers.
            condition: the result of :meth:`condition`.

        Returns:
            (N, c, d, h, w).

        Raises:
            ValueError: for a size that is no multiple of ``downsampling``.
        """
        if any(size % self.downsampling for size in z.shape[2:]):
            raise ValueError(f"latent size {tuple(z.shape[2:])} is not a multiple of {self.downsampling}")
        features, *attention = condition
        embedding = self.time_embedding(get_timestep_embedding(timesteps, self.time_channels).to(z.dtype))
        weight = self.conv_in.weight[:, : self.latent_channels]
        h = F.conv3d(_channels_last(z), weight, padding=1) + features
        encoder_features = []
        for blocks, downsample in zip(self.down, self.downsample):
            for block in blocks:
                h = block(h, embedding)
            encoder_features.append(h)
            h = downsample(h)
        h = self.middle(h, embedding)
        for level in reversed(range(len(self.up))):
            e = encoder_features[level]
            keys_and_values = attention[KEYS_AND_VALUES * level : KEYS_AND_VALUES * (level + 1)]
            h = self.skip[level](e, h, *keys_and_values) if self.skip else torch.cat([e, h], dim=1)
            for block in self.up[level]:
                h = block(h, embedding)
            h = self.upsample[level](h)
        return self.out(h).float()

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Run :meth:`denoise` as MONAI's inferers call it: ``x`` (N, 2 c, d, h, w) holds the noisy CT latent and then
        the MR latent; ``context`` is unused."""
        z, z_mr = x.chunk(2, dim=1)
        return self.denoise(z, timesteps, self.condition(z_mr))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)

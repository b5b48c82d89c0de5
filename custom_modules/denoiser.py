"""The diffusion U-Net of the modality translation stage (Fig. 1), whose skip connections pass through DSCA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn

from custom_modules.blocks import ChannelRMSNorm, ResidualBlock
from custom_modules.dsca import DualSkipConnectionAttention


class LatentDenoiser(nn.Module):
    """epsilon_theta(Z_CT^t, t, Z_MR) of Eq. 12, or its velocity form; one DSCA a scale.

    Args:
        latent_channels: c; the input has 2 c channels, the noisy CT latent and then the MR latent.
        channels: features of each scale, finest first; every scale but the last halves the resolution.
        num_blocks: residual blocks a scale, on the way down and on the way up.
        dsca: False for plain concatenation in the skips (Table II without DSCA).
        attention_channels, max_tokens: see :class:`~custom_modules.dsca.DualSkipConnectionAttention`.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (64, 128, 128),
        num_blocks: int = 2,
        dsca: bool = True,
        attention_channels: int = 64,
        max_tokens: int = 512,
    ) -> None:
        super().__init__()
        self.latent_channels, self.time_channels = latent_channels, channels[0]
        self.downsampling = 2 ** (len(channels) - 1)
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
                self.skip.append(DualSkipConnectionAttention(width, latent_channels, attention_channels, max_tokens))
        self.middle = ResidualBlock(channels[-1], channels[-1], embedding)
        self.out = nn.Sequential(
            ChannelRMSNorm(channels[0]), nn.SiLU(), nn.Conv3d(channels[0], latent_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict the noise (or velocity) of a batch.

        Args:
            x: (N, 2 c, d, h, w), noisy CT latent and MR latent; d, h and w multiples of ``downsampling``.
            timesteps: (N,) integers.
            context: unused; MONAI's inferers pass it.

        Returns:
            (N, c, d, h, w).

        Raises:
            ValueError: for a size that does not divide.
        """
        if any(size % self.downsampling for size in x.shape[2:]):
            raise ValueError(f"latent size {tuple(x.shape[2:])} is not a multiple of {self.downsampling}")
        z_mr = x[:, self.latent_channels :]
        embedding = self.time_embedding(get_timestep_embedding(timesteps, self.time_channels).to(x.dtype))
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        encoder_features = []
        for blocks, downsample in zip(self.down, self.downsample):
            for block in blocks:
                h = block(h, embedding)
            encoder_features.append(h)
            h = downsample(h)
        h = self.middle(h, embedding)
        for level in reversed(range(len(self.up))):
            e = encoder_features[level]
            h = self.skip[level](e, h, z_mr) if self.skip else torch.cat([e, h], dim=1)
            for block in self.up[level]:
                h = block(h, embedding)
            h = self.upsample[level](h)
        return self.out(h).float()

"""The KL autoencoder that maps MR and CT into one latent space (stage 1, Fig. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from custom_modules.networks.blocks import ChannelRMSNorm, ResidualBlock, WaveletBlock
from custom_modules.networks.wavelets import BANDS, WaveletTransform3d


class Decoder(nn.Sequential):
    """The layers from latent to image, in order; those from number ``finest`` on work at the finest resolution."""

    def __init__(self, *layers: nn.Module, finest: int) -> None:
        super().__init__(*layers)
        self.finest = finest

    def forward(self, latent: Tensor, detail: Tensor | None = None) -> Tensor:
        """Decode (N, c, d, h, w); ``detail`` (N, channels[0], D', H', W') is added where the finest layers begin."""
        x = latent
        for number, layer in enumerate(self):
            if number == self.finest and detail is not None:
                x = x + detail
            x = layer(x)
        return x


class WaveletAutoencoderKL(nn.Module):
    """KL autoencoder of WaveletBlocks; one set of weights encodes and decodes both modalities.

    Images are (N, 1, D, H, W) in [-1, 1]; latents are (N, latent_channels, D/f, H/f, W/f), where f
    (``downsampling``) is a factor of 2 for each step between ``channels`` and another one for the Haar stem. D, H and W
    must be multiples of f. The first half of the latent channels holds the structure S, the second the modality M.

    Args:
        latent_channels: c, even.
        channels: feature channels of each resolution, finest first.
        num_blocks: blocks at each resolution, in the encoder and in the decoder.
        stem: ``haar`` puts a Haar transform at the image end and its inverse at the output, so that the first
            convolution sees eight bands at half the resolution; ``conv`` starts at full resolution.
        wavelet: the Wavelet Residual Module's wavelet, or None for plain residual blocks (Table II, "Vanilla").
        kernel_size: of the group-wise convolutions in that module.
        group_width: channels of their groups; 1 for depthwise convolutions.

    Raises:
        ValueError: for an odd ``latent_channels``, an unknown ``stem``, or an image size that is no multiple of f.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (32, 64),
        num_blocks: Sequence[int] = (1, 2),
        stem: str = "haar",
        wavelet: str | None = "haar",
        kernel_size: int = 3,
        group_width: int = 1,
    ) -> None:
        super().__init__()
        if latent_channels % 2:
            raise ValueError(
                f"latent_channels must be even to split into structure and modality, got {latent_channels}"
            )
        if stem not in ("haar", "conv"):
            raise ValueError(f"stem must be 'haar' or 'conv', got '{stem}'")
        self.latent_channels, self.channels = latent_channels, tuple(channels)
        self.stem = WaveletTransform3d("haar") if stem == "haar" else None
        self.downsampling = 2 ** (len(channels) - 1 + (stem == "haar"))
        image_channels = BANDS if stem == "haar" else 1

        def blocks(width: int, count: int) -> list[nn.Module]:
            if wavelet is None:
                return [ResidualBlock(width, width) for _ in range(count)]
            return [WaveletBlock(width, width, kernel_size, wavelet, group_width) for _ in range(count)]

        encoder: list[nn.Module] = [nn.Conv3d(image_channels, channels[0], 3, padding=1)]
        for level, (width, count) in enumerate(zip(channels, num_blocks)):
            if level:
                encoder.append(nn.Conv3d(channels[level - 1], width, 2, stride=2))
            encoder += blocks(width, count)
        encoder += [ChannelRMSNorm(channels[-1]), nn.SiLU(), nn.Conv3d(channels[-1], 2 * latent_channels, 1)]

        decoder: list[nn.Module] = [nn.Conv3d(latent_channels, channels[-1], 3, padding=1)]
        for level in reversed(range(len(channels))):
            finest = len(decoder)  # of the last round
            decoder += blocks(channels[level], num_blocks[level])
            if level:
                decoder.append(nn.ConvTranspose3d(channels[level], channels[level - 1], 2, stride=2))
        decoder += [ChannelRMSNorm(channels[0]), nn.SiLU(), nn.Conv3d(channels[0], image_channels, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), Decoder(*decoder, finest=finest)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance of an image's posterior, each of the latent's shape."""
        if any(size % self.downsampling for size in image.shape[2:]):
            raise ValueError(f"image size {tuple(image.shape[2:])} is not a multiple of {self.downsampling}")
        x = image if self.stem is None else self.stem(image)
        mean, log_variance = self.encoder(x.contiguous(memory_format=torch.channels_last_3d)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latent: Tensor, detail: Tensor | None = None) -> Tensor:
        """Return the image of a latent, nominally in [-1, 1], not clipped; for ``detail`` see :class:`Decoder`."""
        x = self.decoder(latent.contiguous(memory_format=torch.channels_last_3d), detail).float()
        return x if self.stem is None else self.stem.inverse(x, [2 * size for size in x.shape[2:]])

    @staticmethod
    def sample(mean: Tensor, log_variance: Tensor) -> Tensor:
        """Draw one sample from the posterior (by the reparametrisation of Kingma and Welling 2014)."""
        return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)

    @staticmethod
    def split(latent: Tensor) -> tuple[Tensor, Tensor]:
        """Split z = [S, M] into structure and modality, its halves along the channels (section III.B, Fig. 3)."""
        structure, modality = latent.chunk(2, dim=1)
        return structure, modality

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (reconstruction, sampled latent, mean, log-variance) of an image, for training."""
        mean, log_variance = self.encode(image)
        latent = self.sample(mean, log_variance)
        return self.decode(latent), latent, mean, log_variance

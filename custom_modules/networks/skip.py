"""The MR's own way to the decoder, past the latent: edges at 2 mm need not pass through the diffusion."""

from __future__ import annotations

from torch import Tensor, nn

from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.blocks import ChannelRMSNorm, ResidualBlock
from custom_modules.networks.wavelets import BANDS


class MRSkip(nn.Module):
    """From an MR (N, 1, D, H, W) to features (N, channels[0], ...) of the decoder's finest resolution.

    The MR passes the Haar transform of the autoencoder's stem, if it has one: its eight bands at half the resolution
    meet those of the CT in the decoder. The last convolution starts at zero, so that an untrained module adds nothing.

    Args:
        autoencoder: whose decoder the features are added in.
    """

    def __init__(self, autoencoder: WaveletAutoencoderKL) -> None:
        super().__init__()
        width = autoencoder.channels[0]
        self.stem = autoencoder.stem
        self.layers = nn.Sequential(
            nn.Conv3d(1 if self.stem is None else BANDS, width, 3, padding=1),
            ResidualBlock(width, width),
            ChannelRMSNorm(width),
            nn.SiLU(),
            nn.Conv3d(width, width, 1),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, mr: Tensor) -> Tensor:
        return self.layers(mr if self.stem is None else self.stem(mr))

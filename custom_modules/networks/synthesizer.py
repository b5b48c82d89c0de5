"""The bundle's ``network_def``: autoencoder, denoiser, latent scale and schedule in one module (Fig. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.denoiser import LatentDenoiser
from custom_modules.networks.schedule import DDIMSchedule
from custom_modules.networks.skip import MRSkip

MODALITIES = ("MR", "CT")


class Synthesizer(nn.Module):
    """3D-WLDM: MR to synthetic CT, both (N, 1, D, H, W) in [-1, 1].

    Latents inside are normalised: every channel has mean 0 and standard deviation 1 over the training set. Mean and
    standard deviation are computed once (:meth:`set_latent_scale`) and stored with the weights.

    Args:
        autoencoder, denoiser, schedule: the parts; each with its default arguments when None.
        hu_window: HU that are mapped to [-1, 1]; stored with the weights, and replaced when weights are loaded.
        num_inference_steps: steps of :meth:`forward`.
        mr_skip: give the decoder the MR beside the latent (:class:`~custom_modules.networks.skip.MRSkip`).
    """

    def __init__(
        self,
        autoencoder: WaveletAutoencoderKL | None = None,
        denoiser: LatentDenoiser | None = None,
        schedule: DDIMSchedule | None = None,
        hu_window: Sequence[float] = (-1000.0, 1600.0),
        num_inference_steps: int = 1,
        mr_skip: bool = True,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder or WaveletAutoencoderKL()
        channels = self.autoencoder.latent_channels
        self.denoiser = denoiser or LatentDenoiser(latent_channels=channels)
        self.schedule = schedule or DDIMSchedule()
        self.mr_skip = MRSkip(self.autoencoder) if mr_skip else None
        self.num_inference_steps = num_inference_steps
        self.register_buffer("hu_window", torch.tensor(hu_window))
        self.register_buffer("latent_mean", torch.zeros(len(MODALITIES), channels))
        self.register_buffer("latent_std", torch.ones(len(MODALITIES), channels))
        self.register_buffer("air", torch.zeros(channels))
        self.register_load_state_dict_pre_hook(_without_air)

    @property
    def downsampling(self) -> int:
        """Image voxels per voxel of the denoiser's coarsest scale, along each axis."""
        return self.autoencoder.downsampling * self.denoiser.downsampling

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    def _scale(self, modality: str) -> tuple[Tensor, Tensor]:
        row = MODALITIES.index(modality)
        return self.latent_mean[row].view(1, -1, 1, 1, 1), self.latent_std[row].view(1, -1, 1, 1, 1)

    @property
    def has_latent_scale(self) -> bool:
        """Whether the latent scale has been set, by training or by loaded weights."""
        return not bool((self.latent_std == 1).all())

    def set_latent_scale(self, modality: str, latents: Sequence[Tensor]) -> None:
        """Store the mean and standard deviation of each channel over ``latents``, each (c, d, h, w) as encoded."""
        row, channels = MODALITIES.index(modality), torch.cat([z.flatten(1) for z in latents], dim=1)
        self.latent_mean[row] = channels.mean(1)
        self.latent_std[row] = channels.std(1).clamp_min(1e-6)

    def normalize(self, latent: Tensor, modality: str) -> Tensor:
        """Scale a latent as encoded (N, c, ...) to mean 0 and standard deviation 1."""
        mean, std = self._scale(modality)
        return (latent - mean.to(latent.device)) / std.to(latent.device)

    def encode(self, image: Tensor, modality: str) -> Tensor:
        """Return the normalised mean of an image's posterior (N, c, D/f, H/f, W/f)."""
        return self.normalize(self.autoencoder.encode(image)[0], modality)

    def detail(self, mr: Tensor) -> Tensor | None:
        """Return what an MR gives the decoder beside the latent, equal for all samples; None without ``mr_skip``."""
        return None if self.mr_skip is None else self.mr_skip(mr)

    def decode(self, latent: Tensor, modality: str = "CT", detail: Tensor | None = None) -> Tensor:
        """Return the image of a normalised latent, clipped to [-1, 1]: a synthetic CT with the :meth:`detail` of its
        MR, a reconstruction from the latent alone."""
        mean, std = self._scale(modality)
        return self.autoencoder.decode(latent * std + mean, detail).clamp(-1, 1)

    def to_hu(self, ct: Tensor) -> Tensor:
        """Convert a CT in [-1, 1] to Hounsfield units."""
        low, high = self.hu_window.tolist()
        return (ct + 1) / 2 * (high - low) + low

    def condition(self, z_mr: Tensor) -> tuple[Tensor, ...]:
        """Compute what the denoiser needs of Z_MR, the same for every step (:meth:`LatentDenoiser.condition`)."""
        return self.denoiser.condition(z_mr)

    def predict(self, z: Tensor, t: int, condition: Sequence[Tensor]) -> Tensor:
        """Return the denoiser's output for the noisy CT latent ``z`` at timestep ``t``, given :meth:`condition`."""
        timesteps = torch.full((len(z),), t, device=z.device)
        return self.denoiser.denoise(z, timesteps, condition)

    def set_air_latent(self, autoencoder: WaveletAutoencoderKL) -> None:
        """Store the normalised CT latent of air by the encoder of ``autoencoder``, that of stage 1: the network's own
        one may be trained for MRs since."""
        size = 8 * self.downsampling
        air = torch.full((1, 1, size, size, size), -1.0, device=self.device)
        centre = size // autoencoder.downsampling // 2
        with torch.no_grad():
            self.air.copy_(self.normalize(autoencoder.encode(air)[0], "CT")[0, :, centre, centre, centre])

    def air_latent(self) -> Tensor:
        """Return the normalised CT latent of air, (1, c, 1, 1, 1)."""
        if not self.air.any():  # weights from before it was stored with them: their encoder is that of stage 1
            self.set_air_latent(self.autoencoder)
        return self.air.view(1, -1, 1, 1, 1)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the parts (``torch.compile``), because :meth:`encode`, :meth:`decode` and :meth:`predict` do not pass
        through :meth:`forward`."""
        self.autoencoder.encoder.compile(*args, **kwargs)
        self.autoencoder.decoder.compile(*args, **kwargs)
        if self.mr_skip is not None:
            self.mr_skip.compile(*args, **kwargs)
        self.denoiser.denoise = torch.compile(self.denoiser.denoise, *args, **kwargs)  # type: ignore[method-assign]

    def forward(self, mr: Tensor, noise: Tensor | None = None) -> Tensor:
        """Synthesise the CT of an MR in one piece; D, H and W must be multiples of ``downsampling``.

        Args:
            noise: Z_CT^T; zeros, the mode of the prior, when None, so that the result is deterministic.
        """
        z_mr = self.encode(mr, "MR")
        z = torch.zeros_like(z_mr) if noise is None else noise
        condition = self.condition(z_mr)
        z = self.schedule.sample(lambda z, t: self.predict(z, t, condition), z, self.num_inference_steps)
        return self.decode(z, detail=self.detail(mr))


def _without_air(network: Synthesizer, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let weights be loaded that were stored before the latent of air was."""
    state.setdefault(f"{prefix}air", torch.zeros_like(network.air))

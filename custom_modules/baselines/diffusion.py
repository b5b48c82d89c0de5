"""Diffusion models that 3D-WLDM is compared with: MONAI's networks, schedulers and inferers, with the MR as condition,
and for volumes slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.engines import PrepareBatch
from monai.inferers import ControlNetDiffusionInferer, DiffusionInferer, Inferer
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from monai.networks.schedulers import Scheduler
from monai.networks.schedulers.ddpm import DDPMPredictionType
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from custom_modules.networks.weights import load_weights_or_stop
from custom_modules.tiling import pad_to_windows
from custom_modules.training.losses import valid_voxels

CONDITIONS = ("concat", "crossattn", "controlnet", "none")


class ConditionalDiffusion(nn.Module):
    """MR to CT by a diffusion model of images or of latents, in 2D or 3D.

    ``condition`` says how the MR enters: ``concat``, as a further channel of the noisy image; ``crossattn``, as tokens
    of its latent and their positions, to which the U-Net attends (Rombach et al. 2022); ``controlnet``, through a
    copied encoder that reads the MR itself (Zhang et al. 2023); ``none``, not at all, as the model that a ControlNet
    extends.

    Args:
        unet: MONAI's ``DiffusionModelUNet``.
        scheduler: of training, MONAI's ``DDPMScheduler``; its ``prediction_type`` says whether the U-Net predicts the
            noise or the velocity.
        autoencoder: MONAI's ``AutoencoderKL``, which is frozen; when None, images are diffused themselves.
        controlnet: MONAI's ``ControlNet``.
        position_channels: sine and cosine channels for the position of a token; a multiple of 4 in 2D, of 6 in 3D.

    Raises:
        ValueError: for another ``condition``, or ``controlnet`` without one.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Scheduler,
        condition: str,
        autoencoder: nn.Module | None = None,
        controlnet: nn.Module | None = None,
        position_channels: int = 24,
    ) -> None:
        super().__init__()
        if condition not in CONDITIONS or (condition == "controlnet") != (controlnet is not None):
            raise ValueError(f"condition must be one of {CONDITIONS}, 'controlnet' with one, got '{condition}'")
        self.unet, self.autoencoder, self.controlnet = unet, autoencoder, controlnet
        self.scheduler, self.condition, self.position_channels = scheduler, condition, position_channels
        self.register_buffer("latent_std", torch.zeros(()))  # of the first batch, as in latent diffusion
        if autoencoder is not None:
            autoencoder.requires_grad_(False)

    def encode(self, image: Tensor) -> Tensor:
        """Return what is diffused of an image (N, 1, ...): itself, or the mean of its posterior."""
        if self.autoencoder is None:
            return image
        with torch.no_grad():
            latent = self.autoencoder.encode(image)[0].float()
        if self.latent_std == 0:
            self.latent_std.copy_(latent.std())
        return latent / self.latent_std

    def decode(self, latent: Tensor) -> Tensor:
        return latent if self.autoencoder is None else self.autoencoder.decode(latent * self.latent_std)

    def context(self, mr: Tensor) -> Tensor | None:
        """Return the condition for MONAI's inferers: the MR (N, 1, ...), tokens (N, tokens, channels), or None."""
        if self.condition == "concat":
            return self.encode(mr)
        if self.condition != "crossattn":
            return None
        latent = self.encode(mr)
        size = list(latent.shape[2:])
        place = build_sincos_position_embedding(size, self.position_channels, len(size)).to(latent)
        return torch.cat([latent.flatten(2).transpose(1, 2), place.expand(len(mr), -1, -1)], dim=2)

    def _inferer(self, mr: Tensor) -> tuple[DiffusionInferer, dict[str, Any]]:
        if self.condition == "controlnet":
            return ControlNetDiffusionInferer(self.scheduler), {"controlnet": self.controlnet, "cn_cond": mr}
        return DiffusionInferer(self.scheduler), {"mode": "concat" if self.condition == "concat" else "crossattn"}

    def forward(self, mr: Tensor, ct: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted and the true noise (or velocity) of a training step, at random timesteps."""
        clean = self.encode(ct)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(self.scheduler.num_train_timesteps, (len(clean),), device=clean.device)
        velocity = self.scheduler.prediction_type == DDPMPredictionType.V_PREDICTION
        target = self.scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
        inferer, how = self._inferer(mr)
        return inferer(clean, self.unet, noise=noise, timesteps=timesteps, condition=self.context(mr), **how), target

    @torch.no_grad()
    def sample(self, mr: Tensor, sampler: Scheduler, steps: int) -> Tensor:
        """Synthesise the CTs of MRs (N, 1, ...) with MONAI's ``DDPMScheduler`` or ``DDIMScheduler`` in ``steps`` steps,
        from noise of PyTorch's generator."""
        sampler.set_timesteps(steps)
        inferer, how = self._inferer(mr)
        noise = torch.randn_like(self.encode(mr))
        latent = inferer.sample(
            noise, self.unet, scheduler=sampler, conditioning=self.context(mr), verbose=False, **how
        )
        return self.decode(latent.float())


def add_controlnet(network: ConditionalDiffusion, path: str) -> ConditionalDiffusion:
    """Load the weights in ``path``, of the same diffusion model without a ControlNet, into ``network``, freeze them,
    and copy its encoder into the ControlNet, whose zero convolutions are kept (Zhang et al. 2023). Ends the program if
    that fails."""
    controlnet, network.controlnet = network.controlnet, None
    assert controlnet is not None, "a network without a ControlNet"
    load_weights_or_stop(network, path)
    network.requires_grad_(False)
    controlnet.load_state_dict(network.unet.state_dict(), strict=False)
    network.controlnet = controlnet
    return network


class NoiseLoss(nn.Module):
    """L2 between predicted and true noise, or velocity, over latent voxels in which at most one image voxel in twenty
    is invalid (:func:`~custom_modules.training.losses.valid_voxels`)."""

    def forward(self, output: tuple[Tensor, Tensor], valid: Tensor) -> Tensor:
        prediction, noise = output
        whole = F.interpolate(valid.float(), prediction.shape[2:], mode="area") > 0.95
        squares = (prediction.float() - noise).square().mean(dim=1, keepdim=True)
        return (squares * whole).sum() / whole.sum().clamp_min(1)


class AutoencoderKLLoss(nn.Module):
    """L1 reconstruction + ``kl_weight`` times the mean KL per latent element (Rombach et al. 2022) + ``adversary``."""

    def __init__(self, adversary: Callable[[Tensor], Tensor], kl_weight: float = 2e-5) -> None:
        super().__init__()
        self.adversary, self.kl_weight = adversary, kl_weight

    def forward(self, output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        reconstruction, mean, sigma = (x.float() for x in output)
        kl = 0.5 * (mean.square() + sigma.square() - 1 - 2 * sigma.log()).mean()
        return (reconstruction - target).abs().mean() + self.kl_weight * kl + self.adversary(reconstruction)


class PairedPrepareBatch(PrepareBatch):
    """The MR as input, the valid voxels of the pair as target, and the CT as the second argument of the network."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        mr, ct = (convert_to_tensor(batchdata[k], track_meta=False).to(device) for k in ("image", "label"))
        return mr, valid_voxels(mr, ct), (ct,), {}


class SlicePrepareBatch(PrepareBatch):
    """Runs another ``prepare_batch`` on transverse slices: crops one voxel high, (N, 1, D, H, 1), as (N, 1, D, H)."""

    def __init__(self, prepare_batch: PrepareBatch) -> None:
        self.prepare_batch = prepare_batch

    def __call__(self, batchdata: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        planes = {key: convert_to_tensor(batchdata[key], track_meta=False)[..., 0] for key in ("image", "label")}
        return self.prepare_batch({**batchdata, **planes}, *args, **kwargs)


class VolumeInferer(Inferer):
    """Applies a network to a whole volume (1, 1, D, H, W) in RAS order, or to its transverse slices.

    Args:
        predict: maps (images, network) to images of the same size.
        unit: sizes are padded to multiples of it by replicating the edge; the padding is removed from the result.
        slices: transverse slices per batch; whole volumes when None.
        seed: of PyTorch's generator, whose state is restored afterwards.
    """

    def __init__(
        self, predict: Callable[[Tensor, nn.Module], Tensor], unit: int, slices: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.predict, self.unit, self.slices, self.seed = predict, unit, slices, seed

    @torch.no_grad()
    def __call__(self, inputs: Tensor, network: nn.Module) -> Tensor:  # type: ignore[override]
        volume = convert_to_tensor(inputs, track_meta=False)
        device = next(network.parameters(), volume).device
        parts = volume[0].movedim(-1, 0) if self.slices else volume
        parts, inside = pad_to_windows(parts, [self.unit] * (parts.ndim - 2), self.unit)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            batches = (part.to(device) for part in parts.split(self.slices or 1))
            parts = torch.cat([self.predict(batch, network).to(parts.device) for batch in batches])[inside]
        return parts.movedim(0, -1)[None] if self.slices else parts

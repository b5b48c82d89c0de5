"""Batches of the training stages: the input of each network, and the target in the form that each loss needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.engines import DiffusionPrepareBatch, PrepareBatch
from monai.inferers import Inferer, sliding_window_inference
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from custom_modules.errors import stop
from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.schedule import DDIMSchedule
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.tiling import pad_to_windows
from custom_modules.training.losses import valid_voxels


class AutocastInferer(Inferer):
    """Runs another inferer in bfloat16 autocast on the device of the network.

    Args:
        cuda_graph: on CUDA, capture the forward and the backward pass of the first batch and replay them for all
            others, which have its shapes: the CPU then launches two graphs and not thousands of kernels. All arguments
            and results must be tensors, and there must be one process.
    """

    def __init__(self, inferer: Callable[..., Any], enabled: bool = True, cuda_graph: bool = False) -> None:
        super().__init__()
        self.inferer, self.enabled, self.cuda_graph = inferer, enabled, cuda_graph
        self.captured: Callable[..., Any] | None = None

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next(network.parameters(), inputs).device
        if self.cuda_graph and device.type == "cuda":
            tensors = (inputs, *args, *kwargs.values())
            self.captured = self.captured or self._capture(network, tensors, tuple(kwargs))
            return self.captured(*tensors)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.enabled):
            return self.inferer(inputs, network, *args, **kwargs)

    def _capture(self, network: nn.Module, tensors: tuple[Tensor, ...], names: Sequence[str]) -> Callable[..., Any]:
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        positional = _Positional(self.inferer, network, self.enabled, names)
        try:
            return torch.cuda.make_graphed_callables(positional, tensors, allow_unused_input=True)
        except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
            stop(f"--cuda_graph: the networks cannot be captured ({' '.join(str(error).split())[:99]}); leave it out")


class _Positional(nn.Module):
    """A network in an inferer that takes tensors only, the last of them by ``names``, as CUDA graphs want it."""

    def __init__(self, inferer: Callable[..., Any], network: nn.Module, amp: bool, names: Sequence[str]) -> None:
        super().__init__()
        self.inferer, self.network, self.amp, self.names = inferer, network, amp, names

    def forward(self, *tensors: Tensor) -> Any:
        count = len(tensors) - len(self.names)
        named = dict(zip(self.names, tensors[count:]))
        # a graph must not hold casts of weights that a cache made before it
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.amp, cache_enabled=False):
            return self.inferer(tensors[0], self.network, *tensors[1:count], **named)


def _as_tensor(batchdata: Mapping[str, Tensor], key: str, device: Any, non_blocking: bool) -> Tensor:
    return convert_to_tensor(batchdata[key].to(device, non_blocking=non_blocking), track_meta=False)


class PairPrepareBatch(PrepareBatch):
    """Stage 1: MR and CT of several patients stacked into one batch, which is also the target."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pair = torch.cat([_as_tensor(batchdata, key, device, non_blocking) for key in ("image", "label")])
        return pair, pair


class ReconstructionPrepareBatch(PrepareBatch):
    """Validation of stage 1: the CT as input; the target has the mask of the voxels that count as a second channel."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        target = _as_tensor(batchdata, "label", device, non_blocking)
        return target[:, :1], target


class SynthesisPrepareBatch(PrepareBatch):
    """Regression baselines: the MR as input, and as target the CT with its valid voxels (:func:`valid_voxels`)."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mr, ct = (_as_tensor(batchdata, key, device, non_blocking) for key in ("image", "label"))
        return mr, (ct, valid_voxels(mr, ct))


class ReconstructionInferer(Inferer):
    """Validation of stage 1: encodes and decodes a volume, without sampling, in tiles of ``tile_size``."""

    def __init__(self, tile_size: Sequence[int], amp: bool = True) -> None:
        super().__init__()
        self.tile_size, self.amp = tuple(tile_size), amp

    def __call__(self, inputs: Tensor, network: WaveletAutoencoderKL) -> Tensor:  # type: ignore[override]
        volume, inside = pad_to_windows(
            convert_to_tensor(inputs, track_meta=False), self.tile_size, network.downsampling
        )
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            decoded = sliding_window_inference(
                volume, self.tile_size, 1, lambda tile: network.decode(network.encode(tile)[0]), 0.25, mode="gaussian"
            )
        return decoded[inside]


class LatentPrepareBatch(DiffusionPrepareBatch):
    """Stage 2 (Eq. 12): CT latents as input, MR latents as condition, random timesteps. The target is that of the
    schedule, noise or velocity, with the valid voxels of the pair and the CT itself.

    Args:
        last_timestep_share: of the crops, which are at the timestep where sampling starts; drawn where it is no whole
            number of a batch.
    """

    def __init__(self, schedule: DDIMSchedule, last_timestep_share: float = 0.5) -> None:
        super().__init__(schedule.num_train_timesteps, condition_name="z_mr")
        self.schedule, self.last_timestep_share = schedule, last_timestep_share

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.target(images, noise, timesteps)

    def get_timesteps(self, images: Tensor) -> Tensor:
        timesteps = super().get_timesteps(images)
        # a share that is no whole number of crops is met on average
        count = int(len(images) * self.last_timestep_share + torch.rand(()).item())
        timesteps[:count] = self.schedule.inference_timesteps(1)[0][0]
        return timesteps

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple, dict]:
        latents = {key: batchdata[key] for key in ("image", "z_mr")}
        clean, target, args, infer_kwargs = super().__call__(latents, device, non_blocking, **kwargs)
        mr, valid, ct = (_as_tensor(batchdata, key, device, non_blocking) for key in ("mr", "valid", "label"))
        return clean, (target, valid, ct), args, {**infer_kwargs, "mr": mr}


class OneStepEstimate(nn.Module):
    """The denoiser's output for noisy latents, and the decoded one-step estimate of the clean latent (Eq. 14).

    It is a module because distributed training needs the gradients of all networks to pass through one ``forward``.

    Args:
        decodes: False for the denoiser's output alone; the estimate is then None, and the decoder frozen.
        train_encoder: encode the MR here, with gradients, so that its latent learns what the CT needs. The latents of
            the CT stay those of stage 1. Without it the encoder is frozen, and ``condition`` is the latent of the MR.
    """

    def __init__(self, network: Synthesizer, decodes: bool = True, train_encoder: bool = False) -> None:
        super().__init__()
        self.network, self.decodes, self.train_encoder = network, decodes, train_encoder
        network.autoencoder.encoder.requires_grad_(train_encoder)
        network.autoencoder.decoder.requires_grad_(decodes)

    def forward(
        self, clean: Tensor, noise: Tensor, timesteps: Tensor, condition: Tensor, mr: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        schedule = self.network.schedule
        if self.train_encoder:
            condition = self.network.encode(mr, "MR")
        noisy = schedule.add_noise(clean, noise, timesteps)
        output = self.network.denoiser(torch.cat([noisy, condition], dim=1), timesteps)
        if not self.decodes:
            return output, None
        estimate = schedule.estimate(output, timesteps, noisy)
        return output, self.network.decode(estimate, detail=self.network.detail(mr))

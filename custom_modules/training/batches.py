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
        sample_share: of the crops, for each of which two samples are made, too. They are at that timestep, without
            noise: their estimate is that from which samples start.
    """

    def __init__(self, schedule: DDIMSchedule, last_timestep_share: float = 0.5, sample_share: float = 0.0) -> None:
        super().__init__(schedule.num_train_timesteps, condition_name="z_mr")
        self.schedule, self.last_timestep_share, self.sample_share = schedule, last_timestep_share, sample_share

    def _sampled(self, images: Tensor) -> int:
        return round(len(images) * self.sample_share)

    def get_noise(self, images: Tensor) -> Tensor:
        noise = super().get_noise(images)
        noise[: self._sampled(images)] = 0
        return noise

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.target(images, noise, timesteps)

    def get_timesteps(self, images: Tensor) -> Tensor:
        timesteps = super().get_timesteps(images)
        # a share that is no whole number of crops is met on average
        count = int(len(images) * self.last_timestep_share + torch.rand(()).item())
        timesteps[: max(count, self._sampled(images))] = self.schedule.inference_timesteps(1)[0][0]
        return timesteps

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple, dict]:
        latents = {key: batchdata[key] for key in ("image", "z_mr")}
        clean, target, args, infer_kwargs = super().__call__(latents, device, non_blocking, **kwargs)
        mr, valid, ct = (_as_tensor(batchdata, key, device, non_blocking) for key in ("mr", "valid", "label"))
        if pairs := self._sampled(clean):
            infer_kwargs["sample_noise"] = torch.randn_like(torch.cat([clean[:pairs]] * 2))
        return clean, (target, valid, ct), args, {**infer_kwargs, "mr": mr}


class OneStepEstimate(nn.Module):
    """The denoiser's output for noisy latents, and the decoded one-step estimate of the clean latent (Eq. 14), followed
    by two samples of each of the first crops if there is ``sample_noise`` for them, (2K, c, ...).

    It is a module because distributed training needs the gradients of all networks to pass through one ``forward``.

    Args:
        decodes: False for the denoiser's output alone; the estimate is then None, and the decoder frozen.
        train_encoder: encode the MR here, with gradients, so that its latent learns what the CT needs. The latents of
            the CT stay those of stage 1. Without it the encoder is frozen, and ``condition`` is the latent of the MR.
        sample_share: of the crops, see :class:`LatentPrepareBatch`.
        sample_timestep: where samples start, see :class:`~custom_modules.inference.inferer.LatentSampler`; here in one
            step.
    """

    def __init__(
        self,
        network: Synthesizer,
        decodes: bool = True,
        train_encoder: bool = False,
        sample_share: float = 0.0,
        sample_timestep: int | None = 300,
    ) -> None:
        super().__init__()
        start = sample_timestep or network.schedule.num_train_timesteps
        if sample_share > 0 and (not decodes or start >= network.schedule.num_train_timesteps):
            stop("--sample_share: needs an image_weight above 0 and a sample_timestep below num_train_timesteps")
        self.network, self.decodes, self.train_encoder = network, decodes, train_encoder
        self.sample_timestep = sample_timestep
        network.autoencoder.encoder.requires_grad_(train_encoder)
        network.autoencoder.decoder.requires_grad_(decodes)

    def forward(
        self,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        mr: Tensor,
        sample_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.train_encoder:
            condition = self.network.encode(mr, "MR")
        output, estimate = self._denoise(clean, noise, timesteps, condition)
        if not self.decodes:
            return output, None
        detail = self.network.detail(mr)
        if sample_noise is not None:
            first = slice(len(sample_noise) // 2)
            start = torch.full((len(sample_noise),), self.sample_timestep, device=timesteps.device)
            # samples are not to change the estimate that they start from
            _, samples = self._denoise(_twice(estimate[first].detach()), sample_noise, start, _twice(condition[first]))
            estimate = torch.cat([estimate, samples])
            detail = None if detail is None else torch.cat([detail, _twice(detail[first])])
        return output, self.network.decode(estimate, detail=detail)

    def _denoise(self, clean: Tensor, noise: Tensor, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise (Eq. 11); return the denoiser's output and the estimate of the clean latent."""
        noisy = self.network.schedule.add_noise(clean, noise, timesteps)
        output = self.network.denoiser(torch.cat([noisy, condition], dim=1), timesteps)
        return output, self.network.schedule.estimate(output, timesteps, noisy)


def _twice(batch: Tensor) -> Tensor:
    return torch.cat([batch, batch])

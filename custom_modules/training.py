"""What the training stages feed their networks: latents of whole volumes, and a batch as each loss wants it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader, Dataset
from monai.engines import DiffusionPrepareBatch, PrepareBatch
from monai.inferers import Inferer, sliding_window_inference
from monai.transforms import Randomizable
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from tqdm import tqdm

from custom_modules.autoencoder import WaveletAutoencoderKL
from custom_modules.losses import has_both
from custom_modules.pairs import SeededDataset, seed_of
from custom_modules.schedule import DDIMSchedule
from custom_modules.synthesizer import Synthesizer
from custom_modules.tiling import pad_to_windows


class AutocastInferer(Inferer):
    """Run another inferer in bfloat16 autocast on whatever device the network is."""

    def __init__(self, inferer: Callable[..., Any], enabled: bool = True) -> None:
        super().__init__()
        self.inferer, self.enabled = inferer, enabled

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next(network.parameters(), inputs).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.enabled):
            return self.inferer(inputs, network, *args, **kwargs)


def _as_tensor(batchdata: Mapping[str, Tensor], key: str, device: Any, non_blocking: bool) -> Tensor:
    return convert_to_tensor(batchdata[key].to(device, non_blocking=non_blocking), track_meta=False)


class PairPrepareBatch(PrepareBatch):
    """Stage 1: MR and CT of several patients stacked to one batch, which is its own target."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pair = torch.cat([_as_tensor(batchdata, key, device, non_blocking) for key in ("image", "label")])
        return pair, pair


class ReconstructionPrepareBatch(PrepareBatch):
    """Stage 1's validation: the CT as input, and as target the CT with the voxels that count as a second channel."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        target = _as_tensor(batchdata, "label", device, non_blocking)
        return target[:, :1], target


class SynthesisPrepareBatch(PrepareBatch):
    """Regression baselines: the MR as input, and as target the CT with where it can teach (:func:`has_both`)."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mr, ct = (_as_tensor(batchdata, key, device, non_blocking) for key in ("image", "label"))
        return mr, (ct, has_both(mr, ct))


class ReconstructionInferer(Inferer):
    """Stage 1's validation: a volume encoded and decoded, without sampling, in tiles of ``tile_size``."""

    def __init__(self, tile_size: Sequence[int], amp: bool = True) -> None:
        super().__init__()
        self.tile_size, self.amp = tuple(tile_size), amp

    def __call__(self, inputs: Tensor, network: WaveletAutoencoderKL) -> Tensor:  # type: ignore[override]
        volume, inside = pad_to_windows(convert_to_tensor(inputs, track_meta=False), self.tile_size, network.downsampling)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            decoded = sliding_window_inference(
                volume, self.tile_size, 1, lambda tile: network.decode(network.encode(tile)[0]), 0.25, mode="gaussian"
            )
        return decoded[inside]


class LatentDataset(Randomizable, Dataset):
    """MR and CT latents of whole volumes, encoded once by the frozen autoencoder; a random crop of one an item.

    Every patient is encoded in ``versions`` augmented copies (posterior means, half precision in memory), so that
    stage 2 is spent on the denoiser. Latents come from whole volumes, as in sampling: a crop of them knows what
    stands beside it. A network whose latent scale was never set gets it here, from the training latents.

    Items are ``image``, the CT latent, and ``z_mr``, both (c, *roi / f) and normalised; ``valid`` (1, *roi) at the same
    place, see :func:`has_both`; with ``images`` also ``label``, the CT (1, *roi) in [-1, 1]; and ``patient``.

    Args:
        data: datalist of ``image`` and ``label``.
        transform: deterministic and then random, up to images in [-1, 1].
        network: with the autoencoder's weights.
        roi_size: of a crop, in image voxels.
        images: keep the CT itself too.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, str]],
        transform: Callable,
        network: Synthesizer,
        roi_size: Sequence[int],
        versions: int = 16,
        amp: bool = True,
        seed: int = 0,
        images: bool = False,
    ) -> None:
        super().__init__(data, transform)
        self.network, self.roi_size, self.versions, self.amp, self.images = network, roi_size, versions, amp, images
        self.seed = seed
        self.set_random_state(seed)
        self.latents: list[list[dict[str, Any]]] = []

    def encode(self) -> None:
        """Encode all patients; once, before the first item is asked for. The same copies for the same seed."""
        count = len(self.data)
        keys = [(patient, seed_of(self.seed, copy, patient)) for copy in range(self.versions) for patient in range(count)]
        images = SeededDataset(CacheDataset(self.data, self.transform))
        loader = DataLoader(images, batch_size=1, sampler=keys, num_workers=1)
        latents: list[list[dict[str, Any]]] = [[] for _ in self.data]
        for (patient, _), batch in zip(keys, tqdm(loader, desc="encoding", unit="volume")):
            latents[patient].append(self._encode(batch))
        if not self.network.has_latent_scale:
            for modality, key in (("MR", "z_mr"), ("CT", "image")):
                self.network.set_latent_scale(modality, [copies[0][key].float() for copies in latents])
        for item in itertools.chain(*latents):
            for modality, key in (("MR", "z_mr"), ("CT", "image")):
                item[key] = self.network.normalize(item[key][None].float(), modality)[0].half()
        self.latents = latents

    @property
    def sizes(self) -> list[int]:
        """Latent voxels of each patient."""
        return [copies[0]["image"][0].numel() for copies in self.latents]

    @torch.no_grad()
    def _encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        network, device = self.network, self.network.latent_mean.device
        mr, ct = (
            pad_to_windows(_as_tensor(batch, key, device, False), self.roi_size, network.downsampling)[0]
            for key in ("image", "label")
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
            z_mr, z_ct = (network.autoencoder.encode(volume)[0][0].cpu().half() for volume in (mr, ct))
        item = {"image": z_ct, "z_mr": z_mr, "valid": has_both(mr, ct)[0].cpu(), "patient": batch["patient"][0]}
        return {**item, "label": ct[0].cpu().half()} if self.images else item

    def __getitem__(self, index: int) -> dict[str, Any]:
        version = self.latents[index][self.R.randint(len(self.latents[index]))]
        f = self.network.autoencoder.downsampling
        roi = [size // f for size in self.roi_size]
        start = [self.R.randint(size - r + 1) for size, r in zip(version["image"].shape[1:], roi)]

        def crop(volume: Tensor, scale: int) -> Tensor:
            return volume[(..., *(slice(s * scale, (s + r) * scale) for s, r in zip(start, roi)))].float()

        scales = {"image": 1, "z_mr": 1, "valid": f, "label": f}
        return {key: crop(value, scales[key]) if key in scales else value for key, value in version.items()}


class LatentPrepareBatch(DiffusionPrepareBatch):
    """Stage 2 (Eq. 12): CT latents as input, MR latents as condition for MONAI's ``DiffusionInferer``, random
    timesteps, and as target the schedule's own, noise or velocity, with where the pair is valid."""

    def __init__(self, schedule: DDIMSchedule) -> None:
        super().__init__(schedule.num_train_timesteps, condition_name="z_mr")
        self.schedule = schedule

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.target(images, noise, timesteps)

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple, dict]:
        latents = {key: batchdata[key] for key in ("image", "z_mr")}
        clean, target, args, infer_kwargs = super().__call__(latents, device, non_blocking, **kwargs)
        return clean, (target, _as_tensor(batchdata, "valid", device, non_blocking)), args, infer_kwargs


class EstimatePrepareBatch(LatentPrepareBatch):
    """Fine-tuning: as stage 2, with the CT itself behind the targets, and half of each batch at the timestep that
    sampling starts from."""

    def get_timesteps(self, images: Tensor) -> Tensor:
        timesteps = super().get_timesteps(images)
        timesteps[: len(images) // 2] = self.schedule.inference_timesteps(1)[0][0]
        return timesteps

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple, dict]:
        clean, target, args, infer_kwargs = super().__call__(batchdata, device, non_blocking, **kwargs)
        return clean, (*target, _as_tensor(batchdata, "label", device, non_blocking)), args, infer_kwargs


class OneStepEstimate(nn.Module):
    """The denoiser's output for noisy latents, and the decoded one-step estimate of the clean latent (Eq. 14).

    A module, so that the gradients of both networks pass through one ``forward``, as distributed training needs.
    """

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.network = network

    def forward(self, clean: Tensor, noise: Tensor, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        schedule = self.network.schedule
        noisy = schedule.add_noise(clean, noise, timesteps)
        output = self.network.denoiser(torch.cat([noisy, condition], dim=1), timesteps)
        estimates = [schedule.step(o, int(t), -1, z) for o, t, z in zip(output, timesteps, noisy)]
        return output, self.network.decode(torch.stack(estimates))

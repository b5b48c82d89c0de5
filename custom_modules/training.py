"""What the two training stages need beyond MONAI: batches of different patients, the losses, latent batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine
from monai.data import CacheDataset, DataLoader, Dataset
from monai.engines import DiffusionPrepareBatch, IterationEvents, PrepareBatch
from monai.inferers import Inferer
from monai.transforms import Randomizable
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm import trange

from custom_modules.disentanglement import disentanglement_loss, latent_cosines
from custom_modules.inferer import pad_to_windows
from custom_modules.schedule import DDIMSchedule
from custom_modules.synthesizer import Synthesizer


class DistinctPatientSampler(Sampler[list[int]]):
    """Batches of different patients, larger volumes more often (the square root of their voxels).

    Args:
        sizes: gives the voxels of each patient's volume, in the dataset's order; asked when an epoch starts.
        batch_size: patients a batch, at least 2 where the disentanglement loss is used.
        batches: batches an epoch.
        seed: seeds the order; the epoch counts on with each pass.

    Raises:
        ValueError: when there are fewer patients than a batch needs.
    """

    def __init__(self, sizes: Callable[[], Sequence[int]], batch_size: int, batches: int, seed: int = 0) -> None:
        self.sizes, self.batch_size, self.batches, self.seed, self.epoch = sizes, batch_size, batches, seed, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        weights = torch.tensor(self.sizes(), dtype=torch.float64).sqrt()
        if len(weights) < self.batch_size:
            raise ValueError(f"a batch needs {self.batch_size} different patients, the datalist has {len(weights)}")
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        for _ in range(self.batches):
            yield torch.multinomial(weights, self.batch_size, generator=generator).tolist()


class AutocastInferer(Inferer):
    """Run another inferer in bfloat16 autocast on whatever device the inputs are."""

    def __init__(self, inferer: Callable[..., Any], enabled: bool = True) -> None:
        super().__init__()
        self.inferer, self.enabled = inferer, enabled

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.enabled):
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


class AutoencoderLoss(nn.Module):
    """L_pre without its adversarial term (Eq. 8): L2 reconstruction + alpha KL + beta L_D.

    KL is averaged over latent elements, so that alpha does not depend on the crop size. The value of every term
    at the last call is in ``terms``, with the cosines of Eqs. 3 to 6.

    Args:
        kl_weight: alpha.
        disentanglement_weight: beta; 0 leaves the latent as it comes (the paper's ablation).
    """

    def __init__(self, kl_weight: float = 2e-5, disentanglement_weight: float = 1e-4) -> None:
        super().__init__()
        self.kl_weight, self.disentanglement_weight = kl_weight, disentanglement_weight
        self.terms: dict[str, float] = {}

    def forward(self, output: tuple[Tensor, Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        reconstruction, latent, mean, log_variance = output
        recon_mr, recon_ct = F.mse_loss(reconstruction.float(), target, reduction="none").chunk(2)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        cosines = latent_cosines(*latent.chunk(2))
        disentanglement = disentanglement_loss(cosines)
        loss = 0.5 * (recon_mr.mean() + recon_ct.mean()) + self.kl_weight * kl
        if self.disentanglement_weight:
            loss = loss + self.disentanglement_weight * disentanglement
        self.terms = {
            name: float(value.detach())
            for name, value in {
                "loss": loss,
                "reconstruction_mr": recon_mr.mean(),
                "reconstruction_ct": recon_ct.mean(),
                "kl": kl,
                "disentanglement": disentanglement,
                **{f"cosine_{name}": value for name, value in cosines._asdict().items()},
            }.items()
        }
        return loss


def has_both(mr: Tensor, ct: Tensor) -> Tensor:
    """Where a pair can teach: not where the MR shows tissue and the CT air, beyond the CT's own field of view.

    Both in [-1, 1]; tissue is MR above 8 % of its window, air is CT in the lowest 23 % of its (below -400 HU).
    """
    return ~((mr > -0.84) & (ct < -0.54))


class LatentDataset(Randomizable, Dataset):
    """MR and CT latents of whole volumes, encoded once by the frozen autoencoder; a random crop of one an item.

    Every patient is encoded in ``versions`` augmented copies (posterior means, half precision in memory), so that
    stage 2 is spent on the denoiser. Latents come from whole volumes, as in sampling: a crop of them knows what
    stands beside it. A network whose latent scale was never set gets it here, from the training latents.

    Items are ``image``, the CT latent, and ``z_mr``, both (c, *roi / f) and normalised, and with ``images`` also
    ``label``, the CT (1, *roi) in [-1, 1] at the same place, and ``valid``, see :func:`has_both`.

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
        self.set_random_state(seed)
        self.latents: list[list[dict[str, Tensor]]] = []

    def encode(self) -> None:
        """Encode all patients; once, before the first item is asked for."""
        images = CacheDataset(self.data, self.transform)
        loader = DataLoader(images, batch_size=1, num_workers=1, persistent_workers=True)
        latents: list[list[dict[str, Tensor]]] = [[] for _ in self.data]
        for _ in trange(self.versions, desc="encoding", unit="version"):
            for patient, batch in zip(latents, loader):
                patient.append(self._encode(batch))
        if not self.network.has_latent_scale:
            for modality, key in (("MR", "z_mr"), ("CT", "image")):
                self.network.set_latent_scale(modality, [patient[0][key].float() for patient in latents])
        for item in itertools.chain(*latents):
            for modality, key in (("MR", "z_mr"), ("CT", "image")):
                item[key] = self.network.normalize(item[key][None].float(), modality)[0].half()
        self.latents = latents

    @property
    def sizes(self) -> list[int]:
        """Latent voxels of each patient."""
        return [patient[0]["image"][0].numel() for patient in self.latents]

    @torch.no_grad()
    def _encode(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        network, device, item = self.network, self.network.latent_mean.device, {}
        for name, key in (("image", "label"), ("z_mr", "image")):
            volume, _ = pad_to_windows(_as_tensor(batch, key, device, False), self.roi_size, network.downsampling)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
                item[name] = network.autoencoder.encode(volume)[0][0].cpu().half()
            if key == "label" and self.images:
                item[key] = volume[0].cpu().half()
                mr, _ = pad_to_windows(_as_tensor(batch, "image", device, False), self.roi_size, network.downsampling)
                item["valid"] = has_both(mr, volume)[0].cpu()
        return item

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        version = self.latents[index][self.R.randint(len(self.latents[index]))]
        f = self.network.autoencoder.downsampling
        roi = [size // f for size in self.roi_size]
        start = [self.R.randint(size - r + 1) for size, r in zip(version["image"].shape[1:], roi)]

        def crop(volume: Tensor, scale: int) -> Tensor:
            return volume[(..., *(slice(s * scale, (s + r) * scale) for s, r in zip(start, roi)))].float()

        return {key: crop(value, f if key in ("label", "valid") else 1) for key, value in version.items()}


class LatentPrepareBatch(DiffusionPrepareBatch):
    """Stage 2 (Eq. 12): CT latents as input, MR latents as condition for MONAI's ``DiffusionInferer``, random
    timesteps, and the schedule's own target, noise or velocity."""

    def __init__(self, schedule: DDIMSchedule) -> None:
        super().__init__(schedule.num_train_timesteps, condition_name="z_mr")
        self.schedule = schedule

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.target(images, noise, timesteps)


class EstimatePrepareBatch(LatentPrepareBatch):
    """Fine-tuning: as stage 2, with the CT itself beside the schedule's target, and half of each batch at the timestep
    that sampling starts from."""

    def get_timesteps(self, images: Tensor) -> Tensor:
        timesteps = super().get_timesteps(images)
        timesteps[: len(images) // 2] = self.schedule.inference_timesteps(1)[0][0]
        return timesteps

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple, dict]:
        latents = {key: batchdata[key] for key in ("image", "z_mr")}
        clean, target, args, infer_kwargs = super().__call__(latents, device, non_blocking, **kwargs)
        ct, valid = (_as_tensor(batchdata, key, device, non_blocking) for key in ("label", "valid"))
        return clean, (target, ct, valid), args, infer_kwargs


class EstimateInferer(Inferer):
    """The denoiser's output for noisy latents, and the decoded one-step estimate of the clean latent (Eq. 14)."""

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: Synthesizer, noise: Tensor, timesteps: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        schedule = network.schedule
        noisy = schedule.add_noise(inputs, noise, timesteps)
        output = network.denoiser(torch.cat([noisy, condition], dim=1), timesteps)
        estimates = [schedule.step(o, int(t), -1, z) for o, t, z in zip(output, timesteps, noisy)]
        return output, network.decode(torch.stack(estimates))


class EstimateLoss(nn.Module):
    """L1 between decoded estimate and CT, + ``latent_weight`` times the latent diffusion loss (Eq. 12), both where the
    pair is valid (:func:`has_both`)."""

    def __init__(self, latent_weight: float = 0.02) -> None:
        super().__init__()
        self.latent_weight = latent_weight

    def forward(self, output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (prediction, image), (clean, ct, valid) = output, target
        l1 = ((image - ct).abs() * valid).sum() / valid.sum().clamp_min(1)
        whole = F.adaptive_avg_pool3d(valid, prediction.shape[2:]) > 0.95
        l2 = ((prediction - clean).square().mean(dim=1, keepdim=True) * whole).sum() / whole.sum().clamp_min(1)
        return l1 + self.latent_weight * l2


class GradientClipping:
    """Handler that clips the norm of the network's gradient before each optimiser step."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)

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
    tensor = batchdata[key].to(device, non_blocking=non_blocking)
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


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


class LatentDataset(Randomizable, Dataset):
    """MR and CT latents of whole volumes, encoded once by the frozen autoencoder; a random crop of one an item.

    Every patient is encoded in ``versions`` augmented copies (posterior means, half precision in memory), so that
    stage 2 is spent on the denoiser. Latents come from whole volumes, as in sampling: a crop of them knows what
    stands beside it. A network whose latent scale was never set gets it here, from the training latents.

    Items are ``image``, the CT latent, and ``z_mr``, both (c, *roi / f) and normalised, and with ``images`` also
    ``label``, the CT (1, *roi) in [-1, 1] at the same place.

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
        return item

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        version = self.latents[index][self.R.randint(len(self.latents[index]))]
        f = self.network.autoencoder.downsampling
        roi = [size // f for size in self.roi_size]
        start = [self.R.randint(size - r + 1) for size, r in zip(version["image"].shape[1:], roi)]

        def crop(volume: Tensor, scale: int) -> Tensor:
            return volume[(..., *(slice(s * scale, (s + r) * scale) for s, r in zip(start, roi)))].float()

        return {key: crop(value, f if key == "label" else 1) for key, value in version.items()}


class LatentPrepareBatch(DiffusionPrepareBatch):
    """Stage 2 (Eq. 12): CT latents as input, MR latents as condition for MONAI's ``DiffusionInferer``, random
    timesteps, and the schedule's own target, noise or velocity."""

    def __init__(self, schedule: DDIMSchedule) -> None:
        super().__init__(schedule.num_train_timesteps, condition_name="z_mr")
        self.schedule = schedule

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.target(images, noise, timesteps)


class EstimatePrepareBatch(PrepareBatch):
    """Decoder adaptation: the denoiser's one-step estimates of the clean CT latent (Eq. 14) as input, the CT as target.

    Half of the estimates are made from pure noise, as the first sampling step makes them; the others from random
    timesteps.
    """

    def __init__(self, network: Synthesizer, amp: bool = True) -> None:
        self.network, self.amp = network, amp

    @torch.no_grad()
    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        clean, z_mr, ct = (_as_tensor(batchdata, key, device, non_blocking) for key in ("image", "z_mr", "label"))
        schedule = self.network.schedule
        last = schedule.inference_timesteps(1)[0][0]
        timesteps = torch.randint(0, last + 1, (len(clean),), device=clean.device)
        timesteps[: len(clean) // 2] = last
        z = schedule.add_noise(clean, torch.randn_like(clean), timesteps)
        with torch.autocast(clean.device.type, dtype=torch.bfloat16, enabled=self.amp):
            output = self.network.denoiser(torch.cat([z, z_mr], dim=1), timesteps)
        estimates = [schedule.step(o, int(t), -1, x) for o, t, x in zip(output, timesteps, z)]
        return torch.stack(estimates), ct


class DecodeInferer(Inferer):
    """Decode latents by the network's decoder."""

    def __call__(self, inputs: Tensor, network: Synthesizer, *args: Any, **kwargs: Any) -> Tensor:
        return network.decode(inputs)


class GradientClipping:
    """Handler that clips the norm of the network's gradient before each optimiser step."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)

"""What the two training stages need beyond MONAI: batches of different patients, the losses, latent batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine
from monai.engines import DiffusionPrepareBatch, IterationEvents, PrepareBatch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.utils.data import Sampler

from custom_modules.disentanglement import disentanglement_loss, latent_cosines
from custom_modules.synthesizer import Synthesizer


class DistinctPatientSampler(Sampler[list[int]]):
    """Batches of different patients, larger volumes more often (the square root of their voxels).

    Args:
        sizes: voxels of each patient's volume, in the dataset's order.
        batch_size: patients a batch, at least 2 where the disentanglement loss is used.
        batches: batches an epoch.
        seed: seeds the order; the epoch counts on with each pass.

    Raises:
        ValueError: when there are fewer patients than a batch needs.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, batches: int, seed: int = 0) -> None:
        if len(sizes) < batch_size:
            raise ValueError(f"a batch needs {batch_size} different patients, the datalist has {len(sizes)}")
        self.weights = torch.tensor(sizes, dtype=torch.float64).sqrt()
        self.batch_size, self.batches, self.seed, self.epoch = batch_size, batches, seed, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        for _ in range(self.batches):
            yield torch.multinomial(self.weights, self.batch_size, generator=generator).tolist()


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


@torch.no_grad()
def fit_latent_scale(network: Synthesizer, batches: Iterable[Mapping[str, Tensor]], device: Any) -> None:
    """Set the latent scale of ``network`` from the training batches of one epoch, once, before stage 2."""
    latents: dict[str, list[Tensor]] = {"MR": [], "CT": []}
    for batchdata in batches:
        for modality, key in (("MR", "image"), ("CT", "label")):
            image = _as_tensor(batchdata, key, device, False)
            latents[modality].append(network.autoencoder.encode(image)[0].cpu())
    for modality, values in latents.items():
        network.set_latent_scale(modality, torch.cat(values))


class LatentPrepareBatch(DiffusionPrepareBatch):
    """Stage 2: encode MR and CT by the frozen autoencoder (posterior means), draw noise and timesteps (Eq. 12).

    Gives MONAI's ``DiffusionInferer`` the CT latent as input and the MR latent as condition.
    """

    def __init__(self, network: Synthesizer, amp: bool = True) -> None:
        super().__init__(network.schedule.num_train_timesteps, condition_name="z_mr")
        self.network, self.amp = network, amp

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.network.schedule.target(images, noise, timesteps)

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        mr, ct = (_as_tensor(batchdata, key, device, non_blocking) for key in ("image", "label"))
        with torch.no_grad(), torch.autocast(mr.device.type, dtype=torch.bfloat16, enabled=self.amp):
            latents = {"image": self.network.encode(ct, "CT"), "z_mr": self.network.encode(mr, "MR")}
        return super().__call__(latents, device, non_blocking, **kwargs)


class GradientClipping:
    """Handler that clips the norm of the network's gradient before each optimiser step."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)

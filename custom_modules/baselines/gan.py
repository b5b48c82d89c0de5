"""Adversarial baselines with MONAI's networks: pix2pix (Isola et al. 2017) and CycleGAN (Zhu et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import PrepareBatch
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from custom_modules.training.adversary import Adversary
from custom_modules.training.losses import ValidL1Loss, valid_voxels


class PairAdversary(Adversary):
    """pix2pix: the discriminator sees pairs, (MR, synthetic CT) and (MR, CT), as two channels."""

    def images(self, engine: Engine) -> tuple[Tensor, Tensor]:
        mr, fake, (ct, *_) = (engine.state.output[key] for key in ("image", "pred", "label"))
        return torch.cat([mr, fake.detach()], dim=1), torch.cat([mr, ct], dim=1)


class Pix2PixLoss(nn.Module):
    """L1 to the CT over valid voxels, and the adversarial term for the pair of MR and synthetic CT."""

    def __init__(self, adversary: PairAdversary) -> None:
        super().__init__()
        self.adversary, self.image_loss = adversary, ValidL1Loss()

    def forward(self, image: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ct, valid, mr = target
        return self.image_loss(image, (ct, valid)) + self.adversary(torch.cat([mr, image], dim=1))


class Pix2PixPrepareBatch(PrepareBatch):
    """The MR as input, and as target the CT, the valid voxels of the pair, and the MR for the discriminator."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        mr, ct = (convert_to_tensor(batchdata[key], track_meta=False).to(device) for key in ("image", "label"))
        return mr, (ct, valid_voxels(mr, ct), mr)


class CycleGAN(nn.Module):
    """Two generators that end in a tanh. With one argument it maps MR to synthetic CT, with two it returns all images
    that the loss needs."""

    def __init__(self, to_ct: nn.Module, to_mr: nn.Module) -> None:
        super().__init__()
        self.to_ct, self.to_mr = (nn.Sequential(generator, nn.Tanh()) for generator in (to_ct, to_mr))

    def forward(self, mr: Tensor, ct: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        if ct is None:
            return self.to_ct(mr)
        fake_ct, fake_mr = self.to_ct(mr), self.to_mr(ct)
        return {
            "fakes": torch.cat([fake_mr, fake_ct], dim=1),
            "cycles": torch.cat([self.to_mr(fake_ct), self.to_ct(fake_mr)], dim=1),
            "same": torch.cat([self.to_mr(mr), self.to_ct(ct)], dim=1),
        }


class UnpairedPrepareBatch(PrepareBatch):
    """MRs as input and, as second argument, the CTs of other patients in the batch, so that nothing is paired. The
    target is both, as two channels."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        mr, ct = (convert_to_tensor(batchdata[key], track_meta=False).to(device) for key in ("image", "label"))
        ct = ct.roll(1, dims=0)
        return mr, torch.cat([mr, ct], dim=1), (ct,), {}


class CycleLoss(nn.Module):
    """Least squares of both discriminators + L1 cycle consistency (10) + L1 identity (5), each summed over MR and
    CT."""

    def __init__(self, adversary: Adversary, cycle_weight: float = 10.0, identity_weight: float = 5.0) -> None:
        super().__init__()
        self.adversary, self.cycle_weight, self.identity_weight = adversary, cycle_weight, identity_weight

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        cycle, same = (2 * (output[key].float() - target).abs().mean() for key in ("cycles", "same"))
        return self.adversary(output["fakes"]) + self.cycle_weight * cycle + self.identity_weight * same


class ByChannel(nn.Module):
    """One discriminator per channel of an image, with the logits of all as channels of one result."""

    def __init__(self, discriminators: Sequence[nn.Module]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, image: Tensor) -> list[Tensor]:
        logits = [network(x)[-1] for network, x in zip(self.discriminators, image.split(1, dim=1), strict=True)]
        return [torch.cat(logits, dim=1)]


class ImagePool:
    """Pool of generated images, from which half of the returned images are older ones (Shrivastava et al. 2017). It is
    empty after a resumption."""

    def __init__(self, size: int = 50) -> None:
        self.size, self.pool = size, []  # type: tuple[int, list[Tensor]]

    def __call__(self, images: Tensor) -> Tensor:
        returned = []
        for image in images:
            if len(self.pool) < self.size:
                self.pool.append(image)
            elif torch.rand(()) < 0.5:
                place = int(torch.randint(self.size, ()))
                image, self.pool[place] = self.pool[place], image
            returned.append(image)
        return torch.stack(returned)


class UnpairedAdversary(Adversary):
    """CycleGAN: both discriminators, for MRs and for CTs, with generated images from a pool."""

    def __init__(self, *args: Any, pool: ImagePool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool

    def images(self, engine: Engine) -> tuple[Tensor, Tensor]:
        return self.pool(engine.state.output["pred"]["fakes"].detach().float()), engine.state.output["label"]

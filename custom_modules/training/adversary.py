"""The adversarial term of Eq. 8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.losses import PatchAdversarialLoss
from torch import Tensor, nn


class Adversary:
    """The adversarial term of Eq. 8, and the handler that trains its discriminator after each step of the autoencoder.

    The loss is least squares (MONAI's ``PatchAdversarialLoss``). The term is 0 for the first ``warmup`` iterations; the
    discriminator is trained from the middle of them on.

    Args:
        discriminator: maps an image (N, 1, D, H, W) to a list of feature maps, the last of them the logits, as MONAI's
            ``PatchDiscriminator`` does.
        optimizer: of the discriminator.
        weight: gamma; 0 disables the term and the discriminator.
        warmup: iterations.
        wrap: wraps the discriminator for its own training step, for distributed training.
        amp: bfloat16 autocast.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: torch.optim.Optimizer,
        weight: float = 0.1,
        warmup: int = 0,
        wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
        amp: bool = True,
    ) -> None:
        self.discriminator, self.optimizer, self.weight, self.warmup = discriminator, optimizer, weight, warmup
        self.amp = amp
        self.wrapped = wrap(discriminator) if weight else discriminator
        self.loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
        self.iteration, self.terms = 0, {}

    def attach(self, engine: Engine) -> None:
        if self.weight:
            engine.add_event_handler(Events.ITERATION_STARTED, self._count)
            engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._train)

    def _count(self, engine: Engine) -> None:
        self.iteration = engine.state.iteration

    def __call__(self, reconstruction: Tensor) -> Tensor:
        """Return gamma times the loss by which ``reconstruction`` is told from an image; 0 during the warm-up."""
        if not self.weight or self.iteration <= self.warmup:
            return reconstruction.new_zeros(())
        self.discriminator.requires_grad_(False)
        with torch.autocast(reconstruction.device.type, dtype=torch.bfloat16, enabled=self.amp):
            logits = self.discriminator(reconstruction)[-1]
        self.discriminator.requires_grad_(True)
        return self.weight * self.loss(logits.float(), target_is_real=True, for_discriminator=False)

    def images(self, engine: Engine) -> tuple[Tensor, Tensor]:
        """Return what the discriminator learns to tell apart: generated images, detached, and real ones."""
        return engine.state.output["pred"][0].detach(), engine.state.output["image"]

    def _train(self, engine: Engine) -> None:
        if self.iteration <= self.warmup // 2:
            return
        steps = engine.accumulation_steps
        fake, real = self.images(engine)
        with torch.autocast(real.device.type, dtype=torch.bfloat16, enabled=self.amp):
            logits = self.wrapped(torch.cat([fake, real]))[-1]
        on_fake, on_real = logits.float().chunk(2)
        loss = 0.5 * (self.loss(on_fake, False, True) + self.loss(on_real, True, True))
        if (self.iteration - 1) % steps == 0:
            self.optimizer.zero_grad()
        (loss / steps).backward()
        if self.iteration % steps == 0:
            self.optimizer.step()
        self.terms = {"discriminator": float(loss.detach())}

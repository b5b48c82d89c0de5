"""Handlers of the training engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.handlers import StatsHandler, TensorBoardStatsHandler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from custom_modules.data.sampler import seed_of
from custom_modules.errors import stop
from custom_modules.training.checkpoints import BestWeights


def loss_value(output: Mapping[str, Any]) -> float:
    """Return the loss in the output of a training step."""
    return float(output["loss"].detach())


def smaller_is_better(value: float, best: float) -> bool:
    """Compare values of an evaluator's key metric, whose best is -1 before the first validation."""
    return value < best or best < 0


class LoggedTerms:
    """The loss of a step, and the latest ``terms`` of each of ``sources`` that has any, by name."""

    def __init__(self, sources: Sequence[Any]) -> None:
        self.sources = sources

    def __call__(self, output: Mapping[str, Any]) -> dict[str, float]:
        terms = {"loss": loss_value(output)}
        for source in self.sources:
            terms |= getattr(source, "terms", {})
        return terms


class StepSeed:
    """Handler that seeds PyTorch before each iteration from (``seed``, iteration, rank)."""

    def __init__(self, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        torch.manual_seed(seed_of(self.seed, (engine.state.iteration - 1) * self.world_size + self.rank))


class GradientClipping:
    """Handler that clips the norm of the gradient before each optimiser step, every ``accumulation`` batches."""

    def __init__(self, max_norm: float, accumulation: int = 1) -> None:
        self.max_norm, self.accumulation = max_norm, accumulation

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration % self.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)


class AfterStep:
    """Handler that calls ``actions`` after each optimiser step, such as the step of a learning rate schedule."""

    def __init__(self, actions: Sequence[Callable[[], Any]], accumulation: int = 1) -> None:
        self.actions, self.accumulation = actions, accumulation

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.accumulation), self)

    def __call__(self, engine: Engine) -> None:
        for action in self.actions:
            action()


class StopOnNonFinite:
    """Handler that ends the run when the loss is not finite, before the weights change, and names the batch. The loss
    is left in ``engine.state.loss``: whoever reads it from a GPU later in the step would wait for the whole step."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.loss = float(engine.state.output["loss"].detach())
        if not math.isfinite(loss):
            names = ", ".join(engine.state.batch["patient"])
            stop(
                f"the loss is {loss} at iteration {engine.state.iteration}, patients {names}; the last "
                "checkpoint is good: check these volumes, or --resume true with a lower --learning_rate"
            )


class ValidateAtEnd:
    """Handler that validates at the end of a training, unless its last iteration has been validated, so that every run
    leaves weights, whatever the interval between validations.

    Args:
        validator: evaluator with ``run(epoch)``.
    """

    def __init__(self, validator: Engine) -> None:
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        def validated(_: Engine) -> None:
            engine.state.validated_iteration = engine.state.iteration

        self.validator.add_event_handler(Events.COMPLETED, validated)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if getattr(engine.state, "validated_iteration", None) != engine.state.iteration:
            self.validator.run(engine.state.epoch)


class ProgressBar:
    """Handler that shows the iterations of the whole run, the loss (of :class:`StopOnNonFinite`) and the time left."""

    def __init__(self, disable: bool = False) -> None:
        self.disable = disable

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.COMPLETED, lambda: self.bar.close())

    def _open(self, engine: Engine) -> None:
        total = engine.state.epoch_length * engine.state.max_epochs
        self.bar = tqdm(
            total=total,
            initial=engine.state.iteration,
            desc="training",
            unit="step",
            mininterval=1.0,
            disable=self.disable,
        )

    def _update(self, engine: Engine) -> None:
        self.bar.set_postfix(loss=f"{engine.state.loss:.4g}", refresh=False)
        self.bar.update()


class ValidationMontage:
    """Handler of the evaluator that adds a picture to TensorBoard: one row per patient, with the middle coronal plane
    of MR, prediction and CT, each in its whole window."""

    def __init__(self, log_dir: str | Path, patients: int = 4) -> None:
        self.log_dir, self.patients, self.rows = log_dir, patients, []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        for item in engine.state.output[: self.patients - len(self.rows)]:
            planes = [np.asarray(item[key][0].float().cpu()) for key in ("image", "pred", "label")]
            planes = [plane[::-1, plane.shape[1] // 2, ::-1].T for plane in planes]
            self.rows.append(np.concatenate(planes, axis=1).clip(-1, 1) / 2 + 0.5)

    def _write(self, engine: Engine) -> None:
        width = max(row.shape[1] for row in self.rows)
        rows = [np.pad(row, ((0, 2), (0, width - row.shape[1]))) for row in self.rows]
        writer = SummaryWriter(self.log_dir)
        writer.add_image("validation", np.concatenate(rows)[None], engine.state.epoch)
        writer.close()
        self.rows = []


WRITERS = (ProgressBar, StatsHandler, TensorBoardStatsHandler, ValidationMontage, BestWeights)


def handlers_of_rank(handlers: Sequence[Any], rank: int) -> list[Any]:
    """Return all ``handlers`` for rank 0, and only those that write nothing for other ranks."""
    return [handler for handler in handlers if rank == 0 or not isinstance(handler, WRITERS)]

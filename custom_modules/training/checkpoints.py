"""The checkpoints and the best weights of a run."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from custom_modules.errors import stop
from custom_modules.files import atomic_write
from custom_modules.networks.weights import save_weights

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves the whole state of a run every ``interval`` iterations and after each epoch, and resumes from it.

    A checkpoint is written to a temporary file and renamed, so that a run that dies while writing keeps the previous
    one; the last ``keep`` are kept. Everything random is a function of the iteration (:class:`StepSeed`,
    :class:`~custom_modules.data.sampler.PatientSampler`), so the iteration is the only random state.

    Args:
        folder: of the run.
        state: objects with ``state_dict`` and ``load_state_dict``, by name.
        interval: in iterations.
        keep: number of checkpoints to keep.
        rank: of this process; only the first one writes.
    """

    PATTERN = re.compile(r"checkpoint_(\d+)\.pt")

    def __init__(
        self, folder: str | Path, state: Mapping[str, Any], interval: int, keep: int = 2, rank: int = 0
    ) -> None:
        self.folder, self.state, self.interval, self.keep, self.rank = Path(folder), dict(state), interval, keep, rank

    def found(self) -> list[Path]:
        """Return the checkpoints of the run, oldest first."""
        matches = [(self.PATTERN.fullmatch(path.name), path) for path in self.folder.glob("checkpoint_*.pt")]
        return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]

    def begin(self, engine: Engine, resume: bool = False) -> None:
        """Save the run of ``engine`` from now on, after its other handlers. With ``resume``, first restore it from the
        newest checkpoint that can be read.

        Ends the program if the folder holds a run and ``resume`` is off.
        """
        if resume:
            self._resume(engine)
        elif self.found():
            stop(f"{self.folder}: holds a run already; continue it with --resume true, or give another --output_dir")
        if self.rank == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self._within_epoch)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def _resume(self, engine: Engine) -> None:
        for path in reversed(self.found()):
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                logger.warning("%s cannot be read (%s), using the previous one", path, type(error).__name__)
                continue
            self._restore(engine, saved, path)
            return
        logger.info("%s holds no checkpoint, starting from the beginning", self.folder)

    def _restore(self, engine: Engine, saved: dict[str, Any], path: Path) -> None:
        length = engine.state.epoch_length
        if saved["epoch_length"] != length:
            stop(f"{path}: was saved with {saved['epoch_length']} batches per epoch, the config says {length}")
        try:
            for name, item in self.state.items():
                item.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError) as error:
            stop(f"{path}: belongs to another model or config ({' '.join(str(error).split())[:160]})")
        iteration = saved["iteration"]
        engine.state.iteration, engine.state.epoch = iteration, iteration // length
        engine.data_loader.batch_sampler.start = iteration  # type: ignore[attr-defined]
        if iteration >= length * engine.state.max_epochs:
            stop(f"{path}: the run is complete; give a larger --max_epochs to continue")
        logger.info("resuming %s after %d iterations", path, iteration)

    def _within_epoch(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length:  # the last of an epoch is saved after its validation
            self.save(engine)

    def save(self, engine: Engine) -> None:
        saved = {name: item.state_dict() for name, item in self.state.items()}
        saved |= {"iteration": engine.state.iteration, "epoch_length": engine.state.epoch_length}
        with atomic_write(self.folder / f"checkpoint_{engine.state.iteration:08d}.pt") as temporary:
            torch.save(saved, temporary)
        for path in self.found()[: -self.keep]:
            path.unlink()


class BestWeights:
    """Handler of the evaluator that saves the network of the best validation to ``path``.

    Args:
        metric: name of the metric, whose smallest value is best.
        trained_with: values that the weights depend on; stored with them.
    """

    def __init__(
        self, network: nn.Module, path: str | Path, metric: str, trained_with: Mapping[str, Any] | None = None
    ) -> None:
        self.network, self.path, self.metric, self.trained_with = network, Path(path), metric, trained_with
        self.best = math.inf

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        value = engine.state.metrics[self.metric]
        if value < self.best:
            self.best = float(value)
            save_weights(self.network, self.path, torch.float32, self.trained_with)
            logger.info("%s: best so far, %s %.4g", self.path, self.metric, value)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best = state["best"]

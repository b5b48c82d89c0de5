"""Training that ends after a given time, so that every system of a comparison is trained equally long."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from custom_modules.errors import stop
from custom_modules.files import write_json

logger = logging.getLogger(__name__)


class TimeBudget:
    """Handler that ends a training after ``minutes`` of wall time, summed over all its resumptions.

    All time after :meth:`start` counts: encoding latents, steps, validation, checkpoints. The validator runs
    ``validations`` times at equal intervals, the last time at the end of the budget or of the last epoch. Training also
    ends after ``patience`` validations in a row without improvement. Then ``path`` is written, which marks the training
    as complete.

    Args:
        minutes: of wall time, validation included; the last validation may exceed it.
        validator: evaluator with ``run(epoch)`` and with ``metric`` in its state.
        path: JSON with the steps, minutes, CPU minutes of this process, the best validation, and ``curve``, a list of
            (minutes, step, ``metric``) of all validations.
        metric: name of the metric, whose smallest value is best.
    """

    def __init__(
        self, minutes: float, validator: Any, path: str | Path, metric: str = "val_mae", validations: int = 5,
        patience: int | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.minutes, self.validator, self.path, self.metric = float(minutes), validator, Path(path), metric
        self.validations, self.patience, self.clock = validations, patience, clock
        self.wall = self.cpu = 0.0  # seconds of the runs before this one
        self.done = self.stale = 0
        self.curve: list[tuple[float, int, float]] = []
        self.best, self.begun = math.inf, (clock(), time.process_time())

    def start(self, trainer: Any) -> None:
        """Start the clock, once the ``trainer`` and its data are in memory."""
        self.begun = (self.clock(), time.process_time())

    @property
    def seconds(self) -> tuple[float, float]:
        """Wall and CPU seconds so far."""
        return self.wall + self.clock() - self.begun[0], self.cpu + time.process_time() - self.begun[1]

    @property
    def share(self) -> float:
        """Fraction of the budget that is used, in [0, 1]."""
        return min(self.seconds[0] / (60 * self.minutes), 1.0)

    def rate(self, step: int, warmup: int = 100) -> float:
        """Return the factor on the learning rate: linear over the first ``warmup`` steps, a cosine over the budget."""
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * self.share))

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED(once=1), self._first)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _first(self, engine: Engine) -> None:
        if self.share >= 1:
            stop(f"{self.minutes:.3g} min are over before the first step; give a larger budget")

    def _step(self, engine: Engine) -> None:
        while self.done < self.validations - 1 and self.share >= (self.done + 1) / self.validations:
            self.done = int(self.share * self.validations)
            self._validate(engine)
        if self.share >= 1 or (self.patience and self.stale >= self.patience):
            engine.terminate()

    def _validate(self, engine: Engine) -> None:
        if getattr(engine.state, "validated_iteration", None) != engine.state.iteration:
            self.validator.run(engine.state.epoch)
        value = float(self.validator.state.metrics[self.metric])
        self.stale = 0 if value < self.best else self.stale + 1
        self.best = min(self.best, value)
        self.curve.append((round(self.seconds[0] / 60, 2), engine.state.iteration, round(value, 2)))
        logger.info("%.1f min, step %d: %s %.4g", self.seconds[0] / 60, engine.state.iteration, self.metric, value)

    def _completed(self, engine: Engine) -> None:
        if not (self.patience and self.stale >= self.patience):
            self._validate(engine)
        wall, cpu = self.seconds
        used = {"steps": engine.state.iteration, "minutes": wall / 60, "cpu_minutes": cpu / 60, "budget": self.minutes}
        write_json({**used, self.metric: self.best, "curve": self.curve}, self.path)

    def state_dict(self) -> dict[str, Any]:
        wall, cpu = self.seconds
        return {"wall": wall, "cpu": cpu, "done": self.done, "stale": self.stale, "best": self.best,
                "curve": list(self.curve)}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

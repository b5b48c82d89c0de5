"""A training run as a thing on disk: checkpoints, the best weights, its record, and what one watches."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.handlers import StatsHandler, TensorBoardStatsHandler
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from custom_modules.errors import stop
from custom_modules.pairs import is_on, seed_of
from custom_modules.weights import save_atomically, save_weights

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves all of a run's state every ``interval`` iterations and after each epoch, and resumes from it.

    A checkpoint is written beside its place and renamed, so that a run that dies while writing keeps the one before;
    the last ``keep`` stay. Whatever is random is a function of the iteration (:class:`StepSeed`,
    :class:`~custom_modules.pairs.DistinctPatientSampler`), so that the iteration is all the random state there is.

    Args:
        folder: of the run.
        state: objects with ``state_dict`` and ``load_state_dict`` by name.
        interval: in iterations.
        keep: checkpoints that stay.
        rank: only the first process writes.
    """

    PATTERN = re.compile(r"checkpoint_(\d+)\.pt")

    def __init__(
        self, folder: str | Path, state: Mapping[str, Any], interval: int, keep: int = 2, rank: int = 0
    ) -> None:
        self.folder, self.state, self.interval, self.keep, self.rank = Path(folder), dict(state), interval, keep, rank

    def found(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        matches = [(self.PATTERN.fullmatch(path.name), path) for path in self.folder.glob("checkpoint_*.pt")]
        return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]

    def begin(self, engine: Engine, resume: bool | str = False) -> None:
        """Save ``engine``'s run from now on, after its other handlers; with ``resume``, first bring it and the state to the
        newest checkpoint that can be read.

        Ends the program where the folder holds a run and ``resume`` is off.
        """
        if is_on(resume):
            self._resume(engine)
        elif self.found():
            stop(f"{self.folder}: holds a run already; go on with --resume true, or give another --output_dir")
        if self.rank == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self._within_epoch)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def _resume(self, engine: Engine) -> None:
        for path in reversed(self.found()):
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                logger.warning("%s cannot be read (%s), taking the one before", path, type(error).__name__)
                continue
            self._restore(engine, saved, path)
            return
        logger.info("%s holds no checkpoint, starting from the beginning", self.folder)

    def _restore(self, engine: Engine, saved: dict[str, Any], path: Path) -> None:
        length = engine.state.epoch_length
        if saved["epoch_length"] != length:
            stop(f"{path}: was saved with {saved['epoch_length']} batches an epoch, the config says {length}")
        try:
            for name, item in self.state.items():
                item.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError) as error:
            stop(f"{path}: of another model or config than this one ({' '.join(str(error).split())[:160]})")
        iteration = saved["iteration"]
        engine.state.iteration, engine.state.epoch = iteration, iteration // length
        engine.data_loader.batch_sampler.start = iteration  # type: ignore[attr-defined]
        if iteration >= length * engine.state.max_epochs:
            stop(f"{path}: the run is complete; give a larger --max_epochs to go on")
        logger.info("resuming %s after %d iterations", path, iteration)

    def _within_epoch(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length:  # the epoch's last is saved after its validation
            self.save(engine)

    def save(self, engine: Engine) -> None:
        saved = {name: item.state_dict() for name, item in self.state.items()}
        saved |= {"iteration": engine.state.iteration, "epoch_length": engine.state.epoch_length}
        save_atomically(saved, self.folder / f"checkpoint_{engine.state.iteration:08d}.pt")
        for path in self.found()[: -self.keep]:
            path.unlink()


class BestWeights:
    """Handler of the evaluator that keeps the network of the best validation as ``path``.

    Args:
        metric: name of the metric, whose smallest value is best.
    """

    def __init__(self, network: nn.Module, path: str | Path, metric: str) -> None:
        self.network, self.path, self.metric, self.best = network, Path(path), metric, math.inf

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        value = engine.state.metrics[self.metric]
        if value < self.best:
            self.best = float(value)
            save_weights(self.network, self.path, torch.float32)
            logger.info("%s: best so far, %s %.4g", self.path, self.metric, value)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best = state["best"]


class StepSeed:
    """Handler that seeds PyTorch before each iteration from (``seed``, iteration, rank)."""

    def __init__(self, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        torch.manual_seed(seed_of(self.seed, (engine.state.iteration - 1) * self.world_size + self.rank))


class GradientClipping:
    """Handler that clips the norm of the gradient before each optimiser step, that is every ``accumulation`` batches."""

    def __init__(self, max_norm: float, accumulation: int = 1) -> None:
        self.max_norm, self.accumulation = max_norm, accumulation

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration % self.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)


class AfterStep:
    """Handler that calls ``actions`` after each optimiser step, such as a learning rate schedule's."""

    def __init__(self, actions: Sequence[Callable[[], Any]], accumulation: int = 1) -> None:
        self.actions, self.accumulation = actions, accumulation

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.accumulation), self)

    def __call__(self, engine: Engine) -> None:
        for action in self.actions:
            action()


class StopOnNonFinite:
    """Handler that ends the run, before the weights are touched, when the loss is not finite; it names the batch."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"]
        if not torch.isfinite(loss):
            names = ", ".join(engine.state.batch["patient"])
            stop(
                f"the loss is {float(loss)} at iteration {engine.state.iteration}, patients {names}; the last "
                "checkpoint is good: look at these volumes, or --resume true with a lower --learning_rate"
            )


class ProgressBar:
    """Handler that shows the whole run's iterations, the loss and the time left."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.COMPLETED, lambda: self.bar.close())

    def _open(self, engine: Engine) -> None:
        total = engine.state.epoch_length * engine.state.max_epochs
        self.bar = tqdm(total=total, initial=engine.state.iteration, desc="training", unit="step", mininterval=1.0)

    def _update(self, engine: Engine) -> None:
        self.bar.set_postfix(loss=f"{engine.state.output['loss'].item():.4g}", refresh=False)
        self.bar.update()


class ValidationMontage:
    """Handler of the evaluator that puts a picture into TensorBoard: a row a patient, its middle coronal plane of MR,
    prediction and CT, each in its whole window."""

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
    """All ``handlers`` for rank 0; for the others those that write nothing."""
    return [handler for handler in handlers if rank == 0 or not isinstance(handler, WRITERS)]


def write_record(folder: str | Path, settings: Mapping[str, Any], data: str = "", rank: int = 0) -> None:
    """Write ``folder``/run.json: when, with what command, settings, packages, commit, data and hardware it ran; a run
    that is resumed adds to the list that stands there.

    Args:
        settings: the config's values; those that are no plain numbers, texts and lists of them are left out.
        data: fingerprint, see :func:`~custom_modules.pairs.check_pairs_or_stop`.
    """
    if rank:
        return
    path = Path(folder) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(path.read_text()) if path.exists() else []
    plain = {name: value for name, value in settings.items() if _is_plain(value)}
    packages = ("torch", "monai", "pytorch-ignite", "nibabel", "itk", "numpy")
    record = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "settings": plain,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "commit": commit(),
        "data_sha256": data,
        "hardware": hardware(),
    }
    temporary = path.with_name(f".run.json.{os.getpid()}")
    temporary.write_text(json.dumps([*records, record], indent=1, default=str))
    os.replace(temporary, path)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, and GPUs."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    cpu = models[0] if models else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]}


def commit() -> str | None:
    """The repository's commit, with ``+`` where files were changed; None outside a repository."""
    root = Path(__file__).parent
    try:
        run: Callable[[Iterable[str]], str] = lambda arguments: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
        return run(["rev-parse", "HEAD"]) + ("+" if run(["status", "--porcelain"]) else "")
    except (OSError, subprocess.CalledProcessError):
        return None

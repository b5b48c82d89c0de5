"""Synthesis of a folder of volumes: while the network computes one, the next is read and the last one written. Volumes
can be divided among processes, and a run can be resumed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from ignite.engine import Events
from monai.data import Dataset, list_data_collate
from monai.engines import SupervisedEvaluator
from tqdm import tqdm

from custom_modules.data.volumes import name_of
from custom_modules.errors import one_line, stop

logger = logging.getLogger(__name__)


class VolumeDataset(Dataset):
    """Dataset that returns an item that fails as ``{"image": path, "failure": message, "error": exception}``, so that
    the others go ahead.

    Args:
        data: all volumes, see :func:`~custom_modules.data.inputs.find_volumes`.
        transform: applied to each.
        rank, world_size: of this process; each process handles every ``world_size``-th volume.
        resume: skip the items for which ``is_finished`` finds a complete synthetic CT.
    """

    def __init__(
        self, data: Sequence[dict[str, str]], transform: Callable, rank: int = 0, world_size: int = 1,
        resume: bool = False, is_finished: Callable[[Mapping[str, str]], bool] | None = None,
    ) -> None:  # fmt: skip
        mine = list(data)[rank::world_size]
        left = [item for item in mine if not is_finished(item)] if resume and is_finished else mine
        if len(left) < len(mine):
            logger.info("%d of %d volumes are finished and kept", len(mine) - len(left), len(mine))
        super().__init__(left, transform)

    def __getitem__(self, index: int) -> dict[Hashable, Any]:
        item = self.data[index]
        try:
            return super().__getitem__(index)
        except Exception as error:
            name = name_of(item["image"])
            return {"image": name, "failure": one_line(error, name), "error": error}


def collate(items: Sequence[dict[Hashable, Any]]) -> Any:
    """Make a batch of one volume; a failure is passed on unchanged."""
    return items[0] if "failure" in items[0] else list_data_collate(items)


class SynthesisEvaluator(SupervisedEvaluator):
    """Evaluator that continues after a volume that fails and lists the failures at the end. It resamples and writes a
    synthetic CT while the next one is computed. Volumes are kept in main memory; the inferer moves what it computes.

    Args:
        postprocessing: turns the output of the network into files.
        guard: checks each batch before synthesis (:class:`~custom_modules.inference.guard.Guard`).
        sidecar: writes the record of each synthesis after its files
            (:class:`~custom_modules.inference.sidecar.Sidecar`).
        progress: show a bar over the volumes with their names; for a single one, the inferer's bar over its tiles.
    """

    def __init__(
        self,
        *args: Any,
        postprocessing: Callable | None = None,
        guard: Callable | None = None,
        sidecar: Callable | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.finish, self.guard, self.sidecar = postprocessing, guard, sidecar
        self.failures: list[str] = []
        self.errors: list[Exception] = []  # of the failures
        self.started = time.perf_counter()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self.pending: Future | None = None
        self.progress = progress
        self.add_event_handler(Events.STARTED, self._open_bar)
        self.add_event_handler(Events.GET_BATCH_STARTED, self._start_clock)
        self.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.bar.update())
        self.add_event_handler(Events.COMPLETED, self._wait)
        self.add_event_handler(Events.COMPLETED, lambda: self.bar.close())

    def _open_bar(self) -> None:
        total = self.state.epoch_length
        if total == 1 and self.progress and hasattr(self.inferer, "progress"):
            self.inferer.progress = True
        self.bar = tqdm(total=total, desc="synthesis", unit="volume", disable=not self.progress or total == 1)

    def _start_clock(self) -> None:
        self.started = time.perf_counter()

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict:
        if "failure" in batchdata:
            return self._fail(batchdata["failure"], batchdata["error"])
        name = batchdata["image"].meta["filename_or_obj"]
        name = name if isinstance(name, str) else name[0]
        self.bar.set_postfix_str(Path(name).name)
        try:
            findings = self.guard(batchdata, engine.network) if self.guard else None
            output = super()._iteration(engine, batchdata)
        except Exception as error:
            return self._fail(one_line(error, name), error)
        self._wait()  # at most one volume waits to be written
        item = {**engine.state.batch[0], "pred": output[0]["pred"]}  # as MONAI has decollated them
        self.pending = self.pool.submit(self._write, name, item, findings, self.started)
        return output

    def _write(self, name: str, item: dict[str, Any], findings: Any, started: float) -> None:
        try:
            if self.finish:
                self.finish(item)
            if self.sidecar:
                self.sidecar(name, item["output"], findings, time.perf_counter() - started)
        except Exception as error:
            self._fail(one_line(error, name), error)

    def _wait(self) -> None:
        if self.pending:
            self.pending.result()
            self.pending = None

    def _fail(self, failure: str, error: Exception) -> dict:
        self.failures.append(failure)
        self.errors.append(error)
        logger.error(failure)
        return {}

    def exit_on_failures(self) -> None:
        """End the program with a list of the volumes that failed, if any did."""
        wait_for_all()
        if self.failures:
            total = self.state.epoch_length
            stop(f"{len(self.failures)} of {total} volumes failed:\n" + "\n".join(f"  {f}" for f in self.failures))


def wait_for_all() -> None:
    """Wait for the other processes of ``torchrun``, which ends them all as soon as one exits with a failure."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

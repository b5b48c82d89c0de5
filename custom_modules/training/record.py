"""The record of a training run."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from custom_modules.config_check import plain_settings
from custom_modules.files import write_json


class RunRecord:
    """Writes ``folder``/run.json: start time, command, settings, packages, commit, data and hardware of a training.

    Args:
        folder: of the run.
        rank: of this process; only the first one writes.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder, self.rank = Path(folder), rank

    def write(self, data_sha256: str = "") -> None:
        """Add a record to the list in run.json, which has several records if the run was resumed.

        Args:
            data_sha256: fingerprint of the data, see :class:`~custom_modules.data.pairs.DataCheck`.
        """
        if self.rank == 0:
            write_record(self.folder, plain_settings(), data_sha256)


def write_record(folder: str | Path, settings: Mapping[str, Any], data_sha256: str = "") -> None:
    """Add a record with the config's ``settings`` to ``folder``/run.json."""
    path = Path(folder) / "run.json"
    records = json.loads(path.read_text()) if path.exists() else []
    packages = ("torch", "monai", "pytorch-ignite", "nibabel", "itk", "numpy")
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "settings": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": commit(),
        "data_sha256": data_sha256,
        "hardware": hardware(),
    }
    write_json([*records, record], path)


def version(package: str) -> str | None:
    """Return the version of an installed package, None for one that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Return the CPU model, the number of cores that this process may use, and the GPUs."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    cpu = models[0] if models else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }


def commit() -> str | None:
    """Return the commit of the repository, with ``+`` if files were changed; None outside a repository."""
    root = Path(__file__).parent
    try:
        run: Callable[[Iterable[str]], str] = lambda arguments: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
        return run(["rev-parse", "HEAD"]) + ("+" if run(["status", "--porcelain"]) else "")
    except (OSError, subprocess.CalledProcessError):
        return None

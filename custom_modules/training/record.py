"""The record of a training run."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from custom_modules.files import write_json


def write_record(folder: str | Path, settings: Mapping[str, Any], data: str = "", rank: int = 0) -> None:
    """Write ``folder``/run.json: when, with what command, settings, packages, commit, data and hardware it ran; a run
    that is resumed adds to the list that stands there.

    Args:
        settings: the config's values; those that are no plain numbers, texts and lists of them are left out.
        data: fingerprint, see :func:`~custom_modules.data.pairs.check_pairs_or_stop`.
    """
    if rank:
        return
    path = Path(folder) / "run.json"
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
    write_json([*records, record], path)


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

"""What the benchmarks share: interleaved medians, the machine they ran on, and where results go.

Every script prints its table, writes ``benchmarks/results/NAME.json`` and puts the table into a page, mostly
``docs/performance.md``, between the markers of its name.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
CPU = torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device = CPU) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def medians(works: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU) -> dict[str, float]:
    """Median seconds of each of ``works``, taken in turn ``repeats`` times after a round that warms up; what fails is
    left out."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            if name in times:
                try:
                    times[name].append(seconds(work, device))
                except (RuntimeError, TypeError, ValueError):
                    del times[name]
    return {name: float(np.median(found[1:])) for name, found in times.items()}


def processor() -> str:
    """The processor's name, where Linux tells it."""
    found = (
        re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return found[1] if found else platform.machine()


def hardware(device: torch.device = CPU) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{torch.get_num_threads()} threads, {processor()}{amx}"


def publish(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    device: torch.device = CPU,
    page: Path = PAGE,
) -> None:
    """Print ``rows`` as a table of ``columns``, keep all of them as JSON and put the table into the page."""
    date = str(datetime.date.today())
    content = {"date": date, "hardware": hardware(device), "torch": torch.__version__, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    table = f"{table_of(rows, columns)}\n\n{date}, {hardware(device)}, PyTorch {torch.__version__}."
    print(table, flush=True)
    _put(name, table, page)


def table_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_text(row.get(column)) for column in columns)} |" for row in rows)])


def put_table(name: str, rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Print ``rows`` as a table of all their columns and put it into the page, where nothing depends on the machine."""
    table = table_of(rows, list(rows[0]))
    print(f"{table}\n", flush=True)
    _put(name, table, page)


def _put(name: str, table: str, page: Path) -> None:
    if page.exists():
        mark = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        page.write_text(mark.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page.read_text()))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)

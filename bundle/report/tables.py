"""The tables of the report: measures with their precision and direction, and which value is the best and the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from custom_modules.data.hu import TISSUES, tissue
from custom_modules.inference.guard import LIMIT, MEASURES


@dataclass(frozen=True)
class Column:
    """A measure: its title, decimals, and what is better: ``low``, ``high``, or ``zero`` for the nearest to it."""

    title: str
    digits: int
    better: str = ""


COLUMNS = {
    "synthrad2025_mae": Column("MAE, HU", 1, "low"), "synthrad2025_bias": Column("bias, HU", 1, "zero"),
    "synthrad2025_rmse": Column("RMSE, HU", 1, "low"), "synthrad2025_psnr": Column("PSNR, dB", 1, "high"),
    "synthrad2025_ms_ssim": Column("MS-SSIM", 3, "high"),
    "synthrad2025_soft_mae": Column("soft tissue MAE, HU", 1, "low"),
    "synthrad2025_bone_mae": Column("bone MAE, HU", 0, "low"), "synthrad2025_bone_dice": Column("bone Dice", 2, "high"),
    "paper_mae": Column("MAE (paper), HU", 1, "low"), "paper_psnr": Column("PSNR (paper), dB", 1, "high"),
    "paper_ssim": Column("SSIM (paper)", 3, "high"), "paper_ncc": Column("NCC (paper)", 3, "high"),
}  # fmt: skip
SPREAD = {
    "sd_mean_sd": Column("mean SD, HU", 1), "sd_coverage_50": Column("in the 50 % interval", 2),
    "sd_coverage_80": Column("in the 80 % interval", 2), "sd_coverage_95": Column("in the 95 % interval", 2),
    "sd_soft_coverage_95": Column("soft tissue in 95 %", 2), "sd_bone_coverage_95": Column("bone in 95 %", 2),
    "sd_ence": Column("ENCE", 2, "low"), "sd_spearman": Column("Spearman", 2, "high"),
    "sd_ause": Column("AUSE", 2, "low"),
}  # fmt: skip
CLINICAL = {
    "pet_acf": Column("PET correction factors, %", 2, "zero"),
    "pet_soft": Column("activity, soft tissue, %", 2, "zero"), "pet_bone": Column("activity, bone, %", 2, "zero"),
    "pet_lesion": Column("activity, lesions, %", 2, "zero"),
    "dose_photons": Column("photon dose, absolute, %", 2, "low"),
    "dose_photons_gamma": Column("photons, gamma 2 %/2 mm, %", 1, "high"),
    "dose_protons": Column("proton dose, absolute, %", 2, "low"),
    "dose_protons_gamma": Column("protons, gamma 2 %/2 mm, %", 1, "high"),
    "dose_path": Column("path length, absolute, mm", 2, "low"),
    "organs_usual": Column("organs with usual HU, share", 2, "high"),
}  # fmt: skip


@dataclass
class Cell:
    """A value as text, as a number to sort by (empty when there is none), its mark (``best``, ``worst`` or none), an
    address it leads to, and a detail in a line of its own."""

    text: str
    value: float | str = ""
    mark: str = ""
    link: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows of cells."""

    head: list[str]
    rows: list[list[Cell]]


def number(text: Any, otherwise: float = np.nan) -> float:
    """Convert a cell of metrics.csv or a value of metrics.json; an empty or undefined one becomes ``otherwise``."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return otherwise
    return otherwise if np.isnan(value) else value


def cell(value: Any, digits: int) -> Cell:
    """Return a value with its decimals; what is not defined is never a number."""
    if value in (None, ""):
        return Cell("")
    found = number(value)
    if np.isnan(found):
        return Cell("not defined" if str(value).lower() == "nan" else str(value))
    return Cell(f"{found:.{digits}f}", found if np.isfinite(found) else "")


def scores(
    rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column], first: str = "", links: Mapping[str, str] = {}
) -> Table | None:
    """Return a table of patients or systems by measures, without empty rows and columns; None if nothing is left.

    Args:
        rows: measures by name of the row.
        first: heading of the names.
        links: addresses of the names.
    """
    rows = {name: row for name, row in rows.items() if any(row.get(key) not in (None, "") for key in columns)}
    columns = {k: column for k, column in columns.items() if any(row.get(k) not in (None, "") for row in rows.values())}
    if not columns:
        return None
    cells = {key: [cell(row.get(key), column.digits) for row in rows.values()] for key, column in columns.items()}
    for key, column in columns.items():
        mark(cells[key], column.better)
    names = [Cell(name, name, link=links.get(name, "")) for name in rows]
    return Table([first, *(c.title for c in columns.values())], [list(row) for row in zip(names, *cells.values())])


def mark(cells: Sequence[Cell], better: str) -> None:
    """Mark the best and the worst of at least three values, unless all are equal as shown."""
    known = [each for each in cells if isinstance(each.value, float)]
    if not better or len(known) < 3 or len({each.text for each in known}) < 2:
        return

    def badness(each: Cell) -> float:
        value = float(each.value)
        return -value if better == "high" else abs(value) if better == "zero" else value

    for each in known:
        if badness(each) == min(map(badness, known)):
            each.mark = "best"
        elif badness(each) == max(map(badness, known)):
            each.mark = "worst"


def means(systems: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]) -> Table | None:
    """Return the means of the systems with their intervals and, if not all, the number of patients."""
    table = scores({name: {k: v["mean"] for k, v in row.items()} for name, row in systems.items()}, columns, "system")
    titles = {column.title: (key, column.digits) for key, column in columns.items()}
    for row in table.rows if table else []:
        for title, each in zip(table.head[1:], row[1:]):  # type: ignore[union-attr]
            key, digits = titles[title]
            values = systems[row[0].text].get(key)
            if values and values["mean"] is not None:
                low_high = values["ci95"]
                interval = f"{low_high[0]:.{digits}f} to {low_high[1]:.{digits}f}" if low_high else ""
                each.detail = f"{interval} [{values['n']}]" if values["not_defined"] else interval
    return table


def by_tissue(ct: np.ndarray, sct: np.ndarray, mask: np.ndarray, voxel_ml: float) -> Table:
    """Return volume, means and errors of the tissues of a CT within a mask."""
    rows = []
    for name in TISSUES:
        inside = mask & tissue(ct, name)
        if inside.any():
            real, made = ct[inside].astype(np.float64), sct[inside].astype(np.float64)
            numbers = [real.mean(), made.mean(), (made - real).mean(), np.abs(made - real).mean()]
            rows.append([Cell(name), cell(inside.sum() * voxel_ml, 0), *(cell(value, 0) for value in numbers)])
    head = ["tissue by the CT", "volume, ml", "CT, mean HU", "synthetic CT, mean HU", "bias, HU", "MAE, HU"]
    return Table(head, rows)


def guard_table(guard: Mapping[str, Any]) -> Table | None:
    """Return what the guard measured, by distance from the training MRs; None if nothing was compared."""
    measures, off = guard.get("measures") or {}, guard.get("deviations") or {}
    rows = []
    for name in sorted(off, key=off.__getitem__, reverse=True):
        unit = MEASURES.get(name, ("",))[0]
        distance = cell(off[name], 1)
        distance.mark = "worst" if off[name] > LIMIT else ""
        rows.append([Cell(name), Cell(f"{measures[name]:.3g}{unit and ' ' + unit}"), distance])
    return Table(["measure of the MR", "value", f"SD from the training MRs (limit {LIMIT:g})"], rows) if rows else None

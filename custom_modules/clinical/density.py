"""Relative electron density and mass density from HU, by a lookup table (HLUT): a default one or the user's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from custom_modules.errors import InputError

AIR = -1000.0  # HU below are noise around air and count as this


@dataclass(frozen=True)
class LookupTable:
    """A table of HU and values, linear between its nodes.

    Attributes:
        name: in messages.
        hu, values: (N,), HU strictly increasing.
    """

    name: str
    hu: np.ndarray
    values: np.ndarray

    def __call__(self, hu: np.ndarray) -> np.ndarray:
        """Return the values at HU of any shape, float32.

        Raises:
            InputError: for HU beyond the table.
        """
        hu = np.maximum(np.asarray(hu, dtype=np.float64), AIR)
        low, high = float(hu.min()), float(hu.max())
        if low < self.hu[0] or high > self.hu[-1]:
            raise InputError(
                f"{self.name}: goes from {self.hu[0]:g} to {self.hu[-1]:g} HU, the image from {low:g} to {high:g}; "
                "extend the table"
            )
        return np.interp(hu, self.hu, self.values).astype(np.float32)


def _table(name: str, nodes: dict[float, float]) -> LookupTable:
    return LookupTable(name, np.array(list(nodes), dtype=float), np.array(list(nodes.values())))


# matRad's default table
ELECTRON = _table(
    "matRad's table", {-1024: 0.001, -999: 0.001, -90: 0.95, -45: 0.99, 0: 1, 100: 1.095, 350: 1.199, 3000: 2.505}
)
# Schneider et al. 2000 (Phys Med Biol 45:459), as in GATE, g/cm³
MASS = _table("Schneider's table", {
    -1000: 0.00121, -98: 0.93, -97: 0.930486, 14: 1.03, 23: 1.031, 100: 1.1199, 101: 1.0762, 1600: 1.9642, 3000: 2.8,
})  # fmt: skip
QUANTITIES = {"electron": ELECTRON, "mass": MASS}


def read_hlut(path: str | Path) -> LookupTable:
    """Read a table of two columns, HU and value: a CSV with or without headings, or matRad's ``.hlut``. Lines that
    start with ``#`` are comments.

    Raises:
        InputError: for a file that is no such table, or whose HU do not increase.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a table of HU and density ({error})") from None
    lines = [re.split(r"[,;\s]+", line.strip().strip(",;")) for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line[0].startswith("#")]
    if lines and not _is_number(lines[0][0]):
        lines = lines[1:]  # headings
    if len(lines) < 2 or not all(len(line) == 2 and all(map(_is_number, line)) for line in lines):
        raise InputError(f"{path}: is not a table of two columns, HU and density; give one node a line")
    hu, values = np.array(lines, dtype=float).T
    if (np.diff(hu) <= 0).any():
        at = int(np.argmax(np.diff(hu) <= 0))
        raise InputError(f"{path}: HU must increase, but {hu[at + 1]:g} follows {hu[at]:g}; sort the table")
    if not np.isfinite([hu, values]).all() or (values < 0).any():
        raise InputError(f"{path}: holds densities that are negative or not finite; correct them")
    return LookupTable(str(path), hu, values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""What ``wldm pet``, ``dose`` and ``organs`` found for a synthetic CT, where they ran, for scores and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from custom_modules.data.volumes import sibling_path

PET = {
    "pet_acf": ("acf", "mean"), "pet_soft": ("suv", "soft", "mean"), "pet_bone": ("suv", "bone", "mean"),
    "pet_lesion": ("lesion", "mean"),
}  # fmt: skip
DOSE = {
    "dose_photons": ("photons", "difference", "mean_abs"), "dose_photons_gamma": ("photons", "gamma 2 %/2 mm"),
    "dose_protons": ("protons", "difference", "mean_abs"), "dose_protons_gamma": ("protons", "gamma 2 %/2 mm"),
    "dose_path": ("wepl", "front to back", "mean_abs"),
}  # fmt: skip
ORGANS = {"organs_usual": ("usual_share",)}


def clinical_figures(sct: str | Path) -> dict[str, float]:
    """Return the figures that lie beside a synthetic CT, ``a_sct_pet.json``, ``a_sct_dose.json`` and
    ``a_sct_organs.json``, by the names in :data:`PET` (percent), :data:`DOSE` (percent, and mm of the path) and
    :data:`ORGANS` (a share); none that were not made."""
    found: dict[str, float] = {}
    for suffix, names in (("_pet", PET), ("_dose", DOSE), ("_organs", ORGANS)):
        record = _read(sibling_path(sct, suffix, ".json"))
        for name, keys in names.items():
            value: Any = record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                found[name] = float(value)
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

"""Which of the prepared patients are used, in which split: the datalist for training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bundle.prepare.patients import SPLITS, Patient
from custom_modules.files import write_json

FINISHED = "prepared.json"  # written last: a patient with it is finished


@dataclass(frozen=True)
class Limits:
    """What a pair must reach to be in the datalist.

    Attributes:
        min_dice: of the two bodies.
        min_mutual_information: nats.
        max_deformation: beyond the rigid motion, mm.
        max_folded: share of the body.
        min_covered: share of the MR's body that the CT covers.
    """

    min_dice: float = 0.85
    min_mutual_information: float = 0.2
    max_deformation: float = 40.0
    max_folded: float = 0.001
    min_covered: float = 0.5

    def shortfalls(self, measures: Mapping[str, Any]) -> list[str]:
        """What ``measures`` fall short of, in words."""
        found = []
        for limit in fields(self):
            bound, name = limit.name.split("_", 1)
            value, allowed = measures[name], getattr(self, limit.name)
            if not (value >= allowed if bound == "min" else value <= allowed):
                side = "below" if bound == "min" else "above"
                found.append(f"{name.replace('_', ' ')} {value:.3g} is {side} {allowed:g}")
        return found


def read_result(folder: Path) -> dict[str, Any]:
    """What was found when a patient was prepared, or nothing if it is not finished."""
    path = folder / FINISHED
    return json.loads(path.read_text()) if path.is_file() else {}


def summarise(
    patients: Sequence[Patient], out: Path, limits: Limits, failures: Mapping[str, str], split: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Hold every patient against the limits, split those that pass and write ``datalist.json``; a row a patient."""
    rows = []
    for patient in patients:
        row: dict[str, Any] = {"patient": patient.name, "notes": [], "used": False, "split": patient.split}
        if patient.name in failures:
            row["state"] = f"failed: {failures[patient.name]}"
        else:
            row.update(read_result(out / patient.name))
            short = [] if row.get("unpaired") else limits.shortfalls(row)
            row.update(used=not short, state=f"left out: {'; '.join(short)}")
            if row.get("unpaired"):
                row["split"] = row["split"] or "training"
        rows.append(row)
    used = [row for row in rows if row["used"]]
    splits = split_patients([row["patient"] for row in used if not row["split"]], **split)
    for row in used:
        row["state"] = row["split"] = row["split"] or splits[row["patient"]]
    write_datalist(used, out / "datalist.json", split["seed"])
    return rows


def split_patients(names: Sequence[str], test: float = 0.2, validation: float = 0.0, seed: int = 0) -> dict[str, str]:
    """A split for each patient, in the order of a hash of seed and name: exact shares, and a patient more moves at most
    one other across each border."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    tests, validations = round(test * len(order)), round(validation * len(order))
    kinds = ["test"] * tests + ["validation"] * validations
    return dict(zip(order, kinds + ["training"] * (len(order) - len(kinds))))


def write_datalist(rows: Sequence[Mapping[str, Any]], path: Path, seed: int) -> None:
    """A MONAI datalist of the patients in ``rows`` by their ``split``, paths relative to its folder."""
    content: dict[str, Any] = {
        "description": "image = MR, label = CT in HU registered to it; paths relative to this file",
        "modality": {"image": "MR", "label": "CT"},
        "seed": seed,
    }
    for kind in SPLITS:
        content[kind] = [_entry(row) for row in rows if row["split"] == kind]
    write_json(content, path)


def _entry(row: Mapping[str, Any]) -> dict[str, str]:
    """The datalist's entry of a patient; a CT without an MR has no ``image``."""
    name = row["patient"]
    image = {} if row.get("unpaired") else {"image": f"{name}/image.nii.gz"}
    return {**image, "label": f"{name}/label.nii.gz", "patient": name}

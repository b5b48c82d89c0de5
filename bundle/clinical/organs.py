"""``python -m bundle organs``: the HU of organs in a synthetic CT, where there is no CT to compare it with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from custom_modules.clinical.study import MARK
from custom_modules.data.grid import check_same_grid
from custom_modules.data.hu import check_hu
from custom_modules.data.organs import class_names, read_labels
from custom_modules.data.volumes import read_volume, sibling_path
from custom_modules.errors import InputError
from custom_modules.evaluation.organs import organ_hu
from custom_modules.files import write_json


def organs(sct: str, labels: str, names: str | None = None, output: str | None = None) -> None:
    """Compare the HU of organs in a synthetic CT with what is usual on a CT without contrast medium.

    Prints, and writes to SCT_organs.json, the median HU of each organ, and for liver, spleen, kidneys, muscles, fat,
    vertebrae and lungs whether it is usual. This needs no CT, but labels of the organs, such as TotalSegmentator makes
    from the MR (task total_mr).

    Args:
        sct: the synthetic CT, or any other volume in HU.
        labels: label volume on the same grid; names of the classes are read from its header.
        names: JSON file with the names, {"1": "spleen", ...}, for a header without them.
        output: the JSON file to write; SCT_organs.json when None.
    """
    volume, classes = read_volume(sct), read_labels(labels)
    check_same_grid(classes, volume)
    hu = np.asarray(volume[0])
    check_hu(hu, sct)
    rows = organ_hu(hu, np.asarray(classes[0]).astype(int), _names(names) if names else class_names(labels))
    judged = [row for row in rows if row["within"] is not None]
    share = sum(row["within"] for row in judged) / len(judged) if judged else None
    path = Path(output) if output else sibling_path(sct, "_organs", ".json")
    write_json({"sct": str(Path(sct).resolve()), "organs": rows, "usual_share": share, "note": MARK}, path)
    report(rows)
    if judged:
        print(f"usual          {sum(row['within'] for row in judged)} of {len(judged)} organs with a usual range")
    print(f"written        {path}")


def _names(path: str) -> dict[int, str]:
    try:
        return {int(label): str(name) for label, name in json.loads(Path(path).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f'{path}: not a JSON file of names by class, such as {{"1": "spleen"}} ({error})') from error


def report(rows: list[dict[str, Any]]) -> None:
    """Print one line for each organ."""
    print(f"{'organ':<28}{'median HU':>10}{'10 to 90 %':>16}{'usual':>16}")
    for row in rows:
        usual = "" if row["usual"] is None else f"{row['usual'][0]:g} to {row['usual'][1]:g}"
        mark = "" if row["within"] in (None, True) else "  outside"
        spread = f"{row['p10']:.0f} to {row['p90']:.0f}"
        print(f"{row['organ']:<28}{row['median']:>10.0f}{spread:>16}{usual:>16}{mark}")

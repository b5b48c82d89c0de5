"""Organ Dice (Table III): the same segmentation on CT and synthetic CT, compared class by class."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor

from custom_modules.data.grid import check_same_grid
from custom_modules.data.volumes import EXTENSIONS, read_volume
from custom_modules.errors import InputError
from custom_modules.evaluation.metrics import dice

SEGMENTER = "TotalSegmentator"


def organ_dice(patient: str, ct: str | Path, sct: str | Path, labels: str | Path | None) -> dict[str, Any]:
    """Compute the Dice of each class of the CT's labels, ``dice_<class>``, and their mean, ``organ_dice``; ``organs``
    describes the classes in words.

    A class that is missing in the labels of the synthetic CT has a Dice of 0; one that only they have is named and not
    averaged.

    Args:
        labels: folder with ``<patient>_ct`` and ``<patient>_sct``; when None, TotalSegmentator makes them if it is
            installed; otherwise nothing is computed.

    Raises:
        InputError: for a label volume that is missing, unreadable, on another grid, not of labels, or of other classes.
    """
    if labels is not None:
        return _compare(*(_find(Path(labels), f"{patient}_{kind}") for kind in ("ct", "sct")))
    if shutil.which(SEGMENTER) is None:
        return {"organs": f"not computed: neither label volumes nor {SEGMENTER} available"}
    with tempfile.TemporaryDirectory() as folder:
        return _compare(*(_segment(path, Path(folder) / f"{kind}.nii.gz") for kind, path in (("ct", ct), ("sct", sct))))


def _find(folder: Path, name: str) -> Path:
    paths = [folder / (name + extension) for extension in EXTENSIONS]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise InputError(f"{paths[0]}: no such label volume")
    return found


def _segment(path: str | Path, target: Path) -> Path:
    command = [SEGMENTER, "-i", str(path), "-o", str(target), "--ml", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not target.exists():
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{path}: {SEGMENTER} failed ({reason[:160]})")
    return target


def _compare(ct: Path, sct: Path) -> dict[str, Any]:
    volumes = [_read_labels(path) for path in (ct, sct)]
    check_same_grid(volumes[1], volumes[0])
    a, b = (np.asarray(volume[0]).astype(int) for volume in volumes)
    classes, others = (set(np.unique(x)) - {0} for x in (a, b))
    if not classes or 2 * len(classes & others) < len(classes | others):
        raise InputError(f"{sct}: classes {_list(others)} differ from those of {ct}, {_list(classes)}")
    values = {f"dice_{label}": dice(a == label, b == label) for label in sorted(classes)}
    text = [f"{len(classes)} classes"]
    text += [f"only in the CT: {_list(classes - others)}"] * bool(classes - others)
    text += [f"only in the synthetic CT: {_list(others - classes)}"] * bool(others - classes)
    return {"organs": "; ".join(text), "organ_dice": float(np.mean(list(values.values()))), **values}


def _read_labels(path: Path) -> MetaTensor:
    volume = read_volume(path)
    values = np.asarray(volume)
    if values.min() < 0 or (values != values.round()).any():
        raise InputError(f"{path}: not a label volume, its values are not whole numbers of at least 0")
    return volume


def _list(classes: set[int]) -> str:
    return ", ".join(str(label) for label in sorted(classes)) or "none"

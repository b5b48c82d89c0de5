"""Organs: their Dice (Table III), the same segmentation on CT and synthetic CT compared class by class; and their HU,
beside what is usual on a CT without contrast medium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from custom_modules.data.grid import check_same_grid
from custom_modules.data.organs import MUSCLES, read_labels
from custom_modules.data.volumes import EXTENSIONS
from custom_modules.errors import InputError
from custom_modules.evaluation.metrics import dice

SEGMENTER = "TotalSegmentator"

# usual median HU without contrast medium, by words in the class's name; none for others
USUAL_HU: dict[tuple[str, ...], tuple[float, float]] = {
    ("liver",): (40, 70), ("spleen",): (35, 60), ("kidney",): (20, 45), ("lung",): (-900, -600),
    MUSCLES: (35, 70),
    ("fat",): (-120, -70), ("vertebra",): (100, 300),
}  # fmt: skip


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
    volumes = [read_labels(path) for path in (ct, sct)]
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


def _list(classes: set[int]) -> str:
    return ", ".join(str(label) for label in sorted(classes)) or "none"


def usual_hu(name: str) -> tuple[float, float] | None:
    """Return the usual median HU of a class, from and to; None for classes without such a range."""
    return next((hu for words, hu in USUAL_HU.items() if any(word in name.lower() for word in words)), None)


def organ_hu(hu: np.ndarray, labels: np.ndarray, names: dict[int, str]) -> list[dict[str, Any]]:
    """Measure the HU of each class in a volume: median, 10 and 90 % quantile, and whether the median is usual.

    The outermost voxel of an organ is left out where that leaves anything, because it is partly something else.

    Args:
        hu, labels: (D, H, W).
        names: of the classes.

    Raises:
        InputError: for a class without a name.
    """
    classes = np.unique(labels)[np.unique(labels) > 0]
    unknown = [int(label) for label in classes if int(label) not in names]
    if unknown:
        raise InputError(f"no name for class {', '.join(map(str, unknown))} of the labels; give --names FILE.json")
    rows = []
    for label, box in zip(range(1, int(labels.max()) + 1), ndimage.find_objects(labels)):
        if box is None:
            continue
        organ = labels[box] == label
        inner = ndimage.binary_erosion(organ)
        low, median, high = np.percentile(hu[box][inner if inner.any() else organ], (10, 50, 90)).tolist()
        usual = usual_hu(names[label])
        rows.append({
            "organ": names[label], "voxels": int(organ.sum()), "median": median, "p10": low, "p90": high,
            "usual": usual, "within": None if usual is None else usual[0] <= median <= usual[1],
        })  # fmt: skip
    return rows

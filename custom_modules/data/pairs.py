"""Training pairs: reading and checking a datalist, and batches of different patients."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import load_decathlon_datalist
from tqdm import tqdm

from custom_modules.data.grid import REGISTER, check_same_grid
from custom_modules.data.hu import check_hu
from custom_modules.data.organs import organ_tissues, read_labels
from custom_modules.data.volumes import EXTENSIONS, read_volume, volume_files
from custom_modules.errors import InputError, stop
from custom_modules.files import sha256

Pair = dict[str, str]
CLIPPED_HU, CLIPPED_VOXELS = 1000.0, 8  # a CT that ends below, in more than so many equal voxels, has been clipped


def load_pairs(
    datalist: str | Path, base_dir: str | Path, splits: Sequence[str] = ("training", "validation"),
    unpaired: bool = False,
) -> dict[str, list[Pair]]:  # fmt: skip
    """Read the pairs of ``splits`` of a MONAI datalist: ``image`` (MR), ``label`` (CT) and ``patient``. Without a
    ``patient`` in the datalist it is the file name of the image, or its folder if file names repeat
    (``<patient>/mr.nii.gz``). With ``unpaired``, entries may have a ``label`` only: their MR is simulated. ``organs``,
    a label volume on the grid of the CT, says of what tissue its organs are.

    Raises:
        InputError: when the datalist is missing, is not JSON or has no such split, or an entry lacks a key.
    """
    if not Path(datalist).is_file():
        raise InputError(f"{datalist}: no such datalist; give --datalist or --dataset_dir")
    pairs = {}
    for split in splits:
        try:
            entries = load_decathlon_datalist(str(datalist), True, split, base_dir=str(base_dir))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:  # MONAI inspects the first entry
            raise InputError(f"{datalist}: has no usable split '{split}' ({error})") from error
        for number, entry in enumerate(entries):
            for key in ("label",) if unpaired and "image" not in entry else ("image", "label"):
                if not isinstance(entry.get(key), str):
                    advice = "" if unpaired or key == "label" else "; CTs without MR need configs/whole_body.yaml"
                    raise InputError(
                        f"{datalist}: entry {number} of '{split}' has no '{key}' (image = MR, label = CT){advice}"
                    )
        pairs[split] = [dict(entry) for entry in entries]
        for entry in pairs[split]:
            if "organs" in entry:  # MONAI knows image and label only
                entry["organs"] = str(Path(base_dir) / entry["organs"])
    images = {main_file(entry) for entries in pairs.values() for entry in entries}
    by_folder = len({Path(image).name for image in images}) < len(images)
    for entry in itertools.chain(*pairs.values()):
        image = Path(main_file(entry))
        stem = next((image.name[: -len(e)] for e in EXTENSIONS if image.name.lower().endswith(e)), image.name)
        patient = Path(str(entry.get("patient", image.parent.name if by_folder else stem)))
        root = os.path.normpath(base_dir)  # MONAI takes a name for a path if there is a folder of that name
        entry["patient"] = str(patient.relative_to(root) if patient.is_relative_to(root) else patient)
    return pairs


def main_file(pair: Pair) -> str:
    """The MR of a pair, or its CT where there is no MR: the file that stands for the patient."""
    return pair.get("image", pair["label"])


def load_pairs_or_stop(*args: Any, **kwargs: Any) -> dict[str, list[Pair]]:
    """Read pairs as :func:`load_pairs` does, for configs: an :class:`InputError` ends the program with its one line."""
    try:
        return load_pairs(*args, **kwargs)
    except InputError as error:
        stop(str(error))


class DataCheck:
    """Check of the pairs for configs (:func:`check_pairs_or_stop`). :meth:`run` it before training; then
    ``fingerprint`` identifies the data."""

    def __init__(self, pairs: Mapping[str, Sequence[Pair]], least_patients: int = 1, check_data: bool = True) -> None:
        self.pairs, self.least_patients, self.check_data, self.fingerprint = pairs, least_patients, check_data, ""

    def run(self) -> None:
        self.fingerprint = check_pairs_or_stop(self.pairs, self.least_patients, self.check_data)


def check_pairs_or_stop(pairs: Mapping[str, Sequence[Pair]], least_patients: int = 2, check_data: bool = True) -> str:
    """End the program with a list of what is wrong with ``pairs``, by file, before any training.

    Every volume is read once: each must be readable, MR and CT of a pair on one grid, the CT in HU, the MR not a CT;
    no patient (by name in the datalist, file or content) may be in two splits.

    Args:
        least_patients: number that the training split must have; the disentanglement loss compares two.
        check_data: False checks the datalist only, for large cohorts that have been checked before.

    Returns:
        SHA-256 over all files, the fingerprint of the data; without ``check_data`` over their names.
    """
    items = [(split, pair) for split, entries in pairs.items() for pair in entries]
    problems = [f"split '{split}' is empty" for split, entries in pairs.items() if not entries]
    patients = len({main_file(pair) for pair in pairs["training"]})
    if pairs["training"] and patients < least_patients:
        problems.append(
            f"training needs at least {least_patients} different patients, the training split has {patients}"
        )
    digests: list[str] = [""] * len(items)
    if check_data:
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda item: _inspect(item[1]), items)
            for n, (found, digest) in enumerate(tqdm(results, desc="checking", total=len(items), unit="pair")):
                problems += found
                digests[n] = digest
    problems += _shared_patients(items, digests)
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        stop("the training data has problems:\n" + "\n".join(f"  {p}" for p in problems[:20]) + more)
    names = [digest or pair.get("image", "") + pair["label"] for digest, (_, pair) in zip(digests, items)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _shared_patients(items: Sequence[tuple[str, Pair]], digests: Sequence[str]) -> list[str]:
    """Return a message for each pair whose patient, file or content is in another split too."""
    owner: dict[str, tuple[str, str]] = {}
    problems = []
    for (split, pair), digest in zip(items, digests):
        files = [str(Path(pair[key]).resolve()) for key in ("image", "label") if key in pair]
        for mark in sorted({pair["patient"], *files, *digest.split()} - {""}):
            other, image = owner.setdefault(mark, (split, main_file(pair)))
            if other != split:
                problems.append(
                    f"{main_file(pair)}: the same patient as {image}, once in '{other}' and once in '{split}'"
                )
                break
    return problems


def _inspect(pair: Pair) -> tuple[list[str], str]:
    """Return what is wrong with a pair, and the SHA-256 of its files."""
    volumes, digests = {}, []
    for key in (key for key in ("image", "label") if key in pair):
        try:
            volumes[key] = read_volume(pair[key])
        except InputError as error:
            return [str(error)], ""
        digests.append(sha256(volume_files(pair[key])))
    problems = []
    if "organs" in pair:
        problems = _organ_problems(pair["organs"], volumes["label"])
        digests += [sha256(volume_files(pair["organs"]))] if not problems else []
    if "image" not in volumes:
        return problems + _ct_problems(volumes["label"], pair["label"]), " ".join(digests)
    return problems + _problems(volumes["image"], volumes["label"], pair), " ".join(digests)


def _organ_problems(path: str, ct: Any) -> list[str]:
    """What is wrong with the label volume of a CT's organs."""
    try:
        check_same_grid(read_labels(path), ct)
        organ_tissues(path, ct)
    except InputError as error:
        return [str(error)]
    return []


def _ct_problems(ct: Any, name: str) -> list[str]:
    """What is wrong with a CT that an MR is to be simulated from."""
    try:
        check_hu(np.asarray(ct), name)
    except InputError as error:
        return [str(error)]
    highest = float(ct.max())
    if highest <= CLIPPED_HU and int((ct == highest).sum()) > CLIPPED_VOXELS:
        return [f"{name}: clipped at {highest:g} HU; its MR cannot be simulated, give the CT with all of its bone"]
    return []


def _problems(mr: Any, ct: Any, pair: Pair) -> list[str]:
    try:
        check_same_grid(ct, mr, REGISTER)
    except InputError as error:
        return [str(error)]
    mr_is_ct = float(mr.min()) < -0.2 * float(np.percentile(np.asarray(mr), 99))
    try:
        check_hu(np.asarray(ct), pair["label"])
        not_hu = ""
    except InputError as error:
        not_hu = str(error)
    if mr_is_ct and not_hu:
        return [f"{pair['image']} and {pair['label']}: MR and CT are swapped; image is the MR, label the CT"]
    problems = [not_hu] if not_hu else []
    if mr_is_ct:
        problems.append(f"{pair['image']}: goes down to {float(mr.min()):g} as a CT does; image must be the MR")
    return problems

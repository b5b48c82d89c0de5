"""``python -m bundle pack``: a data set at the resolution of training, small enough to carry to another machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd
from tqdm import tqdm

from custom_modules.data.grid import SameGridd, ToSpacingd
from custom_modules.data.mr import CorrectBiasFieldd, SubtractBackgroundd
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import ReadVolumed, write_volume
from custom_modules.errors import InputError
from custom_modules.files import inside, writable_or_stop, write_json

LARGEST = 32767
SUITABLE, MIDDLE = (200.0, 8000.0), 4000.0  # 99th percentiles of an MR; the middle is none that counts as standardised


def pack(
    dataset_dir: str,
    output_dir: str,
    datalist: str | None = None,
    splits: str | Sequence[str] = "training,validation",
    spacing: float = 2.0,
    step: int = 1,
) -> None:
    """Write the volumes of a datalist at ``spacing`` in 16 bit, with a datalist of their own.

    The networks see the same grid as with the data themselves, and MRs whose bias field is corrected. Scores are not
    the same: those are taken on the grid of the MR, which is now that of the networks.

    Args:
        dataset_dir: folder that the datalist's paths are relative to.
        output_dir: folder for the packed data.
        datalist: MONAI datalist; ``DATASET_DIR/datalist.json`` when None.
        splits: names joined by commas.
        spacing: mm.
        step: HU and MR units, of which values are made multiples; noise takes most of the room, and 8 halves it.

    Raises:
        InputError: for a datalist without one of the splits, two entries of one name, or a volume that cannot be read.
    """
    if not 0.1 <= spacing <= 20 or not 1 <= step <= 100:
        raise InputError("--spacing must be 0.1 to 20 mm, --step 1 to 100")
    names = [name.strip() for name in splits.split(",")] if isinstance(splits, str) else list(splits)
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    found = load_pairs(path, dataset_dir, names, unpaired=True)
    patients = [pair["patient"] for pairs in found.values() for pair in pairs]
    twice = sorted({patient for patient in patients if patients.count(patient) > 1})
    if twice:
        raise InputError(f"{path}: patient {', '.join(twice)} more than once; give each entry a 'patient' of its own")
    folder = Path(writable_or_stop(output_dir))
    packed: dict[str, list[dict[str, str]]] = {split: [] for split in found}
    with tqdm(total=sum(map(len, found.values())), desc="packing", unit="patient") as bar:
        for split, pairs in found.items():
            for pair in pairs:
                packed[split].append({**_packed(pair, folder, spacing, step), "patient": pair["patient"]})
                bar.update()
    write_json(packed, folder / "datalist.json")
    size = sum(file.stat().st_size for file in folder.rglob("*.nii.gz")) / 1e6
    print(f"{size:.1f} MB in {folder}; wldm train --dataset_dir {folder} --correct_bias false")


def _packed(pair: dict[str, str], folder: Path, spacing: float, step: int) -> dict[str, str]:
    """Write the volumes of a patient and return their paths within ``folder``."""
    keys = [key for key in ("image", "label") if key in pair]
    read = Compose(
        [
            ReadVolumed(keys), SameGridd(keys), Orientationd(keys, axcodes="RAS", labels=None),
            SubtractBackgroundd("image", allow_missing_keys=True), ToSpacingd(keys, [spacing] * 3),
            CorrectBiasFieldd("image", allow_missing_keys=True),
        ]
    )  # fmt: skip
    data, files = read({key: pair[key] for key in keys}), {}
    for key, name in (("image", "mr"), ("label", "ct")):
        if key in data:
            files[key] = f"{pair['patient']}/{name}.nii.gz"
            target = inside(folder, files[key])
            target.parent.mkdir(parents=True, exist_ok=True)
            volume = _scaled(data[key]) if key == "image" else data[key]
            write_volume((volume / step).round().mul(step).clamp(-LARGEST, LARGEST).short(), target)
    return files


def _scaled(mr: MetaTensor) -> MetaTensor:
    """Bring an MR whose units do not suit 16 bit to some that do; training rescales it either way."""
    top = float(np.percentile(np.asarray(mr), 99))
    return mr if SUITABLE[0] <= top <= SUITABLE[1] or top <= 0 else mr * (MIDDLE / top)

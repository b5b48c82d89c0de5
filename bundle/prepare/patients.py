"""Finding the MR and the CT of each patient, in folders as they come from the clinic and in public layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from custom_modules.data.dicom import DicomSeries, find_series
from custom_modules.data.grid import same_grid
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import EXTENSIONS, read_grid, read_volume
from custom_modules.errors import InputError
from custom_modules.files import inside, walk

SPLITS = ("training", "validation", "test")
MASKS = ("mask.mha", "mask.nii.gz")  # of SynthRAD2025 and 2023
TILT = 0.5  # degrees by which the axes of a volume may deviate from perpendicular
FEWEST_VALUES = 32  # of an image; a mask or a label map has fewer


@dataclass(frozen=True)
class Patient:
    """One patient to prepare.

    Attributes:
        folder: folder of the MR and the CT; the datalist for a patient from a datalist.
        root: the input; nothing outside it is read.
        given: paths by ``mr``, ``ct`` and ``mask`` if a layout names them; otherwise the folder is searched.
        split: split of the patient in the datalist.
    """

    name: str
    folder: Path
    root: Path
    given: dict[str, str] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """A volume in a patient's folder: a file, or a DICOM series.

    Attributes:
        path: as :func:`~custom_modules.data.volumes.read_volume` takes it.
    """

    path: str
    series: DicomSeries | None = None

    @property
    def name(self) -> str:
        """Name of the file, or of the folder of the series."""
        return self.series.folder.name if self.series else Path(self.path).name

    @property
    def modality(self) -> str | None:
        """Modality of a DICOM series; None for other files."""
        return self.series.modality if self.series else None

    @property
    def title(self) -> str:
        """Name in messages and notes."""
        return self.series.title if self.series else self.name

    @property
    def voxels(self) -> int:
        if self.series:
            return math.prod(self.series.size) * self.series.slices
        grid = read_grid(self.path)
        return math.prod(grid[0]) if grid else 0

    def matches(self, pattern: str, folder: Path) -> bool:
        """Whether its path below ``folder``, its name or its series description matches the shell ``pattern``."""
        place = self.series.folder if self.series else Path(self.path)
        names = [str(place.relative_to(folder)), self.name, *([self.series.description] if self.series else [])]
        return any(fnmatch(name, pattern) for name in names)


# the patients of an input


def find_patients(path: str | Path, unpaired: bool = False) -> list[Patient]:
    """Find the patients of a MONAI datalist (a file, or ``datalist.json`` in a folder), of SynthRAD's folders
    (``Task1/<region>/<patient>/{mr,ct,mask}.mha`` or ``.nii.gz``), or of a folder of patient folders.

    Args:
        unpaired: entries of a datalist may have a CT alone.

    Raises:
        InputError: when there are none.
    """
    root = Path(path)
    if not str(path) or not root.exists():
        raise InputError(f"{path}: no such file or folder")
    datalist = root if root.is_file() else root / "datalist.json"
    if datalist.is_file():
        return _datalist_patients(datalist, unpaired)
    parents = {mask.parent.parent for name in MASKS for mask in root.rglob(name) if mask.parent != root} or {root}
    folders = sorted(folder for parent in parents for folder in parent.iterdir() if _is_patient(folder))
    if not folders:
        raise InputError(f"{root}: holds no patient folders; give a folder with one folder per patient, or a datalist")
    long = len({folder.name for folder in folders}) < len(folders)
    return [
        Patient("_".join(folder.relative_to(root).parts) if long else folder.name, folder, root) for folder in folders
    ]


def _is_patient(folder: Path) -> bool:
    """Whether ``folder`` is a folder, or a link to one or to nothing; SynthRAD's ``overview`` holds pictures only."""
    hidden = folder.name.startswith(".") or folder.name == "overview"
    return not hidden and (folder.is_dir() or (folder.is_symlink() and not folder.exists()))


def _datalist_patients(datalist: Path, unpaired: bool) -> list[Patient]:
    try:
        content = json.loads(datalist.read_text())
        splits = [split for split, entries in content.items() if isinstance(entries, list) and entries]
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{datalist}: is not a MONAI datalist ({error})") from error
    found = load_pairs(datalist, datalist.parent, splits, unpaired) if splits else {}
    patients: dict[str, Patient] = {}
    for split, pairs in found.items():
        for pair in pairs:
            name = pair["patient"]
            given = {kind: pair[key] for kind, key in (("mr", "image"), ("ct", "label")) if key in pair}
            if name in patients:
                raise InputError(f"{datalist}: lists patient {name} more than once")
            inside(datalist.parent, name)
            patients[name] = Patient(name, datalist, datalist.parent, given, split if split in SPLITS else None)
    if not patients:
        raise InputError(f"{datalist}: lists no patients")
    return list(patients.values())


# the volumes of a patient


def load_patient(
    patient: Patient, mr: str | None = None, ct: str | None = None, unpaired: bool = False
) -> tuple[dict[str, MetaTensor], list[str]]:
    """Read a patient's volumes.

    Args:
        mr, ct: shell patterns of file names, of folders below the patient's, or of series descriptions. Without them
            the modality is that in the DICOM header, for files ``mr.*`` and ``ct.*`` that of their name, and for others
            it is guessed from their intensities.
        unpaired: the patient may have a CT alone.

    Returns:
        ``mr`` if there is one, ``ct`` and, for a pair that is registered already, ``mask``, each (1, D, H, W); and
        notes on the choice of volumes.

    Raises:
        InputError: with the patient's folder or file and what is wrong with it.
    """
    if patient.given:
        volumes = {kind: read_volume(path) for kind, path in patient.given.items()}
        notes = []
    else:
        sources = find_sources(patient)
        volumes, notes = _choose(patient, sources, {"mr": mr, "ct": ct}, unpaired)
        mask = next((s for s in sources if s.name in MASKS), None)
        if mask and _is_synthrad(Path(mask.path), volumes):
            outline = read_volume(mask.path)
            if all(same_grid(outline, volume) for volume in volumes.values()):
                volumes["mask"] = outline
    if "mr" not in volumes:
        notes.append("no MR: the CT alone, for training on simulated MRs")
    for kind in ("mr", "ct"):
        if kind in volumes:
            check_modality(volumes[kind], kind)
            _check_straight(volumes[kind])
    return volumes, notes


def _check_straight(volume: MetaTensor) -> None:
    axes = (volume.affine[:3, :3] / volume.affine[:3, :3].norm(dim=0)).numpy()
    if np.abs(axes.T @ axes - np.eye(3)).max() > np.sin(np.radians(TILT)):
        raise InputError(f"{volume.meta['filename_or_obj']}: its axes are not perpendicular (gantry tilt); resample it")


def _is_synthrad(mask: Path, volumes: dict[str, MetaTensor]) -> bool:
    """Whether the volumes are in the folder of ``mask`` with SynthRAD's names and in its format."""
    paths = {kind: Path(volume.meta["filename_or_obj"]) for kind, volume in volumes.items()}
    return all(path == mask.with_name(mask.name.replace("mask", kind)) for kind, path in paths.items())


def find_sources(patient: Patient) -> list[Source]:
    """Find every volume file and DICOM series below the patient's folder.

    Raises:
        InputError: for a link that leads out of the input, for damaged DICOM files, and for DICOM files of more than
            one patient.
    """
    files = list(_files(patient))
    volumes = [path for path in files if path.name.lower().endswith(EXTENSIONS)]
    series = find_series(path for path in files if path not in set(volumes))
    damaged = [message for one in series for message in one.damaged]
    if damaged:
        raise InputError(damaged[0])
    ids = sorted({name for one in series for name in one.patient.split("/")})
    if len(ids) > 1:
        raise InputError(f"{patient.folder}: holds DICOM of {len(ids)} patients ({', '.join(ids)}); give each a folder")
    return [Source(str(path)) for path in volumes] + [Source(one.address, one) for one in series]


def _files(patient: Patient) -> Iterator[Path]:
    """Yield the readable files below the patient's folder, without hidden ones."""
    root = patient.root.resolve()
    if not patient.folder.resolve().is_relative_to(root) or not patient.folder.exists():
        raise InputError(f"{patient.folder}: is a link out of the input or to nothing; copy what it leads to")
    for folder, names in walk(patient.folder):
        for path in (folder, *(folder / name for name in names)):
            if not path.resolve().is_relative_to(root):
                raise InputError(f"{path}: is a link out of the input; copy what it leads to")
            if path.is_file():
                yield path


def _choose(
    patient: Patient, sources: Iterable[Source], patterns: dict[str, str | None], unpaired: bool
) -> tuple[dict[str, MetaTensor], list[str]]:
    """Read the largest MR and the largest CT, with a note on each choice that had to be made."""
    chosen: dict[str, list[Source]] = {"mr": [], "ct": []}
    cache: dict[str, MetaTensor] = {}
    notes, others = [], []
    for source in sources:
        kind = _kind(source, patient.folder, patterns)
        if kind is None and source.modality is None and source.name not in MASKS:
            try:
                cache[source.path] = read_volume(source.path)
            except InputError as error:  # no problem if it is neither the MR nor the CT
                notes.append(f"left out: {error}")
                others.append(source)
                continue
            kind = guess_modality(cache[source.path])
            if kind and patterns[kind]:
                kind = None
            elif kind:
                notes.append(f"{source.name} taken for the {kind.upper()} by its intensities")
        (chosen[kind] if kind else others).append(source)
    volumes = {}
    for kind, candidates in chosen.items():
        if not candidates and kind == "mr" and unpaired and not any(_may_be_mr(s, cache) for s in others):
            continue
        if not candidates:
            found = ", ".join(s.title for s in [*others, *chosen["mr"], *chosen["ct"]]) or "nothing that can be read"
            raise InputError("; ".join([f"{patient.folder}: no {kind.upper()}; found {found}", *notes]))
        best = max(candidates, key=lambda source: source.voxels)
        if len(candidates) > 1:
            rest = ", ".join(s.title for s in candidates if s is not best)
            notes.append(f"{kind.upper()}: {best.title} is the largest; left out: {rest}")
        volumes[kind] = cache[best.path] if best.path in cache else read_volume(best.path)
    return volumes, notes


def _may_be_mr(source: Source, cache: dict[str, MetaTensor]) -> bool:
    """Whether a source that is neither the MR nor the CT is an MR by its header or its values, or cannot be read."""
    if source.modality or source.name in MASKS:
        return source.modality == "MR"
    return source.path not in cache or guess_modality(cache[source.path]) == "mr"


def _kind(source: Source, folder: Path, patterns: dict[str, str | None]) -> str | None:
    """Return ``mr`` or ``ct`` by the patterns and the DICOM header, or None if neither tells.

    Raises:
        InputError: when a pattern names a series of another modality.
    """
    for kind, pattern in patterns.items():
        if pattern and source.matches(pattern, folder):
            if source.modality not in (None, kind.upper()):
                raise InputError(f"{source.path}: --{kind} {pattern} names it, but its modality is {source.modality}")
            return kind
    kind = (source.modality or source.name.split(".")[0]).lower()
    return kind if kind in patterns and not patterns[kind] else None


def guess_modality(volume: MetaTensor) -> str | None:
    """Return ``ct`` for values like Hounsfield units, ``mr`` for others, None for a mask or a label map."""
    low, high = float(volume.min()), float(volume.max())
    if low < -150 and high - low > 300:
        return "ct"
    step = max(1, volume.numel() // 100_000)
    return "mr" if len(torch.unique(volume.as_tensor().flatten()[::step])) >= FEWEST_VALUES else None


def check_modality(volume: MetaTensor, kind: str) -> None:
    """Raise InputError if the intensities contradict ``kind``, ``mr`` or ``ct``."""
    name, guess = volume.meta["filename_or_obj"], guess_modality(volume)
    low, high = float(volume.min()), float(volume.max())
    if kind == "mr" and guess == "ct":
        raise InputError(f"{name}: should be the MR, but goes from {low:g} to {high:g} as a CT does")
    if kind == "mr" and guess is None:
        raise InputError(f"{name}: should be the MR, but has so few different values that it is a mask")
    if kind == "ct" and guess != "ct":
        raise InputError(
            f"{name}: should be the CT, but {low:g} to {high:g} are not Hounsfield units; apply the rescale "
            "slope and intercept"
        )

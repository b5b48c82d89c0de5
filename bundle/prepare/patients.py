"""Finding the MR and the CT of each patient, in folders as they come from the clinic and in public layouts."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pydicom
import torch
from monai.data import ITKReader, MetaTensor
from pydicom.misc import is_dicom

from custom_modules.data.grid import same_grid
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import EXTENSIONS, check_volume, read_volume
from custom_modules.errors import InputError

SPLITS = ("training", "validation", "test")
MASKS = ("mask.mha", "mask.nii.gz")  # of SynthRAD2025 and 2023
TILT = 0.5  # degrees between the slices' normal and the line through their origins
UNEVEN = 0.1  # of the slice spacing
FEWEST_VALUES = 32  # of an image; a mask or a label map has fewer
TAGS = [
    "PatientID", "Modality", "SeriesInstanceUID", "SOPInstanceUID", "SeriesDescription", "Rows", "Columns",
    "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient",
]  # fmt: skip


@dataclass(frozen=True)
class Patient:
    """One patient to prepare.

    Attributes:
        folder: where the MR and the CT are; the datalist for a patient that comes from one.
        root: the input; nothing outside it is read.
        given: paths by ``mr``, ``ct`` and ``mask`` where a layout names them; otherwise the folder is searched.
        split: of the datalist the patient comes from.
    """

    name: str
    folder: Path
    root: Path
    given: dict[str, str] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """A volume in a patient's folder: a file, or the slices of a DICOM series with their headers.

    Attributes:
        modality: of a DICOM series; None for files, which do not say.
    """

    path: Path
    slices: tuple[tuple[Path, pydicom.Dataset], ...] = ()
    modality: str | None = None

    @property
    def title(self) -> str:
        """What it is called in messages and notes."""
        if not self.slices:
            return self.path.name
        description = str(self.slices[0][1].get("SeriesDescription", "")).strip()
        return f"{self.modality} series {description or self.path.name} ({len(self.slices)} slices)"

    @property
    def voxels(self) -> int:
        if not self.slices:
            return int(np.prod(itk_size(self.path)))
        header = self.slices[0][1]
        return int(header.Rows) * int(header.Columns) * len(self.slices)

    def matches(self, pattern: str, folder: Path) -> bool:
        """Whether its path below ``folder``, its name or its series description is ``pattern``'s (as a shell's)."""
        description = [str(one.get("SeriesDescription", "")) for _, one in self.slices[:1]]
        names = [str(self.path.relative_to(folder)), self.path.name, *description]
        return any(fnmatch(name, pattern) for name in names)


def itk_size(path: Path) -> tuple[int, ...]:
    """Voxels along each axis by the header; zero where there is none to read."""
    reader = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if reader is None:
        return (0,)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return (0,)
    return tuple(reader.GetDimensions(axis) for axis in range(reader.GetNumberOfDimensions()))


# the patients of an input


def find_patients(path: str | Path) -> list[Patient]:
    """The patients of a MONAI datalist (a file, or ``datalist.json`` in a folder), of SynthRAD's folders
    (``Task1/<region>/<patient>/{mr,ct,mask}.mha`` or ``.nii.gz``), or a folder of patient folders.

    Raises:
        InputError: when there are none.
    """
    root = Path(path)
    if not str(path) or not root.exists():
        raise InputError(f"{path}: no such file or folder")
    datalist = root if root.is_file() else root / "datalist.json"
    if datalist.is_file():
        return _datalist_patients(datalist)
    parents = {mask.parent.parent for name in MASKS for mask in root.rglob(name) if mask.parent != root} or {root}
    folders = sorted(folder for parent in parents for folder in parent.iterdir() if _is_patient(folder))
    if not folders:
        raise InputError(f"{root}: holds no patient folders; give a folder with one folder a patient, or a datalist")
    long = len({folder.name for folder in folders}) < len(folders)
    return [
        Patient("_".join(folder.relative_to(root).parts) if long else folder.name, folder, root) for folder in folders
    ]


def _is_patient(folder: Path) -> bool:
    """A folder, or a link that is one or leads nowhere; SynthRAD's ``overview`` holds pictures only."""
    hidden = folder.name.startswith(".") or folder.name == "overview"
    return not hidden and (folder.is_dir() or (folder.is_symlink() and not folder.exists()))


def _datalist_patients(datalist: Path) -> list[Patient]:
    try:
        content = json.loads(datalist.read_text())
        splits = [split for split, entries in content.items() if isinstance(entries, list) and entries]
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{datalist}: is no MONAI datalist ({error})") from error
    found = load_pairs(datalist, datalist.parent, splits) if splits else {}
    patients: dict[str, Patient] = {}
    for split, pairs in found.items():
        for pair in pairs:
            name, given = pair["patient"], {"mr": pair["image"], "ct": pair["label"]}
            if name in patients:
                raise InputError(f"{datalist}: lists patient {name} more than once")
            if Path(name).name != name:
                raise InputError(f"{datalist}: '{name}' cannot be the name of a patient's folder")
            patients[name] = Patient(name, datalist, datalist.parent, given, split if split in SPLITS else None)
    if not patients:
        raise InputError(f"{datalist}: lists no patients")
    return list(patients.values())


# the volumes of a patient


def load_patient(
    patient: Patient, mr: str | None = None, ct: str | None = None
) -> tuple[dict[str, MetaTensor], list[str]]:
    """Read a patient's volumes.

    Args:
        mr, ct: shell patterns of file names, folders below the patient's or series descriptions; without them the
            modality is that of the DICOM header, of files named ``mr.*`` and ``ct.*`` that of their name, and of
            others decided from their intensities.

    Returns:
        ``mr``, ``ct`` and, for a pair that is registered already, ``mask``, each (1, D, H, W); and notes on what was
        chosen from what.

    Raises:
        InputError: that names the patient's folder or file and what is wrong with it.
    """
    if patient.given:
        volumes = {kind: read_volume(path) for kind, path in patient.given.items()}
        notes = []
    else:
        sources = find_sources(patient)
        volumes, notes = _choose(patient, sources, {"mr": mr, "ct": ct})
        mask = next((s for s in sources if s.path.name in MASKS), None)
        if mask and _is_synthrad(mask.path, volumes):
            outline = read_volume(mask.path)
            if all(same_grid(outline, volume) for volume in volumes.values()):
                volumes["mask"] = outline
    for kind in ("mr", "ct"):
        check_modality(volumes[kind], kind)
        _check_straight(volumes[kind])
    return volumes, notes


def _check_straight(volume: MetaTensor) -> None:
    axes = (volume.affine[:3, :3] / volume.affine[:3, :3].norm(dim=0)).numpy()
    if np.abs(axes.T @ axes - np.eye(3)).max() > np.sin(np.radians(TILT)):
        raise InputError(f"{volume.meta['filename_or_obj']}: its axes are not perpendicular (gantry tilt); resample it")


def _is_synthrad(mask: Path, volumes: dict[str, MetaTensor]) -> bool:
    """Whether the volumes lie beside ``mask`` under SynthRAD's names and in its format."""
    paths = {kind: Path(volume.meta["filename_or_obj"]) for kind, volume in volumes.items()}
    return all(path == mask.with_name(mask.name.replace("mask", kind)) for kind, path in paths.items())


def find_sources(patient: Patient) -> list[Source]:
    """Every volume file and DICOM series below the patient's folder.

    Raises:
        InputError: for a link that leads out of the input, and for DICOM files of more than one patient.
    """
    sources, series = [], defaultdict(list)
    for path in _files(patient):
        if path.name.lower().endswith(EXTENSIONS):
            sources.append(Source(path))
        elif path.name.upper() != "DICOMDIR" and is_dicom(path):
            header = _header(path)
            series[(header.SeriesInstanceUID, header.Modality)].append((path, header))
    ids = sorted({str(header.get("PatientID", "")) for slices in series.values() for _, header in slices})
    if len(ids) > 1:
        raise InputError(f"{patient.folder}: holds DICOM of {len(ids)} patients ({', '.join(ids)}); give each a folder")
    for (_, modality), slices in series.items():
        slices = {header.SOPInstanceUID: (path, header) for path, header in slices}  # copies count once
        common = Path(os.path.commonpath([path.parent for path, _ in slices.values()]))
        sources.append(Source(common, tuple(slices.values()), str(modality)))
    return sources


def _header(path: Path) -> pydicom.Dataset:
    """What is needed of a DICOM file's header."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
    except Exception as error:  # a damaged header raises whatever its values lead to
        raise InputError(f"{path}: cannot be read as DICOM, truncated or damaged ({error})") from error
    needed = ["SeriesInstanceUID", "SOPInstanceUID", "Modality"]
    needed += ["Rows", "Columns"] if header.get("Modality") in ("MR", "CT") else []
    lacking = [name for name in needed if header.get(name) in (None, "")]
    if lacking:
        raise InputError(f"{path}: cannot be read, truncated or damaged: its DICOM header has no {lacking[0]}")
    return header


def _files(patient: Patient) -> Iterator[Path]:
    inside = patient.root.resolve()
    for folder, folders, names in os.walk(patient.folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder), *(Path(folder, name) for name in (*folders, *sorted(names)))):
            if not path.resolve().is_relative_to(inside):
                raise InputError(f"{path}: is a link out of the input; copy what it leads to")
            if path.is_file() and not path.name.startswith("."):
                yield path
    if not patient.folder.resolve().is_relative_to(inside) or not patient.folder.exists():
        raise InputError(f"{patient.folder}: is a link out of the input or to nothing; copy what it leads to")


def _choose(
    patient: Patient, sources: Iterable[Source], patterns: dict[str, str | None]
) -> tuple[dict[str, MetaTensor], list[str]]:
    """The largest MR and the largest CT, read, with a note on each choice that had to be made."""
    chosen: dict[str, list[Source]] = {"mr": [], "ct": []}
    cache: dict[Path, MetaTensor] = {}
    notes, others = [], []
    for source in sources:
        kind = _kind(source, patient.folder, patterns)
        if kind is None and source.modality is None and source.path.name not in MASKS:
            try:
                cache[source.path] = read_volume(source.path)
            except InputError as error:  # of no matter where it is neither the MR nor the CT
                notes.append(f"left out: {error}")
                others.append(source)
                continue
            kind = guess_modality(cache[source.path])
            if kind and patterns[kind]:
                kind = None
            elif kind:
                notes.append(f"{source.path.name} taken for the {kind.upper()} by its intensities")
        (chosen[kind] if kind else others).append(source)
    volumes = {}
    for kind, candidates in chosen.items():
        if not candidates:
            found = ", ".join(s.title for s in [*others, *chosen["mr"], *chosen["ct"]]) or "nothing that can be read"
            raise InputError("; ".join([f"{patient.folder}: no {kind.upper()}; found {found}", *notes]))
        best = max(candidates, key=lambda source: source.voxels)
        if len(candidates) > 1:
            rest = ", ".join(s.title for s in candidates if s is not best)
            notes.append(f"{kind.upper()}: {best.title} is the largest; left out: {rest}")
        volumes[kind] = cache[best.path] if best.path in cache and not best.slices else read_source(best)
    return volumes, notes


def _kind(source: Source, folder: Path, patterns: dict[str, str | None]) -> str | None:
    """``mr`` or ``ct`` by the patterns and the DICOM header, None where neither tells.

    Raises:
        InputError: when a pattern names a series of another modality.
    """
    for kind, pattern in patterns.items():
        if pattern and source.matches(pattern, folder):
            if source.modality not in (None, kind.upper()):
                raise InputError(f"{source.path}: --{kind} {pattern} names it, but its modality is {source.modality}")
            return kind
    kind = (source.modality or source.path.name.split(".")[0]).lower()
    return kind if kind in patterns and not patterns[kind] else None


def guess_modality(volume: MetaTensor) -> str | None:
    """``ct`` for values as of Hounsfield units, ``mr`` for others, None for a mask or a label map."""
    low, high = float(volume.min()), float(volume.max())
    if low < -150 and high - low > 300:
        return "ct"
    step = max(1, volume.numel() // 100_000)
    return "mr" if len(torch.unique(volume.as_tensor().flatten()[::step])) >= FEWEST_VALUES else None


def check_modality(volume: MetaTensor, kind: str) -> None:
    """Raise InputError where the intensities contradict ``kind``, ``mr`` or ``ct``."""
    name, guess = volume.meta["filename_or_obj"], guess_modality(volume)
    low, high = float(volume.min()), float(volume.max())
    if kind == "mr" and guess == "ct":
        raise InputError(f"{name}: should be the MR, but goes from {low:g} to {high:g} as a CT does")
    if kind == "mr" and guess is None:
        raise InputError(f"{name}: should be the MR, but has so few different values that it is a mask")
    if kind == "ct" and guess != "ct":
        raise InputError(
            f"{name}: should be the CT, but {low:g} to {high:g} are no Hounsfield units; apply the rescale slope "
            "and intercept"
        )


# DICOM


def read_source(source: Source) -> MetaTensor:
    """Read a file or a DICOM series as (1, D, H, W) float32 with its affine (RAS mm), rescaled slice by slice.

    Raises:
        InputError: see :func:`~custom_modules.data.volumes.read_volume` and :func:`_ordered`.
    """
    if not source.slices:
        return read_volume(source.path)
    names = _ordered(source)
    for name in names:
        _check_pixels(name)
    try:
        image = itk.imread([str(name) for name in names], pixel_type=itk.F)
    except RuntimeError as error:
        raise InputError(f"{source.path}: cannot be read as a DICOM series ({str(error).strip()[-160:]})") from error
    array, meta = ITKReader().get_data(image)
    affine = np.asarray(meta["affine"], dtype=np.float64)
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    check_volume(tensor, affine, str(source.path))
    return MetaTensor(tensor[None], affine=torch.from_numpy(affine), meta={"filename_or_obj": str(source.path)})


def _ordered(source: Source) -> list[Path]:
    """The files of a series along its normal.

    Raises:
        InputError: unless they are the evenly spaced slices of one straight volume.
    """
    name = f"{source.path}: {source.title}"
    headers = [header for _, header in source.slices]
    if any(int(header.get("NumberOfFrames", 1) or 1) > 1 for header in headers):
        raise InputError(f"{name} has several frames a file; convert it to NIfTI or to one file a slice")
    if len(headers) < 2:
        raise InputError(f"{name} is one slice; a volume is needed")
    if not all(header.get("ImagePositionPatient") and header.get("ImageOrientationPatient") for header in headers):
        raise InputError(f"{name} lacks positions or orientations of its slices")
    orientations = np.array([header.ImageOrientationPatient for header in headers], dtype=float)
    if np.abs(orientations - orientations[0]).max() > 1e-3 or len({(h.Rows, h.Columns) for h in headers}) > 1:
        raise InputError(f"{name} has slices of different orientations or sizes, as scouts do")
    positions = np.array([header.ImagePositionPatient for header in headers], dtype=float)
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    order = np.argsort(positions @ normal)
    along = (positions @ normal)[order]
    gaps = np.diff(along)
    if gaps.min() < 1e-3:
        raise InputError(f"{name} has two slices at {along[gaps.argmin()]:.2f} mm, as echoes and time points do")
    if gaps.max() - gaps.min() > UNEVEN * np.median(gaps):
        raise InputError(
            f"{name} has gaps of {gaps.min():g} to {gaps.max():g} mm; slices are missing or unevenly spaced"
        )
    line = positions[order[-1]] - positions[order[0]]
    tilt = np.degrees(np.arccos(min(1.0, float(line @ normal / np.linalg.norm(line)))))
    if tilt > TILT:
        raise InputError(f"{name} is sheared by a gantry tilt of {tilt:.1f} degrees; resample it to a straight grid")
    return [source.slices[index][0] for index in order]


def _check_pixels(path: Path) -> None:
    """Raise InputError unless the file holds as many pixels as its header says; those compressed are ITK's to check."""
    try:
        item: Any = pydicom.dcmread(path)
        size = int(item.Rows) * int(item.Columns) * int(item.BitsAllocated) // 8 * int(item.get("SamplesPerPixel", 1))
        complete = item.file_meta.TransferSyntaxUID.is_compressed or len(item.PixelData) >= size
    except Exception as error:  # a file that ends in the middle raises whatever comes first
        raise InputError(f"{path}: cannot be read, truncated or damaged ({type(error).__name__})") from error
    if not complete:
        raise InputError(f"{path}: is truncated, {len(item.PixelData)} of {size} bytes of its pixels are there")

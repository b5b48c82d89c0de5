"""Finding DICOM series and reading them as volumes, for inference, ``prepare`` and the label app.

The address of a series is the path of its folder if that holds no other, the path of its file if it has only one, and
otherwise ``FOLDER#<SeriesInstanceUID>``. If its slices lie in several folders below FOLDER, it is
``FOLDER#<SeriesInstanceUID>*``.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.uid import MediaStorageDirectoryStorage

from custom_modules.data.pixels import read_frames
from custom_modules.data.slices import (
    GEOMETRY,
    TELLING,
    Slice,
    by_file,
    check_single,
    check_stack,
    order_slices,
    slice_affine,
    slices_of,
)
from custom_modules.errors import InputError
from custom_modules.files import walk

logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="pydicom")

IDENTITY = (
    "SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality", "PatientID",
    "Rows", "Columns", "NumberOfFrames",
)  # fmt: skip
PLACE = (
    *GEOMETRY, *TELLING, "StackID", "InstanceNumber", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "Rows", "Columns", "NumberOfFrames",
)  # fmt: skip
NO_IMAGES = (
    "SEG",
    "RTDOSE",
    "RTSTRUCT",
    "RTPLAN",
    "SR",
    "PR",
    "KO",
    "REG",
    "DOC",
    "FID",
)  # modalities that are derived from images
SUFFIXES = (".dcm", ".ima", ".dicom")
DENSEST = 2000  # voxels per byte, of a slice of air
HEAD = 132  # bytes of the preamble and the magic word after it (PS3.10)
DAMAGED = "is a DICOM file that cannot be read, damaged or truncated; replace or remove it"


@dataclass(frozen=True)
class DicomSeries:
    """The files of one SeriesInstanceUID.

    Attributes:
        folder: common folder of all files.
        address: see above.
        patient: PatientID.
        slices: number of frames, or of files.
        size: rows, columns.
        damaged: what is wrong with other DICOM files in its folders, which may be slices of it.
    """

    folder: Path
    uid: str
    paths: tuple[Path, ...]
    address: str
    modality: str = ""
    description: str = ""
    number: str = ""
    patient: str = ""
    slices: int = 0
    size: tuple[int, int] = (0, 0)
    damaged: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name in messages."""
        number = f" {self.number}" if self.number else ""
        name = f" {self.description}" if self.description else ""
        return f"{self.modality or 'DICOM'} series{number}{name} ({self.slices} slices)"

    def matches(self, wanted: str) -> bool:
        """Whether ``wanted`` is its UID or number, or a shell pattern of its description."""
        return wanted in (self.uid, self.number) or fnmatch(self.description.lower(), wanted.lower())


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its first bytes, with the preamble of the standard or, as from older scanners,
    without.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head[128:] == b"DICM":
        return True
    group, element = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    if group not in (0x0002, 0x0008) or element not in (0x0000, 0x0001, 0x0005, 0x0008, 0x0012, 0x0016):
        return False
    return head[4:6].isalpha() or int.from_bytes(head[4:8], "little") < 256


def _is_remnant(path: Path, slices: Sequence[Path]) -> bool:
    """Whether a file that is not DICOM seems to be a damaged one: by its suffix, or because it is empty or starts with
    zeros as a preamble does."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        head = file.read(HEAD)
    suffix_of_slices = path.suffix in {other.suffix for other in slices}
    return suffix_of_slices and not any(head[:128])


def find_series(source: str | Path | Iterable[Path]) -> list[DicomSeries]:
    """Find the series of images among files, or directly in a folder, by SeriesInstanceUID only.

    Reports, segmentations, dose, presentation states and ``DICOMDIR`` are not images. DICOM files that cannot be read
    are listed in ``damaged`` of each series in their folder, or of a series without files if there is none.
    """
    files = sorted(Path(source).iterdir()) if isinstance(source, (str, Path)) else sorted(source)
    files = [
        path for path in files if not (path.is_dir() or path.name.startswith(".") or path.name.upper() == "DICOMDIR")
    ]
    closed = {path for path in files if not (path.is_file() and os.access(path, os.R_OK))}
    files = [path for path in files if path not in closed]
    dicom, damaged = [path for path in files if is_dicom(path)], defaultdict(list)
    groups: dict[str, list[tuple[Path, Dataset]]] = defaultdict(list)
    for path in dicom:
        try:
            header = _header(path, IDENTITY)
            if _is_image(header, path):
                groups[str(header.SeriesInstanceUID)].append((path, header))
        except InputError as error:
            damaged[path.parent].append(str(error))
    for path in set(files) - set(dicom):
        if _is_remnant(path, dicom):
            damaged[path.parent].append(f"{path}: {DAMAGED}")
    for path in closed:
        if path.suffix.lower() in SUFFIXES:
            damaged[path.parent].append(
                f"{path}: seems to be a slice of a DICOM series and cannot be opened; replace it"
            )
    uids: dict[Path, set[str]] = defaultdict(set)
    for uid, members in groups.items():
        for path, _ in members:
            uids[path.parent].add(uid)
    found = [_series(uid, members, damaged, uids) for uid, members in groups.items()]
    covered = {path.parent for series in found for path in series.paths}
    found += [
        DicomSeries(folder, "", (), str(folder), damaged=tuple(sorted(messages)))
        for folder, messages in damaged.items() if folder not in covered
    ]  # fmt: skip
    return sorted(found, key=_rank)


def join_series(series: Sequence[DicomSeries]) -> list[DicomSeries]:
    """Join series of the same UID in several folders if each folder holds different slices. Folders with slices at the
    same positions hold copies or time points, and remain separate series."""
    groups: dict[str, list[DicomSeries]] = defaultdict(list)
    for one in series:
        groups[one.uid].append(one)
    joined = []
    for uid, parts in groups.items():
        if uid and len(parts) > 1 and _are_parts(parts):
            joined += find_series(path for part in parts for path in part.paths)
        else:
            joined += parts
    return sorted(joined, key=_rank)


def _rank(series: DicomSeries) -> tuple[str, int, str]:
    """Sort key of series: folder, then number."""
    return str(series.folder), int("0" + re.sub(r"\D", "", series.number)), series.uid


def _are_parts(parts: Sequence[DicomSeries]) -> bool:
    """Whether the headers give the positions of all slices and no position is in two of the parts."""
    taken: set[tuple[float, ...]] = set()
    for part in parts:
        try:
            slices = [item for path in part.paths for item in slices_of(path, _header(path, PLACE))]
        except InputError:
            return False
        places = {(*item.position.round(2), *item.orientation.ravel().round(2)) for item in slices}
        if part.damaged or places & taken:
            return False
        taken |= places
    return True


def _header(path: Path, names: Sequence[str]) -> Dataset:
    """Read the elements ``names`` of a DICOM header.

    Raises:
        InputError: for a header that is damaged or truncated.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(names))
        for name in names:
            header.get(name)  # values are parsed on access
    except Exception as error:  # damaged values lead to errors of any type in pydicom
        raise InputError(f"{path}: {DAMAGED}") from error
    return header


def _is_image(header: Dataset, path: Path) -> bool:
    """Whether a header is that of an image. Raises InputError for one that is too short to tell."""
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    if kind == MediaStorageDirectoryStorage:
        return False
    if not (kind and header.get("SeriesInstanceUID")):
        raise InputError(f"{path}: {DAMAGED}")
    if str(header.get("Modality") or "") in NO_IMAGES:
        return False
    sized = bool(header.get("Rows") and header.get("Columns"))
    if not sized and "Image" in pydicom.uid.UID(kind).name:
        raise InputError(f"{path}: {DAMAGED}")
    return sized


def _series(
    uid: str, members: list[tuple[Path, Dataset]], damaged: dict[Path, list[str]], uids: dict[Path, set[str]]
) -> DicomSeries:
    """Make a series of ``members``; ``damaged`` and ``uids`` describe what else is in their folders."""
    paths, headers = zip(*members)
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    below = any(path.parent != folder for path in paths)
    address = f"{folder}#{uid}*" if below else str(folder) if len(uids[folder]) == 1 else f"{folder}#{uid}"
    first = headers[0]
    modalities = sorted({str(header.get("Modality") or "") for header in headers})
    patients = sorted({str(header.get("PatientID") or "") for header in headers})
    return DicomSeries(
        folder, uid, tuple(paths), address, "/".join(modalities),
        description=" ".join(str(first.get("SeriesDescription") or "").split()),
        number="" if first.get("SeriesNumber") is None else str(first.SeriesNumber),
        patient="/".join(patients),
        slices=sum(int(header.get("NumberOfFrames") or 1) for header in headers),
        size=(int(first.Rows), int(first.Columns)),
        damaged=tuple(sorted(message for place in {path.parent for path in paths} for message in damaged[place])),
    )  # fmt: skip


def split_address(path: str | Path) -> tuple[Path, str | None]:
    """Split the address of a series into path and SeriesInstanceUID; the UID is None for any other path."""
    folder, mark, uid = str(path).rpartition("#")
    if mark and re.fullmatch(r"[\d.]+\*?", uid) and not Path(path).exists():
        return Path(folder), uid
    return Path(path), None


def is_series(path: str | Path) -> bool:
    """Whether ``path`` can be the address of a series: a folder, a folder with a UID, or a DICOM file."""
    place, uid = split_address(path)
    return uid is not None or place.is_dir() or (place.is_file() and is_dicom(place))


def series_at(path: str | Path) -> DicomSeries:
    """Return the series at the address ``path``.

    Raises:
        InputError: if there is none, or several in the folder.
    """
    place, uid = split_address(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder")
    if uid and uid.endswith("*"):
        found = find_series(Path(folder, name) for folder, names in walk(place) for name in names)
    else:
        found = find_series(place if place.is_dir() else [place])
    if uid:
        found = [series for series in found if series.uid == uid.rstrip("*")]
    if len(found) > 1:
        listed = "; ".join(series.title for series in found)
        raise InputError(f"{path}: holds more than one DICOM series: {listed}; choose one, or give each its own folder")
    if not found:
        raise InputError(f"{path}: holds no DICOM series" + (" of this UID" if uid else ""))
    if place.is_file() and found[0].slices < 2:
        raise InputError(f"{path}: is one slice of a DICOM series; give the folder that holds them all")
    return found[0]


def read_slices(series: DicomSeries, name: str) -> list[Slice]:
    """Return the slices of a series in the order of the volume, by their headers; exact copies count once.

    Args:
        name: of the series in messages.

    Raises:
        InputError: for damaged files, and unless the slices are one straight, evenly spaced volume.
    """
    if series.damaged:
        more = f" (and {len(series.damaged) - 1} more)" if len(series.damaged) > 1 else ""
        raise InputError(series.damaged[0] + more)
    if "/" in series.modality:
        raise InputError(f"{name}: holds images of {series.modality.replace('/', ' and ')}; give each its own series")
    name = f"{name}: {series.title}"
    slices = [item for path in series.paths for item in slices_of(path, _header(path, PLACE))]
    groups = [_without_copies(group) for group in order_slices(slices, name)]
    check_single(groups, name)
    ordered = [group[0] for group in groups]
    check_stack(ordered, name)
    return ordered


def _without_copies(group: list[Slice]) -> list[Slice]:
    """Return the slices at one position without copies: those with the pixels and tags of an earlier one."""
    if len(group) == 1:
        return group
    kept: list[Slice] = []
    marks = set()
    for item in group:
        pixels = read_frames(item.path)[item.frame].tobytes()
        tags = tuple(sorted((tag, value) for tag, value in item.tags.items() if tag != "InstanceNumber"))
        mark = (hash(pixels), tags, item.slope, item.intercept)
        if mark not in marks:
            kept.append(item)
        marks.add(mark)
    return kept


def read_series(series: DicomSeries, name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a series as (columns, rows, slices) float32, each slice with its own slope and intercept, and its affine
    (RAS mm).

    Raises:
        InputError: see :func:`read_slices`, and for pixels that are truncated or cannot be decoded.
    """
    slices = read_slices(series, name or series.address)
    _check_size(slices, name or series.address)
    rows, columns = slices[0].size
    volume = np.empty((len(slices), rows, columns), dtype=np.float32)
    for path, places in by_file(slices):
        frames = read_frames(path)
        for place, item in places:
            if frames.shape[1:] != (rows, columns) or item.frame >= len(frames):
                raise InputError(f"{path}: its pixels do not match its header; replace it")
            with np.errstate(all="ignore"):
                volume[place] = frames[item.frame] * np.float64(item.slope) + np.float64(item.intercept)
    return volume.transpose(2, 1, 0), slice_affine(slices)


def _check_size(slices: Sequence[Slice], name: str) -> None:
    """Raise InputError for more voxels than the files can hold, however well they are compressed."""
    rows, columns = slices[0].size
    held = sum(path.stat().st_size for path in {item.path for item in slices})
    if rows * columns * len(slices) > DENSEST * held:
        raise InputError(f"{name}: {rows} x {columns} x {len(slices)} voxels cannot be in its {held} bytes; replace it")


def series_grid(series: DicomSeries) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Return shape (columns, rows, slices) and spacing (mm) from the headers only."""
    slices = [item for path in series.paths for item in slices_of(path, _header(path, PLACE))]
    _check_size(slices, series.address)
    normal = np.cross(*slices[0].orientation)
    along = np.unique(np.round([item.position @ normal for item in slices], 3))
    gap = (along[-1] - along[0]) / max(len(along) - 1, 1)
    (rows, columns), (between_rows, between_columns) = slices[0].size, slices[0].spacing
    return (columns, rows, len(along)), (float(between_columns), float(between_rows), float(gap))

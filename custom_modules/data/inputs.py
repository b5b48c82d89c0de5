"""Finding the volumes in a file, a folder, a list of paths or a datalist, and naming their synthetic CTs."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from custom_modules.data.dicom import DicomSeries, find_series, is_dicom, join_series, series_at, split_address
from custom_modules.data.volumes import EXTENSIONS, _extension, input_of, sibling_path
from custom_modules.errors import InputError, stop
from custom_modules.files import walk

logger = logging.getLogger(__name__)

Item = dict[str, str]

LISTS = (".txt", ".csv", ".json")
HEADINGS = ("image", "images", "path", "paths", "file", "filename", "mr", "input")  # of the first column of a CSV
OTHER_FORMATS = (
    ".nhdr", ".mhd", ".mgz", ".mgh", ".img", ".img.gz", ".hdr", ".gipl", ".gipl.gz", ".mnc", ".par", ".rec", ".vtk",
    ".vti", ".nii.bz2", ".nii.xz", ".nii.zst", ".zip", ".7z", ".rar", ".tar", ".tar.gz", ".tgz",
)  # fmt: skip


def find_volumes(
    path: str | Path, strict: bool = True, series: str | int | None = None, pattern: str | None = None,
    output_format: str = "mr",
) -> list[Item]:  # fmt: skip
    """List the volumes that ``path`` names.

    Args:
        path: a volume; a folder, which is searched recursively for volumes and DICOM series; the address of a DICOM
            series (:mod:`custom_modules.data.dicom`); a list of such paths, ``.txt`` (one per line) or ``.csv`` (the
            first column); or a MONAI datalist, ``.json`` (``image`` of each entry). Paths in a list are relative to it.
        strict: raise an error if there is no volume; otherwise the list is empty.
        series: take only DICOM series of this UID, number or description (a shell pattern).
        pattern: take only volumes of this name, or path below the folder (a shell pattern).
        output_format: of the synthetic CTs: ``mr``, that of the MR; ``nifti``; ``dicom`` or ``both``, a DICOM series.

    Synthetic CTs that have their record, hidden files and folders, and ``__MACOSX`` are left out. Linked folders are
    followed once. Files in unsupported formats are named in a warning. What cannot be opened (a broken link, a pipe, a
    file without permission) is listed, so that reading it reports what is wrong.

    Returns:
        For each volume ``image``, the path to read, and ``output``, the unique path of its synthetic CT below the
        output folder: ``a.nii.gz`` becomes ``a_sct.nii.gz``; if there is an ``a.mha`` too, that becomes
        ``a_mha_sct.mha``. A DICOM series becomes one, in a folder ``NAME_sct`` after its own folder, and after its
        number and description if that holds several. A name without extension is a folder with a DICOM series.

    Raises:
        InputError: when there is no volume, or none that can be read.
    """
    try:
        found = _find(path)
        chosen = _choose(found, path, series, pattern)
        if not chosen:
            raise InputError(f"{path}: holds no volume ({', '.join(EXTENSIONS)}) and no DICOM series")
    except InputError:
        if strict:
            raise
        return []
    return [{"image": image, "output": output} for (image, _), output in zip(chosen, _outputs(chosen, output_format))]


# finding: for each path its name, without extension and below the output folder, and its series if it is one

Found = dict[str, tuple[Path, DicomSeries | None]]


def _find(path: str | Path) -> Found:
    root, uid = split_address(path)
    if not str(path) or not os.path.lexists(root):
        raise InputError(f"{path}: no such file or folder")
    if uid or (root.is_file() and os.access(root, os.R_OK) and _extension(root.name) is None and is_dicom(root)):
        series = series_at(path)
        return {str(path): (Path(_stem(root.name) if not uid else _series_name(series)), series)}
    if root.is_dir():
        return _in_folder(root)
    if root.name.lower().endswith(LISTS) and root.is_file():
        return _in_list(root)
    if _extension(root.name) is None and root.is_file():
        raise InputError(
            f"{root}: not a volume; give {', '.join(EXTENSIONS)}, a folder with a DICOM series, or a list of paths"
        )
    return {str(root): (Path(_stem(root.name)), None)}


def _in_folder(root: Path) -> Found:
    found: Found = {}
    others: list[Path] = []
    series: list[DicomSeries] = []
    for folder, names in walk(root):
        relative, rest = folder.relative_to(root), []
        for name in names:
            path = folder / name
            readable = path.is_file() and os.access(path, os.R_OK)
            if readable and _extension(name) is None:
                foreign = name.lower().endswith(OTHER_FORMATS) and not is_dicom(path)  # DICOM may be called .img
                (others if foreign else rest).append(path)
            elif not readable or not is_own_output(path):
                found[str(path)] = (relative / _stem(name), None)
        series += find_series(rest)
    for one in join_series(series):
        if input_of(one.folder):
            continue  # a synthetic CT
        name = root.resolve().name if one.folder == root else one.folder.name
        alone = one.address == str(one.folder)
        parent = one.folder.relative_to(root).parent
        found[one.address] = (parent / (name if alone else f"{name}_{_series_name(one)}"), one)
    _log_findings(root, others, [one for one in series if "#" in one.address])
    if not found and others:
        listed = ", ".join(path.name for path in others[:5])
        raise InputError(
            f"{root}: holds no volume that can be read ({', '.join(EXTENSIONS)}, DICOM), only {listed}; convert it"
        )
    return found


def _log_findings(root: Path, others: Sequence[Path], several: Sequence[DicomSeries]) -> None:
    """Log the files that are not read, and the series of folders that hold several."""
    if others:
        names = ", ".join(str(path.relative_to(root)) for path in others[:20])
        more = f" and {len(others) - 20} more" if len(others) > 20 else ""
        logger.warning("%s: not read, because no reader supports them: %s%s; convert them to NIfTI", root, names, more)
    for folder in dict.fromkeys(one.folder for one in several):
        listed = "; ".join(one.title for one in several if one.folder == folder)
        logger.info("%s: holds several DICOM series: %s; --series chooses", folder, listed)


def _in_list(path: Path) -> Found:
    """Find the volumes of a list of paths; missing ones are listed too."""
    try:
        entries = _datalist(path) if path.suffix.lower() == ".json" else _lines(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no list of paths ({' '.join(str(error).split())[:120]})") from error
    if not entries:
        raise InputError(f"{path}: lists no volumes")
    entries = list(dict.fromkeys(os.path.normpath(path.parent / entry) for entry in entries))
    if not any(os.path.lexists(split_address(entry)[0]) for entry in entries):
        raise InputError(f"{path}: is no volume and no list of volumes; nothing is at {entries[0][:200]}")
    common = os.path.commonpath([os.path.dirname(os.path.abspath(entry)) for entry in entries])
    found: Found = {}
    for entry in entries:
        parent = Path(os.path.relpath(os.path.dirname(os.path.abspath(entry)), common))
        try:
            inner = _find(entry) if not entry.lower().endswith(LISTS) else {}
        except InputError:
            inner = {}
        if not inner:
            inner = {entry: (Path(_stem(Path(entry).name)), None)}  # reading it reports what is wrong
        nested = len(inner) > 1 or (Path(entry).is_dir() and str(entry) not in inner)
        for image, (name, series) in inner.items():
            found[image] = (parent / (Path(entry).name if nested else "") / name, series)
    return found


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if path.suffix.lower() == ".csv":
        lines = [row[0].strip() for row in csv.reader(lines) if row and row[0].strip()]
    return lines[1:] if lines and lines[0].lower() in HEADINGS else lines


def _datalist(path: Path) -> list[str]:
    """Return ``image`` of every entry of every split."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    splits = content.values() if isinstance(content, dict) else [content]
    entries = [entry for split in splits if isinstance(split, list) for entry in split]
    images = [entry.get("image") if isinstance(entry, dict) else entry for entry in entries]
    return [image for image in images if isinstance(image, str) and image]


def is_own_output(path: Path) -> bool:
    """Whether a volume is a synthetic CT, or something that was made of it such as its standard deviation
    ``a_sct_sd.nii.gz``, because its record lies in the same folder."""
    stem = _stem(path.name)
    names = [stem.rsplit("_", parts)[0] for parts in range(stem.count("_") + 1)]
    return any(input_of(path.with_name(name)) for name in names if name)


# choosing among them, and naming their synthetic CTs


def _choose(found: Found, path: str | Path, series: str | int | None, pattern: str | None) -> list[tuple[str, Path]]:
    root = split_address(path)[0]
    chosen = []
    for image, (name, one) in found.items():
        place = Path(split_address(image)[0])
        below = place.relative_to(root).as_posix() if place.is_relative_to(root) else place.as_posix()
        wanted = pattern in (None, "") or any(fnmatch(text, str(pattern)) for text in (below, place.name))
        if wanted and (series in (None, "") or (one is not None and one.matches(str(series)))):
            chosen.append((image, name))
    if found and not chosen:
        listed = [one.title if one else str(name) for name, one in found.values()]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        asked = f"--series {series}" if series not in (None, "") else f"--pattern {pattern}"
        raise InputError(f"{path}: holds nothing that {asked} names; there are {', '.join(listed[:8])}{more}")
    return chosen


def _outputs(chosen: Iterable[tuple[str, Path]], output_format: str) -> list[str]:
    """Return a unique name for each, which does not depend on the order of the files."""
    chosen = list(chosen)
    ranks = {image: EXTENSIONS.index(_extension(image) or EXTENSIONS[0]) for image, _ in chosen}
    taken: set[str] = set()
    outputs = {}
    for image, name in sorted(chosen, key=lambda item: (ranks[item[0]], _extension(item[0]) is None)):
        extension = (_extension(image) or EXTENSIONS[0]).lower()
        written = {"nifti": EXTENSIONS[0], "mr": (_extension(image) or "").lower()}.get(output_format, "")
        own = name.with_name(f"{name.name}_{extension[1:].replace('.', '_')}")
        candidates = [name, *([own] if _extension(image) else [])]
        candidates += [name.with_name(f"{name.name}_{number}") for number in range(2, len(chosen) + 2)]
        free = next(one for one in candidates if str(one).lower() not in taken)
        taken.add(str(free).lower())
        outputs[image] = f"{free}_sct{written}"
    return [outputs[image] for image, _ in chosen]


def _stem(name: str) -> str:
    return sibling_path(name, "", "").name if _extension(name) else name


def _series_name(series: DicomSeries) -> str:
    """Return number and description as characters that a file name may have."""
    text = f"{series.number}_{series.description}" if series.description else series.number or series.uid
    return re.sub(r"[^\w.+-]+", "_", text).strip("_.")[:80] or "series"


def require_volumes(
    found: Sequence[Mapping[str, str]], path: str | Path, series: str | int | None = None, pattern: str | None = None
) -> None:
    """End the program with one line that says why, if :func:`find_volumes` found nothing in ``path``."""
    if not found:
        try:
            find_volumes(path, series=series, pattern=pattern)
        except InputError as error:
            stop(str(error))

"""Which volumes there are: a file, a folder of volumes, DICOM series."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from custom_modules.data.volumes import EXTENSIONS, _extension, _is_dicom
from custom_modules.errors import InputError, stop


def find_volumes(path: str | Path, strict: bool = True) -> list[dict[str, str]]:
    """List the volumes under ``path``: a file, a folder of volumes (sub-folders too), or DICOM series, one a folder.

    Args:
        strict: raise where there is nothing; otherwise the list is empty.

    Returns:
        For each volume ``image``, what to read, and ``output``, where its synthetic CT goes below the output
        folder: ``a.nii.gz`` becomes ``a_sct.nii.gz``; a DICOM series becomes NIfTI under its folder's name.

    Raises:
        InputError: when nothing is there, or nothing that can be read.
    """
    root = Path(path)
    if not strict and not root.exists():
        return []
    if not str(path) or not root.exists():
        raise InputError(f"{path}: no such file or folder")
    if root.is_file():
        if not strict and _extension(root.name) is None:
            return []
        if _extension(root.name) is None:
            raise InputError(f"{root}: not a volume; give {', '.join(EXTENSIONS)} or a folder with a DICOM series")
        return [{"image": str(root), "output": _output_name(root.name)}]
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        relative = Path(folder).relative_to(root)
        names = sorted(name for name in names if not name.startswith("."))
        volumes = [name for name in names if _extension(name)]
        found += [{"image": str(Path(folder, n)), "output": str(relative / _output_name(n))} for n in volumes]
        if not volumes and any(_is_dicom(Path(folder, name)) for name in names[:8]):
            name = _output_name(Path(folder).resolve().name + EXTENSIONS[0])
            found.append({"image": folder, "output": str(relative.parent / name)})
    taken: set[str] = set()
    for item in found:
        stem, extension = item["output"], _extension(item["output"])
        for number in range(2, len(found) + 2):
            if item["output"] not in taken:
                break
            item["output"] = f"{stem[: -len(extension)]}_{number}{extension}"
        taken.add(item["output"])
    if strict and not found:
        raise InputError(f"{root}: holds no volume ({', '.join(EXTENSIONS)}) and no DICOM series")
    return found


def _output_name(name: str) -> str:
    extension = _extension(name) or ""
    return f"{name[: len(name) - len(extension)]}_sct{extension.lower()}"


def require_volumes(found: Sequence[Mapping[str, str]], path: str | Path) -> None:
    """End the program with one line that says why, where :func:`find_volumes` found nothing in ``path``."""
    if not found:
        try:
            find_volumes(path)
        except InputError as error:
            stop(str(error))

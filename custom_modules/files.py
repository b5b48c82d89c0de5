"""Files and folders: written completely or not at all, hashed, and checked before they are needed."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from custom_modules.errors import InputError, stop

PARTIAL = ".partial-"  # prefix of a file that is being written; hidden, so that it is not mistaken for a result


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is renamed to ``path``, otherwise it is removed.

    The temporary file is in the same folder, so that the rename is atomic, and has the same extension, because image
    writers choose the format by it. Temporary files that dead processes left for the same ``path`` are removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    extension = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    name = f"{zlib.crc32(path.name.encode()):08x}{extension}"  # short, because the name may have the maximum length
    for left in path.parent.glob(f"{PARTIAL}*-{glob.escape(name)}"):
        if not _is_running(left.name.removeprefix(PARTIAL).split("-", 1)[0]):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it is renamed to ``path``, otherwise it is removed.

    A folder that is at ``path`` already is replaced. It is moved aside just before, so that ``path`` never holds a
    mixture of both. Temporary folders that dead processes left for the same ``path`` are removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"{zlib.crc32(path.name.encode()):08x}"
    for left in path.parent.glob(f"{PARTIAL}*-{name}*"):
        if left.is_dir() and not _is_running(left.name.removeprefix(PARTIAL).split("-", 1)[0]):
            shutil.rmtree(left, ignore_errors=True)
    temporary, old = (path.with_name(f"{PARTIAL}{os.getpid()}-{name}{end}") for end in ("", "-old"))
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: str) -> bool:
    import psutil

    return pid.isdigit() and psutil.pid_exists(int(pid))


def write_text(text: str, path: str | Path) -> None:
    """Write ``text`` as UTF-8 with :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON with :func:`atomic_write`; NaN becomes null and infinity ``"inf"``, since JSON has neither."""
    write_text(json.dumps(to_plain(content), indent=1, allow_nan=False) + "\n", path)


def to_plain(value: Any) -> Any:
    """Convert ``value`` to types that JSON supports; objects of other types become text."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def sha256(path: str | Path | Iterable[Path]) -> str:
    """Return the SHA-256 of a file, of several files in turn, or of all files in a folder sorted by name."""
    if isinstance(path, (str, Path)):
        folder = Path(path)
        path = sorted(f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else [folder]
    digest = hashlib.sha256()
    for file in path:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def walk(root: str | Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield ``root`` and recursively each folder in it, with the sorted names of the files in it.

    Linked folders are followed, each folder once. Hidden files and folders, and ``__MACOSX``, are left out.
    """
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def inside(folder: str | Path, name: str | Path) -> Path:
    """Return the path of ``name``, which comes from data, below ``folder``; ``a/b`` is a name of two parts.

    Raises:
        InputError: for a name that is empty or leads out of the folder: absolute, with ``..``, or through a link.
    """
    path = Path(str(name))
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(name):
        raise InputError(f"'{name}' leads out of {folder} and cannot be a name; use one without '..' or a leading '/'")
    target = Path(folder) / path
    if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"'{name}' leads out of {folder} through a link; use another name or remove the link")
    return target


def writable_or_stop(path: str | Path) -> str:
    """Make the folder ``path`` and write a test file to it; end the program with one line if that fails."""
    probe = Path(path) / f"{PARTIAL}{os.getpid()}-probe"
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        stop(f"{path}: cannot write there ({error.strerror})")
    return str(path)

"""The studies folder of the server: images and labels with plain names, and no access to any other path."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.datastore.local import LocalDatastore
from monailabel.utils.sessions import Sessions

from custom_modules.data.dicom import split_address
from custom_modules.data.inputs import LISTS, find_volumes
from custom_modules.data.volumes import EXTENSIONS, read_volume
from custom_modules.errors import InputError

UNPACKED_LIMIT = 4_000_000_000  # bytes; zipfile reads no more of a member than its entry says
LABEL_MAP_VALUES = 32  # whole numbers that a label map may hold; a magnitude image has hundreds


class NotFound(InputError):
    """Something that the client names does not exist."""


@contextmanager
def errors_name(path: str | Path, name: str) -> Iterator[None]:
    """Let errors about ``path``, a path of the server, say ``name`` instead, by which the client knows it."""
    try:
        yield
    except InputError as error:
        raise type(error)(str(error).replace(str(path), name)) from error


def check_volume_file(path: str | Path, label_map: bool = False) -> dict[str, str]:
    """Return the one volume in ``path``, as :func:`~custom_modules.data.inputs.find_volumes` lists it.

    Args:
        label_map: accept a label map; training checks that a label is a CT.

    Raises:
        InputError: for anything but one valid volume, and for a label map.
    """
    if Path(path).suffix.lower() in LISTS:  # its paths could lead anywhere
        raise InputError(f"{path}: not a volume; give {', '.join(EXTENSIONS)} or a folder with a DICOM series")
    found = find_volumes(path)
    if len(found) > 1:
        addresses = ", ".join(Path(item["image"]).name for item in found[:8])
        raise InputError(f"{path}: holds {len(found)} volumes ({addresses}); give one")
    values = np.asarray(read_volume(found[0]["image"])).ravel()
    distinct = np.unique(values[:: max(1, values.size // 10**6)])
    if not label_map and len(distinct) <= LABEL_MAP_VALUES and (distinct == distinct.round()).all():
        raise InputError(f"{path}: holds only {len(distinct)} whole numbers, as a label map does; give an MR")
    return found[0]


def check_name(name: str) -> None:
    """Raise InputError unless ``name`` can be a file name and is not a path."""
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise InputError(f"'{name}' cannot be a name; use letters, digits, blanks and . _ + -")


class Studies(LocalDatastore):
    """MONAI Label's folder of images with labels, limited to volumes and to paths inside it."""

    def __init__(self, folder: str, **kwargs: Any) -> None:
        super().__init__(folder, extensions=[f"*{extension}" for extension in EXTENSIONS], **kwargs)
        self.folder = Path(folder).resolve()

    def resolve(self, image: str) -> tuple[str | None, Path]:
        """Return the id of an image, None if it has none, and its path. ``image`` is an id, or a path in the studies
        folder, which also contains uploads and sessions.

        Raises:
            NotFound: when there is no such image, or the path leads out of the folder.
        """
        uri = self.get_image_uri(image)
        if uri:
            return image, Path(uri)
        try:
            place, uid = split_address(self.folder / image)
            place = place.resolve()
            there = place.exists() and place != self.folder and place.is_relative_to(self.folder)
        except (OSError, ValueError):
            there = False
        if not there:
            raise NotFound(f"no image '{image}' in the studies folder; GET /datastore/?output=all lists them")
        return None, Path(f"{place}#{uid}" if uid else place)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        check_name(image_id)
        with errors_name(image_filename, f"image '{image_id}'"):
            check_volume_file(image_filename)
        return super().add_image(image_id, image_filename, image_info)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        check_name(label_tag)
        with errors_name(label_filename, f"label of '{image_id}'"):
            check_volume_file(label_filename, label_map=True)
        return self.keep(image_id, label_filename, label_tag, label_info)

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        if not self.datalist():
            raise NotFound("no image of the datastore has a 'final' label, there is nothing to download")
        return super().get_dataset_archive(limit_cases)

    def keep(self, image_id: str, label_filename: str | Path, label_tag: str, label_info: dict[str, Any]) -> str:
        """Save as label a volume that the server itself made, without the checks of :meth:`save_label`."""
        return super().save_label(image_id, str(label_filename), label_tag, label_info)


def unpack(archive: Path, folder: Path) -> None:
    """Write the files in a zip to ``folder``, numbered, so that no name in it can lead elsewhere.

    Raises:
        InputError: for what is no zip, is damaged or has a password, or would be larger than :data:`UNPACKED_LIMIT`.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > UNPACKED_LIMIT:
                raise InputError(f"the archive has more than {UNPACKED_LIMIT / 1e9:g} GB when unpacked; send less")
            for number, member in enumerate(members):
                name = Path(member.filename.replace("\\", "/")).name
                if name.startswith(".") or "__MACOSX" in member.filename:
                    continue
                with content.open(member) as source, (folder / f"{number}_{name}").open("xb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise InputError(f"the archive cannot be unpacked ({error}); send a zip without a password") from error


class CheckedSessions(Sessions):
    """MONAI Label's sessions, each with one uploaded volume or DICOM series, or a zip of it (``uncompress``)."""

    def add_session(
        self, data_file: str, expiry: int = 0, uncompress: bool = False, session_id: str | None = None
    ) -> Any:
        if not uncompress:
            with errors_name(data_file, "the upload"):
                check_volume_file(data_file)
            return super().add_session(data_file, expiry, session_id=session_id)
        with tempfile.TemporaryDirectory(prefix="result") as folder:  # named apart from uploads
            unpack(Path(data_file), Path(folder) / "files")
            with errors_name(Path(folder) / "files", "the archive"):
                check_volume_file(Path(folder) / "files")
            return super().add_session(str(Path(folder) / "files"), expiry, session_id=session_id)

    def get_session(self, session_id: str, update_ts: bool = True, fetch_cache: bool = True) -> Any:
        return super().get_session(session_id, update_ts, fetch_cache) if re.fullmatch(r"[\w-]+", session_id) else None

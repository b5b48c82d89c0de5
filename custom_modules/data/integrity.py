"""Check that a NIfTI, NRRD or MetaImage file holds all that its header promises, before its voxels are read.

The libraries that read them fill missing voxels with zeros, ignore checksums, and allocate as much memory as a header
asks for. Therefore the header is compared with the size of the file, and compressed data with their checksum.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from custom_modules.errors import InputError

HEADER_LIMIT = 2**20  # bytes of a text header
BLOCK = 2**20
DAMAGED = "is damaged or truncated; copy it again"
META_TYPES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4,
    "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip
NRRD_TYPES = {
    1: ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"),
    2: ("short", "short int", "signed short", "signed short int", "int16", "int16_t",
        "ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    4: ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"),
    8: ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t",
        "ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double"),
}  # fmt: skip


def check_amount(path: Path, found: int, expected: int, spare: int = 0) -> None:
    """Raise InputError unless ``found`` bytes of voxels are as many as ``expected``, or up to ``spare`` more."""
    if found < expected:
        raise InputError(f"{path}: {DAMAGED}; it holds {found} of {expected} bytes of voxels")
    if found > expected + spare:
        raise InputError(f"{path}: holds {found} bytes of voxels, its header says {expected}; correct or replace it")


def check_nifti(path: Path, offset: int, shape: tuple[int, ...], itemsize: int) -> None:
    """Check a ``.nii`` or ``.nii.gz`` against its header: voxels of ``itemsize`` bytes start at ``offset``.

    Raises:
        InputError: if voxels are missing or left over, or the checksum is wrong.
    """
    expected = math.prod(map(int, shape)) * itemsize
    spare = max(math.prod(map(int, shape[:2])) * itemsize - 1, 0)  # less than a slice after the voxels is tolerated
    if min(shape, default=0) < 1 or offset < 0:
        raise InputError(f"{path}: its header says a shape of {tuple(map(int, shape))}; correct it")
    if path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            found = _gzip_size(path, file, offset + expected + spare)
    else:
        found = path.stat().st_size
    check_amount(path, found - offset, expected, spare)


def _gzip_size(path: Path, file: BinaryIO, limit: int) -> int:
    """Count the bytes in a gzip stream up to its checksum, but stop just beyond ``limit``."""
    size = 0
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while size <= limit and (block := stream.read(BLOCK)):
                size += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {DAMAGED} ({str(error)[:80]})") from error
    return size


def _zlib_size(path: Path, file: BinaryIO, limit: int) -> int:
    """Count bytes as :func:`_gzip_size` does, in a zlib stream, which must end the file."""
    stream, size = zlib.decompressobj(47), 0  # with the header of zlib or of gzip
    try:
        data = file.read(BLOCK)
        while data and not stream.eof and size <= limit:
            size += len(stream.decompress(data, BLOCK))
            data = stream.unconsumed_tail or file.read(BLOCK)
        size += len(stream.flush()) if size <= limit else 0
    except zlib.error as error:
        raise InputError(f"{path}: {DAMAGED} ({str(error)[:80]})") from error
    if size <= limit and (not stream.eof or stream.unused_data or file.read(1)):
        raise InputError(f"{path}: {DAMAGED}; its compressed data do not end where they should")
    return size


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a text header; raise InputError at its end."""
    while file.tell() < HEADER_LIMIT and (line := file.readline(HEADER_LIMIT)):
        yield line.decode("latin-1").rstrip("\r\n")
    raise InputError(f"{path}: cannot be read, its header is damaged or not what its name says")


def _whole_numbers(path: Path, name: str, text: str | None) -> tuple[int, ...]:
    numbers = (text or "").split()
    if not numbers or not all(re.fullmatch(r"[0-9]{1,9}", number) and int(number) for number in numbers):
        raise InputError(f"{path}: cannot be read, its header has no valid {name} ('{(text or '')[:40]}')")
    return tuple(map(int, numbers))


def _one_of(path: Path, name: str, text: str | None, supported: tuple[str, ...] | dict[str, int]) -> str:
    if text is None or text not in supported:
        raise InputError(f"{path}: cannot be read, its header has {name} '{(text or '')[:40]}', which is not supported")
    return text


# MetaImage


def check_meta(path: Path, voxels: bool = True) -> tuple[int, ...]:
    """Check a ``.mha`` against its header and, with ``voxels``, its checksum.

    Returns:
        The shape, in the file's order of axes.

    Raises:
        InputError: for a damaged header, and for voxels that are missing, damaged or in another file.
    """
    with path.open("rb") as file:
        header = _meta_fields(path, file)
        shape = _whole_numbers(path, "DimSize", header.get("DimSize"))
        if (len(shape),) != _whole_numbers(path, "NDims", header.get("NDims")):
            raise InputError(f"{path}: cannot be read, its header has {len(shape)} sizes for NDims {header['NDims']}")
        channels = _whole_numbers(path, "ElementNumberOfChannels", header.get("ElementNumberOfChannels", "1"))[0]
        if channels > 1:
            raise InputError(f"{path}: has {channels} channels; give one number per voxel")
        size = META_TYPES[_one_of(path, "ElementType", header.get("ElementType"), META_TYPES)]
        if not _switch(path, header, "BinaryData"):
            raise InputError(f"{path}: holds its voxels as text, which is not supported; save it as binary")
        for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"):
            _switch(path, header, name)
        if header.get("HeaderSize", "0") != "0":
            raise InputError(f"{path}: has a HeaderSize, which is not supported; save it again")
        expected, left = math.prod(shape) * size, path.stat().st_size - file.tell()
        compressed = _switch(path, header, "CompressedData")
        promised = header.get("CompressedDataSize", "nothing")  # without it ITK reads other voxels
        if compressed and promised != str(left):
            raise InputError(
                f"{path}: {DAMAGED}; it holds {left} bytes of compressed data, its header says {promised[:20]}"
            )
        if voxels or not compressed:
            check_amount(path, _zlib_size(path, file, expected) if compressed else left, expected)
    return shape


def _meta_fields(path: Path, file: BinaryIO) -> dict[str, str]:
    header: dict[str, str] = {}
    for line in _lines(path, file):
        key, equals, value = line.partition("=")
        if not equals and line.strip():
            raise InputError(f"{path}: cannot be read, its header is damaged or not what its name says")
        header[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            break
    if header["ElementDataFile"] != "LOCAL":
        raise InputError(f"{path}: its voxels are in another file; save it as one .mha or as NIfTI")
    return header


def _switch(path: Path, header: dict[str, str], name: str) -> bool:
    values = ("True", "False", "true", "false", "TRUE", "FALSE")
    return _one_of(path, name, header.get(name, "False"), values).lower() == "true"


# NRRD


def check_nrrd(path: Path, voxels: bool = True) -> tuple[int, ...]:
    """Check a ``.nrrd`` against its header and, with ``voxels``, its checksum.

    Returns:
        The shape, in the file's order of axes.

    Raises:
        InputError: for a damaged header, for voxels that are missing, damaged or in another file, and for an axis that
            is not spatial unless it has one element.
    """
    with path.open("rb") as file:
        header = _nrrd_fields(path, file)
        shape = _whole_numbers(path, "sizes", header.get("sizes"))
        if (len(shape),) != _whole_numbers(path, "dimension", header.get("dimension")):
            raise InputError(
                f"{path}: cannot be read, its header has {len(shape)} sizes for dimension {header['dimension']}"
            )
        _check_axes(path, header, shape)
        types = {name: size for size, names in NRRD_TYPES.items() for name in names}
        size = types[_one_of(path, "type", header.get("type", "").lower(), types)]
        if size > 1:
            _one_of(path, "endian", header.get("endian", "").lower(), ("little", "big"))
        if any(header.get(name, "0") != "0" for name in ("lineskip", "byteskip")):
            raise InputError(f"{path}: skips lines or bytes before its voxels, which is not supported; save it again")
        raw = _one_of(path, "encoding", header.get("encoding", "").lower(), ("raw", "gzip", "gz")) == "raw"
        expected, left = math.prod(shape) * size, path.stat().st_size - file.tell()
        if voxels or raw:
            check_amount(path, left if raw else _gzip_size(path, file, expected), expected)
    return shape


def _nrrd_fields(path: Path, file: BinaryIO) -> dict[str, str]:
    lines = _lines(path, file)
    if not re.fullmatch(r"NRRD000[1-5]", next(lines)):
        raise InputError(f"{path}: cannot be read, its header is damaged or not what its name says")
    header: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            break
        key, colon, value = line.partition(":")
        if not line.startswith("#") and not value.startswith("="):
            if not colon:
                raise InputError(f"{path}: cannot be read, its header has a damaged line '{line[:40]}'")
            header[key.strip().lower().replace(" ", "")] = value.strip()
    if "datafile" in header:
        raise InputError(f"{path}: its voxels are in another file; save it as one .nrrd or as NIfTI")
    return header


def _check_axes(path: Path, header: dict[str, str], shape: tuple[int, ...]) -> None:
    directions = re.findall(r"none|\([^)]*\)", header.get("spacedirections", ""))
    for axis, (size, direction) in enumerate(zip(shape, directions)):
        if direction == "none" and size > 1:
            kind = (header.get("kinds", "").split() or ["no kind"] * len(shape))[axis]
            raise InputError(
                f"{path}: axis {axis + 1} of {len(shape)} is not spatial ({kind}, {size} elements); "
                "give one volume with one number per voxel"
            )

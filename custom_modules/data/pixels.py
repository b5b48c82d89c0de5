"""Reading the stored pixels of a DICOM file completely or not at all: uncompressed and RLE by pydicom, the rest by
ITK."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pydicom
from monai.utils import optional_import
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, RLELossless, generate_uid

from custom_modules.errors import InputError

itk, _ = optional_import("itk")

TRUNCATED = "is truncated or damaged"
PIXEL_MODULE = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation",
)  # fmt: skip


def read_frames(path: Path) -> np.ndarray:
    """Read the stored values of a DICOM file, (frames, rows, columns), before slope and intercept.

    Raises:
        InputError: for pixels that are truncated, damaged or colours, or whose compression is not supported.
    """
    try:
        item = pydicom.dcmread(path, force=True)
        if "PixelData" not in item:
            raise InputError(f"{path}: {TRUNCATED}, it ends before its pixels; replace it")
        syntax = item.file_meta.get("TransferSyntaxUID") if hasattr(item, "file_meta") else None
        _check_form(item, path)
        if syntax is not None and syntax.is_compressed and not syntax.is_deflated:
            return _decoded(item, path, syntax)
        _check_length(item, path)
        if syntax is None:  # a file without a preamble
            item.file_meta = FileMetaDataset()
            item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        return _whole(item.pixel_array, item)
    except InputError:
        raise
    except Exception as error:  # damaged pixels lead to errors of any type in decoders
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: {TRUNCATED}, its pixels cannot be read ({reason[:120]}); replace it") from error


def _check_form(item: Dataset, path: Path) -> None:
    if int(item.get("SamplesPerPixel", 1)) != 1:
        raise InputError(f"{path}: holds colours; give one number per voxel")
    allocated, stored, high = (
        int(item.BitsAllocated),
        int(item.BitsStored),
        int(item.get("HighBit", item.BitsStored - 1)),
    )
    if allocated not in (8, 16, 32) or not 0 < stored <= allocated or high != stored - 1:
        raise InputError(
            f"{path}: has pixels of {stored} in {allocated} bits up to bit {high}, which are not supported"
        )


def _check_length(item: Dataset, path: Path) -> None:
    frames = int(item.get("NumberOfFrames") or 1)
    size = int(item.Rows) * int(item.Columns) * int(item.BitsAllocated) // 8 * frames
    found = len(item.PixelData)
    if found < size:
        raise InputError(f"{path}: {TRUNCATED}, {found} of {size} bytes of its pixels are there; replace it")
    if found > size + size % 2:
        raise InputError(f"{path}: holds {found} bytes of pixels, its header says {size}; replace it")


def _decoded(item: Dataset, path: Path, syntax: pydicom.uid.UID) -> np.ndarray:
    """Return the frames of a compressed file."""
    count = int(item.get("NumberOfFrames") or 1)
    parts = _encoded_frames(item, count)
    if len(parts) != count:
        raise InputError(f"{path}: {TRUNCATED}, {len(parts)} of {count} frames are there; replace it")
    if syntax == RLELossless:
        return _whole(item.pixel_array, item)
    rows, columns = int(item.Rows), int(item.Columns)
    if rows * columns > 2**26:
        raise InputError(f"{path}: {rows} x {columns} pixels per slice are not supported")
    return np.stack([_by_itk(item, part, syntax, path) for part in parts])


def _encoded_frames(item: Dataset, count: int) -> list[bytes]:
    try:
        from pydicom.encaps import generate_frames
    except ImportError:  # pydicom 2
        from pydicom.encaps import generate_pixel_data_frame

        return list(generate_pixel_data_frame(item.PixelData, count))
    return list(generate_frames(item.PixelData, number_of_frames=count))


def _by_itk(item: Dataset, part: bytes, syntax: pydicom.uid.UID, path: Path) -> np.ndarray:
    """Decode one frame (rows, columns), written to a separate file without slope and intercept."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
    meta.TransferSyntaxUID = syntax
    alone = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    alone.SOPClassUID, alone.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    for name in PIXEL_MODULE:
        setattr(alone, name, item[name].value)
    alone.PixelData = encapsulate([part])
    alone["PixelData"].is_undefined_length = True
    alone["PixelData"].VR = "OB"
    alone.is_little_endian, alone.is_implicit_VR = True, False
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "frame.dcm")
        alone.save_as(file, write_like_original=False)
        try:
            pixels = itk.array_from_image(itk.imread(str(file), pixel_type=itk.D, imageio=itk.GDCMImageIO.New()))
        except RuntimeError as error:
            raise InputError(
                f"{path}: its pixels ({syntax.name}) are damaged or cannot be decoded; replace it"
            ) from error
    return pixels.reshape(pixels.shape[-2:])


def _whole(pixels: np.ndarray, item: Dataset) -> np.ndarray:
    """Return (frames, rows, columns) without the content of the bits above those that are stored."""
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    spare = int(item.BitsAllocated) - int(item.BitsStored)
    return (pixels << spare) >> spare if spare else pixels

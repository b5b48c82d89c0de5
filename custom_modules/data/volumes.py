"""Volumes in and out: finding them in a folder, reading them with care, writing them whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, ITKWriter, MetaTensor
from monai.transforms import MapTransform

from custom_modules.data.hu import AIR_HU
from custom_modules.errors import InputError
from custom_modules.files import atomic_write

logger = logging.getLogger(__name__)

EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha")
SPACING_LIMITS = (0.05, 50.0)  # mm; outside, a header is broken


def _extension(name: str) -> str | None:
    return next((e for e in EXTENSIONS if name.lower().endswith(e)), None)


def _is_dicom(path: Path) -> bool:
    """Whether the file carries DICOM's magic word after its preamble (PS3.10)."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"






def read_volume(path: str | Path) -> MetaTensor:
    """Read one 3D volume as (1, D, H, W) float32 with its affine (RAS mm).

    Raises:
        InputError: for a file that is missing, empty, unreadable or truncated; data that are not one 3D volume,
            not finite, constant or all zero; a spacing of zero or outside 0.05 to 50 mm; a singular affine.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        array, affine, spacing = _read_nifti(path) if path.name.lower().endswith((".nii", ".nii.gz")) else _read_itk(path)
    except InputError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"{path}: cannot be read, damaged or not what its name says ({reason[:160]})") from error
    if array.dtype.names or np.iscomplexobj(array):
        raise InputError(f"{path}: holds colours or complex numbers; give one number a voxel")
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    check_volume(tensor, affine, str(path), spacing)
    # with its channel: a MetaTensor made without one takes (D, H, W) for a 2D image with channels
    return MetaTensor(tensor[None], affine=torch.from_numpy(affine), meta={"filename_or_obj": str(path)})


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Array, affine as nibabel has it, and the header's own spacing, which nibabel repairs as it loads."""
    image = nib.load(path)
    with nib.openers.ImageOpener(path) as file:
        header = type(image.header).from_fileobj(file, check=False)
    return np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=np.float64), np.abs(header["pixdim"][1:4])


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray, None]:
    if path.is_dir():
        _check_series(path)
    reader = ITKReader()
    array, meta = reader.get_data(reader.read(str(path)))
    return array, np.asarray(meta["affine"], dtype=np.float64), None


def read_grid(path: str | Path) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Shape and spacing (mm) of a volume by its header alone, or None where it has none that can be read."""
    path = Path(path)
    try:
        if path.name.lower().endswith((".nii", ".nii.gz")):
            header = nib.load(path).header
            return tuple(header.get_data_shape()[:3]), tuple(map(float, header.get_zooms()[:3]))
        if path.is_dir():
            slices = [file for file in path.iterdir() if file.is_file() and _is_dicom(file)]
            first = pydicom.dcmread(slices[0], stop_before_pixels=True)
            thickness = float(first.get("SpacingBetweenSlices") or first.SliceThickness)
            return (first.Columns, first.Rows, len(slices)), (*map(float, first.PixelSpacing), thickness)
        image = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
        image.SetFileName(str(path))
        image.ReadImageInformation()
        axes = range(min(image.GetNumberOfDimensions(), 3))
        return tuple(image.GetDimensions(n) for n in axes), tuple(image.GetSpacing(n) for n in axes)
    except Exception:  # readers raise whatever their libraries do
        return None


def _check_series(folder: Path) -> None:
    """Raise InputError unless the folder holds one DICOM series of evenly spaced slices."""
    names = [path for path in folder.iterdir() if path.is_file() and _is_dicom(path)]
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in names]
    if len({item.get("SeriesInstanceUID") for item in slices}) > 1:
        raise InputError(f"{folder}: holds more than one DICOM series; give each a folder of its own")
    if len(slices) > 1:
        normal = np.cross(*np.reshape(slices[0].ImageOrientationPatient, (2, 3)))
        gaps = np.diff(sorted(float(np.dot(item.ImagePositionPatient, normal)) for item in slices))
        if gaps.max() - gaps.min() > 0.1 * gaps.max():
            raise InputError(f"{folder}: the series has gaps of {gaps.min():g} to {gaps.max():g} mm; slices are missing")


def check_volume(volume: torch.Tensor, affine: np.ndarray, name: str, header: np.ndarray | None = None) -> None:
    """Raise :class:`InputError` unless ``volume`` is one sound 3D volume; see :func:`read_volume`."""
    shape = tuple(volume.shape)
    if volume.ndim != 3 or min(shape) < 2:
        raise InputError(f"{name}: shape {shape} is not one 3D volume; give a single channel and time point")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for values in (spacing, spacing if header is None else header):
        if not np.isfinite(values).all() or not all(SPACING_LIMITS[0] <= s <= SPACING_LIMITS[1] for s in values):
            text = " x ".join(f"{s:g}" for s in values)
            raise InputError(f"{name}: spacing {text} mm is not usable; correct the header")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise InputError(f"{name}: the affine is singular, its axes do not span a volume; correct the header")
    if not torch.isfinite(volume).all():
        raise InputError(f"{name}: holds {int((~torch.isfinite(volume)).sum())} NaN or infinite voxels")
    if volume.min() == volume.max():
        raise InputError(f"{name}: every voxel is {float(volume.min()):g}, there is no image in it")


class ReadVolumed(MapTransform):
    """Dictionary form of :func:`read_volume`; keeps the input's own grid for :class:`RestoreGridd`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            volume = read_volume(data[key])
            volume.meta["source_affine"] = volume.affine.clone()
            volume.meta["source_shape"] = torch.tensor(volume.shape[1:])
            data[key] = volume
        return data




class AirOutsideBodyd(MapTransform):
    """Set ``keys`` (HU) to air where ``body`` is below one half, and round to int16.

    Args:
        outside: what stands for air, in HU; 0 for the standard deviation of it, which stays in single precision.
    """

    def __init__(
        self, keys: KeysCollection, body: str = "body", outside: float = AIR_HU, dtype: str = "int16",
        allow_missing_keys: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(keys, allow_missing_keys)
        self.body, self.outside, self.dtype = body, float(outside), getattr(torch, dtype)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            hu = torch.where(data[self.body] < 0.5, torch.as_tensor(self.outside), data[key])
            data[key] = hu.to(self.dtype) if self.dtype.is_floating_point else hu.round().to(self.dtype)
        return data


class SaveVolumed(MapTransform):
    """Write ``keys`` below ``output_dir``, under the name in ``data["output"]``, by a temporary name and a rename.

    Args:
        suffix: put behind the name: with ``_sd``, ``a_sct.nii.gz`` becomes ``a_sct_sd.nii.gz``.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, suffix: str = "", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir, self.suffix = Path(output_dir), suffix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            target = beside(self.output_dir / data["output"], self.suffix)
            write_volume(data[key], target)
            logger.info("%s -> %s", data["image"].meta["filename_or_obj"], target)
        return dict(data)


def beside(path: str | Path, suffix: str, extension: str | None = None) -> Path:
    """The name of what belongs to a volume: ``a_sct.nii.gz`` with ``_sd`` is ``a_sct_sd.nii.gz``, with another
    ``extension``, such as ``.json``, ``a_sct.json``."""
    path = Path(path)
    own = _extension(path.name) or ""
    return path.with_name(path.name[: len(path.name) - len(own)] + suffix + (own if extension is None else extension))


def write_volume(volume: MetaTensor, path: str | Path) -> None:
    """Write (1, D, H, W) with its affine, in its own dtype, whole or not at all."""
    array, affine = np.asarray(volume)[0], np.asarray(volume.affine)
    with atomic_write(path) as temporary:
        if Path(path).name.lower().endswith((".nii", ".nii.gz")):
            image = nib.Nifti1Image(array, affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, temporary)
        else:
            image = ITKWriter.create_backend_obj(array, channel_dim=None, affine=affine, dtype=array.dtype)
            itk.imwrite(image, str(temporary))





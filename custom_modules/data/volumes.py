"""Reading volumes with checks, and writing them completely or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, ITKWriter, MetaTensor
from monai.transforms import MapTransform
from monai.utils import optional_import

from custom_modules.data.dicom import is_series, read_series, series_at, series_grid, split_address
from custom_modules.data.hu import AIR_HU, is_hu
from custom_modules.data.integrity import check_meta, check_nifti, check_nrrd
from custom_modules.errors import InputError
from custom_modules.files import atomic_write, inside

itk, has_itk = optional_import("itk")  # missing where a GPU is lent: packed data are NIfTI
logger = logging.getLogger(__name__)

EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha")
RECORD = {"input", "output", "settings"}  # some keys of the record that is written with a synthetic CT
SPACING_LIMITS = (0.05, 50.0)  # mm; a header with another spacing is broken
NIFTI_UNITS = {"meter": 1e3, "micron": 1e-3}  # to mm; without a unit it is mm

# silence the remarks of libraries on headers: the checks below have their own messages
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
if has_itk:
    itk.ProcessObject.SetGlobalWarningDisplay(False)


def _extension(name: str) -> str | None:
    return next((e for e in EXTENSIONS if name.lower().endswith(e)), None)


def read_volume(path: str | Path) -> MetaTensor:
    """Read one 3D volume as (1, D, H, W) float32 with its affine (RAS mm).

    Args:
        path: of a file, or the address of a DICOM series (:mod:`custom_modules.data.dicom`); the result then has its
            modality as ``meta["modality"]``.

    Raises:
        InputError: for a file that is missing, empty, unreadable, truncated or damaged; for data that are not one 3D
            volume, not finite, or constant; for a spacing of zero or outside 0.05 to 50 mm; for a singular affine; for
            slices that are not one straight, evenly spaced volume.
    """
    meta = {"filename_or_obj": str(path)}
    try:
        _check_file(path)
        if is_series(path):
            series = series_at(path)
            (array, affine), spacing = read_series(series, str(path)), None
            meta["modality"] = series.modality
        elif str(path).lower().endswith((".nii", ".nii.gz")):
            array, affine, spacing = _read_nifti(Path(path))
        else:
            array, affine, spacing = _read_itk(Path(path))
    except InputError:
        raise
    except Exception as error:  # readers raise errors of any type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"{path}: cannot be read, damaged or not what its name says ({reason[:160]})") from error
    return volume_from(array, affine, meta, spacing)


def volume_from(
    array: np.ndarray, affine: np.ndarray, meta: Mapping[str, Any], header: np.ndarray | None = None
) -> MetaTensor:
    """Return an array (D, H, W) with its affine (RAS mm) as :func:`read_volume` returns a file.

    Args:
        meta: has the name for messages as ``filename_or_obj``.
        header: spacing by the header, mm, which is checked too.

    Raises:
        InputError: for data that are not one valid 3D volume, see :func:`read_volume`.
    """
    name = meta["filename_or_obj"]
    if array.dtype.names or np.iscomplexobj(array):
        raise InputError(f"{name}: holds colours or complex numbers; give one number per voxel")
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    with np.errstate(all="ignore"):  # values beyond float32 become infinite, which is an error below
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    check_volume(tensor, affine, name, header)
    # with a channel, because a MetaTensor made without one takes (D, H, W) for a 2D image with channels
    return MetaTensor(tensor[None], affine=torch.from_numpy(affine), meta=dict(meta))


def name_of(image: str | Path | MetaTensor) -> str:
    """Return the path of a volume, also of one that has been read."""
    return str(image.meta["filename_or_obj"] if isinstance(image, MetaTensor) else image)


def _check_file(path: str | Path) -> None:
    """Raise InputError unless ``path`` can be opened; pipes are not tried."""
    place, _ = split_address(path)
    if place.is_symlink() and not place.exists():
        raise InputError(f"{path}: is a link to {os.readlink(place)}, which does not exist; correct or remove it")
    if not place.exists():
        raise InputError(f"{path}: no such file")
    if not (place.is_file() or place.is_dir()):
        raise InputError(f"{path}: is neither a file nor a folder but a pipe, socket or device; remove it")
    if not os.access(place, os.R_OK):
        raise InputError(f"{path}: no permission to read it; change its permissions")
    if place.is_file() and place.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")


def volume_files(path: str | Path) -> list[Path]:
    """Return the files from which :func:`read_volume` reads a volume, sorted by name, for its hash and age."""
    return sorted(series_at(path).paths) if is_series(path) else [Path(path)]


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the array, nibabel's affine in mm, and the spacing in the header, which nibabel repairs on loading."""
    image, unit = cast(nib.Nifti1Image, nib.load(path)), 1.0
    stored = cast(nib.arrayproxy.ArrayProxy, image.dataobj)
    check_nifti(path, stored.offset, stored.shape, stored.dtype.itemsize)
    with nib.openers.ImageOpener(str(path)) as file:
        header = type(image.header).from_fileobj(file, check=False)
    if "xyzt_units" in header:
        unit = NIFTI_UNITS.get(image.header.get_xyzt_units()[0], 1.0)
    affine, spacing = np.array(image.affine, dtype=np.float64), np.abs(header["pixdim"][1:4])
    affine[:3] *= unit
    return np.asanyarray(image.dataobj), affine, spacing if unit == 1 else spacing * unit


def _check_itk(path: Path, voxels: bool = True) -> tuple[int, ...]:
    return (check_nrrd if path.name.lower().endswith(".nrrd") else check_meta)(path, voxels)


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray, None]:
    shape = _check_itk(path)
    if len(shape) > 3:  # ITK has no 4D images in Python
        shape = tuple(size for size in shape if size > 1)
        if len(shape) != 3:
            raise InputError(f"{path}: shape {shape} is not one 3D volume; give a single channel and time point")
        reader = itk.ImageFileReader[itk.Image[itk.F, 3]].New(FileName=str(path))
        reader.Update()
        image = reader.GetOutput()
    else:
        image = itk.imread(str(path))
    array, meta = ITKReader().get_data(image)
    if array.shape != shape:
        raise InputError(f"{path}: is read as {array.shape}, its header says {shape}; save it again")
    return array, np.asarray(meta["affine"], dtype=np.float64), None


def read_grid(path: str | Path | MetaTensor) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Return the shape and spacing (mm) of a volume by its header only, or None if they are not usable."""
    shape: Sequence[int]
    spacing: Sequence[float]
    if isinstance(path, MetaTensor):  # checked when it was made
        return tuple(path.shape[1:]), tuple(map(float, path.pixdim))
    try:
        _check_file(path)
        if is_series(path):
            shape, spacing = series_grid(series_at(path))
        elif str(path).lower().endswith((".nii", ".nii.gz")):
            header = cast(nib.Nifti1Image, nib.load(path)).header
            unit = NIFTI_UNITS.get(header.get_xyzt_units()[0], 1.0) if "xyzt_units" in header else 1.0
            shape, spacing = header.get_data_shape()[:3], [float(zoom) * unit for zoom in header.get_zooms()[:3]]
        else:
            _check_itk(Path(path), voxels=False)  # otherwise ITK prints what it finds
            image = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
            image.SetFileName(str(path))
            image.ReadImageInformation()
            axes = [n for n in range(image.GetNumberOfDimensions()) if n < 3 or image.GetDimensions(n) > 1]
            shape, spacing = [image.GetDimensions(n) for n in axes], [image.GetSpacing(n) for n in axes]
    except Exception:  # readers raise errors of any type
        return None
    usable = len(shape) == 3 and all(SPACING_LIMITS[0] <= step <= SPACING_LIMITS[1] for step in spacing)
    return (tuple(map(int, shape)), tuple(spacing)) if usable else None


def check_volume(volume: torch.Tensor, affine: np.ndarray, name: str, header: np.ndarray | None = None) -> None:
    """Raise :class:`InputError` unless ``volume`` is one valid 3D volume; see :func:`read_volume`."""
    shape = tuple(volume.shape)
    if volume.ndim != 3 or min(shape) < 2:
        raise InputError(f"{name}: shape {shape} is not one 3D volume; give a single channel and time point")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    for values in (spacing, spacing if header is None else header):
        if not np.isfinite(values).all() or not all(SPACING_LIMITS[0] <= s <= SPACING_LIMITS[1] for s in values):
            text = " x ".join(f"{s:g}" for s in values)
            raise InputError(f"{name}: spacing {text} mm is not usable; correct the header and its unit")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise InputError(f"{name}: the affine is singular, its axes do not span a volume; correct the header")
    if not torch.isfinite(volume).all():
        raise InputError(f"{name}: holds {int((~torch.isfinite(volume)).sum())} NaN or infinite voxels")
    if volume.min() == volume.max():
        raise InputError(f"{name}: every voxel is {float(volume.min()):g}, there is no image in it")


class ReadVolumed(MapTransform):
    """Dictionary form of :func:`read_volume`, which leaves volumes in memory as they are; stores the grid of the input
    for :class:`RestoreGridd`.

    Args:
        allow_ct: accept a CT, or another modality than MR in the DICOM header, as ``image``.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, allow_ct: bool = True) -> None:
        super().__init__(keys, allow_missing_keys)
        self.allow_ct = allow_ct

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            volume = data[key].clone() if isinstance(data[key], MetaTensor) else read_volume(data[key])
            if key == "image" and not self.allow_ct:
                check_mr(volume)
            volume.meta["source_affine"] = volume.affine.clone()
            volume.meta["source_shape"] = torch.tensor(volume.shape[1:])
            data[key] = volume
        return data


def check_mr(volume: MetaTensor) -> None:
    """Raise InputError if the DICOM header names another modality, or the values are Hounsfield units."""
    name, modality = volume.meta["filename_or_obj"], volume.meta.get("modality", "MR")
    if modality not in ("MR", "", "OT"):
        raise InputError(f"{name}: is a {modality} series, not an MR; give the MR, or --allow_ct true to accept it")
    values = np.asarray(volume[0])
    if is_hu(values):
        low, high = float(values.min()), float(values.max())
        raise InputError(
            f"{name}: goes from {low:g} to {high:g} as a CT in HU does; give the MR, or --allow_ct true to accept it"
        )


class AirOutsideBodyd(MapTransform):
    """Set ``keys`` (HU) to air where ``body`` is below one half, and round to integers.

    Args:
        outside: HU of air; for a volume of standard deviations 0.
        dtype: of the result; floating point numbers are not rounded.
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
    """Write ``keys`` below ``output_dir`` with the name ``data["output"]``, completely or not at all.

    Args:
        suffix: appended to the name: with ``_sd``, ``a_sct.nii.gz`` becomes ``a_sct_sd.nii.gz``.
        beside_series: write NIfTI, too, where the name is that of a DICOM series and has no extension.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, suffix: str = "", allow_missing_keys: bool = False,
        beside_series: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(keys, allow_missing_keys)
        self.output_dir, self.suffix, self.beside_series = Path(output_dir), suffix, beside_series

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        series = _extension(data["output"]) is None
        for key in () if series and not self.beside_series else self.key_iterator(data):
            name = sibling_path(data["output"], self.suffix, EXTENSIONS[0] if series else None)
            target = inside(self.output_dir, name)
            source = data["image"].meta["filename_or_obj"]
            log_overwriting(target, source)
            write_volume(data[key], target)
            logger.info("%s -> %s", source, target)
        return dict(data)


def log_overwriting(target: Path, source: str) -> None:
    """Warn of a synthetic CT at ``target`` that was made from something else than ``source``."""
    before = input_of(target)
    if before not in (None, str(Path(source).resolve())):
        logger.warning("%s: overwritten, made from %s; before it was made from %s", target, source, before)


def sibling_path(path: str | Path, suffix: str, extension: str | None = None) -> Path:
    """Return the path of a file that belongs to a volume: ``a_sct.nii.gz`` with ``_sd`` gives ``a_sct_sd.nii.gz``, and
    with another ``extension``, such as ``.json``, ``a_sct.json``."""
    path = Path(path)
    own = _extension(path.name) or ""
    return path.with_name(path.name[: len(path.name) - len(own)] + suffix + (own if extension is None else extension))


def input_of(path: str | Path) -> str | None:
    """Return the path that a synthetic CT was made from, by its record; None if there is no record of this program."""
    record = sibling_path(path, "", ".json")
    try:
        content = json.loads(record.read_text()) if record.is_file() else {}
        return str(content["input"]) if set(content) >= RECORD else None
    except (OSError, ValueError, TypeError):
        return None


def write_volume(volume: MetaTensor, path: str | Path, description: str = "") -> None:
    """Write (1, D, H, W) with its affine, in its own dtype, completely or not at all; ``description`` goes into the
    header of NIfTI, which has room for 79 characters."""
    array, affine = np.asarray(volume)[0], np.asarray(volume.affine)
    with atomic_write(path) as temporary:
        if Path(path).name.lower().endswith((".nii", ".nii.gz")):
            image = nib.Nifti1Image(array, affine)
            image.header.set_xyzt_units("mm")
            image.header["descrip"] = description[:79].encode("ascii", "replace")
            nib.save(image, temporary)
        else:
            image = ITKWriter.create_backend_obj(array, channel_dim=None, affine=affine, dtype=array.dtype)
            itk.imwrite(image, str(temporary))

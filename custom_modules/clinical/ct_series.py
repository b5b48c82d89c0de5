"""A synthetic CT as a DICOM CT series (CT Image Storage, PS3.3 A.3): in the study and frame of reference of its MR, or
in a study of its own."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, CTImageStorage
from pydicom.valuerep import format_number_as_ds

from custom_modules.clinical.study import (
    MARK,
    SOFTWARE,
    Origin,
    Study,
    code,
    content_uid,
    new_instance,
    new_study,
    save_instance,
    study_of,
)
from custom_modules.config_check import result_settings
from custom_modules.data.dicom import is_series, series_at
from custom_modules.data.grid import GRID_TOLERANCE
from custom_modules.data.slices import slice_affine
from custom_modules.data.volumes import EXTENSIONS, log_overwriting, volume_files
from custom_modules.errors import InputError
from custom_modules.files import atomic_folder, inside, sha256, to_plain

logger = logging.getLogger(__name__)

INTERCEPT = -1024
STORED = (INTERCEPT, 2**15 - 1 + INTERCEPT)  # HU that signed 16 bit hold, air and below never negative as stored
WINDOWS = (("SOFT TISSUE", 40, 400), ("BONE", 300, 1500))  # name, centre, width in HU
TRAINING_KVP = 120  # of the training CTs, as assumed: their files do not record it
DESCRIPTION = f"Synthetic CT from MR ({MARK})"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to the coordinates of DICOM


@dataclass(frozen=True)
class Plane:
    """Where a slice lies (PS3.3 C.7.6.2): mm, LPS.

    Attributes:
        position: (3,), centre of its first pixel.
        orientation: (2, 3), directions of a row and of a column.
        spacing: (2,), between rows and between columns.
    """

    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray


@dataclass(frozen=True)
class CTSeries:
    """A synthetic CT on its planes, before it is written.

    Attributes:
        stack: (slices, rows, columns), int16 HU.
        planes: of its slices.
        study: that it belongs to.
        origin: what it was made from and with.
    """

    stack: np.ndarray
    planes: tuple[Plane, ...]
    study: Study
    origin: Origin

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        """What its UIDs follow from: input, weights, settings and voxels."""
        origin = self.origin
        voxels = hashlib.sha256(np.ascontiguousarray(self.stack, dtype="<i2")).hexdigest()
        settings = json.dumps(to_plain(origin.settings), sort_keys=True)
        study = str(self.study.common.StudyInstanceUID)
        return voxels, study, origin.input_sha256, origin.model_sha256, origin.version, settings

    @property
    def uid(self) -> UID:
        return content_uid(*self.identity, "series")

    def instance_uid(self, number: int) -> UID:
        """The SOP Instance UID of slice ``number``, from 0."""
        return content_uid(*self.identity, "instance", number)

    @property
    def gap(self) -> float:
        """Millimetres between slices."""
        first, last = self.planes[0].position, self.planes[-1].position
        return float(np.linalg.norm(last - first) / max(len(self.planes) - 1, 1))


def ct_series(hu: np.ndarray, affine: np.ndarray, origin: Origin, source: str | Path) -> CTSeries:
    """Put a synthetic CT on the slices of its MR series, or, for another MR, on axial slices in a study of its own.

    Args:
        hu: (D, H, W) in any order of axes.
        affine: voxel to RAS mm.
        source: the MR: the address of a DICOM series, or a file.

    Raises:
        InputError: for HU beyond what is stored, for a volume that does not lie on the series, for a sheared one.
    """
    low, high = float(hu.min()), float(hu.max())
    if low < STORED[0] or high > STORED[1]:
        raise InputError(f"{source}: {low:g} to {high:g} HU; a CT series holds {STORED[0]} to {STORED[1]}; clip it")
    if not is_series(source):
        stack, planes = _axial(hu, affine, str(source))
        return CTSeries(stack, planes, new_study(_stem(source), origin), origin)
    study = study_of(series_at(source))
    stack = _on_series(hu, affine, study, str(source))
    planes = tuple(Plane(item.position, item.orientation, item.spacing) for item in study.slices)
    return CTSeries(stack, planes, study, origin)


def _stem(path: str | Path) -> str:
    name = Path(path).name
    return next((name[: -len(end)] for end in EXTENSIONS if name.lower().endswith(end)), name)


def _on_series(hu: np.ndarray, affine: np.ndarray, study: Study, name: str) -> np.ndarray:
    """Return (slices, rows, columns) of a volume on the grid of a series, with its axes in any order and direction."""
    target = slice_affine(study.slices)
    turned, moved = _reoriented(hu, affine, target)
    shape = (study.slices[0].size[1], study.slices[0].size[0], len(study.slices))
    if turned.shape != shape or np.abs(moved - target).max() > GRID_TOLERANCE:
        raise InputError(
            f"{name}: the synthetic CT does not lie on this series ({' x '.join(map(str, turned.shape))} voxels for "
            f"{' x '.join(map(str, shape))}, or another position); give the series it was made from"
        )
    return turned.transpose(2, 1, 0).astype(np.int16)


def _reoriented(hu: np.ndarray, affine: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume and its affine with axes permuted and flipped to be nearest to those of ``target``."""
    relative = np.linalg.inv(target) @ affine
    orientation = nib.orientations.io_orientation(relative)
    turned = nib.orientations.apply_orientation(hu, orientation)
    return turned, affine @ nib.orientations.inv_ornt_aff(orientation, hu.shape)


def _axial(hu: np.ndarray, affine: np.ndarray, name: str) -> tuple[np.ndarray, tuple[Plane, ...]]:
    """Return (slices, rows, columns) and the planes of a volume, turned so that rows go left, columns to the back and
    slices up as far as its axes allow, for planning systems read axial slices."""
    turned, affine = _reoriented(hu, np.asarray(affine, dtype=np.float64), LPS)
    axes = (LPS @ affine)[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    directions = axes / spacing
    sheared = np.abs(directions.T @ directions - np.eye(3)).max() * np.max(spacing * turned.shape)
    if sheared > GRID_TOLERANCE or np.linalg.det(directions) < 0:
        raise InputError(f"{name}: its axes are not perpendicular ({sheared:.2g} mm off); resample it")
    steps = np.arange(turned.shape[2])[:, None] * axes[:, 2] + (LPS @ affine)[:3, 3]
    orientation, between = directions[:, :2].T, spacing[[1, 0]]
    return turned.transpose(2, 1, 0).astype(np.int16), tuple(Plane(step, orientation, between) for step in steps)


# the data sets


def write_ct_series(series: CTSeries, folder: str | Path) -> Path:
    """Write one file a slice, ``ct_0001.dcm`` and so on, into ``folder``, which appears once all of them are there.

    Raises:
        InputError: for a folder that holds something else than an earlier DICOM series.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and all(file.suffix == ".dcm" for file in folder.iterdir())):
        raise InputError(f"{folder}: holds other files than a DICOM series, which would be lost; choose another name")
    with atomic_folder(folder) as temporary:
        for number in range(len(series.stack)):
            save_instance(ct_image(series, number), temporary / f"ct_{number + 1:04d}.dcm")
    return folder


def ct_image(series: CTSeries, number: int) -> Dataset:
    """Return the data set of slice ``number``, from 0."""
    plane, study = series.planes[number], series.study
    item = new_instance(study, CTImageStorage, series.instance_uid(number), series.origin)
    # General Series, General Image
    item.Modality, item.SeriesInstanceUID, item.SeriesDescription = "CT", series.uid, DESCRIPTION
    item.SeriesNumber = 1000 + int(study.common.get("SeriesNumber") or 0) % 10**8
    item.update(study.images)
    for name in ("PatientPosition", "Laterality"):
        item.setdefault(name, "")
    item.InstanceNumber, item.AcquisitionNumber = number + 1, None
    item.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    item.BurnedInAnnotation, item.LossyImageCompression = "NO", "00"
    _add_derivation(item, series, number)
    # Image Plane
    item.ImagePositionPatient = _decimals(plane.position)
    item.ImageOrientationPatient = _decimals(plane.orientation.ravel())
    item.PixelSpacing = _decimals(plane.spacing)
    item.SliceThickness = item.SpacingBetweenSlices = _decimals([series.gap])[0]
    # CT Image, Image Pixel, VOI LUT
    item.KVP = None  # no tube made this image
    item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 1, INTERCEPT, "HU"
    item.WindowCenter, item.WindowWidth = [w[1] for w in WINDOWS], [w[2] for w in WINDOWS]
    item.WindowCenterWidthExplanation = [w[0] for w in WINDOWS]
    pixels = (series.stack[number].astype(np.int32) - INTERCEPT).astype("<i2")
    item.Rows, item.Columns = pixels.shape
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated = item.BitsStored = 16
    item.HighBit, item.PixelRepresentation = 15, 1
    item.PixelData = pixels.tobytes()
    item["PixelData"].VR = "OW"
    return item


def _decimals(values: Any) -> list[str]:
    """Format numbers as Decimal Strings: 16 characters at most, which is finer than 1e-6 mm here."""
    return [format_number_as_ds(float(round(value, 9)) + 0.0) for value in values]


def _add_derivation(item: Dataset, series: CTSeries, number: int) -> None:
    """Add what says that the image is synthetic, from what and with what it was made."""
    origin, study = series.origin, series.study
    item.ImageComments = f"SYNTHETIC CT, predicted from MR by {SOFTWARE} {origin.version}; {MARK}"
    item.DerivationDescription = (
        f"Synthetic CT, HU predicted from MR by {SOFTWARE} {origin.version}, weights sha256 {origin.weights}, "
        f"trained on CT of {TRAINING_KVP} kVp (assumed); {MARK}"
    )
    contribution = Dataset()
    contribution.PurposeOfReferenceCodeSequence = [code("109102", "Processing Equipment")]
    contribution.Manufacturer, contribution.ManufacturerModelName = item.Manufacturer, item.ManufacturerModelName
    contribution.SoftwareVersions = item.SoftwareVersions
    contribution.ContributionDescription = f"Synthetic CT; weights sha256 {origin.model_sha256 or 'unknown'}"
    equipment = [contribution]
    if study.scanner.get("Manufacturer"):
        scanner = Dataset()
        scanner.update(study.scanner)
        scanner.PurposeOfReferenceCodeSequence = [code("109101", "Acquisition Equipment")]
        scanner.ContributionDescription = "Acquisition of the MR"
        equipment.append(scanner)
    item.ContributingEquipmentSequence = DicomSequence(equipment)
    if study.slices:
        _add_source(item, study, number)


def _add_source(item: Dataset, study: Study, number: int) -> None:
    """Refer to the MR image at the same place."""
    source = study.slices[number]
    sop_class, instance = study.references[source.path]
    if not instance:
        return
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = sop_class, instance
    common = Dataset()
    common.update(reference)
    if UID(sop_class).name.startswith("Enhanced"):
        reference.ReferencedFrameNumber = source.frame + 1
    reference.PurposeOfReferenceCodeSequence = [code("121322", "Source image for image processing operation")]
    reference.SpatialLocationsPreserved = "YES"
    item.SourceImageSequence = DicomSequence([reference])
    referenced = Dataset()
    referenced.SeriesInstanceUID = study.series_uid
    referenced.ReferencedInstanceSequence = DicomSequence([common])
    item.ReferencedSeriesSequence = DicomSequence([referenced])


class SaveSeriesd(MapTransform):
    """Write ``keys`` (1, D, H, W), HU, as a DICOM CT series below ``output_dir``, where the name ``data["output"]`` has
    no extension.

    Args:
        checkpoint: the weights.
        version: of the bundle.
        settings: of the synthesis; when None, those of the running config that change the result.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, checkpoint: str | Path, version: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(keys)
        self.output_dir, self.checkpoint, self.version = Path(output_dir), Path(checkpoint), version
        self.settings = result_settings() if settings is None else settings

    @cached_property
    def model_sha256(self) -> str | None:
        return sha256(self.checkpoint) if self.checkpoint.is_file() else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if not str(data["output"]).lower().endswith(EXTENSIONS):
            for key in self.key_iterator(dict(data)):
                self._write(data[key], data["image"].meta["filename_or_obj"], data["output"])
        return dict(data)

    def _write(self, volume: MetaTensor, source: str, name: str) -> None:
        target = inside(self.output_dir, name)
        log_overwriting(target, source)
        origin = Origin(sha256(volume_files(source)), self.model_sha256, self.version, self.settings)
        write_ct_series(ct_series(np.asarray(volume[0]), np.asarray(volume.affine), origin, source), target)
        logger.info("%s -> %s", source, target)

"""What DICOM files of one patient share: patient, study, frame of reference and equipment, copied from a series or made
for a volume that has none; and UIDs that follow from the content."""

from __future__ import annotations

import logging
import re
import unicodedata
import uuid
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, ExplicitVRLittleEndian

from custom_modules.data.dicom import DicomSeries, read_slices
from custom_modules.data.slices import Slice
from custom_modules.errors import InputError

logger = logging.getLogger(__name__)

SOFTWARE = "3D-WLDM"
MARK = "research, not for clinical use"  # in every file
# Modules of PS3.3 that carry over: Patient, Clinical Trial Subject and Study, General Study, Patient Study
CARRIED = (
    "SpecificCharacterSet", "TimezoneOffsetFromUTC",
    "PatientName", "PatientID", "IssuerOfPatientID", "TypeOfPatientID", "PatientBirthDate", "PatientSex",
    "PatientBirthTime", "OtherPatientIDsSequence", "OtherPatientNames", "EthnicGroup", "PatientComments",
    "PatientSpeciesDescription", "QualityControlSubject", "PatientIdentityRemoved", "DeidentificationMethod",
    "DeidentificationMethodCodeSequence", "ClinicalTrialSponsorName", "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName", "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription",
    "StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
    "StudyDescription", "PatientAge", "PatientSize", "PatientWeight", "PatientSexNeutered", "AdditionalPatientHistory",
    "MedicalAlerts", "Allergies", "PregnancyStatus", "PatientState", "LongitudinalTemporalInformationModified",
)  # fmt: skip
TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber",
)  # fmt: skip
FRAME = ("PositionReferenceIndicator",)
IMAGES = ("BodyPartExamined", "Laterality", "PatientPosition")  # what only images have
SCANNER = ("Manufacturer", "ManufacturerModelName", "InstitutionName", "StationName", "SoftwareVersions")
LENGTHS = {"SH": 16, "CS": 16, "AE": 16, "LO": 64, "PN": 64, "DS": 16, "IS": 12, "ST": 1024}  # PS3.5 6.2


@dataclass(frozen=True)
class Origin:
    """Where a synthetic CT comes from.

    Attributes:
        input_sha256: of the MR's files.
        model_sha256: of the weights; None where they had no file.
        version: of the bundle.
        settings: of the synthesis that change its result.
    """

    input_sha256: str
    model_sha256: str | None
    version: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """The first digits of the weights' hash, for people."""
        return (self.model_sha256 or "unknown")[:16]


def content_uid(*parts: Any) -> UID:
    """Return the UID that follows from ``parts``: the name-based UUID of their text, as PS3.5 B.2 allows. The same
    content gives the same UID on every machine, another content another."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, repr(parts)).int}")


@dataclass(frozen=True)
class Study:
    """Patient, study and frame of reference of a synthetic CT.

    Attributes:
        common: the elements of all its files.
        images: further ones of its images.
        scanner: those of the equipment that made the MR, may be empty.
        slices: of the MR's series in the order of its volume; empty where there is no series.
        references: SOP class and instance of each file of ``slices``.
        series_uid: of the MR.
    """

    common: Dataset
    images: Dataset
    scanner: Dataset
    slices: tuple[Slice, ...] = ()
    references: Mapping[Path, tuple[str, str]] = field(default_factory=dict)
    series_uid: str = ""


def study_of(series: DicomSeries) -> Study:
    """Read patient, study and frame of reference of an MR series, and its slices.

    Raises:
        InputError: for a series that is not one evenly spaced volume, or that has no Study Instance UID.
    """
    slices = read_slices(series, series.address)
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in {s.path for s in slices}}
    first = headers[slices[0].path]
    if not first.get("StudyInstanceUID"):
        raise InputError(f"{slices[0].path}: has no Study Instance UID; export it again, or take NIfTI")
    common = _copied(first, CARRIED + FRAME)
    for name in (*TYPE_2, "PositionReferenceIndicator"):
        common.setdefault(name, "")
    common.FrameOfReferenceUID = first.get("FrameOfReferenceUID") or content_uid(series.uid, "frame of reference")
    if first.get("SeriesNumber") is not None:
        common.SeriesNumber = first.SeriesNumber
    references = {
        path: (str(header.SOPClassUID), str(header.get("SOPInstanceUID", ""))) for path, header in headers.items()
    }
    return Study(common, _copied(first, IMAGES), _copied(first, SCANNER), tuple(slices), references, series.uid)


def new_study(name: str, origin: Origin, patient_position: str = "HFS") -> Study:
    """Make a study of its own for a volume without a series; ``name`` becomes the patient's ID and name."""
    plain = re.sub(r"[^\w .+-]+", "_", unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode())
    common = Dataset()
    for keyword in TYPE_2:
        setattr(common, keyword, "")
    common.PatientID, common.PatientName = plain[:64] or "unnamed", plain[:64] or "unnamed"
    common.StudyInstanceUID = content_uid(origin.input_sha256, "study")
    common.FrameOfReferenceUID = content_uid(origin.input_sha256, "frame of reference")
    common.StudyDescription = f"Synthetic CT ({MARK})"
    common.PositionReferenceIndicator, images = "", Dataset()
    images.PatientPosition = patient_position
    return Study(common, images, Dataset())


def _copied(header: Dataset, names: tuple[str, ...]) -> Dataset:
    """Return the elements ``names`` of a header that it has and that are not empty where they need not
    be there, without private ones in their sequences. Text that is too
    long for its type, which checkers and some readers refuse, is cut."""
    found = Dataset()
    for name in names:
        if name in header and not (name in IMAGES and header[name].is_empty):
            found[name] = _within_length(header[name])
    found.remove_private_tags()
    return found


def _within_length(element: pydicom.DataElement) -> pydicom.DataElement:
    limit = LENGTHS.get(str(element.VR))
    if limit is None or element.is_empty or isinstance(element.value, DicomSequence):
        return element
    if element.VR == "PN" or element.VM > 1 or len(str(element.value)) <= limit:
        return element
    logger.warning("%s '%s' is longer than its %d characters and cut", element.name, element.value, limit)
    cut = pydicom.DataElement(element.tag, element.VR, str(element.value)[:limit].strip())
    return cut


def new_instance(study: Study, sop_class: UID, sop_instance: UID, origin: Origin) -> Dataset:
    """Return a data set of ``sop_class`` with what all files of the study share, the equipment, and the file's meta
    information."""
    item = deepcopy(study.common)
    item.SOPClassUID, item.SOPInstanceUID = sop_class, sop_instance
    item.Manufacturer, item.ManufacturerModelName = SOFTWARE, "mr_to_ct_wavelet_diffusion"
    item.SoftwareVersions = [SOFTWARE, origin.version]
    item.ContentQualification = "RESEARCH"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, sop_instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.file_meta = meta
    return item


def code(value: str, meaning: str, scheme: str = "DCM") -> Dataset:
    """Return an item of a code sequence (PS3.16)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def save_instance(item: Dataset, path: Path) -> None:
    """Write a data set with its preamble."""
    if int(pydicom.__version__.split(".")[0]) < 3:  # the label server's
        item.is_little_endian, item.is_implicit_VR = True, False
        item.save_as(path, write_like_original=False)
    else:
        item.save_as(path, enforce_file_format=True)

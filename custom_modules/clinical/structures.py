"""Structures of a synthetic CT by thresholds, and their contours as a DICOM RT Structure Set (PS3.3 A.19) on the CT
series just written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import CTImageStorage, RTStructureSetStorage
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.measure import approximate_polygon, find_contours, points_in_poly

from custom_modules.clinical.ct_series import CTSeries, Plane
from custom_modules.clinical.study import MARK, content_uid, new_instance, save_instance
from custom_modules.data.body import ct_tissue_mask
from custom_modules.data.hu import BONE_HU, TISSUE_HU
from custom_modules.errors import InputError
from custom_modules.files import atomic_write

STRUCTURES = ("EXTERNAL", "BONE", "LUNG", "AIR")
COLOURS = {"EXTERNAL": (0, 200, 0), "BONE": (255, 240, 170), "LUNG": (90, 160, 255), "AIR": (0, 255, 255)}
KINDS = {"EXTERNAL": "EXTERNAL", "BONE": "ORGAN", "LUNG": "ORGAN", "AIR": "CAVITY"}  # RT ROI Interpreted Type
RULES = {
    "EXTERNAL": f"above {TISSUE_HU:g} HU, holes filled by slice",
    "BONE": f"above {BONE_HU:g} HU in the body",
    "LUNG": f"below {TISSUE_HU:g} HU in the body, parts of 50 mL and more",
    "AIR": f"below {TISSUE_HU:g} HU in the body, smaller parts",
}
LUNG_ML = 50.0  # a smaller part of air in the body is gas in the bowel or an airway


def structure_masks(stack: np.ndarray, voxel_ml: float, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the structures ``names`` of a CT as bool masks, each by its rule in :data:`RULES`.

    Args:
        stack: (slices, rows, columns), HU.
        voxel_ml: volume of a voxel in mL.

    Raises:
        InputError: for a name that is not in :data:`STRUCTURES`, or when there is no body.
    """
    unknown = [name for name in names if name not in STRUCTURES]
    if unknown:
        raise InputError(f"no structure '{unknown[0]}'; there are {', '.join(STRUCTURES)}")
    body = ct_tissue_mask(stack.transpose(1, 2, 0)).transpose(2, 0, 1)
    if not body.any():
        raise InputError("there is no body in the synthetic CT to outline, only air")
    cavities, number = ndimage.label(body & (stack < TISSUE_HU))
    large = np.bincount(cavities.ravel(), minlength=number + 1) * voxel_ml >= LUNG_ML
    large[0] = False
    lung = large[cavities]
    found = {"EXTERNAL": body, "BONE": body & (stack > BONE_HU), "LUNG": lung, "AIR": (cavities > 0) & ~lung}
    return {name: found[name] for name in names}


# contours


def contours(mask: np.ndarray) -> list[np.ndarray]:
    """Return closed outlines (N, 2), in (row, column), of the parts of a mask (rows, columns), half a pixel around it.

    A hole is joined to the outline around it by a channel of no width, the keyhole technique of PS3.3 C.8.8.6.3, since
    a reader may fill every contour on its own.
    """
    lines = [line[:-1] - 1 for line in find_contours(np.pad(mask, 1).astype(np.float32), 0.5)]
    outer = [line for line in lines if _area(line) > 0]
    holes = [line for line in lines if _area(line) < 0]
    inside: dict[int, list[np.ndarray]] = {}
    for hole in holes:
        around = [n for n, line in enumerate(outer) if points_in_poly(hole[:1], line)[0]]
        inside.setdefault(min(around, key=lambda n: abs(_area(outer[n]))), []).append(hole)
    return [approximate_polygon(_with_holes(line, inside.get(n, [])), 0) for n, line in enumerate(outer)]


def _area(line: np.ndarray) -> float:
    """Return the signed area of a polygon; :func:`find_contours` winds holes the other way round."""
    rows, columns = line.T
    return 0.5 * float(np.sum(columns * np.roll(rows, -1) - rows * np.roll(columns, -1)))


def _with_holes(line: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """Join each hole to the outline where both are nearest, the nearest hole first. The channel starts and ends within
    edges, so that it goes past the centres of pixels: a centre on it could count as outside."""
    remaining = list(holes)
    while remaining:
        gaps = [np.linalg.norm(_joints(line)[:, None] - _joints(hole)[None], axis=2) for hole in remaining]
        chosen = int(np.argmin([gap.min() for gap in gaps]))
        hole, (at, start) = remaining.pop(chosen), np.unravel_index(gaps[chosen].argmin(), gaps[chosen].shape)
        channel = np.stack([_joints(line)[at], _joints(hole)[start]])
        around = np.concatenate([hole[start + 1 :], hole[: start + 1]])
        line = np.concatenate([line[: at + 1], channel, around, channel[::-1], line[at + 1 :]])
    return line


def _joints(line: np.ndarray) -> np.ndarray:
    """Return a point on each edge of a polygon, off its middle and its ends."""
    return line + 0.3 * (np.roll(line, -1, axis=0) - line)


def points(line: np.ndarray, plane: Plane) -> np.ndarray:
    """Return an outline (N, 2) in (row, column) as (N, 3), mm, LPS."""
    offsets = (
        line[:, 1:] * plane.spacing[1] * plane.orientation[0] + line[:, :1] * plane.spacing[0] * plane.orientation[1]
    )
    return plane.position + offsets


def fill(lines: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return the mask (rows, columns) of the pixels whose centres outlines in (row, column) enclose."""
    mask = np.zeros(shape, dtype=bool)
    for line in lines:
        mask ^= polygon2mask(shape, line)
    return mask


# the structure set


def write_structure_set(series: CTSeries, names: Sequence[str], path: str | Path) -> dict[str, float]:
    """Write the structures ``names`` of a CT series; return their volumes in mL.

    Raises:
        InputError: see :func:`structure_masks`.
    """
    spacing = series.planes[0].spacing
    voxel_ml = float(spacing[0] * spacing[1] * series.gap) / 1000
    masks = structure_masks(series.stack, voxel_ml, names)
    with atomic_write(path) as temporary:
        save_instance(structure_set(series, masks), temporary)
    return {name: float(mask.sum()) * voxel_ml for name, mask in masks.items()}


def structure_set(series: CTSeries, masks: dict[str, np.ndarray]) -> Dataset:
    """Return the data set of ``masks`` (slices, rows, columns) by name."""
    study = series.study
    instance = content_uid(*series.identity, "structures", *masks)
    item = new_instance(study, RTStructureSetStorage, instance, series.origin)
    item.Modality, item.SeriesInstanceUID = "RTSTRUCT", content_uid(instance, "series")
    item.SeriesNumber = 2000 + int(study.common.get("SeriesNumber") or 0) % 10**8
    item.SeriesDescription = f"Structures of synthetic CT ({MARK})"
    item.OperatorsName, item.InstanceNumber = "", 1
    item.StructureSetLabel, item.StructureSetName = "SYNTHETIC CT", f"By thresholds ({MARK})"
    item.StructureSetDate, item.StructureSetTime = "", ""
    item.ApprovalStatus = "UNAPPROVED"
    item.ReferencedFrameOfReferenceSequence = DicomSequence([_frame_of_reference(series)])
    rois, outlines, observations = [], [], []
    for number, (name, mask) in enumerate(masks.items(), start=1):
        rois.append(_roi(name, number, study.common.FrameOfReferenceUID))
        outlines.append(_roi_contour(series, mask, name, number))
        observations.append(_observation(name, number))
    item.StructureSetROISequence = DicomSequence(rois)
    item.ROIContourSequence = DicomSequence(outlines)
    item.RTROIObservationsSequence = DicomSequence(observations)
    return item


def _image(series: CTSeries, number: int) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = CTImageStorage
    reference.ReferencedSOPInstanceUID = series.instance_uid(number)
    return reference


def _frame_of_reference(series: CTSeries) -> Dataset:
    """Return the item that names the CT series and its images."""
    referenced_series, referenced_study, frame = Dataset(), Dataset(), Dataset()
    referenced_series.SeriesInstanceUID = series.uid
    referenced_series.ContourImageSequence = DicomSequence([_image(series, n) for n in range(len(series.stack))])
    referenced_study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, by the standard
    referenced_study.ReferencedSOPInstanceUID = series.study.common.StudyInstanceUID
    referenced_study.RTReferencedSeriesSequence = DicomSequence([referenced_series])
    frame.FrameOfReferenceUID = series.study.common.FrameOfReferenceUID
    frame.RTReferencedStudySequence = DicomSequence([referenced_study])
    return frame


def _roi(name: str, number: int, frame: str) -> Dataset:
    roi = Dataset()
    roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, frame
    roi.ROIGenerationAlgorithm, roi.ROIGenerationDescription = "AUTOMATIC", RULES[name]
    return roi


def _roi_contour(series: CTSeries, mask: np.ndarray, name: str, number: int) -> Dataset:
    roi, found = Dataset(), []
    roi.ReferencedROINumber, roi.ROIDisplayColor = number, list(COLOURS[name])
    for k in np.flatnonzero(mask.any(axis=(1, 2))):
        for line in contours(mask[k]):
            contour = Dataset()
            contour.ContourImageSequence = DicomSequence([_image(series, int(k))])
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(line)
            contour.ContourNumber = len(found) + 1
            contour.ContourData = [f"{value:.4f}" for value in points(line, series.planes[k]).ravel() + 0.0]
            found.append(contour)
    if found:
        roi.ContourSequence = DicomSequence(found)
    return roi


def _observation(name: str, number: int) -> Dataset:
    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = number
    observation.RTROIInterpretedType, observation.ROIInterpreter = KINDS[name], ""
    return observation

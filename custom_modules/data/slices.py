"""The slices of a DICOM series: their positions by the headers, and checks that they form one straight volume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset

from custom_modules.errors import InputError

UNEVEN = 0.1  # of the slice spacing: tolerance of a gap, and of a slice's position on an even grid
ROUNDING = 0.1  # mm; headers round positions, so that smaller differences are never uneven
SAME_PLACE = 0.01  # mm
TILT = 0.5  # degrees between the slices' normal and the line through their origins
# Attributes that tell slices at one position apart; those that vary from slice to slice come last
TELLING = (
    "EchoTime", "EffectiveEchoTime", "EchoNumbers", "InversionTime", "FlipAngle", "DiffusionBValue",
    "TemporalPositionIdentifier", "TemporalPositionIndex", "TriggerTime", "NominalCardiacTriggerDelayTime",
    "ImageType", "FrameType", "AcquisitionNumber", "FrameAcquisitionNumber", "SequenceName", "RepetitionTime",
    "DiffusionGradientOrientation", "AcquisitionTime", "ContentTime",
)  # fmt: skip
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
FRAME_GROUPS = (  # of enhanced images: sequences with the attributes of a frame
    ("PlanePositionSequence", ("ImagePositionPatient",)),
    ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
    ("PixelMeasuresSequence", ("PixelSpacing",)),
    ("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")),
    ("FrameContentSequence", ("StackID", "TemporalPositionIndex", "FrameAcquisitionNumber")),
    ("MREchoSequence", ("EffectiveEchoTime",)),
    ("MRDiffusionSequence", ("DiffusionBValue",)),
    ("MRImageFrameTypeSequence", ("FrameType",)),
    ("CardiacSynchronizationSequence", ("NominalCardiacTriggerDelayTime",)),
)


@dataclass(frozen=True)
class Slice:
    """A plane of a series: a file, or a frame of one.

    Attributes:
        frame: its number in the file, starting at 0.
        position: centre of its first pixel, (3,), mm, LPS.
        orientation: directions of a row and of a column, (2, 3).
        spacing: between rows and between columns, (2,), mm.
        size: rows, columns.
        slope, intercept: map stored values to those of the image.
        tags: further attributes in the header, see :data:`TELLING`.
    """

    path: Path
    frame: int
    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray
    size: tuple[int, int]
    slope: float = 1.0
    intercept: float = 0.0
    tags: Mapping[str, str] = field(default_factory=dict)


def slices_of(path: Path, header: Dataset) -> list[Slice]:
    """Return the slices in a DICOM file by its header: one, or one per frame of an enhanced image.

    Raises:
        InputError: for a header without a usable position of the slice, for mosaics, and for frames without positions.
    """
    if "MOSAIC" in [str(kind).upper() for kind in _several(header.get("ImageType"))]:
        raise InputError(f"{path}: is a mosaic, all slices of a volume in one picture; convert it to NIfTI (dcm2niix)")
    if "ModalityLUTSequence" in header:
        raise InputError(f"{path}: its values go through a table (Modality LUT), which is not supported; convert it")
    frames = int(header.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" not in header:
        if frames > 1:
            raise InputError(f"{path}: holds {frames} frames without positions; export it as one file per slice")
        return [_slice(path, 0, header, header)]
    groups = header.PerFrameFunctionalGroupsSequence
    if len(groups) != frames:
        raise InputError(f"{path}: its header says {frames} frames and describes {len(groups)}; export it again")
    shared = next(iter(header.get("SharedFunctionalGroupsSequence") or []), Dataset())
    return [_slice(path, n, header, _frame(group, shared)) for n, group in enumerate(groups)]


def _frame(group: Dataset, shared: Dataset) -> Dataset:
    """Return the attributes of a frame by its functional groups; its own take precedence over shared ones."""
    found = Dataset()
    for sequence, names in FRAME_GROUPS:
        items = group.get(sequence) or shared.get(sequence) or []
        for name in names if len(items) else ():
            if items[0].get(name) not in (None, ""):
                setattr(found, name, items[0].get(name))
    return found


def _slice(path: Path, frame: int, header: Dataset, place: Dataset) -> Slice:
    which = f"{path}: frame {frame + 1}" if place is not header else str(path)
    lacking = [name for name in GEOMETRY if place.get(name) in (None, "")]
    if lacking:
        raise InputError(f"{which} has no {', '.join(lacking)}; without positions there is no volume; export it again")
    try:
        position, orientation, spacing = (
            np.array(_several(place.get(name)), dtype=float).reshape(shape)
            for name, shape in zip(GEOMETRY, ((3,), (2, 3), (2,)))
        )
        slope, intercept = (
            float(default if place.get(name) in (None, "") else place.get(name))
            for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        size = int(header.Rows), int(header.Columns)
    except (TypeError, ValueError) as error:
        raise InputError(f"{which} has a damaged header ({str(error)[:80]}); export it again") from error
    if not all(np.isfinite(values).all() for values in (position, orientation, spacing, [slope, intercept])):
        raise InputError(f"{which} has positions or a rescale slope that are not numbers; export it again")
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > 1e-2:
        raise InputError(f"{which} has an orientation whose two directions are not perpendicular; export it again")
    if slope == 0:
        raise InputError(f"{which} has a rescale slope of 0; export it again")
    tags = {name: str(place.get(name)) for name in (*TELLING, "StackID") if place.get(name) not in (None, "")}
    tags["InstanceNumber"] = str(header.get("InstanceNumber", "")) if place is header else str(frame + 1)
    return Slice(path, frame, position, orientation, spacing, size, slope, intercept, tags)


def _several(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, (str, int, float)) else list(value)


def order_slices(slices: Sequence[Slice], name: str) -> list[list[Slice]]:
    """Sort the slices along their normal, those at one position together.

    Raises:
        InputError: unless they are parallel, of the same size and spacing, and in one stack.
    """
    first = slices[0]
    normals = [np.cross(*item.orientation) for item in slices]
    if any(np.abs(item.orientation - first.orientation).max() > 1e-3 for item in slices):
        count = len({tuple(normal.round(2)) for normal in normals})
        raise InputError(f"{name} has slices of {max(count, 2)} orientations, as localisers do; give a series of one")
    sizes = sorted({item.size for item in slices})
    if len(sizes) > 1:
        text = ", ".join(f"{rows} x {columns}" for rows, columns in sizes)
        raise InputError(f"{name} has slices of different sizes ({text} pixels); give a series of one size")
    spacings = np.array([item.spacing for item in slices])
    if np.abs(spacings - spacings[0]).max() > 1e-3 * np.abs(spacings[0]).max():
        raise InputError(f"{name} has slices of different pixel spacings; give a series of one spacing")
    stacks = sorted({item.tags.get("StackID", "") for item in slices})
    if len(stacks) > 1:
        raise InputError(f"{name} holds {len(stacks)} stacks of slices ({', '.join(stacks)}); export one at a time")
    along = np.array([item.position @ normals[0] for item in slices])
    order = np.argsort(along, kind="stable")
    breaks = np.flatnonzero(np.diff(along[order]) > SAME_PLACE) + 1
    return [[slices[n] for n in group] for group in np.split(order, breaks)]


def check_single(groups: Sequence[Sequence[Slice]], name: str) -> None:
    """Raise InputError if several slices are at one position; its message says how they differ."""
    crowded = [group for group in groups if len(group) > 1]
    if not crowded:
        return
    found = {tag: values for tag in TELLING if len(values := _values(crowded, tag)) > 1}
    found = found or {"InstanceNumber": _values(crowded, "InstanceNumber")}
    reasons = [f"{tag} ({', '.join(list(values)[:4])}{', ...' * (len(values) > 4)})" for tag, values in found.items()]
    raise InputError(
        f"{name} has {len(crowded[0])} slices at {len(crowded)} of {len(groups)} positions, as echoes and time points "
        f"do; they differ in {', '.join(reasons[:3])}; export one of them as a separate series"
    )


def _values(groups: Sequence[Sequence[Slice]], tag: str) -> dict[str, None]:
    """Return the values of ``tag`` in order, if they differ within a position."""
    found = [[item.tags.get(tag, "none") for item in group] for group in groups]
    return dict.fromkeys(value for values in found if len(set(values)) > 1 for value in values)


def check_stack(slices: Sequence[Slice], name: str) -> None:
    """Raise InputError unless ordered slices, one per position, are evenly spaced along their normal."""
    if len(slices) < 2:
        raise InputError(f"{name} is one slice; a volume is needed")
    positions = np.array([item.position for item in slices])
    normal = np.cross(*slices[0].orientation)
    along = positions @ normal
    gaps = np.diff(along)
    usual, even = float(np.median(gaps)), np.linspace(along[0], along[-1], len(along))
    allowed = max(UNEVEN * usual, ROUNDING)
    if gaps.max() > 1.5 * usual:
        at = int(gaps.argmax())
        raise InputError(
            f"{name} has gaps of {gaps.min():g} to {gaps.max():g} mm, the widest at {along[at]:.1f} mm along its "
            "normal; slices are missing or unevenly spaced"
        )
    if np.abs(gaps - usual).max() > allowed or np.abs(along - even).max() > allowed:
        raise InputError(
            f"{name} has gaps of {gaps.min():g} to {gaps.max():g} mm, and slices up to "
            f"{np.abs(along - even).max():.2g} mm from an even grid ({allowed:.2g} mm are allowed): unevenly spaced; "
            "resample it"
        )
    line = positions[-1] - positions[0]
    tilt = np.degrees(np.arccos(min(1.0, float(line @ normal / np.linalg.norm(line)))))
    if tilt > TILT:
        raise InputError(f"{name} is sheared by a gantry tilt of {tilt:.1f} degrees; resample it to a straight grid")
    aside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(aside, axis=1).max() > max(0.5 * slices[0].spacing.min(), ROUNDING):
        shift = np.linalg.norm(aside, axis=1).max()
        raise InputError(f"{name} is sheared: slices lie up to {shift:.2g} mm sideways of the first; resample it")


def slice_affine(slices: Sequence[Slice]) -> np.ndarray:
    """Return the affine (4, 4) of checked slices from (column, row, slice) to RAS mm (PS3.3 C.7.6.2.1.1)."""
    first, last = slices[0], slices[-1]
    rows, columns = first.orientation
    spacing = [first.spacing[1], first.spacing[0], np.linalg.norm(last.position - first.position) / (len(slices) - 1)]
    affine = np.eye(4)
    affine[:3, :3] = np.stack([rows, columns, np.cross(rows, columns)], axis=1) @ np.diag(spacing)
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def by_file(slices: Sequence[Slice]) -> Iterator[tuple[Path, list[tuple[int, Slice]]]]:
    """Yield each file with its slices and their indices in the volume."""
    files: dict[Path, list[tuple[int, Slice]]] = {}
    for place, item in enumerate(slices):
        files.setdefault(item.path, []).append((place, item))
    yield from files.items()

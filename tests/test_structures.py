"""Structures by thresholds, and their contours: read back by another rasteriser they are the masks they came from."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from pydicom.dataset import Dataset
from scipy import ndimage
from test_ct_series import ORIGIN_OF, SAGITTAL, TURNED, series
from test_volumes import ORIENTATION

from custom_modules.clinical.ct_series import CTSeries, ct_series, write_ct_series
from custom_modules.clinical.structures import contours, structure_masks, write_structure_set
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError

SHAPE = (8, 40, 36)  # slices, rows, columns


def phantom() -> np.ndarray:
    """Two legs with bone that has marrow of water in it, and a bubble; (slices, rows, columns), HU."""
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    plane = np.full(SHAPE[1:], -1000)
    for centre, radius in ((10, 9), (28, 7)):
        distance = np.hypot(rows - 18, columns - centre)
        plane[distance <= radius] = 40
        plane[distance <= 4] = 900
        plane[distance <= 1.5] = 0
    plane[23:25, 9:11] = -800
    return np.repeat(plane[None], SHAPE[0], axis=0).astype(np.int16)


def inside(points: np.ndarray, plane: Dataset) -> np.ndarray:
    """Which pixel centres of ``plane`` a contour (N, 3) in mm encloses, by matplotlib."""
    rows, columns = np.array(plane.ImageOrientationPatient, float).reshape(2, 3)
    offsets = points - np.array(plane.ImagePositionPatient, float)
    assert np.abs(offsets @ np.cross(rows, columns)).max() < 1e-3
    outline = np.stack([offsets @ rows / plane.PixelSpacing[1], offsets @ columns / plane.PixelSpacing[0]], axis=1)
    grid = np.moveaxis(np.mgrid[: plane.Rows, : plane.Columns][::-1], 0, -1).reshape(-1, 2)
    return Outline(np.concatenate([outline, outline[:1]])).contains_points(grid).reshape(plane.Rows, plane.Columns)


def read_back(path: Path, folder: Path) -> dict[str, np.ndarray]:
    """The masks of a structure set, by the images that its contours refer to."""
    planes = {item.SOPInstanceUID: item for item in map(pydicom.dcmread, sorted(folder.iterdir()))}
    item = pydicom.dcmread(path)
    names = {roi.ROINumber: roi.ROIName for roi in item.StructureSetROISequence}
    masks = {}
    for roi in item.ROIContourSequence:
        mask = masks[names[roi.ReferencedROINumber]] = np.zeros((len(planes), *SHAPE[1:]), dtype=bool)
        for contour in roi.get("ContourSequence", []):
            plane = planes[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            mask[plane.InstanceNumber - 1] |= inside(points, plane)  # each contour on its own: holes are keyholes
    return masks


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(params=["oblique", "sagittal", "turned", "file"])
def made(request, tmp_path) -> tuple[CTSeries, Path]:
    stack = phantom()
    if request.param == "file":
        made = ct_series(stack.T, np.diag([-1.0, -1.2, 3, 1]), ORIGIN_OF, "a.nii.gz")
    else:
        orientation = {"oblique": ORIENTATION, "sagittal": SAGITTAL, "turned": TURNED}[request.param]
        mr = series(tmp_path / "mr", orientation, stack=np.maximum(stack, 0) + 1, FrameOfReferenceUID="1.2.3")
        made = ct_series(stack.T, np.asarray(read_volume(mr).affine), ORIGIN_OF, mr)
    write_ct_series(made, tmp_path / "ct")
    return made, tmp_path


def test_what_is_read_back_is_the_mask(made):
    series, folder = made
    volumes = write_structure_set(series, ["EXTERNAL", "BONE", "AIR"], folder / "s.dcm")
    found = read_back(folder / "s.dcm", folder / "ct")
    stack = series.stack
    expected = {"BONE": stack == 900, "AIR": stack == -800}
    expected["EXTERNAL"] = np.array([ndimage.binary_fill_holes(plane > -300) for plane in stack])
    assert set(found) == set(expected)
    for name, mask in expected.items():
        assert dice(found[name], mask) >= 0.98, name
        voxel = np.prod(series.planes[0].spacing) * series.gap / 1000
        assert volumes[name] == pytest.approx(mask.sum() * voxel)
    assert not found["BONE"][series.stack == 0].any()  # the marrow stays a hole


def test_it_refers_to_the_ct_that_was_written(made):
    series, folder = made
    write_structure_set(series, ["EXTERNAL", "LUNG"], folder / "s.dcm")
    item = pydicom.dcmread(folder / "s.dcm")
    images = [pydicom.dcmread(path) for path in sorted((folder / "ct").iterdir())]
    (frame,) = item.ReferencedFrameOfReferenceSequence
    (referred,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert referred.SeriesInstanceUID == images[0].SeriesInstanceUID
    assert [one.ReferencedSOPInstanceUID for one in referred.ContourImageSequence] == [i.SOPInstanceUID for i in images]
    for name in ("StudyInstanceUID", "PatientID", "FrameOfReferenceUID"):
        assert (item[name].value if name in item else frame[name].value) == images[0][name].value
    kinds = [one.RTROIInterpretedType for one in item.RTROIObservationsSequence]
    assert kinds == ["EXTERNAL", "ORGAN"] and item.SOPInstanceUID not in {i.SOPInstanceUID for i in images}
    assert "not for clinical use" in item.SeriesDescription and item.ApprovalStatus == "UNAPPROVED"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.4, 2.5), st.floats(-0.1, 0.1))
def test_any_mask_comes_back_from_its_contours(seed, smoothness, level):
    noise = np.random.default_rng(seed).normal(size=(30, 26))
    mask = ndimage.gaussian_filter(noise, smoothness) > level
    grid = np.moveaxis(np.mgrid[:30, :26], 0, -1).reshape(-1, 2)
    found = np.zeros(mask.size, dtype=bool)
    for line in contours(mask):
        found |= Outline(np.concatenate([line, line[:1]])).contains_points(grid)
    if mask.any():
        assert dice(found.reshape(mask.shape), mask) >= 0.98


def test_lungs_are_the_large_cavities_and_air_the_small_ones():
    stack = np.full((10, 40, 40), -1000)
    stack[:, 4:36, 4:36] = 20
    stack[2:8, 8:20, 8:20] = -800  # 864 voxels
    stack[5, 28:30, 28:30] = -900
    found = structure_masks(stack, 0.1, ["LUNG", "AIR", "EXTERNAL"])
    assert (
        found["LUNG"].sum() == 864 and found["AIR"].sum() == 4 and found["EXTERNAL"].sum() == 10 * (32 * 32 - 4)
    )  # opening rounds the corners


def test_no_body_and_an_unknown_structure_are_refused():
    with pytest.raises(InputError, match="no body"):
        structure_masks(np.full((4, 5, 6), -1000), 1.0, ["EXTERNAL"])
    with pytest.raises(InputError, match="no structure 'HEART'.*EXTERNAL, BONE"):
        structure_masks(phantom(), 1.0, ["HEART"])


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dciodvfy (Debian's dicom3tools)")
def test_dciodvfy_finds_no_error(made):
    series, folder = made
    write_structure_set(series, ["EXTERNAL", "BONE", "LUNG", "AIR"], folder / "s.dcm")
    check = subprocess.run(["dciodvfy", "-new", str(folder / "s.dcm")], capture_output=True, text=True)
    assert "Error" not in check.stderr + check.stdout, check.stderr

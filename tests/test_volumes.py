"""Finding, reading and writing volumes; nibabel, itk and pydicom are the oracles."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import AIR, files_in, full_disk, save
from monai.data import MetaTensor
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy import ndimage

from custom_modules.data.grid import RestoreGridd
from custom_modules.data.inputs import find_volumes, require_volumes
from custom_modules.data.volumes import (
    AirOutsideBodyd,
    ReadVolumed,
    SaveVolumed,
    read_volume,
    sibling_path,
    write_volume,
)
from custom_modules.errors import InputError, one_line
from custom_modules.files import writable_or_stop
from custom_modules.inference.pipeline import VolumeDataset, collate

RNG = np.random.default_rng(0)
VALUES = RNG.integers(1, 1000, (9, 8, 7)).astype(np.int16)
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.3) @ np.diag([1.5, 2.5, 3.0]), [-40.0, 25.0, 310.0]
)
ORIENTATION = np.array([[0.8, 0.6, 0.0], [-0.36, 0.48, 0.8]])  # DICOM: directions of columns and of rows, LPS
NORMAL = np.cross(*ORIENTATION)
ORIGIN, PIXEL, GAP = np.array([-30.0, 12.0, 44.0]), (1.5, 0.75), 4.0  # PIXEL: between rows, between columns
EXTENSIONS = [".nii", ".nii.gz", ".nrrd", ".mha"]


def save_itk(path: Path, array: np.ndarray = VALUES, vector: bool = False) -> Path:
    """Write ``array``, given in (x, y, z) order, with an oblique geometry."""
    image = itk.GetImageFromArray(np.ascontiguousarray(array.swapaxes(0, 2)), is_vector=vector)
    image.SetSpacing([1.5, 2.5, 3.0])
    image.SetOrigin([40.0, -25.0, 310.0])
    direction = np.diag([-1.0, -1.0, 1.0]) @ nib.eulerangles.euler2mat(0.2, -0.15, 0.3)
    image.SetDirection(itk.GetMatrixFromArray(direction))
    itk.imwrite(image, str(path))
    return path


def save_any(path: Path) -> Path:
    """VALUES on the grid OBLIQUE in the format of the name."""
    return save(path, VALUES, OBLIQUE) if ".nii" in path.name else save_itk(path)


def dicom_slice(pixels: np.ndarray, position: np.ndarray, number: int, series: str, **tags) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    item.SOPClassUID, item.SOPInstanceUID, item.Modality = MRImageStorage, meta.MediaStorageSOPInstanceUID, "MR"
    item.PatientName, item.PatientID, item.StudyInstanceUID, item.SeriesInstanceUID = "A", "A", series, series
    item.SeriesNumber, item.InstanceNumber, item.SeriesDate = 1, number, "20200101"
    item.ImagePositionPatient, item.ImageOrientationPatient = [*position], [*ORIENTATION.ravel()]
    item.PixelSpacing, item.SliceThickness = [*PIXEL], GAP
    item.Rows, item.Columns = pixels.shape
    item.BitsAllocated = item.BitsStored = 16
    item.HighBit, item.SamplesPerPixel, item.PixelRepresentation = 15, 1, 1
    item.PhotometricInterpretation, item.PixelData = "MONOCHROME2", pixels.astype("<i2").tobytes()
    for tag, value in tags.items():
        setattr(item, tag, value)
    return item


def save_series(folder: Path, stack: np.ndarray, missing: tuple[int, ...] = (), **tags) -> Path:
    """Write (slice, row, column) as a series whose file names and numbers do not follow the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    series, names = generate_uid(), np.random.default_rng(1).permutation(len(stack))
    for k, pixels in enumerate(stack):
        if k not in missing:
            item = dicom_slice(pixels, ORIGIN + k * GAP * NORMAL, int(names[k]), series, **tags)
            item.save_as(folder / f"{series[-6:]}_{names[k]:02d}", enforce_file_format=True)
    return folder


@pytest.fixture
def stack() -> np.ndarray:
    return np.random.default_rng(2).integers(1, 2000, (6, 9, 7))


def dicom_world(k: int, row: int, column: int) -> np.ndarray:
    """RAS coordinates by the standard's equation (PS3.3 C.7.6.2.1.1)."""
    lps = ORIGIN + k * GAP * NORMAL + ORIENTATION[0] * PIXEL[1] * column + ORIENTATION[1] * PIXEL[0] * row
    return lps * [-1, -1, 1]


def volume(values: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(affine))


# finding


def names(found: list[dict[str, str]]) -> list[str]:
    return sorted(item["output"] for item in found)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("a.nii.gz", "a_sct.nii.gz"),
        ("a.nii", "a_sct.nii"),
        ("a.nrrd", "a_sct.nrrd"),
        ("a.mha", "a_sct.mha"),
        ("a.b.nii.gz", "a.b_sct.nii.gz"),
        ("A.NII.GZ", "A_sct.nii.gz"),
    ],
)
def test_a_file_is_named_after_its_input_and_keeps_its_format(tmp_path, name, output):
    (tmp_path / name).touch()
    assert find_volumes(tmp_path / name) == [{"image": str(tmp_path / name), "output": output}]


def test_a_folder_keeps_its_sub_folders(tmp_path):
    paths = ["a.nii.gz", "x/a.nii.gz", "x/y/b.nrrd", "z/c.mha", "z/notes.txt", "z/d.nii"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = find_volumes(tmp_path)
    assert names(found) == sorted(["a_sct.nii.gz", "x/a_sct.nii.gz", "x/y/b_sct.nrrd", "z/c_sct.mha", "z/d_sct.nii"])
    assert {Path(item["image"]).relative_to(tmp_path).as_posix() for item in found} == {*paths} - {"z/notes.txt"}


@pytest.mark.parametrize("hidden", [".a.nii.gz", "._b.nii.gz"])
def test_hidden_files_are_ignored(tmp_path, hidden):
    for name in ("b.nii.gz", hidden):
        (tmp_path / name).touch()
    assert names(find_volumes(tmp_path)) == ["b_sct.nii.gz"]


def test_a_dicom_series_is_found_by_its_content_and_named_after_its_folder(tmp_path, stack):
    save_series(tmp_path / "patient" / "t1", stack)
    found = find_volumes(tmp_path)
    assert found == [{"image": str(tmp_path / "patient" / "t1"), "output": "patient/t1_sct"}]
    assert names(find_volumes(tmp_path / "patient" / "t1")) == ["t1_sct"]


def test_two_inputs_never_share_one_output(tmp_path, stack):
    save(tmp_path / "t1.nii.gz", VALUES)
    save_series(tmp_path / "t1", stack)
    outputs = names(find_volumes(tmp_path))
    assert len(outputs) == 2 and len(set(outputs)) == 2


@pytest.mark.parametrize("path", ["missing", "missing.nii.gz", "empty", "notes.txt", "texts"])
def test_nothing_to_read_is_an_error_of_one_line_that_names_the_path(tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("notes.txt", "texts/notes.txt"):
        (tmp_path / name).write_text("no volume")
    with pytest.raises(InputError) as error:
        find_volumes(tmp_path / path)
    assert str(tmp_path / path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SystemExit) as end:
        require_volumes([], tmp_path / path)
    assert end.value.code == f"error: {error.value}"


def test_volumes_that_were_found_do_not_stop_the_program(tmp_path):
    (tmp_path / "a.nii").touch()
    require_volumes(find_volumes(tmp_path), tmp_path)


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_without_strict_nothing_to_read_is_an_empty_list(tmp_path, path):
    (tmp_path / "empty").mkdir()
    assert find_volumes(tmp_path / path, strict=False) == []


def test_an_empty_path_is_an_error():
    with pytest.raises(InputError, match="no such"):
        find_volumes("")


# reading


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_values_and_affine_are_those_of_the_file(tmp_path, extension):
    read = read_volume(save_any(tmp_path / f"a{extension}"))
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read[0], VALUES)
    np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_every_number_type_is_read_as_float32(tmp_path, dtype):
    read = read_volume(save(tmp_path / "a.nii", VALUES.clip(1, 200).astype(dtype)))
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read[0], VALUES.clip(1, 200))


def test_slope_and_intercept_of_the_header_are_applied(tmp_path):
    image = nib.Nifti1Image(VALUES, OBLIQUE)
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii").get_fdata()
    assert nib.load(tmp_path / "a.nii").dataobj.slope == 0.5
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii")[0], expected, atol=1e-3)


def test_a_single_time_point_is_a_volume(tmp_path):
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.nii", VALUES[..., None]))[0], VALUES)


def test_a_dicom_series_has_its_values_at_their_positions(tmp_path, stack):
    read = read_volume(save_series(tmp_path / "series", stack))
    inverse = np.linalg.inv(read.affine)
    assert sorted(read.shape[1:]) == sorted(stack.shape)
    for k, row, column in np.ndindex(stack.shape):
        index = nib.affines.apply_affine(inverse, dicom_world(k, row, column))
        np.testing.assert_allclose(index, index.round(), atol=1e-3)
        assert read[0][tuple(index.round().astype(int))] == stack[k, row, column]


def test_a_dicom_series_is_rescaled(tmp_path, stack):
    read = read_volume(save_series(tmp_path / "series", stack, RescaleSlope="2", RescaleIntercept="-10"))
    np.testing.assert_array_equal(np.sort(np.ravel(read)), np.sort(2 * stack.ravel() - 10))


def test_a_dicom_series_that_lacks_a_slice_is_refused(tmp_path, stack):
    with pytest.raises(InputError, match="series"):
        read_volume(save_series(tmp_path / "series", stack, missing=(3,)))


def test_a_folder_with_two_series_is_refused_rather_than_half_read(tmp_path, stack):
    for values in (stack, stack + 1):
        save_series(tmp_path / "series", values)
    with pytest.raises(InputError, match="series"):
        read_volume(tmp_path / "series")


def test_a_real_dicom_series_equals_its_nifti(real_data):
    series = read_volume(real_data / "dicom" / "mr_STS_027")
    image = nib.load(real_data / "sts" / "STS_027" / "mr.nii.gz")
    to_nifti = np.linalg.inv(image.affine) @ series.affine.numpy()
    np.testing.assert_allclose(np.abs(to_nifti[:3, :3]).sum(axis=0), 1, atol=1e-3)
    points = np.random.default_rng(0).integers(0, series.shape[1:], (2000, 3))
    there = nib.affines.apply_affine(to_nifti, points).round().astype(int)
    np.testing.assert_array_equal(np.asarray(series[0])[tuple(points.T)], image.get_fdata()[tuple(there.T)])


# bad input


def with_pixdim(path: Path, value: float, forms: str) -> Path:
    """A NIfTI file whose first spacing is ``value``, which nibabel does not write, with ``forms`` of s and q."""
    image = nib.Nifti1Image(VALUES, np.diag([2.0, 2, 2, 1]))
    image.set_sform(image.affine if "s" in forms else None, int("s" in forms))
    image.set_qform(image.affine if "q" in forms else None, int("q" in forms))
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 80, value)
    path.write_bytes(content)
    return path


def with_sform(path: Path, sform: np.ndarray) -> Path:
    image = nib.Nifti1Image(VALUES, np.eye(4))
    image.header.set_sform(sform, code=1)
    image.header.set_qform(None, code=0)
    image.header.set_zooms(np.maximum(np.linalg.norm(sform[:3, :3], axis=0), 1e-3))
    content = image.header.binaryblock + b"\0" * 4 + VALUES.tobytes(order="F")
    path.write_bytes(content)
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def holding(value: float) -> np.ndarray:
    values = VALUES.astype(np.float32)
    values[3, 4, 5] = value
    return values


def rgb() -> np.ndarray:
    colours = np.zeros(VALUES.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"] = VALUES % 256
    return colours


SINGULAR = np.array([[2.0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
FLAT = np.diag([2.0, 2, 0, 1])
CHANNELS = np.stack([VALUES, VALUES + 1, VALUES + 2], axis=-1)
NRRD_HEADER = b"""NRRD0004
type: uint8
dimension: 4
space: left-posterior-superior
sizes: 3 7 8 9
space directions: none (2,0,0) (0,2,0) (0,0,2)
space origin: (0,0,0)
kinds: RGB-color domain domain domain
endian: little
encoding: raw

"""
MHA_HEADER = b"""ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
ElementSpacing = 2 2 2
DimSize = 7 8 9
ElementNumberOfChannels = 3
ElementType = MET_FLOAT
ElementDataFile = LOCAL
"""
BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("a.nii.gz", lambda p: None),
    "empty file": ("a.nii.gz", lambda p: p.touch()),
    "empty mha": ("a.mha", lambda p: p.touch()),
    "truncated nii.gz": ("a.nii.gz", lambda p: cut(save_any(p))),
    "truncated nii.gz at its end": ("a.nii.gz", lambda p: cut(save_any(p), 0.9)),
    "truncated nii": ("a.nii", lambda p: cut(save_any(p))),
    "truncated nrrd": ("a.nrrd", lambda p: cut(save_any(p))),
    "truncated mha": ("a.mha", lambda p: cut(save_any(p))),
    "text as nii.gz": ("a.nii.gz", lambda p: p.write_text("I am\nno volume")),
    "text as nrrd": ("a.nrrd", lambda p: p.write_text("I am\nno volume")),
    "text as mha": ("a.mha", lambda p: p.write_text("I am\nno volume")),
    "compressed text": ("a.nii.gz", lambda p: written(p, gzip.compress(b"I am\nno volume" * 100))),
    "2D": ("a.nii.gz", lambda p: save(p, VALUES[..., 0])),
    "one slice": ("a.nii.gz", lambda p: save(p, VALUES[..., :1])),
    "4D": ("a.nii.gz", lambda p: save(p, CHANNELS)),
    "5D": ("a.nii.gz", lambda p: save(p, CHANNELS[..., None, :])),
    "RGB": ("a.nii.gz", lambda p: save(p, rgb())),
    "channels nrrd": ("a.nrrd", lambda p: written(p, NRRD_HEADER + (CHANNELS % 256).astype(np.uint8).tobytes())),
    "channels mha": ("a.mha", lambda p: written(p, MHA_HEADER + CHANNELS.astype(np.float32).tobytes())),
    "NaN": ("a.nii.gz", lambda p: save(p, holding(np.nan))),
    "inf": ("a.nii.gz", lambda p: save(p, holding(np.inf))),
    "minus inf": ("a.nii.gz", lambda p: save(p, holding(-np.inf))),
    "beyond float32": ("a.nii.gz", lambda p: save(p, VALUES * 1e300)),
    "all zero": ("a.nii.gz", lambda p: save(p, np.zeros_like(VALUES))),
    "constant": ("a.nii.gz", lambda p: save(p, np.full_like(VALUES, 7))),
    "zero spacing": ("a.nii", lambda p: with_pixdim(p, 0, "sq")),
    "zero spacing, sform": ("a.nii", lambda p: with_pixdim(p, 0, "s")),
    "zero spacing, qform": ("a.nii", lambda p: with_pixdim(p, 0, "q")),
    "NaN spacing": ("a.nii", lambda p: with_pixdim(p, np.nan, "q")),
    "zero spacing, no form": ("a.nii", lambda p: with_pixdim(p, 0, "")),
    "spacing of 100 m": ("a.nii", lambda p: save(p, VALUES, np.diag([1e5, 2, 2, 1]))),
    "spacing of 1 um": ("a.nii", lambda p: save(p, VALUES, np.diag([1e-3, 2, 2, 1]))),
    "singular affine": ("a.nii", lambda p: with_sform(p, SINGULAR)),
    "flat affine": ("a.nii", lambda p: with_sform(p, FLAT)),
}


@pytest.fixture(params=list(BAD))
def bad_file(request, tmp_path) -> Path:
    name, make = BAD[request.param]
    make(tmp_path / name)
    return tmp_path / name


def test_bad_input_is_refused_in_one_line_that_names_the_file(bad_file):
    with pytest.raises(InputError) as error:
        read_volume(bad_file)
    assert str(error.value).startswith(f"{bad_file}: ") and "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(bad_file)) + 250


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_the_reason_is_not_that_of_another_format(tmp_path, extension):
    with pytest.raises(InputError) as error:
        read_volume(written(tmp_path / f"a{extension}", b"I am no volume"))
    assert "dicom" not in str(error.value).lower()


@pytest.mark.parametrize(
    ("sform", "spacing"),
    [(np.diag([2.0, 3, 4, 1]), (1.0, 1.0, 1.0)), (OBLIQUE, (1.0, 1.0, 1.0)), (OBLIQUE, (1.5, 2.5, 2.0))],
)
def test_a_header_that_contradicts_itself_is_never_settled_in_silence(tmp_path, sform, spacing):
    """Only two results are right: the affine that every other program takes, or a refusal."""
    path = with_sform(tmp_path / "a.nii", sform)
    content = bytearray(path.read_bytes())
    struct.pack_into("<3f", content, 80, *spacing)
    path.write_bytes(content)
    expected = nib.load(path).affine
    np.testing.assert_allclose(expected, sform, atol=1e-4)
    try:
        read = read_volume(path)
    except InputError:
        return
    np.testing.assert_allclose(read.affine, expected, atol=1e-4)


def test_the_dataset_goes_on_after_a_broken_item(tmp_path):
    good, bad = save_any(tmp_path / "good.nii.gz"), written(tmp_path / "bad.nii.gz", b"")
    dataset = VolumeDataset([{"image": str(bad)}, {"image": str(good)}], ReadVolumed("image"))
    failure, item = dataset[0], dataset[1]
    assert (failure["image"], failure["failure"]) == (str(bad), f"{bad}: the file is empty")
    assert collate([failure]) == failure
    np.testing.assert_array_equal(collate([item])["image"][0, 0], VALUES)


def test_one_line_tells_the_innermost_cause_and_the_file():
    try:
        try:
            raise ValueError("first\nsecond")
        except ValueError as error:
            raise RuntimeError("outer") from error
    except RuntimeError as error:
        assert one_line(error, "a.nii") == "a.nii: first second"
    assert one_line(KeyError(), "a.nii") == "a.nii: KeyError"


# writing


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_any_order_of_axes_is_written_and_read_back(tmp_path, extension, axes):
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.5, 2.5, 3.0])[:, axes]
    write_volume(volume(VALUES, affine), tmp_path / f"a{extension}")
    read = read_volume(tmp_path / f"a{extension}")
    np.testing.assert_allclose(read.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(read[0], VALUES)


@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_nifti_is_written_with_values_type_and_affine(tmp_path, extension, dtype):
    write_volume(volume(VALUES.astype(dtype), OBLIQUE), tmp_path / "new" / f"a{extension}")
    image = nib.load(tmp_path / "new" / f"a{extension}")
    np.testing.assert_array_equal(image.dataobj, VALUES)
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-4)
    assert image.get_data_dtype() == dtype and image.shape == VALUES.shape
    assert files_in(tmp_path) == [f"new/a{extension}"]


@pytest.mark.parametrize("extension", [".nrrd", ".mha"])
def test_itk_formats_are_written_with_values_type_and_geometry(tmp_path, extension):
    expected = itk.imread(str(save_itk(tmp_path / f"expected{extension}")))
    write_volume(volume(VALUES, OBLIQUE), tmp_path / f"a{extension}")
    image = itk.imread(str(tmp_path / f"a{extension}"))
    assert type(image) is type(expected)
    np.testing.assert_array_equal(itk.array_view_from_image(image), itk.array_view_from_image(expected))
    for get in ("GetSpacing", "GetOrigin"):
        np.testing.assert_allclose(getattr(image, get)(), getattr(expected, get)(), atol=1e-4)
    directions = (itk.array_from_matrix(i.GetDirection()) for i in (image, expected))
    np.testing.assert_allclose(*directions, atol=1e-6)


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("before", [None, b"an older result"])
def test_a_writer_that_fails_leaves_what_was_there(tmp_path, extension, before):
    path = tmp_path / f"a{extension}"
    if before is not None:
        path.write_bytes(before)
    values = RNG.integers(-1000, 1000, (16, 16, 16)).astype(np.int16)
    with pytest.raises(Exception), full_disk():  # each format's library has its own
        write_volume(volume(values, OBLIQUE), path)
    assert files_in(tmp_path) == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.nii" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        write_volume(volume(VALUES, OBLIQUE), tmp_path / "a.nii")
    assert files_in(tmp_path) == []


def test_a_result_replaces_an_older_one(tmp_path):
    for values in (VALUES, VALUES + 1):
        write_volume(volume(values, OBLIQUE), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(nib.load(tmp_path / "a.nii.gz").dataobj, VALUES + 1)


def test_save_volumed_writes_below_the_output_folder(tmp_path):
    image = volume(VALUES, OBLIQUE)
    image.meta["filename_or_obj"] = "in/a.nii.gz"
    SaveVolumed("pred", tmp_path)({"image": image, "pred": image, "output": "x/a_sct.nii.gz"})
    assert files_in(tmp_path) == ["x/a_sct.nii.gz"]


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path):
    assert writable_or_stop(tmp_path / "a" / "b") == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and files_in(tmp_path) == []


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path, inside):
    path = written(tmp_path / "file", b"") / inside
    with pytest.raises(SystemExit) as end:
        writable_or_stop(path)
    assert str(path) in end.value.code and "\n" not in end.value.code


# back to the input's grid


def restored(values: np.ndarray, affine: np.ndarray, target: np.ndarray, shape: tuple[int, ...], **settings):
    source = volume(values, affine)
    source.meta["source_affine"], source.meta["source_shape"] = torch.from_numpy(target), torch.tensor(shape)
    data = {"image": source, "pred": torch.from_numpy(values)[None]}
    result = RestoreGridd("pred", **settings)(data)["pred"]
    np.testing.assert_allclose(result.affine, target, atol=1e-6)
    points = nib.affines.apply_affine(np.linalg.inv(affine) @ target, np.moveaxis(np.indices(shape), 0, -1))
    return result[0].numpy(), np.moveaxis(points, -1, 0)


FINE = nib.affines.from_matvec(np.diag([-1.5, 0.7, 4.0]), [16.0, 2.0, 0.0])
TURNED = nib.affines.from_matvec(np.array([[0, 0, 1.1], [-1.5, 0, 0], [0, 3.0, 0]]), [2.0, 9.0, -1.0])
SHEARED = nib.affines.from_matvec(np.array([[1.5, 0.4, 0], [0, 1.0, 0.2], [0, 0, 3.0]]), [3.0, 2.0, -1.0])


@pytest.mark.parametrize("slab_voxels", (1, 120, 2**22))  # a plane at a time, three, all
@pytest.mark.parametrize("target", [FINE, TURNED, SHEARED])
def test_restore_grid_is_linear_interpolation_between_the_two_grids(slab_voxels, target):
    affine = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), [3.0, 1.0, -2.0])
    values = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    result, points = restored(values, affine, target, (6, 9, 4), slab_voxels=slab_voxels)
    np.testing.assert_allclose(result, ndimage.map_coordinates(values, points, order=1, mode="nearest"), atol=1e-4)


@pytest.mark.parametrize("target", [FINE, TURNED])
def test_splines_of_third_order_are_those_of_scipy_and_cut_off_at_the_extremes(target):
    affine = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), [-30.0, -30.0, -30.0])
    values = np.where(np.random.default_rng(0).random((40, 40, 40)) < 0.5, -1000, 60).astype(np.float32)
    result, points = restored(values, affine, target, (8, 9, 6), order=3, slab_voxels=120)
    expected = ndimage.map_coordinates(values, points, order=3, mode="mirror")
    assert (points > 8).all() and (points < 31).all()  # far from the faces, where the two differ
    assert expected.min() < -1050 and expected.max() > 110
    np.testing.assert_allclose(result, expected.clip(-1000, 60), atol=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_few_samples_have_splines_of_the_order_they_allow(size):
    affine, target = np.eye(4), np.diag([0.5, 1, 1, 1])
    values = np.arange(size, dtype=np.float32)[:, None, None] * np.ones((1, 5, 5), np.float32)
    result, _ = restored(values, affine, target, (2 * size, 5, 5), order=3)
    np.testing.assert_allclose(result[:, 2, 2], np.minimum(np.arange(2 * size) / 2, size - 1), atol=1e-5)


def test_outside_the_body_is_air_and_inside_is_rounded_to_int16():
    hu = torch.tensor([[-3.6, 1599.5, 20.4, 20.6]])
    body = torch.tensor([[0.5, 1.0, 0.49, 0.0]])
    pred = AirOutsideBodyd("pred")({"pred": hu, "body": body})["pred"]
    assert pred.dtype == torch.int16 and pred.tolist() == [[-4, 1600, AIR, AIR]]


def test_what_belongs_to_a_volume_is_named_after_it():
    assert sibling_path("x/a_sct.nii.gz", "_sd") == Path("x/a_sct_sd.nii.gz")
    assert sibling_path(Path("a.b.mha"), "", ".json") == Path("a.b.json")


def test_the_sd_of_air_is_zero_and_inside_stays_as_it_is():
    sd, body = torch.tensor([[3.25, 4.5]]), torch.tensor([[1.0, 0.2]])
    result = AirOutsideBodyd("sd", outside=0.0, dtype="float32", allow_missing_keys=True)({"sd": sd, "body": body})
    assert result["sd"].tolist() == [[3.25, 0]] and result["sd"].dtype == torch.float32
    assert set(AirOutsideBodyd("sd", allow_missing_keys=True)({"body": body})) == {"body"}


def test_save_volumed_puts_a_suffix_behind_the_name_and_skips_what_is_not_there(tmp_path):
    image = volume(VALUES, OBLIQUE)
    image.meta["filename_or_obj"] = "in/a.nii.gz"
    save = SaveVolumed(["sd", "missing"], tmp_path, suffix="_sd", allow_missing_keys=True)
    save({"image": image, "sd": image, "output": "x/a_sct.nii.gz"})
    assert files_in(tmp_path) == ["x/a_sct_sd.nii.gz"]

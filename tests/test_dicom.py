"""The one DICOM reader: what is a series, in which order its slices lie, and what is refused; ITK is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import ITKReader
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)
from test_volumes import GAP, NORMAL, ORIENTATION, ORIGIN, PIXEL, dicom_slice, dicom_world

from custom_modules.data.dicom import find_series, is_series, series_at, split_address
from custom_modules.data.inputs import find_volumes
from custom_modules.data.volumes import check_mr, read_grid, read_volume, volume_files
from custom_modules.errors import InputError

STACK = np.random.default_rng(4).integers(0, 2000, (8, 9, 7))
Change = Callable[[int, Dataset], object]


def write(
    folder: Path, change: Change | None = None, stack: np.ndarray = STACK, uid: str | None = None, **tags
) -> Path:
    """A series of ``stack`` after ``change(k, slice)``, in files whose names do not follow the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, names = uid or generate_uid(), np.random.default_rng(1).permutation(len(stack))
    for k, pixels in enumerate(stack):
        item = dicom_slice(pixels, ORIGIN + k * GAP * NORMAL, k + 1, uid, **tags)
        if change:
            change(k, item)
        item.save_as(folder / f"{uid[-5:]}_{names[k]:03d}.dcm", enforce_file_format=True)
    return folder


def put(name: str, value: Callable[[int], object]) -> Change:
    return lambda k, item: setattr(item, name, value(k))


def moved(value: Callable[[int], np.ndarray]) -> Change:
    """Each slice ``value(k)`` mm off its place, as (along a row, along a column, along the normal)."""
    axes = np.array([*ORIENTATION, NORMAL])
    return put("ImagePositionPatient", lambda k: [*(ORIGIN + k * GAP * NORMAL + np.asarray(value(k)) @ axes)])


def at_once(*changes: Change) -> Change:
    return lambda k, item: [change(k, item) for change in changes]


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        read_volume(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def is_whole(folder: Path | str, stack: np.ndarray = STACK) -> None:
    """Every voxel of ``stack`` is where the standard's equation puts it."""
    read = read_volume(folder)
    assert read.shape[1:] == stack.shape[::-1]
    np.testing.assert_array_equal(np.asarray(read[0]), stack.transpose(2, 1, 0))
    corner = np.array(stack.shape) - 1
    there = nib.affines.apply_affine(read.affine.numpy(), corner[::-1])
    np.testing.assert_allclose(there, dicom_world(*corner), atol=1e-3)


# a series, whatever varies in it


VARYING = {
    "thickness as text": put("SliceThickness", lambda k: "4" if k < 3 else "4.0"),
    "sequence name": put("SequenceName", lambda k: f"*tse2d1_{k % 2}"),
    "series number": put("SeriesNumber", lambda k: 1 + k % 2),
    "series date and time": at_once(
        put("SeriesDate", lambda k: f"2020010{1 + k % 2}"), put("SeriesTime", lambda k: f"0{k}0000")
    ),
    "description": put("SeriesDescription", lambda k: f"part {k}"),
    "study": put("StudyInstanceUID", lambda k: generate_uid()),
    "rounded positions": moved(lambda k: [0, 0, 0.004 * (-1) ** k]),
    "a frame of reference each": put("FrameOfReferenceUID", lambda k: generate_uid()),
    "trigger times": put("TriggerTime", lambda k: str(10 * k)),
    "no instance numbers": lambda k, item: delattr(item, "InstanceNumber"),
}


@pytest.mark.parametrize("case", list(VARYING))
def test_what_varies_within_a_series_does_not_split_it(tmp_path, case):
    write(tmp_path / "t1", VARYING[case])
    assert find_volumes(tmp_path) == [{"image": str(tmp_path / "t1"), "output": "t1_sct"}]
    read = read_volume(tmp_path / "t1")
    np.testing.assert_array_equal(np.asarray(read[0]), STACK.transpose(2, 1, 0))


def test_a_series_is_that_of_itk(tmp_path):
    write(tmp_path / "t1", RescaleSlope="2.5", RescaleIntercept="-10")
    reader = ITKReader()
    array, meta = reader.get_data(reader.read(str(tmp_path / "t1")))
    read = read_volume(tmp_path / "t1")
    np.testing.assert_array_equal(np.asarray(read[0]), array)
    np.testing.assert_allclose(read.affine, meta["affine"], atol=1e-6)


def test_a_real_series_is_that_of_itk_to_the_last_bit(real_data):
    folder = real_data / "dicom" / "mr_STS_027"
    reader = ITKReader()
    array, meta = reader.get_data(reader.read(str(folder)))
    read = read_volume(folder)
    np.testing.assert_array_equal(np.asarray(read[0]), array)
    np.testing.assert_array_equal(read.affine, meta["affine"])


@settings(max_examples=25, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3), gap=st.floats(0.5, 8), pixel=st.tuples(*[st.floats(0.2, 3)] * 2),
    signed=st.booleans(), flip=st.booleans(), slices=st.integers(2, 6),
)  # fmt: skip
def test_any_straight_series_is_placed_by_its_headers(tmp_path_factory, angles, gap, pixel, signed, flip, slices):
    folder = tmp_path_factory.mktemp("any")
    turn = nib.eulerangles.euler2mat(*angles)
    rows, columns, normal = turn[:, 0], turn[:, 1], turn[:, 2] * (-1 if flip else 1)
    uid = generate_uid()
    for k in range(slices):
        item = dicom_slice(STACK[k], 10 * turn[0] + k * gap * normal, k, uid)
        item.ImageOrientationPatient, item.PixelSpacing = [*rows.round(12), *columns.round(12)], [*pixel]
        item.ImagePositionPatient = [*np.round(10 * turn[0] + k * gap * normal, 10)]
        item.PixelRepresentation = int(signed)
        item.save_as(folder / f"{k}", enforce_file_format=True)
    read = read_volume(folder)
    grid = read_grid(folder)
    assert grid[0] == tuple(read.shape[1:]) == (7, 9, slices)
    np.testing.assert_allclose(grid[1], read.pixdim, atol=1e-3)
    for k in (0, slices - 1):
        lps = 10 * turn[0] + k * gap * normal + rows * pixel[1] * 6 + columns * pixel[0] * 8
        index = nib.affines.apply_affine(np.linalg.inv(read.affine), lps * [-1, -1, 1])
        np.testing.assert_allclose(index, index.round(), atol=1e-3)
        assert read[0][tuple(index.round().astype(int))] == STACK[k, 8, 6]


# values


@pytest.mark.parametrize("late", [100.0, 0.001])
def test_each_slice_has_its_own_slope_and_nothing_wraps_or_is_cut_to_whole_numbers(tmp_path, late):
    write(tmp_path / "a", put("RescaleSlope", lambda k: "1" if k < 2 else str(late)), RescaleIntercept="-0.5")
    slopes = np.where(np.arange(8) < 2, 1.0, late)
    expected = (STACK * slopes[:, None, None] - 0.5).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(read_volume(tmp_path / "a")[0]), expected.transpose(2, 1, 0))


@pytest.mark.parametrize("slope", ["0", "nan"])
def test_a_slope_that_is_none_is_refused(tmp_path, slope):
    write(tmp_path / "a", put("RescaleSlope", lambda k: "1" if k else slope))
    assert "slope" in refused(tmp_path / "a") or "damaged" in refused(tmp_path / "a")


def test_bits_above_those_that_are_stored_do_not_count(tmp_path):
    def overlay(k, item):
        item.BitsStored, item.HighBit, item.PixelRepresentation = 12, 11, 0
        item.PixelData = (STACK[k] | 0x8000).astype("<u2").tobytes()

    is_whole(write(tmp_path / "a", overlay))


def compressed(k: int, item: Dataset, kind: int, folder: Path) -> None:
    """Have GDCM compress the pixels of slice ``k`` of STACK."""
    gdcm(STACK[k], item, kind, folder)


def gdcm(pixels: np.ndarray, item: Dataset, kind: int, folder: Path) -> None:
    writer = itk.GDCMImageIO.New(UseCompression=True, CompressionType=kind)
    itk.imwrite(
        itk.image_from_array(pixels.astype(np.int16)), str(folder / "frame.dcm"), compression=True, imageio=writer
    )
    other = pydicom.dcmread(folder / "frame.dcm")
    item.file_meta.TransferSyntaxUID = other.file_meta.TransferSyntaxUID
    item.PixelData = other.PixelData
    item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True


KINDS = {"JPEG lossless": 0, "JPEG 2000": 1}


@pytest.mark.parametrize("kind", list(KINDS))
def test_compressed_slices_are_read_and_cut_ones_refused(tmp_path, kind):
    folder = write(tmp_path / "a", lambda k, item: compressed(k, item, KINDS[kind], tmp_path), RescaleSlope="2")
    assert pydicom.dcmread(sorted(folder.iterdir())[0]).file_meta.TransferSyntaxUID.is_compressed
    is_whole(folder, 2 * STACK)
    for share in (0.9, 0.7):
        victim = sorted(folder.iterdir())[2]
        victim.write_bytes(victim.read_bytes()[: int(share * victim.stat().st_size)])
        assert victim.name in refused(folder)


@pytest.mark.parametrize("kind", ["RLE", *KINDS])
def test_compressed_frames_are_read_and_each_must_be_there(tmp_path, kind):
    path = enhanced(tmp_path / "a" / "IM1")
    item = pydicom.dcmread(path)
    if kind == "RLE":
        item.compress(RLELossless, generate_instance_uid=False)
    else:
        frames = item.pixel_array
        parts = []
        for frame in frames:
            single = dicom_slice(frame, ORIGIN, 1, "1.2")
            gdcm(frame, single, KINDS[kind], tmp_path)
            parts += generate_frames(single.PixelData, number_of_frames=1)
        item.file_meta.TransferSyntaxUID, item.PixelData = single.file_meta.TransferSyntaxUID, encapsulate(parts)
        item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True
    item.save_as(path)
    is_whole(path)
    item.PixelData = encapsulate(list(generate_frames(item.PixelData, number_of_frames=8))[:7])
    item.save_as(path)
    assert "IM1" in refused(path)


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_every_uncompressed_syntax_is_read(tmp_path, syntax):
    folder = write(tmp_path / "a")
    for path in folder.iterdir():
        item, plain = pydicom.dcmread(path), Dataset()
        pixels = item.pixel_array
        plain.update(item)
        plain.file_meta, plain.preamble = item.file_meta, b"\0" * 128
        plain.file_meta.TransferSyntaxUID = syntax
        plain.PixelData = pixels.astype("<i2" if syntax.is_little_endian else ">i2").tobytes()
        plain.save_as(path, enforce_file_format=True)
    is_whole(folder)


def test_rle_is_read(tmp_path):
    is_whole(write(tmp_path / "a", lambda k, item: item.compress(RLELossless, generate_instance_uid=False)))


def test_colours_are_refused(tmp_path):
    def colour(k, item):
        item.SamplesPerPixel, item.PhotometricInterpretation, item.PlanarConfiguration = 3, "RGB", 0
        item.PixelData = item.PixelData * 3

    assert "colours" in refused(write(tmp_path / "a", colour))


# what is no volume


def twice(name: str, values: tuple, later: Change | None = None) -> Callable[[Path], Path]:
    """Two slices at each position, of different ``name``."""

    def make(folder: Path) -> Path:
        uid = generate_uid()
        for value in values:
            write(folder, at_once(put(name, lambda k: value), later or (lambda k, item: None)), uid=uid)
            for path in folder.glob("*.dcm"):
                path.rename(path.with_suffix(f".{len(list(folder.iterdir()))}{path.stem}"))
        return folder

    return make


def one(change: Change, k: int = 3) -> Change:
    return lambda n, item: change(n, item) if n == k else None


TROUBLE: dict[str, tuple[Change, str]] = {
    "a gap": (moved(lambda k: [0, 0, 4.0 * (k > 3)]), "gaps of 4 to 8 mm"),
    "a gap that is half as wide again": (moved(lambda k: [0, 0, 2.0 * (k > 3)]), "gaps of 4 to 6 mm"),
    "uneven gaps": (moved(lambda k: [0, 0, 0.6 * (k % 2)]), "unevenly"),
    "gaps that grow": (moved(lambda k: [0, 0, 0.05 * k * k]), "unevenly"),
    "small errors that add up": (moved(lambda k: [0, 0, 0.3 * max(0, k - 3)]), "unevenly"),
    "all at one position": (moved(lambda k: [0, 0, -k * GAP]), "8 slices at 1 of 1 positions"),
    "shear": (moved(lambda k: [0.2 * k, 0, 0]), "gantry tilt of 2.9 degrees"),
    "a slice aside": (one(moved(lambda k: [3, 0, 0])), "sideways"),
    "a localiser": (
        put("ImageOrientationPatient", lambda k: [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1]][k % 3]),
        "3 orientations",
    ),
    "one slice turned": (one(put("ImageOrientationPatient", lambda k: [1, 0, 0, 0, 1, 0])), "2 orientations"),
    "a skewed orientation": (
        one(put("ImageOrientationPatient", lambda k: [1, 0, 0, 0.6, 0.8, 0])),
        "not perpendicular",
    ),
    "a mosaic": (put("ImageType", lambda k: ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]), "mosaic"),
    "another pixel spacing": (one(put("PixelSpacing", lambda k: [1, 1])), "pixel spacings"),
    "no positions": (lambda k, item: delattr(item, "ImagePositionPatient"), "no ImagePositionPatient"),
    "no orientation": (one(lambda k, item: delattr(item, "ImageOrientationPatient")), "no ImageOrientationPatient"),
    "no pixel spacing": (one(lambda k, item: delattr(item, "PixelSpacing")), "no PixelSpacing"),
    "a position of two numbers": (one(put("ImagePositionPatient", lambda k: [1.0, 2.0])), "damaged header"),
    "no pixels": (one(lambda k, item: delattr(item, "PixelData")), "ends before its pixels"),
    "too few pixels": (one(lambda k, item: setattr(item, "PixelData", item.PixelData[:-10])), "truncated"),
    "too many pixels": (
        one(lambda k, item: setattr(item, "PixelData", item.PixelData + b"\0" * 10)),
        "header says",
    ),
    "frames without positions": (put("NumberOfFrames", lambda k: 4), "4 frames without positions"),
    "two modalities": (one(put("Modality", lambda k: "CT")), "CT and MR"),
    "two stacks": (put("StackID", lambda k: str(k // 4)), "2 stacks"),
}


@pytest.mark.parametrize("case", list(TROUBLE))
def test_what_is_no_straight_even_volume_is_refused_with_the_reason(tmp_path, case):
    change, reason = TROUBLE[case]
    assert reason in refused(write(tmp_path / "a", change))


def test_slices_of_different_size_are_refused(tmp_path):
    def larger(k, item):
        item.Rows, item.PixelData = 10, np.zeros((10, 7), "<i2").tobytes()

    assert "different sizes (9 x 7, 10 x 7 pixels)" in refused(write(tmp_path / "a", one(larger)))


SERIES_TAGS = {
    "EchoTime": ("10", "80"), "TemporalPositionIdentifier": (1, 2), "AcquisitionNumber": (1, 2),
    "TriggerTime": ("0", "40"),
    "DiffusionBValue": (0.0, 800.0), "ImageType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
    "InversionTime": ("100", "900"), "FlipAngle": ("3", "15"),
}  # fmt: skip


@pytest.mark.parametrize("tag", list(SERIES_TAGS))
def test_several_slices_at_one_position_are_refused_with_the_tag_that_tells_them_apart(tmp_path, tag):
    """Though their pixels are the same: a copy is one that differs in nothing."""
    message = refused(twice(tag, SERIES_TAGS[tag])(tmp_path / "a"))
    assert "2 slices at 8 of 8 positions" in message and f"they differ in {tag} (" in message


def test_exact_copies_of_a_slice_count_once(tmp_path):
    folder = write(tmp_path / "a")
    for path in sorted(folder.iterdir())[:3]:
        (folder / f"copy of {path.name}").write_bytes(path.read_bytes())
    is_whole(folder)


def test_one_sop_instance_uid_for_all_slices_makes_them_no_copies(tmp_path):
    uid = generate_uid()
    is_whole(write(tmp_path / "a", put("SOPInstanceUID", lambda k: uid)))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_slice_that_is_cut_off_anywhere_is_refused_by_name(tmp_path, share, which):
    """The outermost ones too, whose absence leaves no gap."""
    folder = write(tmp_path / "a")
    paths = sorted(folder.iterdir(), key=lambda path: np.dot(pydicom.dcmread(path).ImagePositionPatient, NORMAL))
    paths[which].write_bytes(paths[which].read_bytes()[: int(share * paths[which].stat().st_size)])
    assert paths[which].name in refused(folder)


# what lies beside it


def other_dicom(path: Path, kind: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = BasicTextSRStorage if kind == "report" else MediaStorageDirectoryStorage
    item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    if kind == "report":
        item.SOPClassUID, item.SOPInstanceUID = BasicTextSRStorage, meta.MediaStorageSOPInstanceUID
        item.Modality, item.SeriesInstanceUID, item.PatientID = "SR", generate_uid(), "A"
    else:
        item.FileSetID, item.DirectoryRecordSequence = "X", []
    item.save_as(path, enforce_file_format=True)


BESIDE: dict[str, Callable[[Path], object]] = {
    "DICOMDIR": lambda f: other_dicom(f / "DICOMDIR", "directory"),
    "a directory of another name": lambda f: other_dicom(f / "dicomdir.1", "directory"),
    "a structured report": lambda f: other_dicom(f / "SR001", "report"),
    "texts": lambda f: [(f / f"a{n}.txt").write_text("x" * 300) for n in range(12)],
    "a PDF": lambda f: (f / "report.pdf").write_bytes(b"%PDF-1.4" + b"x" * 300),
    "an empty text": lambda f: (f / "log.txt").touch(),
    "a picture": lambda f: (f / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200)),
    "a hidden file": lambda f: (f / "._x.dcm").write_bytes(b"x"),
    "a folder": lambda f: (f / "folder.dcm").mkdir(),
}


@pytest.mark.parametrize("case", list(BESIDE))
def test_other_files_neither_hide_a_series_nor_stop_it(tmp_path, case):
    folder = write(tmp_path / "t1")
    BESIDE[case](folder)
    assert find_volumes(tmp_path) == [{"image": str(folder), "output": "t1_sct"}]
    is_whole(folder)
    assert {path.suffix for path in volume_files(folder)} == {".dcm"}


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_the_preamble_are_dicom(tmp_path, implicit):
    folder = write(tmp_path / "t1")
    for path in folder.iterdir():
        plain = Dataset()
        plain.update(pydicom.dcmread(path))
        pydicom.dcmwrite(path, plain, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        path.rename(path.with_suffix(".IMA"))
    assert len(find_volumes(tmp_path)) == 1
    is_whole(folder)


@pytest.mark.parametrize("suffix", ["", ".img", ".IMA", ".0001", ".nii.dcm"])
def test_dicom_is_known_by_its_content_whatever_its_name(tmp_path, suffix):
    folder = write(tmp_path / "t1")
    for path in list(folder.iterdir()):
        path.rename(folder / f"{path.stem}{suffix}")
    assert [item["image"] for item in find_volumes(tmp_path)] == [str(folder)]
    is_whole(folder)


def test_several_series_of_a_folder_are_listed_by_number_and_description_and_one_can_be_chosen(tmp_path):
    uids = [generate_uid() for _ in range(3)]
    for n, name in enumerate(("T1 vibe", "T2/tse", "scout")):
        write(tmp_path / "p", stack=STACK + n, uid=uids[n], SeriesNumber=n + 2, SeriesDescription=name)
    found = find_volumes(tmp_path / "p")
    assert [item["output"] for item in found] == [f"p_{n}_sct" for n in ("2_T1_vibe", "3_T2_tse", "4_scout")]
    for n, item in enumerate(found):
        assert item["image"] == f"{tmp_path / 'p'}#{uids[n]}"
        is_whole(item["image"], STACK + n)
        assert read_grid(item["image"])[0] == (7, 9, 8) and len(volume_files(item["image"])) == 8
        assert find_volumes(item["image"])[0]["image"] == item["image"]
    for wanted in (uids[1], "3", 3, "t2*"):
        assert find_volumes(tmp_path, series=wanted) == [{**found[1], "output": found[1]["output"]}]
    with pytest.raises(InputError, match="--series flair.*T1 vibe.*T2/tse.*scout"):
        find_volumes(tmp_path, series="flair")
    assert "MR series 2 T1 vibe (8 slices)" in refused(tmp_path / "p")


def test_a_series_whose_slices_lie_in_several_folders_is_one(tmp_path):
    uid, folder = generate_uid(), tmp_path / "t1"
    write(folder, uid=uid)
    for n, path in enumerate(sorted(folder.iterdir())):
        (folder / f"disk{n % 3}").mkdir(exist_ok=True)
        path.rename(folder / f"disk{n % 3}" / path.name)
    (item,) = find_volumes(tmp_path)
    assert item == {"image": f"{folder}#{uid}*", "output": "t1_1_sct"}
    is_whole(item["image"])


def test_a_copy_of_a_series_in_another_folder_is_a_volume_of_its_own(tmp_path):
    uid = generate_uid()
    for name in ("a", "b"):
        write(tmp_path / name, uid=uid)
    assert [item["image"] for item in find_volumes(tmp_path)] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_folder_name_with_a_hash_is_no_address(tmp_path):
    is_whole(write(tmp_path / "t1#12"))
    assert split_address(tmp_path / "t1#12")[1] is None and is_series(tmp_path / "t1#12")


@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_a_series_that_is_no_mr_is_named(tmp_path, modality):
    with pytest.raises(InputError, match=f"a: is a {modality} series, not an MR"):
        check_mr(read_volume(write(tmp_path / "a", Modality=modality)))
    check_mr(read_volume(write(tmp_path / "b")))


def test_one_slice_is_told_to_be_one(tmp_path):
    folder = write(tmp_path / "a")
    with pytest.raises(InputError, match="one slice of a DICOM series; give the folder"):
        find_volumes(sorted(folder.iterdir())[0])
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    assert "is one slice; a volume is needed" in refused(folder)


# enhanced multi-frame


def enhanced(path: Path, change: Callable[[int, Dataset], object] | None = None, stack: np.ndarray = STACK) -> Path:
    """One file, its frames in another order than their positions; orientation and spacing are shared."""
    order = np.random.default_rng(1).permutation(len(stack))
    item = dicom_slice(stack[order[0]], ORIGIN, 1, generate_uid())
    item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(item, name)
    item.NumberOfFrames, item.PixelData = len(stack), stack[order].astype("<i2").tobytes()
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = [*PIXEL], [*ORIENTATION.ravel()]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([plane])
    frames = []
    for k in order:
        frame, place, content, value = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [*(ORIGIN + k * GAP * NORMAL)]
        content.StackID, content.TemporalPositionIndex = "1", 1
        value.RescaleSlope, value.RescaleIntercept, value.RescaleType = "1", "0", "US"
        frame.PlanePositionSequence, frame.FrameContentSequence = Sequence([place]), Sequence([content])
        frame.PixelValueTransformationSequence = Sequence([value])
        if change:
            change(int(k), frame)
        frames.append(frame)
    item.SharedFunctionalGroupsSequence = Sequence([shared])
    item.PerFrameFunctionalGroupsSequence = Sequence(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    item.save_as(path, enforce_file_format=True)
    return path


def test_frames_are_ordered_by_their_own_positions(tmp_path):
    path = enhanced(tmp_path / "a" / "IM1")
    for address in (path, path.parent):
        is_whole(address)
        assert read_grid(address)[0] == (7, 9, 8)
    assert find_volumes(path) == [{"image": str(path), "output": "IM1_sct"}]
    assert find_volumes(tmp_path)[0]["output"] == "a_sct"


def test_each_frame_has_its_own_slope(tmp_path):
    path = enhanced(
        tmp_path / "a", lambda k, f: setattr(f.PixelValueTransformationSequence[0], "RescaleSlope", "100" if k else "1")
    )
    is_whole(path, STACK * np.where(np.arange(8) > 0, 100, 1)[:, None, None])


def frame_position(k: int, frame: Dataset, place: np.ndarray) -> None:
    frame.PlanePositionSequence[0].ImagePositionPatient = [*place]


def time_points(k: int, frame: Dataset) -> None:
    frame.FrameContentSequence[0].TemporalPositionIndex = 1 + k % 2
    frame_position(k, frame, ORIGIN + (k // 2) * GAP * NORMAL)


ENHANCED: dict[str, tuple[Change, str]] = {
    "a gap": (lambda k, f: frame_position(k, f, ORIGIN + (k + (k > 3)) * GAP * NORMAL), "gaps of 4 to 8 mm"),
    "time points": (time_points, "TemporalPositionIndex (1, 2)"),
    "stacks": (lambda k, f: setattr(f.FrameContentSequence[0], "StackID", str(1 + k // 4)), "2 stacks"),
    "no position": (lambda k, f: delattr(f, "PlanePositionSequence"), "no ImagePositionPatient"),
}


@pytest.mark.parametrize("case", list(ENHANCED))
def test_frames_that_are_no_volume_are_refused(tmp_path, case):
    change, reason = ENHANCED[case]
    assert reason in refused(enhanced(tmp_path / "IM1", change))


def test_a_frame_less_than_the_header_tells_of_is_refused(tmp_path):
    path = enhanced(tmp_path / "IM1")
    path.write_bytes(path.read_bytes()[:-50])
    assert "truncated" in refused(path)


def test_an_address_of_nothing_is_refused(tmp_path):
    write(tmp_path / "a")
    for address, reason in ((f"{tmp_path}/a#1.2.3", "of this UID"), (f"{tmp_path}/b#1.2.3", "no such")):
        with pytest.raises(InputError, match=reason):
            series_at(address)
    (tmp_path / "empty").mkdir()
    assert "no DICOM series" in refused(tmp_path / "empty") and find_series(tmp_path / "empty") == []

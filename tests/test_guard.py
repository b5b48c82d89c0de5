"""The input guard: its measures by hand, what it warns of, and what it does in the inference pipeline."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ellipsoid, files_in, save, tiny_network
from monai.data import MetaTensor

from bundle.workflow import inference_workflow
from custom_modules.errors import InputError
from custom_modules.inference.guard import (
    MEASURES,
    Guard,
    Measurements,
    _depth,
    _detail,
    _under_the_skin,
    _without_margin,
    _without_signal,
    deviations,
    histogram,
    histogram_distance,
    measure,
)

AFFINE = np.diag([2.0, 2, 2, 1])
SMALL_WINDOWS = {"window_size": [16, 16, 16]}


def batch(image: np.ndarray, body: np.ndarray, affine: np.ndarray = AFFINE, shape: tuple | None = None) -> dict:
    """What the guard is given: both (1, 1, D, H, W) on a 2 mm grid, read on ``affine`` and ``shape``."""
    meta = {"source_affine": torch.from_numpy(affine)[None], "filename_or_obj": ["mr.nii"]}
    meta["source_shape"] = torch.tensor(shape or image.shape)[None]
    made = {}
    for key, values in (("image", image), ("body", body)):
        made[key] = MetaTensor(torch.from_numpy(values.astype(np.float32))[None, None], torch.from_numpy(AFFINE), meta)
    return made


def patient(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal(0.2, 0.3, (20, 22, 24)), -1, 1)
    return batch(image, np.ones(image.shape), np.diag([-1.0, -1, 3, 1]), (40, 44, 16 + seed % 3))


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.fixture(scope="module")
def statistics(network) -> dict:
    measured = Measurements(network)
    for seed in range(8):
        measured.add(patient(seed))
    return measured.statistics()


def test_geometry_is_that_of_the_grid_it_was_read_on():
    affine = np.zeros((4, 4))
    affine[[0, 1, 2, 3], [2, 0, 1, 3]] = [-4.0, 1.5, 2.0, 1]  # voxels run along A, S and L
    found = measure(batch(np.zeros((8, 8, 8)), np.ones((8, 8, 8)), affine, (10, 20, 30)), None, None)
    assert found["finest spacing"] == 1.5 and found["coarsest spacing"] == 4
    extents = [found[f"field of view, {name}"] for name in ("left to right", "back to front", "foot to head")]
    assert extents == [120, 15, 40]
    assert found["body fraction"] == pytest.approx(8**3 * 8 / (120 * 15 * 40))


def test_the_margin_of_the_body_is_taken_off_but_not_at_the_edge_of_the_field_of_view():
    body = np.zeros((20, 20, 20), bool)
    body[:12] = True
    assert np.array_equal(np.flatnonzero(_without_margin(body, _depth(body, np.full(3, 2.0)))[:, 5, 5]), np.arange(9))
    whole = np.ones((4, 4, 4), bool)
    assert _without_margin(whole, _depth(whole, np.full(3, 2.0))).all()


def test_histogram_distance_worked_out_by_hand():
    low, high = np.full((4, 4, 4), -0.97), np.full((4, 4, 4), 0.03)
    everywhere = np.ones(low.shape, bool)
    shares = [histogram(x, everywhere) for x in (low, high)]
    assert [share.sum() for share in shares] == [1, 1]
    assert histogram_distance(shares[0], [shares[1]]) == pytest.approx(1.0)
    assert histogram_distance(shares[0], shares) == 0


def test_detail_is_the_mean_step_in_the_body():
    image = np.indices((6, 6, 6))[1] * 0.25
    image[3:] = 77
    inside = np.zeros(image.shape, bool)
    inside[:3] = True
    assert [_detail(image, inside, axis) for axis in range(3)] == pytest.approx([0, 0.25, 0], abs=1e-5)


def test_the_share_without_signal_is_that_of_the_slices_that_have_least_of_it():
    """Eleven slices; a lung in three of them counts no more than in none, dark tissue in all of them does."""
    image = np.full((10, 10, 11), 0.5)
    inside = np.ones(image.shape, bool)
    image[:5, :, :3] = -1
    assert _without_signal(image, inside) == 0
    image[:, :2] = -0.99
    assert _without_signal(image, inside) == pytest.approx(0.2)
    inside[:, :, 10] = False
    inside[0, 0, 10] = True  # the tip of a body is no slice
    assert _without_signal(image, inside) == pytest.approx(0.2)


def cylinder(fat: float, flesh: float) -> tuple[np.ndarray, np.ndarray]:
    """A limb with 8 mm of fat, and its mask as the pipeline makes it, 6 mm wider; both on a 2 mm grid."""
    radius = 2 * np.hypot(*(np.indices((50, 50, 16))[:2] - 24.5))
    return np.select([radius > 40, radius > 32], [-1.0, fat], flesh), radius < 46


def test_the_signal_under_the_skin_is_that_of_fat():
    for fat, flesh, expected in ((0.6, -0.2, 1), (-0.6, 0.6, 0.25)):
        image, body = cylinder(fat, flesh)
        depth = _depth(body, np.full(3, 2.0))
        inside = _without_margin(body, depth)
        assert _under_the_skin(image, inside, depth) == pytest.approx(expected, abs=0.01)
    whole = np.ones_like(body)
    assert _under_the_skin(image, whole, _depth(whole, np.full(3, 2.0))) is None  # a field of view without skin


def test_an_image_of_water_alone_is_named(network, tmp_path):
    measured = Measurements(network)
    for fat in np.linspace(0.5, 0.9, 8):
        measured.add(batch(*cylinder(fat, -0.4)))
    measured.add(batch(cylinder(0.6, -0.4)[0], np.ones((50, 50, 16))))  # one without skin changes nothing
    (tmp_path / "guard.json").write_text(json.dumps({**measured.statistics(), "model_sha256": ""}))
    guard = Guard(tmp_path / "guard.json", tmp_path / "model.pt")
    named = [w for w in guard(batch(*cylinder(-0.7, 0.6)), network)["warnings"] if "water alone" in w]
    assert len(named) == 1 and named[0].startswith("signal under the skin is 0.1")
    assert not any("under the skin" in w for w in guard(batch(*cylinder(0.7, -0.5)), network)["warnings"])


def test_a_fat_only_image_is_named(network, tmp_path, caplog):
    measured = Measurements(network)
    rng = np.random.default_rng(1)
    for _ in range(8):
        tissue = rng.random((40, 40, 30)) < 0.6
        image = np.where(tissue, rng.normal(0.2, 0.1, tissue.shape), rng.normal(-0.5, 0.1, tissue.shape)).clip(-1, 1)
        measured.add(batch(image, np.ones(image.shape)))
    (tmp_path / "guard.json").write_text(json.dumps({**measured.statistics(), "model_sha256": ""}))
    guard = Guard(tmp_path / "guard.json", tmp_path / "model.pt")
    assert not guard(batch(image, np.ones(image.shape)), network)["warnings"]
    fat_only = np.where(tissue, image, -0.99)
    warnings = guard(batch(fat_only, np.ones(image.shape)), network)["warnings"]
    assert any("without signal" in warning and "fat alone" in warning for warning in warnings)


def test_what_is_fitted_is_finite_and_training_patients_are_near_it(statistics, network):
    assert set(statistics["measures"]) == set(MEASURES) - {"signal under the skin"}  # their body fills the image
    assert statistics["patients"] == 8
    assert [sum(shares) for shares in statistics["histograms"]] == pytest.approx([1] * 8, abs=1e-3)
    for seed in range(8):
        found = measure(patient(seed), statistics["histograms"], network)
        assert max(deviations(found, statistics).values()) < 3


def test_less_of_an_error_is_not_odd_and_more_is(statistics):
    known = statistics["measures"]["reconstruction error"]
    for value, expected in ((0.0, 0.0), (known["mean"] + 5 * known["sd"], 5.0)):
        assert deviations({"reconstruction error": value}, statistics)["reconstruction error"] == pytest.approx(
            expected
        )


@pytest.fixture
def stored(tmp_path, statistics) -> Path:
    path = tmp_path / "guard.json"
    path.write_text(json.dumps({**statistics, "model_sha256": "of other weights"}))
    return path


def test_a_warning_says_which_measure_is_outside_and_by_how_much(stored, caplog):
    odd = patient(0)
    odd["image"].meta["source_affine"] = torch.from_numpy(np.diag([1.0, 1, 9, 1]))
    with caplog.at_level(logging.WARNING):
        result = Guard(stored, "none.pt")(odd, None)
    text = next(w for w in result["warnings"] if w.startswith("coarsest spacing"))
    assert "is 9 mm, in training 3 to 3" in text and "SD away" in text
    assert "mr.nii" in caplog.text and text in caplog.text
    assert result["score"] == max(result["deviations"].values()) > 3


def test_strict_makes_it_an_error(stored):
    odd = patient(0)
    odd["image"].meta["source_affine"] = torch.from_numpy(np.diag([1.0, 1, 9, 1]))
    with pytest.raises(InputError, match="coarsest spacing"):
        Guard(stored, "none.pt", strict=True)(odd, None)
    assert Guard(stored, "none.pt", strict=True)(patient(1), None)["warnings"] == []


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: np.where(x > 0.2, 1.0, -1.0), lambda x: x * 0 + 0.9])
def test_other_intensities_are_seen(stored, change):
    odd = patient(0)
    odd["image"] = MetaTensor(torch.from_numpy(change(odd["image"].numpy())), meta=odd["image"].meta)
    odd["image"].affine = torch.from_numpy(AFFINE)
    warnings = Guard(stored, "none.pt")(odd, None)["warnings"]
    assert any(w.startswith("distance of the intensity histogram") for w in warnings)


def test_other_weights_are_not_asked_to_reconstruct(stored, network):
    assert "reconstruction error" not in Guard(stored, "none.pt")(patient(0), network)["measures"]


def test_without_statistics_nothing_is_checked_and_the_log_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert Guard(tmp_path / "none.json", "none.pt")(patient(0), None) is None
    assert "not checked" in caplog.text


# in the inference pipeline


@pytest.fixture
def mr(tmp_path) -> Path:
    volume, _ = ellipsoid((30, 28, 26), AFFINE, (26, 24, 22))
    return save(tmp_path / "mr.nii.gz", volume, AFFINE)


def test_warnings_stand_in_the_sidecar(tmp_path, infer, mr, stored):
    infer(mr, tmp_path / "out", guard_statistics=str(stored), **SMALL_WINDOWS)
    sidecar = json.loads((tmp_path / "out" / "mr_sct.json").read_text())
    assert any("field of view" in warning or "spacing" in warning for warning in sidecar["guard"]["warnings"])


def test_strict_names_the_file_and_writes_nothing(tmp_path, infer, mr, stored):
    with pytest.raises(SystemExit) as end:
        infer(mr, tmp_path / "out", guard_statistics=str(stored), strict=True, **SMALL_WINDOWS)
    assert f"{mr}: not like the training MRs" in end.value.code
    assert files_in(tmp_path / "out") == []


def test_the_guard_can_be_turned_off(tmp_path, infer, mr):
    infer(mr, tmp_path / "out", guard_statistics=None, **SMALL_WINDOWS)
    assert json.loads((tmp_path / "out" / "mr_sct.json").read_text())["guard"] is None


@pytest.mark.integration
@pytest.mark.parametrize(
    "name, alone", [("upper_abdomen", True), ("abdomen_t1_gre_siemens", False), ("abdomen_t2", False)]
)
def test_the_shipped_statistics_name_a_real_fat_only_image(real_data, name, alone):
    """``upper_abdomen`` is the fat image of a Dixon method; the others are not."""
    data = [{"image": str(real_data / "torso_mr" / f"{name}.nii.gz"), "output": ""}]
    parser = inference_workflow(**{"dataset#data": data, "device": "$torch.device('cpu')"}).parser
    found = parser.get_parsed_content("guard")(next(iter(parser.get_parsed_content("dataloader"))), None)
    assert any("fat alone" in warning for warning in found["warnings"]) == alone

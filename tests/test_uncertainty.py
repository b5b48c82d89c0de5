"""The samples' spread: its scale, how well it tells the error, and the path from the sampler to a second volume."""

from __future__ import annotations

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ramp, save, stub
from monai.data import MetaTensor
from scipy.stats import norm, rankdata

from custom_modules.evaluation.uncertainty import FRACTIONS, assess, coverage, ence, fit_scale, sparsification, spearman
from custom_modules.files import sha256
from custom_modules.inference.calibration import CalibrateBoned, Calibration, SplitSpreadd, fit_bone_curve

RNG = np.random.default_rng(0)
SD = RNG.uniform(10, 100, 20000)
ERROR = RNG.normal(0, SD)  # exactly what the spread says
SMALL_WINDOWS = {"window_size": [16, 16, 16]}


def test_scale_worked_out_by_hand():
    """Ratios of 1, 3 and of 2: means of squares 5 and 4, patients weigh the same."""
    errors = [np.array([10.0, -30.0]), np.array([20.0] * 7)]
    assert fit_scale(errors, [np.full(2, 10.0), np.full(7, 10.0)]) == pytest.approx(4.5**0.5)


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_the_scale_undoes_any_factor_on_the_spread(factor):
    assert fit_scale([ERROR], [SD / factor]) == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_coverage_of_errors_that_are_as_the_spread_says_is_the_level(level):
    assert coverage(ERROR, SD, level) == pytest.approx(level, abs=0.01)


def test_coverage_worked_out_by_hand():
    edge = norm.ppf(0.975) * 10
    assert coverage(np.array([edge - 0.1, -edge + 0.1, edge + 0.1, 90.0]), np.full(4, 10.0), 0.95) == 0.5
    assert np.isnan(coverage(np.empty(0), np.empty(0), 0.95))


def test_ence_worked_out_by_hand():
    """Two bins: SD 10 and errors of 20, SD 40 and errors of 30: |10 - 20| / 10 and |40 - 30| / 40."""
    sd, error = np.repeat([10.0, 40.0], 5), np.repeat([20.0, -30.0], 5)
    assert ence(error, sd, bins=2) == pytest.approx((1 + 0.25) / 2)
    assert ence(ERROR, SD) < 0.05


def test_spearman_is_the_correlation_of_ranks():
    expected = np.corrcoef(rankdata(np.abs(ERROR)), rankdata(SD))[0, 1]
    assert spearman(ERROR, SD) == pytest.approx(expected)
    assert np.isnan(spearman(ERROR, np.full_like(SD, 3)))


def test_sparsification_worked_out_by_hand():
    """20 voxels with errors 1 to 20: leaving out the largest k leaves the mean of 1 to 20 - k."""
    error = np.arange(1.0, 21)
    assert sparsification(error, error) == pytest.approx((np.round(20 * (1 - FRACTIONS)) + 1) / 2)
    assert sparsification(error, np.zeros(20))[0] == error.mean()


def test_the_oracle_is_below_every_other_ranking_and_a_good_one_falls():
    best, own = sparsification(ERROR, np.abs(ERROR)), sparsification(ERROR, SD)
    assert (best <= own + 1e-9).all() and own[-1] < 0.5 * own[0]


def test_assess_tells_tissues_apart_and_leaves_what_is_not_there_undefined():
    ct = np.array([[[0.0, 0, 500, 500]]])
    values = assess(ct + np.array([1.0, 1, 500, 500]), ct, np.full(ct.shape, 10.0), np.ones(ct.shape, bool))
    assert values["soft_coverage_95"] == 1 and values["bone_coverage_95"] == 0 and values["coverage_95"] == 0.5
    assert np.isnan(values["air_coverage_95"]) and np.isnan(values["spearman"])


def test_an_empty_mask_has_no_uncertainty():
    ct = np.zeros((2, 2, 2))
    values = assess(ct, ct, ct, np.zeros(ct.shape, bool))
    assert all(np.isnan(value) for value in values.values() if isinstance(value, float))


# the stored scale


@pytest.fixture
def stored(tmp_path):
    """A calibration of 3 for weights in ``model.pt``."""
    (tmp_path / "model.pt").write_bytes(b"weights")
    content = {"sd_scale": 3.0, "model_sha256": sha256(tmp_path / "model.pt"), "settings": {"num_samples": 8}}
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    return tmp_path


def test_the_scale_belongs_to_its_weights(stored, caplog):
    calibration = [Calibration(stored / "calibration.json", stored / "model.pt", {"num_samples": 8}) for _ in range(2)]
    assert calibration[0].scale == 3
    (stored / "model.pt").write_bytes(b"others")
    with caplog.at_level(logging.WARNING):
        assert calibration[1].scale is None
    assert "other weights" in caplog.text


def test_other_settings_than_those_of_the_fit_are_said(stored, caplog):
    with caplog.at_level(logging.WARNING):
        assert Calibration(stored / "calibration.json", stored / "model.pt", {"num_samples": 4}).scale == 3
    assert "num_samples 8" in caplog.text


def test_without_a_calibration_the_spread_stays_as_it_is(stored, caplog):
    with caplog.at_level(logging.WARNING):
        assert Calibration(stored / "none.json", stored / "model.pt", {}).scale is None
    assert "not calibrated" in caplog.text


def test_the_second_channel_becomes_sd_in_hu(stored):
    split = SplitSpreadd("pred", (-1000.0, 1600.0), Calibration(stored / "calibration.json", stored / "model.pt", {}))
    pred = torch.tensor([[[[0.5]]], [[[0.01]]]])
    data = split({"pred": pred})
    assert data["pred"].tolist() == [[[[0.5]]]] and data["sd"].flatten().tolist() == pytest.approx([0.01 * 1300 * 3])
    assert set(split({"pred": pred[:1]})) == {"pred"}


# dense bone


CURVE = [[500.0, 500.0], [700.0, 800.0], [900.0, 1200.0], [1600.0, 1600.0]]


@pytest.fixture
def with_curve(stored):
    content = json.loads((stored / "calibration.json").read_text())
    content |= {"bone_curve": CURVE, "settings": {"num_samples": 8, "num_inference_steps": 1, "output": "mean"}}
    (stored / "calibration.json").write_text(json.dumps(content))
    return stored


def test_the_curve_is_the_median_of_the_ct():
    rng = np.random.default_rng(0)
    predicted = rng.uniform(-200, 1400, 200_000)
    truth = np.where(predicted < 500, predicted, 500 + 1.2 * (predicted - 500)) + rng.laplace(0, 100, predicted.size)
    curve = np.array(fit_bone_curve(predicted, truth, 1600.0))
    assert curve[0].tolist() == [500, 500] and curve[-1].tolist() == [1600, 1600]
    np.testing.assert_allclose(curve[1:-1, 1], 500 + 1.2 * (curve[1:-1, 0] - 500), atol=10)


@pytest.mark.parametrize("slope", [-1.0, 0.0, 3.0])
def test_the_curve_rises_within_its_ends_whatever_the_ct(slope):
    predicted = np.random.default_rng(1).uniform(400, 1500, 20_000)
    curve = np.array(fit_bone_curve(predicted, 900 + slope * (predicted - 900), 1600.0))
    assert (np.diff(curve, axis=0) >= 0).all() and curve.min() == 500 and curve.max() == 1600


def test_too_little_dense_bone_gives_no_curve():
    assert fit_bone_curve(np.full(10_000, 400.0), np.full(10_000, 900.0), 1600.0) is None
    assert fit_bone_curve(np.full(100, 800.0), np.full(100, 900.0), 1600.0) is None


def test_only_dense_bone_moves_along_the_curve(with_curve):
    calibration = Calibration(with_curve / "calibration.json", with_curve / "model.pt", {})
    hu = MetaTensor(torch.tensor([[[[-1000.0, 40.0, 500.0, 600.0, 700.0, 1000.0, 1600.0]]]]), affine=2 * torch.eye(4))
    data = CalibrateBoned("pred", calibration)({"pred": hu})
    expected = [-1000.0, 40.0, 500.0, 650.0, 800.0, 1200 + 400 / 7, 1600.0]
    assert data["pred"].flatten().tolist() == pytest.approx(expected)
    assert torch.equal(data["pred"].affine, 2 * torch.eye(4, dtype=torch.float64))


def test_the_curve_belongs_to_its_weights_and_to_the_settings_of_the_estimate(with_curve, caplog):
    def curve(**settings):
        return Calibration(with_curve / "calibration.json", with_curve / "model.pt", settings).bone_curve

    with caplog.at_level(logging.WARNING):
        assert curve(num_samples=1, num_inference_steps=1, output="mean") == CURVE and not caplog.text
        assert curve(num_inference_steps=4, output="mean") is None and "num_inference_steps 1" in caplog.text
        assert curve(num_inference_steps=1, output="sample") is None and "output mean" in caplog.text
    assert Calibration(None, with_curve / "model.pt", {}).bone_curve is None
    (with_curve / "model.pt").write_bytes(b"others")
    assert curve() is None


# from files to files


def test_several_samples_write_the_estimate_and_sd_on_the_grid_of_the_mr(tmp_path, infer):
    """The estimate is that without samples, the SD that of as many runs of one sample each."""
    affine = np.diag([2.0, 2, 2, 1])
    path = save(tmp_path / "a.nii.gz", ramp((16, 14, 12), affine), affine)
    single = []
    for seed in range(3):
        infer(path, tmp_path / str(seed), seed=seed, output="sample", **SMALL_WINDOWS)
        single.append(nib.load(tmp_path / str(seed) / "a_sct.nii.gz").get_fdata())
    infer(path, tmp_path / "alone", **SMALL_WINDOWS)
    infer(path, tmp_path / "out", num_samples=3, **SMALL_WINDOWS)
    alone = nib.load(tmp_path / "alone" / "a_sct.nii.gz")
    estimate, sd = (nib.load(tmp_path / "out" / f"a_{name}.nii.gz") for name in ("sct", "sct_sd"))
    np.testing.assert_allclose(sd.affine, affine)
    inside = single[0] != -1000
    np.testing.assert_allclose(estimate.get_fdata(), alone.get_fdata(), atol=1)
    np.testing.assert_allclose(sd.get_fdata()[inside], np.std(single, axis=0, ddof=1)[inside], atol=2)
    assert sd.get_fdata().max() > 1


def test_dense_bone_in_a_file_moves_along_the_curve_and_is_made_again_when_that_changes(tmp_path, infer, checkpoint):
    path = save(tmp_path / "a.nii.gz", ramp((16, 14, 12), np.diag([2.0, 2, 2, 1])))
    stored = tmp_path / "calibration.json"

    def synthesised(curve):
        settings = {"num_inference_steps": 1, "num_samples": 1, "output": "mean"}
        content = {"sd_scale": 1.0, "bone_curve": curve, "model_sha256": sha256(checkpoint), "settings": settings}
        stored.write_text(json.dumps(content))
        infer(path, tmp_path / "out", calibration=str(stored), resume=True, **stub())
        assert json.loads((tmp_path / "out" / "a_sct.json").read_text())["bone_curve"] == curve
        return nib.load(tmp_path / "out" / "a_sct.nii.gz").get_fdata()

    plain, moved = synthesised(None), synthesised(CURVE)
    dense = plain > 501  # files are rounded to whole HU
    assert 0.05 < dense.mean() < 0.95 and np.array_equal(moved[plain < 500], plain[plain < 500])
    np.testing.assert_allclose(moved[dense], np.interp(plain[dense], *zip(*CURVE)), atol=2)


def test_the_sample_mode_answers_with_the_first_sample(tmp_path, infer):
    path = save(tmp_path / "a.nii.gz", ramp((16, 14, 12), np.diag([2.0, 2, 2, 1])))
    infer(path, tmp_path / "one", output="sample", **SMALL_WINDOWS)
    infer(path, tmp_path / "three", num_samples=3, output="sample", **SMALL_WINDOWS)
    one, three = (nib.load(tmp_path / name / "a_sct.nii.gz").get_fdata() for name in ("one", "three"))
    np.testing.assert_allclose(one, three, atol=2)
    assert (tmp_path / "three" / "a_sct_sd.nii.gz").exists() and not (tmp_path / "one" / "a_sct_sd.nii.gz").exists()

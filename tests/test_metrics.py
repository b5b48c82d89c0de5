"""Scores against values worked out by hand, and against the known score of the trivial answer on real data."""

from __future__ import annotations

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch

from custom_modules.metrics import InBodyScore, ct_body_mask, dice, score

CT = np.array([[[-1000.0, 0, 100, 300, 400]]])
PRED = np.array([[[500.0, 10, 70, 260, 240]]])
MASK = np.array([[[False, True, True, True, True]]])
HU_WINDOW = (-1000.0, 1600.0)


def test_score_equals_the_one_worked_out_by_hand():
    """Errors 10, -30, -40 and -160; bone is 300 and 400 in the CT and 260 in the answer."""
    assert score(PRED, CT, MASK) == {
        "mae": pytest.approx(60),
        "bias": pytest.approx(-55),
        "bone_mae": pytest.approx(100),
        "bone_dice": pytest.approx(2 / 3),
    }


def test_a_perfect_answer_scores_no_error():
    assert score(CT, CT, MASK) == {"mae": 0, "bias": 0, "bone_mae": 0, "bone_dice": 1}


def test_nothing_outside_the_mask_counts():
    outside = np.where(MASK, PRED, 3000)
    assert score(outside, CT, MASK) == score(PRED, CT, MASK)


def test_integers_do_not_wrap_around():
    ct, pred = np.full((2, 2, 2), -30000, np.int16), np.full((2, 2, 2), 30000, np.int16)
    assert score(pred, ct, np.ones((2, 2, 2), bool))["mae"] == 60000


def test_bone_without_bone_is_not_defined():
    result = score(PRED.clip(max=200), CT.clip(max=200), MASK)
    assert math.isnan(result["bone_mae"]) and math.isnan(result["bone_dice"])
    assert math.isfinite(result["mae"]) and math.isfinite(result["bias"])


def test_bone_where_there_is_none_is_an_overlap_of_zero():
    result = score(PRED, CT.clip(max=200), MASK)
    assert result["bone_dice"] == 0 and math.isnan(result["bone_mae"])


def test_250_hu_is_not_yet_bone():
    limit = np.array([[[250.0, 250.0]]])
    assert score(limit + 1, limit + 1, np.ones((1, 1, 2), bool))["bone_dice"] == 1
    assert math.isnan(score(limit, limit, np.ones((1, 1, 2), bool))["bone_dice"])


def test_an_empty_mask_has_no_score():
    assert all(math.isnan(value) for value in score(PRED, CT, np.zeros_like(MASK)).values())


@pytest.mark.parametrize("seed", range(3))
def test_dice_is_its_formula_on_random_masks(seed):
    a, b = np.random.default_rng(seed).random((2, 5, 6, 7)) < 0.3
    true, false, missed = (a & b).sum(), (a & ~b).sum(), (~a & b).sum()
    assert dice(a, b) == pytest.approx(2 * true / (2 * true + false + missed))
    assert dice(a, b) == dice(b, a)


def test_dice_at_its_ends():
    one, none = np.ones((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    assert dice(one, one) == 1 and dice(one, none) == 0 and math.isnan(dice(none, none))


def body_with_lung_and_couch() -> tuple[np.ndarray, np.ndarray]:
    """A CT of a block of tissue that holds a lung, with a thin couch below and a small object beside; the block."""
    ct = np.full((24, 24, 6), -1000.0)
    block = np.zeros(ct.shape, bool)
    block[4:18, 6:20] = True
    ct[block] = 40
    ct[8:13, 10:15] = -800
    ct[:, 1] = 0
    ct[20:23, 10:13] = 0
    return ct, block


def test_the_body_holds_its_lungs_and_neither_couch_nor_other_objects():
    ct, block = body_with_lung_and_couch()
    mask = ct_body_mask(ct, np.ones_like(ct))
    assert mask[8:13, 10:15].all()
    assert not (mask & ~block).any()
    corners = block.sum() - mask.sum()  # the opening rounds the four edges of the block
    assert 0 <= corners <= 4 * ct.shape[2]


def test_only_where_the_mr_has_signal_counts():
    ct, _ = body_with_lung_and_couch()
    mr = np.ones_like(ct)
    mr[:10] = 0
    assert not ct_body_mask(ct, mr)[:10].any() and ct_body_mask(ct, mr)[10:].any()


def test_a_body_as_large_as_the_field_of_view_counts_to_its_edge():
    assert ct_body_mask(np.zeros((6, 6, 2)), np.ones((6, 6, 2))).all()


def scaled(hu: np.ndarray) -> torch.Tensor:
    """HU in HU_WINDOW to [-1, 1], with a channel."""
    return torch.from_numpy((hu - HU_WINDOW[0]) / (HU_WINDOW[1] - HU_WINDOW[0]) * 2 - 1).float()[None]


@pytest.fixture
def patients() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prediction, CT and MR (in [-1, 1]) of two patients, the second without bone."""
    rng = np.random.default_rng(0)
    ct, block = body_with_lung_and_couch()
    bony = np.where(block & (rng.random(ct.shape) < 0.2), 900.0, ct)
    return [
        ((each + rng.normal(0, 50, ct.shape)).clip(*HU_WINDOW), each, rng.uniform(-0.5, 1, ct.shape))
        for each in (bony, ct)
    ]


@pytest.mark.parametrize("name", ["mae", "bias", "bone_mae"])
def test_the_metric_is_the_mean_score_of_the_patients_where_it_is_defined(patients, name):
    metric = InBodyScore(name, HU_WINDOW)
    for pred, ct, mr in patients:
        metric([scaled(pred)], [torch.cat([scaled(ct), torch.from_numpy(mr).float()[None]])])
    expected = [score(pred, ct, ct_body_mask(ct, mr + 1))[name] for pred, ct, mr in patients]
    assert math.isnan(expected[1]) == (name == "bone_mae")
    assert float(metric.aggregate()) == pytest.approx(np.nanmean(expected), abs=0.01)


def test_patients_of_different_size_make_one_metric(patients):
    metric = InBodyScore("mae", HU_WINDOW)
    pairs = [(p[..., :k], c[..., :k], m[..., :k]) for (p, c, m), k in zip(patients, (4, 6))]
    metric(
        [scaled(pred) for pred, _, _ in pairs],
        [torch.cat([scaled(ct), torch.from_numpy(mr).float()[None]]) for _, ct, mr in pairs],
    )
    assert metric.get_buffer().shape == (2, 1)


def test_zero_hu_everywhere_scores_what_the_design_says_on_the_test_patients(real_data):
    """Design, section 8: constant 0 HU has a mean in-body MAE of 97.2 HU."""
    patients = json.loads((real_data / "datalist.json").read_text())["test"]
    errors = []
    for patient in patients:
        mr, ct = (np.asarray(nib.load(real_data / patient[key]).dataobj) for key in ("image", "label"))
        errors.append(score(np.zeros_like(ct), ct, ct_body_mask(ct, mr))["mae"])
    assert len(errors) == 6
    assert np.mean(errors) == pytest.approx(97.2, abs=0.1)

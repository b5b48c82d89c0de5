"""Scores against values worked out by hand, and against the known score of the trivial prediction on real data."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.metrics import MAEMetric, PSNRMetric, RMSEMetric, SSIMMetric, compute_dice
from scipy import ndimage
from scipy.stats import pearsonr

from custom_modules.data.body import ct_body_mask
from custom_modules.data.hu import check_hu
from custom_modules.errors import InputError
from custom_modules.evaluation.metrics import (
    METRICS,
    PAPER_HU,
    PROTOCOLS,
    SYNTHRAD_HU,
    InBodyScore,
    dice,
    ms_ssim,
    ncc,
    score,
    ssim,
)

CT = np.array([[[-1000.0, 0, 100, 300, 400]]])
PRED = np.array([[[500.0, 10, 70, 260, 240]]])
MASK = np.array([[[False, True, True, True, True]]])
HU_WINDOW = (-1000.0, 1600.0)


def test_scores_equal_those_worked_out_by_hand():
    """Errors 10, -30, -40 and -160; bone is 300 and 400 in the CT and 260 in the prediction; means 145 and 200."""
    mse = (100 + 900 + 1600 + 25600) / 4
    covariance = (-135 * -200 + -75 * -100 + 115 * 100 + 95 * 200) / 4
    sds = ((135**2 + 75**2 + 115**2 + 95**2) / 4) ** 0.5 * ((200**2 + 100**2 + 100**2 + 200**2) / 4) ** 0.5
    expected = {
        "mae": 60, "bias": -55, "rmse": mse**0.5, "soft_mae": 20, "soft_bias": -10, "bone_mae": 100, "bone_bias": -100,
        "bone_dice": 2 / 3, "soft_dice": 4 / 5, "air_mae": math.nan, "air_bias": math.nan, "air_dice": math.nan,
        "psnr": 10 * math.log10(4095**2 / mse), "ncc": covariance / sds, "ssim": math.nan,
    }  # fmt: skip
    scores = score(PRED, CT, MASK)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_the_papers_protocol_clips_to_its_window():
    """1200 against 700 is an error of 100, -1000 against -900 none; the range of PSNR is 1600."""
    ct, pred = np.array([[[-1000.0, 700.0]]]), np.array([[[-900.0, 1200.0]]])
    everywhere = np.ones(ct.shape, bool)
    paper, challenge = (score(pred, ct, everywhere, name) for name in ("paper", "synthrad2025"))
    assert paper["mae"] == 50 and challenge["mae"] == 300
    assert paper["bone_mae"] == 100 and challenge["bone_mae"] == 500
    assert paper["psnr"] == pytest.approx(10 * math.log10(1600**2 / (100**2 / 2)))
    assert challenge["psnr"] == pytest.approx(10 * math.log10(4095**2 / ((100**2 + 500**2) / 2)))


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_a_perfect_answer_scores_no_error(protocol):
    ct = volumes()[1]
    scores = score(ct, ct, np.ones(ct.shape, bool), protocol)
    for name, value in scores.items():
        assert value == {"psnr": math.inf}.get(name, pytest.approx(0 if name.endswith(("mae", "bias", "rmse")) else 1))


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("ssim", "ms_ssim")])
def test_nothing_outside_the_mask_counts(name):
    outside = np.where(MASK, PRED, 3000)
    np.testing.assert_equal(METRICS[name](outside, CT, MASK), METRICS[name](PRED, CT, MASK))


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
def test_the_challenge_sees_air_outside_the_mask(name):
    pred, ct, mask = volumes()
    other = np.where(mask, pred, 3000)
    assert score(other, ct, mask)[name] == pytest.approx(score(pred, ct, mask)[name], abs=1e-12)


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


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_an_empty_mask_has_no_score(protocol):
    pred, ct, mask = volumes()
    assert all(math.isnan(value) for value in score(pred, ct, np.zeros_like(mask), protocol).values())


def test_similarity_of_a_volume_thinner_than_its_window_is_not_defined():
    thin = np.zeros((20, 20, 6))
    assert math.isnan(ssim(thin, thin, np.ones(thin.shape, bool)))


def test_correlation_with_a_constant_is_not_defined():
    assert math.isnan(ncc(np.zeros_like(CT), CT, MASK))


# against the same metrics of others


def volumes(seed: int = 0, shape: tuple[int, ...] = (33, 28, 20)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A prediction and a CT in HU that resemble each other, and a mask that is not a box."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    ct = (smooth / smooth.std() * 500 + 100).clip(-1024, 3071)
    mask = ndimage.gaussian_filter(rng.normal(size=shape), 2) > -0.02
    return (ct + rng.normal(0, 120, shape)).astype(np.float32), ct.astype(np.float32), mask


@pytest.fixture(scope="module", params=["random", pytest.param("real", marks=pytest.mark.integration)])
def pair(request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, CT and mask: random ones, and a real CT against its registered and its raw version."""
    if request.param == "random":
        return volumes()
    folder = request.getfixturevalue("real_data") / "sts" / "STS_041"
    mr, ct, raw = (np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj) for name in ("mr", "ct", "ct_raw"))
    return raw.astype(np.float32), ct.astype(np.float32), ct_body_mask(ct, mr)


def flat(pair: tuple, window: tuple[float, float] | None = None) -> list[torch.Tensor]:
    """Both over the mask as (1, 1, n) tensors, which MONAI's metrics take for images."""
    pred, ct, mask = pair
    both = (torch.from_numpy(x[mask].astype(np.float64))[None, None] for x in (pred, ct))
    return [x if window is None else x.clamp(*window) for x in both]


def test_errors_are_those_of_monai(pair):
    scores, clipped = score(*pair), score(*pair, "paper")
    for name, oracle in {"mae": MAEMetric(), "rmse": RMSEMetric()}.items():
        assert scores[name] == pytest.approx(float(oracle(*flat(pair))), abs=1e-6)
        assert clipped[name] == pytest.approx(float(oracle(*flat(pair, PAPER_HU))), abs=1e-6)


@pytest.mark.parametrize(("protocol", "window"), [("paper", PAPER_HU), ("synthrad2025", SYNTHRAD_HU)])
def test_psnr_is_that_of_monai(pair, protocol, window):
    oracle = PSNRMetric(max_val=window[1] - window[0])
    assert score(*pair, protocol)["psnr"] == pytest.approx(float(oracle(*flat(pair, window))), abs=1e-6)


@pytest.mark.parametrize(("protocol", "window"), [("paper", PAPER_HU), ("synthrad2025", SYNTHRAD_HU)])
def test_ncc_is_that_of_scipy(pair, protocol, window):
    a, b = (x.flatten().numpy() for x in flat(pair, window))
    assert score(*pair, protocol)["ncc"] == pytest.approx(pearsonr(a, b).statistic, abs=1e-6)


def test_dice_is_that_of_monai(pair):
    pred, ct, mask = pair
    masks = [torch.from_numpy((x > -300) & (x <= 250) & mask)[None, None].float() for x in (pred, ct)]
    assert score(*pair)["soft_dice"] == pytest.approx(float(compute_dice(*masks)), abs=1e-6)


def similarity_map(pred, ct, extent: float) -> np.ndarray:
    """Structural similarity where the 7^3 window fits, from pooling: not the filters that the metric is made of."""
    a, b = (torch.from_numpy(x)[None, None] for x in (pred, ct))
    pool, sample = partial(F.avg_pool3d, kernel_size=7, stride=1), 343 / 342
    mean_a, mean_b = pool(a), pool(b)
    centre = float(a.mean())  # for accuracy; a shift changes no variance
    a, b = a - centre, b - centre
    var_a, var_b = ((pool(x * x) - pool(x) ** 2) * sample for x in (a, b))
    covariance = (pool(a * b) - pool(a) * pool(b)) * sample
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2))[0, 0].numpy()


CORE = (slice(3, -3),) * 3


@pytest.mark.parametrize(("protocol", "window"), [("paper", PAPER_HU), ("synthrad2025", SYNTHRAD_HU)])
def test_ssim_is_the_formula_where_the_window_fits(pair, protocol, window):
    pred, ct, mask = pair
    inside = np.zeros_like(mask)
    inside[CORE] = mask[CORE]
    outside = -1024.0 if protocol == "synthrad2025" else None
    a, b = (x.astype(np.float64).clip(*window) for x in (pred, ct))
    a, b = (a, b) if outside is None else (np.where(inside, x, outside) for x in (a, b))
    expected = similarity_map(a, b, window[1] - window[0])[inside[CORE]].mean()
    actual = ssim(pred, ct, inside, window, outside)
    assert actual == pytest.approx(expected, abs=1e-6)


def test_ssim_is_that_of_monai_over_a_whole_volume():
    pred, ct, _ = volumes()
    oracle = SSIMMetric(spatial_dims=3, data_range=1600.0, kernel_type="uniform", win_size=7)
    a, b = (torch.from_numpy(x.astype(np.float64).clip(*PAPER_HU))[None, None] for x in (pred, ct))
    inside = np.zeros(ct.shape, bool)
    inside[CORE] = True
    # MONAI divides by n and not by n - 1, which at 343 voxels a window is all the difference
    assert ssim(pred, ct, inside) == pytest.approx(float(oracle(a, b)), abs=2e-3)


def challenge_ms_ssim(pred, ct, mask) -> float:
    """MS-SSIM from the challenge's description by other means: pooling, and slices in place of filters."""
    a, b = (np.where(mask, x.astype(np.float64).clip(-1024, 3071), -1024) + 1024 for x in (pred, ct))
    margins = [(max(97 - n, 0) // 2, max(97 - n, 0) - max(97 - n, 0) // 2) for n in ct.shape]
    a, b, mask = (np.pad(x, margins, mode="edge") for x in (a, b, mask))
    result = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363, 0.1333):
        values = similarity_map(a, b, 4095.0)[mask[CORE]]
        result *= (values.clip(0) ** weight).mean()
        a, b = (_halved(x) for x in (a, b))
        mask = mask[::2, ::2, ::2]
    return result


def _halved(x: np.ndarray) -> np.ndarray:
    """Means of voxels (2 k - 1, 2 k) along each axis, nothing before the first."""
    before = np.pad(x, [(1, 0)] * 3)
    total = sum(before[i:, j:, k:][: x.shape[0], : x.shape[1], : x.shape[2]] for i, j, k in product((0, 1), repeat=3))
    return total[::2, ::2, ::2] / 8


def test_ms_ssim_is_that_of_the_challenge(pair):
    assert score(*pair)["ms_ssim"] == pytest.approx(challenge_ms_ssim(*pair), abs=1e-6)


def test_ms_ssim_falls_with_blur_and_noise():
    _, ct, _ = volumes(shape=(60, 50, 40))
    mask = np.ones(ct.shape, bool)
    noise = np.random.default_rng(1).normal(0, 1, ct.shape)
    values = [ms_ssim(ct + amount * noise, ct, mask) for amount in (0, 50, 200, 800)]
    assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True) and values[-1] < 0.9


# other


@pytest.mark.parametrize(
    "volume", [np.linspace(0, 1, 60), np.linspace(-1, 1, 60), np.linspace(0, 4095, 60), np.linspace(-10, 100, 60)]
)
def test_what_is_not_in_hu_is_refused_by_name(volume):
    with pytest.raises(InputError, match="ct.nii.*Hounsfield"):
        check_hu(volume.reshape(3, 4, 5), "ct.nii")


def test_hounsfield_units_are_taken():
    check_hu(body_with_lung_and_couch()[0], "ct.nii")


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
    ct[20:23, 10:13, :3] = 0  # less than a fiftieth of the block
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
    """Prediction, CT and mask of two patients, the second without bone."""
    rng = np.random.default_rng(0)
    ct, block = body_with_lung_and_couch()
    bony = np.where(block & (rng.random(ct.shape) < 0.2), 900.0, ct)
    return [
        ((each + rng.normal(0, 50, ct.shape)).clip(*HU_WINDOW), each, rng.random(ct.shape) < 0.7) for each in (bony, ct)
    ]


@pytest.mark.parametrize("name", ["mae", "bias", "bone_mae"])
def test_the_metric_is_the_mean_score_of_the_patients_where_it_is_defined(patients, name):
    metric = InBodyScore(name, HU_WINDOW)
    for pred, ct, mask in patients:
        metric([scaled(pred)], [torch.cat([scaled(ct), torch.from_numpy(mask).float()[None]])])
    expected = [score(pred, ct, mask)[name] for pred, ct, mask in patients]
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

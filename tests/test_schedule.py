"""The noise schedule and its sampler: Eqs. 11, 13 and 14 in numpy, MONAI's DDIM step, finite at every step count."""

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler

from custom_modules.networks.schedule import MIN_ALPHA_BAR, DDIMSchedule

PREDICTIONS = ("epsilon", "v")
SHAPE = (1, 2, 3, 3, 3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*(shape or SHAPE), dtype=torch.float64)


def alpha_bars(beta_end, steps=1000):
    return np.cumprod(1 - np.linspace(1e-4, beta_end, steps))


def mix(clean, noise, a):
    """Eq. 11."""
    return a**0.5 * clean + (1 - a) ** 0.5 * noise


def perfect_output(prediction, clean, noise, a):
    return noise if prediction == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * clean


@pytest.mark.parametrize("beta_end", (0.02, 0.2))
def test_alpha_bar_is_the_product_of_the_alphas(beta_end):
    schedule = DDIMSchedule(beta_end=beta_end)
    actual = [schedule.alpha_bar(t) for t in range(1000)]
    np.testing.assert_allclose(actual, alpha_bars(beta_end), rtol=2e-5)  # MONAI's betas are single precision
    assert schedule.alpha_bar(-1) == 1


def test_default_schedule_keeps_every_step_and_the_papers_about_a_third():
    assert (alpha_bars(0.02) >= MIN_ALPHA_BAR).all()
    assert DDIMSchedule().inference_timesteps(1) == [(999, -1)]
    assert DDIMSchedule().inference_timesteps(1, first=300) == [(300, -1)]
    assert DDIMSchedule().inference_timesteps(3, first=299) == [(299, 199), (199, 99), (99, -1)]
    usable = int((alpha_bars(0.2) >= MIN_ALPHA_BAR).sum())
    assert 250 < usable < 400
    assert DDIMSchedule(beta_end=0.2).inference_timesteps(1) == [(usable - 1, -1)]


@pytest.mark.parametrize("beta_end, usable", ((0.02, 1000), (0.2, int((alpha_bars(0.2) >= MIN_ALPHA_BAR).sum()))))
@pytest.mark.parametrize("steps", (1, 4, 10, 50, 999, 1000))
def test_timesteps_descend_evenly_from_the_last_usable_step_to_the_clean_latent(steps, beta_end, usable):
    pairs = DDIMSchedule(beta_end=beta_end).inference_timesteps(steps)
    descent = [t for t, _ in pairs] + [pairs[-1][1]]
    assert len(pairs) == min(steps, usable)
    assert descent[0] == usable - 1 and descent[-1] == -1
    assert [next_t for _, next_t in pairs] == descent[1:]
    gaps = -np.diff(descent)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 2


@pytest.mark.parametrize("steps", (0, -1, 1001))
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="num_inference_steps"):
        DDIMSchedule().inference_timesteps(steps)


@pytest.mark.parametrize("prediction", ("sample", "v_prediction", ""))
def test_unknown_prediction_is_refused(prediction):
    with pytest.raises(ValueError, match="prediction"):
        DDIMSchedule(prediction=prediction)


def test_step_is_equations_13_and_14_worked_by_hand():
    """Two steps with alphas 0.81 and 0.64: alpha-bar 0.81 and 0.5184, whose roots are 0.9 and 0.72."""
    schedule = DDIMSchedule(2, beta_start=0.19, beta_end=0.36, prediction="epsilon")
    z, epsilon = torch.tensor([1.0, 0.5], dtype=torch.float64)
    estimate = schedule.step(epsilon, 1, -1, z).item()
    assert estimate == pytest.approx((1 - 0.693974 * 0.5) / 0.72, abs=2e-6)  # Eq. 14, 0.693974 = sqrt(1 - 0.5184)
    assert schedule.step(epsilon, 1, 0, z).item() == pytest.approx(0.9 * 0.906962 + 0.435890 * 0.5, abs=2e-6)  # Eq. 13


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta_end", (0.02, 0.2))
def test_the_estimate_of_a_batch_is_the_last_step_of_each_item(prediction, beta_end):
    schedule = DDIMSchedule(prediction=prediction, beta_end=beta_end)
    output, z = torch.randn(2, 3, 4, 2, 3, 2, generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.tensor([0, 250, schedule.inference_timesteps(1)[0][0]])
    alone = [schedule.step(o, int(t), -1, latent) for o, t, latent in zip(output, timesteps, z)]
    torch.testing.assert_close(schedule.estimate(output, timesteps, z), torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t, next_t", ((999, 500), (500, 499), (0, -1), (999, -1)))
def test_step_with_the_right_output_stays_on_the_path_of_equation_11(prediction, t, next_t):
    schedule = DDIMSchedule(prediction=prediction)
    a, next_a = schedule.alpha_bar(t), schedule.alpha_bar(next_t)
    clean, noise = normal(), normal()
    output = perfect_output(prediction, clean, noise, a)
    torch.testing.assert_close(schedule.step(output, t, next_t, mix(clean, noise, a)), mix(clean, noise, next_a))


@pytest.mark.parametrize("beta_end", (0.02, 0.2))
@pytest.mark.parametrize("steps", (1, 4, 50, 1000))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sampler_with_the_right_outputs_recovers_the_clean_latent(prediction, steps, beta_end):
    schedule = DDIMSchedule(beta_end=beta_end, prediction=prediction)
    clean, noise = normal(), normal()
    start = schedule.alpha_bar(schedule.inference_timesteps(steps)[0][0])
    z = schedule.sample(
        lambda z, t: perfect_output(prediction, clean, noise, schedule.alpha_bar(t)), mix(clean, noise, start), steps
    )
    torch.testing.assert_close(z, clean)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", (0, 10, 999))
def test_training_target_is_the_right_output(prediction, t):
    schedule = DDIMSchedule(prediction=prediction)
    clean, noise = normal(), normal()
    a = alpha_bars(0.02)[t]
    actual = schedule.target(clean, noise, torch.tensor([t]))
    torch.testing.assert_close(actual, perfect_output(prediction, clean, noise, a), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_targets_of_a_batch_follow_their_own_timesteps(prediction):
    schedule = DDIMSchedule(prediction=prediction)
    clean, noise, timesteps = normal(3, 2, 2, 2, 2), normal(3, 2, 2, 2, 2), torch.tensor([0, 400, 999])
    a = torch.from_numpy(alpha_bars(0.02))[timesteps].view(3, 1, 1, 1, 1)
    noisy = schedule.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(noisy, mix(clean, noise, a), rtol=1e-3, atol=1e-4)
    target = schedule.target(clean, noise, timesteps)
    torch.testing.assert_close(target, perfect_output(prediction, clean, noise, a), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", (0, 1, 500, 999))
def test_output_for_a_clean_latent_makes_the_estimate_that_latent(prediction, t):
    schedule = DDIMSchedule(prediction=prediction)
    clean, z = normal(), normal()
    torch.testing.assert_close(schedule.step(schedule.output_for(clean, z, t), t, -1, z), clean)


@pytest.mark.parametrize("steps", (1, 10, 50, 1000))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_papers_betas_stay_finite_with_any_output(prediction, steps):
    schedule = DDIMSchedule(beta_end=0.2, prediction=prediction)
    z = schedule.sample(lambda z, t: torch.randn_like(z), torch.randn(SHAPE), steps)
    assert z.isfinite().all() and 0 < z.abs().max() < 10 / MIN_ALPHA_BAR**0.5


@pytest.mark.parametrize("prediction, name", (("epsilon", "epsilon"), ("v", "v_prediction")))
@pytest.mark.parametrize("steps", (1, 10, 50, 1000))
def test_step_is_that_of_monai_between_the_timesteps_that_monai_takes(prediction, name, steps):
    reference = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type=name)
    reference.set_timesteps(steps)
    schedule = DDIMSchedule(prediction=prediction)
    for t in reference.timesteps[[0, steps // 2, -1]].tolist():
        output, z = normal(), normal()
        expected, estimate = reference.step(output, t, z)
        next_t = t - 1000 // steps
        torch.testing.assert_close(schedule.step(output, t, next_t, z), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(schedule.step(output, t, -1, z), estimate, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction, name", (("epsilon", "epsilon"), ("v", "v_prediction")))
def test_sampling_every_step_is_that_of_monai(prediction, name):
    reference = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type=name)
    schedule = DDIMSchedule(prediction=prediction)
    expected = start = normal()
    for t in reference.timesteps.tolist():
        expected, _ = reference.step(0.9 * torch.tanh(expected + t / 1000), t, expected)
    actual = schedule.sample(lambda z, t: 0.9 * torch.tanh(z + t / 1000), start, 1000)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_progress_wraps_the_steps():
    seen = []
    DDIMSchedule().sample(lambda z, t: z, normal(), 4, progress=lambda steps: [seen.append(s) or s for s in steps])
    assert seen == DDIMSchedule().inference_timesteps(4)

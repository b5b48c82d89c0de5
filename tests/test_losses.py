"""The losses of the training stages, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets import PatchDiscriminator
from scipy.stats import norm
from torch import nn

from custom_modules.training.adversary import Adversary
from custom_modules.training.losses import AutoencoderLoss, EstimateLoss, LatentDiffusionLoss, ValidL1Loss, valid_voxels


class Engine:
    """As much of a trainer as the adversary looks at."""

    accumulation_steps = 1

    def __init__(self, iteration: int, fake: torch.Tensor | None = None, real: torch.Tensor | None = None) -> None:
        self.state = type("State", (), {"iteration": iteration, "output": {"pred": (fake,), "image": real}})


def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(spatial_dims=3, channels=4, in_channels=1, num_layers_d=2, norm="INSTANCE")


def adversary(**kwargs) -> Adversary:
    network = discriminator()
    return Adversary(network, torch.optim.Adam(network.parameters(), 1e-2), **{"weight": 0.3, "amp": False, **kwargs})


def test_pretraining_loss_is_the_sum_of_its_terms():
    torch.manual_seed(0)
    target, reconstruction = torch.rand(4, 1, 16, 16, 16), torch.rand(4, 1, 16, 16, 16)
    latent, mean, log_variance = (torch.randn(4, 4, 2, 2, 2) for _ in range(3))
    opponent = adversary()
    opponent._count(Engine(1))
    loss = AutoencoderLoss(0.3, 0.2, opponent, nn.functional.l1_loss, perceptual_weight=0.7)
    value = loss((reconstruction, latent, mean, log_variance), target)
    l2 = ((reconstruction - target) ** 2).mean()
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    fooled = 0.3 * (opponent.discriminator(reconstruction)[-1] - 1).square().mean()
    l1 = (reconstruction - target).abs().mean()
    torch.testing.assert_close(value, l2 + 0.3 * kl + 0.2 * loss.terms["disentanglement"] + fooled + 0.7 * l1)
    assert loss.terms["reconstruction_mr"] == pytest.approx(float(((reconstruction - target)[:2] ** 2).mean()))
    assert loss.terms["adversarial"] == pytest.approx(float(fooled))


def test_no_disentanglement_weight_means_no_disentanglement_gradient():
    torch.manual_seed(0)
    latent = torch.randn(4, 4, 2, 2, 2, requires_grad=True)
    image, zeros = torch.rand(4, 1, 8, 8, 8), torch.zeros(4, 4, 2, 2, 2)
    AutoencoderLoss(disentanglement_weight=0.0)((image, latent, zeros + latent * 0, zeros), image).backward()
    assert latent.grad.abs().max() == 0


def test_the_adversary_is_silent_in_its_warm_up_and_never_trained_by_the_autoencoder():
    image = torch.rand(2, 1, 16, 16, 16, requires_grad=True)
    opponent = adversary(warmup=10)
    opponent._count(Engine(10))
    assert opponent(image) == 0
    opponent._count(Engine(11))
    opponent(image).backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in opponent.discriminator.parameters())


def test_without_weight_there_is_no_adversary():
    opponent = adversary(weight=0.0)
    opponent._count(Engine(5))
    assert opponent(torch.rand(1, 1, 16, 16, 16)) == 0


def test_the_discriminator_learns_to_tell_blurred_from_sharp():
    torch.manual_seed(0)
    opponent = adversary()
    real = torch.rand(4, 1, 16, 16, 16)
    fake = nn.functional.avg_pool3d(real, 3, 1, 1)
    losses = []
    for iteration in range(1, 80):
        opponent._count(Engine(iteration))
        opponent._train(Engine(iteration, fake, real))
        losses.append(opponent.terms["discriminator"])
    assert losses[-1] < 0.5 * losses[0]


def test_the_discriminator_steps_once_per_accumulated_step():
    opponent = adversary()
    Engine.accumulation_steps = 2
    try:
        real, fake = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 1, 16, 16, 16)
        before = [p.clone() for p in opponent.discriminator.parameters()]
        for iteration in (1, 2):
            opponent._count(Engine(iteration))
            opponent._train(Engine(iteration, fake, real))
            same = all(torch.equal(a, b) for a, b in zip(before, opponent.discriminator.parameters()))
            assert same == (iteration == 1)
    finally:
        Engine.accumulation_steps = 1


def test_tissue_in_the_mr_and_air_in_the_ct_cannot_teach():
    mr, ct = torch.tensor([-1.0, -1.0, 0.5, 0.5]), torch.tensor([-1.0, -0.2, -1.0, -0.2])
    assert valid_voxels(mr, ct).tolist() == [True, True, False, True]


def test_losses_count_only_valid_voxels():
    torch.manual_seed(0)
    ct, image = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    valid, clean, prediction = torch.ones_like(ct), torch.zeros(1, 4, 2, 2, 2), torch.ones(1, 4, 2, 2, 2)
    image[..., :4], valid[..., :4], image[..., 4:] = 9.0, 0.0, 0.5
    prediction[..., 0] = 7.0  # these latent voxels are not valid either
    assert ValidL1Loss()(image, (ct, valid.bool())) == pytest.approx(0.5)
    assert LatentDiffusionLoss()(prediction, (clean, valid)) == pytest.approx(1.0)
    assert EstimateLoss(1.0, 0.1)((prediction, image), (clean, valid, ct)) == pytest.approx(0.5 + 0.1 * 1.0)


def test_the_score_of_two_samples_is_that_of_their_distribution():
    """The closed form for a normal distribution (Gneiting and Raftery 2007), whose score is least at the true one."""
    rng, ct = np.random.default_rng(0), torch.full((1, 1, 40, 40, 40), 0.3)

    def score(mean: float, sd: float) -> float:
        samples = torch.from_numpy(rng.normal(mean, sd, (2, *ct.shape[1:])))
        return float(ValidL1Loss()(samples, (ct, torch.ones_like(ct))))

    for mean, sd in ((0.3, 0.2), (0.1, 0.2), (0.5, 0.05)):
        z = (0.3 - mean) / sd
        exact = sd * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
        assert score(mean, sd) == pytest.approx(exact, rel=0.02)


def test_samples_add_their_score_to_the_loss_of_their_crops():
    torch.manual_seed(0)
    ct, image, samples = torch.rand(3, 1, 8, 8, 8), torch.rand(3, 1, 8, 8, 8), torch.rand(4, 1, 8, 8, 8)
    valid, latent = torch.ones_like(ct), torch.zeros(3, 4, 2, 2, 2)
    y, first, second = ct[:2], samples[:2], samples[2:]
    score = ((first - y).abs() + (second - y).abs() - (first - second).abs()).mean() / 2
    loss = EstimateLoss(0.5, 0.0)((latent, torch.cat([image, samples])), (latent, valid, ct))
    torch.testing.assert_close(loss, 0.5 * ((image - ct).abs().mean() + score))


def test_bone_counts_as_often_as_its_weight_says():
    hu = torch.tensor([-900.0, 249.0, 251.0, 1200.0]).view(1, 1, 1, 1, 4)
    ct = 2 * (hu + 1000) / 2600 - 1
    image, valid = ct + torch.tensor([0.1, 0.2, 0.4, 0.8]), torch.ones_like(ct, dtype=torch.bool)
    assert ValidL1Loss(3.0)(image, (ct, valid)) == pytest.approx((0.1 + 0.2 + 3 * 0.4 + 3 * 0.8) / 8)
    valid[..., 3] = False
    assert ValidL1Loss(3.0)(image, (ct, valid)) == pytest.approx((0.1 + 0.2 + 3 * 0.4) / 5)
    wide = 2 * (hu + 1000) / 4000 - 1  # the same HU on another window
    assert ValidL1Loss(3.0, (-1000.0, 3000.0))(wide + 0.4 * (hu > 250), (wide, valid)) == pytest.approx(1.2 / 5)


def test_where_everything_is_valid_the_latent_loss_is_the_mean_square():
    torch.manual_seed(0)
    prediction, clean = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 4, 4, 4, 4)
    loss = LatentDiffusionLoss()(prediction, (clean, torch.ones(2, 1, 16, 16, 16)))
    torch.testing.assert_close(loss, nn.functional.mse_loss(prediction, clean))


def test_where_nothing_is_valid_the_losses_are_zero():
    nothing = torch.zeros(1, 1, 8, 8, 8)
    assert ValidL1Loss()(nothing + 1, (nothing, nothing)) == 0
    assert LatentDiffusionLoss()(torch.ones(1, 4, 2, 2, 2), (torch.zeros(1, 4, 2, 2, 2), nothing)) == 0

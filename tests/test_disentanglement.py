"""The disentanglement loss against Eqs. 1 to 7 written out in numpy, its extremes and its direction."""

import numpy as np
import pytest
import torch

from custom_modules.networks.disentanglement import Cosines, disentanglement_loss, latent_cosines


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cosine(a, b):
    return np.dot(a.ravel(), b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b))


def equations(z_mr, z_ct):
    """Eqs. 3 to 7 for two patients, the second of them primed in the paper."""
    half = z_mr.shape[1] // 2
    (s_mr, s_mr2), (m_mr, m_mr2) = z_mr[:, :half], z_mr[:, half:]
    (s_ct, s_ct2), (m_ct, m_ct2) = z_ct[:, :half], z_ct[:, half:]
    s_pair = cosine(s_ct, s_mr) + cosine(s_ct2, s_mr2)  # Eq. 3
    s_unpaired = cosine(s_ct, s_ct2) + cosine(s_mr, s_mr2)  # Eq. 4
    m_pair = cosine(m_ct, m_mr) + cosine(m_ct2, m_mr2)  # Eq. 5
    m_unpaired = cosine(m_ct, m_ct2) + cosine(m_mr, m_mr2)  # Eq. 6
    loss = (-s_pair + s_unpaired) + (m_pair - m_unpaired)  # Eqs. 1, 2 and 7
    return np.array([s_pair, s_unpaired, m_pair, m_unpaired, loss])


def terms(z_mr, z_ct):
    cosines = latent_cosines(z_mr, z_ct)
    return torch.stack([*cosines, disentanglement_loss(cosines)]).double()


def test_two_patients_give_the_equations():
    z_mr, z_ct = torch.randn(2, 2, 6, 3, 2, 4, dtype=torch.float64) + 0.3
    np.testing.assert_allclose(terms(z_mr, z_ct), equations(z_mr.numpy(), z_ct.numpy()), rtol=1e-9)


def test_more_patients_give_the_mean_of_the_equations_over_cyclic_pairs():
    z_mr, z_ct = torch.randn(2, 4, 6, 3, 2, 4, dtype=torch.float64) + 0.3
    pairs = [[n, (n + 1) % 4] for n in range(4)]
    expected = np.mean([equations(z_mr[pair].numpy(), z_ct[pair].numpy()) for pair in pairs], axis=0)
    np.testing.assert_allclose(terms(z_mr, z_ct), expected, rtol=1e-9)


@pytest.mark.parametrize("swapped, sign", ((False, 1), (True, -1)))
def test_extremes_of_the_loss(swapped, sign):
    """S shared by a patient's images and opposite across patients, M the reverse: -8. The halves swapped: 8."""
    of_modality = torch.randn(1, 3, 2, 2, 2).expand(2, -1, -1, -1, -1)
    of_patient = of_modality * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    z_mr = torch.cat([of_patient, of_modality], dim=1)
    z_ct = torch.cat([of_patient, -of_modality], dim=1)
    if swapped:
        z_mr, z_ct = z_mr.roll(3, dims=1), z_ct.roll(3, dims=1)
    cosines = latent_cosines(z_mr, z_ct)
    torch.testing.assert_close(torch.stack(cosines), sign * torch.tensor([2.0, -2.0, -2.0, 2.0]))
    torch.testing.assert_close(disentanglement_loss(cosines), torch.tensor(-8.0 * sign))


def test_pooled_the_modality_is_compared_as_a_whole_and_structure_voxel_by_voxel():
    z_mr, z_ct = torch.randn(2, 2, 6, 3, 2, 4, dtype=torch.float64) + 0.3
    s_pair, s_unpaired, *_ = latent_cosines(z_mr, z_ct)
    pooled = latent_cosines(z_mr, z_ct, pooled=True)
    m_mr, m_ct = (z[:, 3:].mean(dim=(2, 3, 4)).numpy() for z in (z_mr, z_ct))
    pair = cosine(m_ct[0], m_mr[0]) + cosine(m_ct[1], m_mr[1])
    unpaired = cosine(m_ct[0], m_ct[1]) + cosine(m_mr[0], m_mr[1])
    np.testing.assert_allclose(pooled, [s_pair, s_unpaired, pair, unpaired], rtol=1e-9)


def test_length_of_a_latent_does_not_matter():
    z_mr, z_ct = torch.randn(2, 2, 4, 2, 2, 2)
    torch.testing.assert_close(terms(7 * z_mr, 0.1 * z_ct), terms(z_mr, z_ct))


def test_one_patient_is_refused():
    z = torch.randn(1, 4, 2, 2, 2)
    with pytest.raises(ValueError, match="two different patients"):
        latent_cosines(z, z)


def test_loss_weighs_the_four_cosines_as_equations_1_and_2():
    assert disentanglement_loss(Cosines(*torch.tensor([1.0, 10.0, 100.0, 1000.0]))) == -1 + 10 + 100 - 1000


def test_gradient_steps_lower_the_loss_and_move_every_cosine_its_own_way():
    latents = torch.randn(2, 2, 4, 3, 3, 3, requires_grad=True)
    before = terms(*latents).detach()
    losses = []
    for _ in range(10):
        loss = disentanglement_loss(latent_cosines(*latents))
        (gradient,) = torch.autograd.grad(loss, latents)
        latents = (latents - 2 * gradient).detach().requires_grad_()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1
    s_pair, s_unpaired, m_pair, m_unpaired, _ = terms(*latents).detach() - before
    assert s_pair > 0.1 and m_unpaired > 0.1
    assert s_unpaired < -0.1 and m_pair < -0.1

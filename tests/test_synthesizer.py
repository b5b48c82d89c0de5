"""The bundle's network: what its weights carry, the latent scale, HU, air, and the way from MR to CT."""

import pytest
import torch
from torch import nn

from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.denoiser import LatentDenoiser
from custom_modules.networks.schedule import DDIMSchedule
from custom_modules.networks.synthesizer import Synthesizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(wavelet="haar", **settings):
    network = Synthesizer(
        WaveletAutoencoderKL(4, (8, 16), (1, 1), wavelet=wavelet),
        LatentDenoiser(4, (8, 16), num_blocks=1, attention_channels=8),
        **settings,
    )
    for module in network.denoiser.skip:  # silent in a fresh network
        nn.init.normal_(module.structure_emphasis.out.weight)
    return network.eval()


def scale(network):
    """Latents of the two modalities that differ in mean and deviation by channel."""
    network.latent_mean.copy_(torch.randn(2, 4))
    network.latent_std.copy_(torch.rand(2, 4) + 0.5)
    return network


@torch.no_grad()
def test_state_dict_carries_everything_that_the_answer_depends_on():
    source, other = scale(tiny(hu_window=(-800.0, 800.0))), tiny()
    mr = torch.randn(1, 1, 8, 16, 8)
    assert not torch.allclose(other(mr), source(mr))
    other.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(other(mr), source(mr))
    assert torch.equal(other.to_hu(mr), source.to_hu(mr))


@pytest.mark.parametrize("key", ("latent_mean", "latent_std", "hu_window"))
def test_weights_without_their_statistics_are_refused(key):
    state = tiny().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=key):
        tiny().load_state_dict(state, strict=True)


@torch.no_grad()
def test_forward_is_encode_one_ddim_step_and_decode():
    network = scale(tiny())
    mr, noise = torch.randn(2, 1, 8, 16, 8), torch.randn(2, 4, 2, 4, 2)
    mean, std = network.latent_mean[:, None, :, None, None, None], network.latent_std[:, None, :, None, None, None]
    z_mr = (network.autoencoder.encode(mr)[0] - mean[0]) / std[0]
    velocity = network.denoiser(torch.cat([noise, z_mr], dim=1), torch.tensor([999, 999]))
    a = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[-1])
    z_ct = a**0.5 * noise - (1 - a) ** 0.5 * velocity
    expected = network.autoencoder.decode(z_ct * std[1] + mean[1]).clamp(-1, 1)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(network(mr, noise), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("steps", (1, 3))
def test_forward_has_one_answer_of_the_shape_of_the_mr(steps):
    network = tiny(num_inference_steps=steps)
    mr = torch.randn(1, 1, 8, 24, 16)
    first = network(mr)
    torch.manual_seed(1)
    assert first.shape == mr.shape
    assert torch.equal(network(mr), first)
    torch.testing.assert_close(network(mr, torch.zeros(1, 4, 2, 6, 4)), first)
    assert (network(mr, torch.randn(1, 4, 2, 6, 4)) - first).abs().max() > 1e-3


def test_forward_asks_the_denoiser_once_a_step_at_the_timesteps_of_the_schedule():
    network = tiny(num_inference_steps=4, schedule=DDIMSchedule(100))
    seen = []
    denoise = network.denoiser.denoise
    network.denoiser.denoise = lambda z, t, condition: seen.append(t.tolist()) or denoise(z, t, condition)
    with torch.no_grad():
        network(torch.randn(2, 1, 8, 8, 8))
    assert seen == [[99, 99], [74, 74], [49, 49], [24, 24]]


@torch.no_grad()
@pytest.mark.parametrize("modality, row", (("MR", 0), ("CT", 1)))
def test_latent_scale_gives_every_channel_mean_0_and_deviation_1(modality, row):
    network = tiny()
    images = 3 * torch.randn(4, 1, 16, 16, 16) + 1
    network.set_latent_scale(modality, network.autoencoder.encode(images)[0])
    channels = network.encode(images, modality).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(4), atol=1e-4, rtol=0)
    assert torch.equal(network.latent_mean[1 - row], torch.zeros(4))
    assert torch.equal(network.latent_std[1 - row], torch.ones(4))


@torch.no_grad()
def test_latent_scale_counts_every_voxel_of_volumes_of_any_size_once():
    network = tiny()
    small, large = torch.randn(4, 1, 2, 3) - 5, 2 * torch.randn(4, 5, 4, 6)
    network.set_latent_scale("CT", [small, large])
    voxels = torch.cat([small.reshape(4, -1), large.reshape(4, -1)], dim=1)
    torch.testing.assert_close(network.latent_mean[1], voxels.mean(1))
    torch.testing.assert_close(network.latent_std[1], voxels.std(1))


@torch.no_grad()
def test_network_knows_whether_its_latent_scale_was_set():
    network, loaded = tiny(), tiny()
    assert not network.has_latent_scale
    network.set_latent_scale("MR", torch.randn(2, 4, 3, 3, 3))
    network.set_latent_scale("CT", torch.randn(2, 4, 3, 3, 3))
    loaded.load_state_dict(network.state_dict())
    assert network.has_latent_scale and loaded.has_latent_scale


@torch.no_grad()
def test_latent_scale_of_a_constant_channel_stays_finite():
    network = tiny()
    latents = torch.randn(2, 4, 2, 2, 2)
    latents[:, 1] = 3
    network.set_latent_scale("CT", latents)
    assert (network.latent_std > 0).all()
    assert network.encode(torch.randn(1, 1, 8, 8, 8), "CT").isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("modality", ("MR", "CT"))
def test_decode_takes_the_latent_scale_back(modality):
    network = scale(tiny())
    image = torch.randn(1, 1, 8, 8, 8)
    expected = network.autoencoder.decode(network.autoencoder.encode(image)[0]).clamp(-1, 1)
    decoded = network.decode(network.encode(image, modality), modality)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoded_images_stay_in_range():
    network = tiny()
    network.autoencoder.decoder[-1].weight *= 100
    image = network.decode(torch.randn(1, 4, 4, 4, 4))
    assert (image.min(), image.max()) == (-1, 1)


def test_unknown_modality_is_refused():
    with pytest.raises(ValueError):
        tiny().encode(torch.zeros(1, 1, 8, 8, 8), "PET")


@pytest.mark.parametrize("window", ((-1000.0, 1600.0), (-800.0, 800.0)))
def test_hu_of_the_ends_and_the_middle_of_the_range(window):
    hu = tiny(hu_window=window).to_hu(torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(hu, torch.tensor([window[0], sum(window) / 2, window[1]]))


def test_downsampling_is_that_of_both_networks():
    three_scales = LatentDenoiser(4, (8, 8, 8), num_blocks=1, attention_channels=8)
    assert Synthesizer(WaveletAutoencoderKL(4, (8, 16), (1, 1)), three_scales).downsampling == 16
    assert tiny().downsampling == 8


@torch.no_grad()
def test_air_latent_is_every_interior_voxel_of_encoded_air():
    network = scale(tiny(wavelet=None))
    interior = network.encode(torch.full((1, 1, 64, 48, 48), -1.0), "CT")[:, :, 5:-5, 5:-5, 5:-5]
    assert network.air_latent().shape == (1, 4, 1, 1, 1)
    torch.testing.assert_close(network.air_latent().expand_as(interior), interior, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_air_latent_of_wavelet_blocks_is_the_interior_up_to_their_small_pattern():
    """A bias on the high bands returns as a pattern of period 4, so that encoded air is not quite constant."""
    network = tiny()
    images = torch.randn(2, 1, 16, 16, 16)
    network.set_latent_scale("CT", network.autoencoder.encode(images)[0])
    interior = network.encode(torch.full((1, 1, 128, 64, 64), -1.0), "CT")[:, :, 12:20, 4:-4, 4:-4]
    assert (network.air_latent() - interior).abs().max() < 0.1


@torch.no_grad()
def test_the_latent_of_air_is_stored_with_the_weights_and_encoded_where_they_lack_it():
    network, other, older = (scale(tiny()) for _ in range(3))
    network.set_air_latent(other.autoencoder)
    state = network.state_dict()
    assert torch.equal(tiny().air, torch.zeros(4))
    other.load_state_dict(state)
    assert torch.equal(other.air_latent(), network.air_latent())
    del state["air"]
    older.load_state_dict(state)  # strictly
    assert not torch.equal(older.air_latent(), network.air_latent())
    network.set_air_latent(network.autoencoder)
    torch.testing.assert_close(older.air_latent(), network.air_latent())

"""The autoencoder: shapes, refusals, the posterior, the stems, and latents that move with the image."""

import inspect

import numpy as np
import pytest
import pywt
import torch
from torch import nn

from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.blocks import WaveletResidualModule


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(stem="haar", levels=2, **settings):
    return WaveletAutoencoderKL(4, (8, 16, 16)[:levels], (1, 1, 1)[:levels], stem, **settings)


@pytest.mark.parametrize("stem, levels, factor", (("haar", 1, 2), ("haar", 2, 4), ("conv", 2, 2), ("conv", 3, 4)))
def test_latent_is_smaller_by_the_downsampling_factor(stem, levels, factor):
    network = tiny(stem, levels)
    image = torch.randn(2, 1, 16, 8, 24)
    reconstruction, latent, mean, log_variance = network(image)
    assert network.downsampling == factor
    assert reconstruction.shape == image.shape
    assert latent.shape == mean.shape == log_variance.shape == (2, 4, 16 // factor, 8 // factor, 24 // factor)


def test_one_set_of_weights_serves_both_modalities():
    assert list(inspect.signature(WaveletAutoencoderKL.encode).parameters) == ["self", "image"]
    assert list(inspect.signature(WaveletAutoencoderKL.decode).parameters) == ["self", "latent", "detail"]
    network = tiny().eval()
    mr, ct = torch.randn(2, 1, 1, 8, 8, 8)
    together = network.encode(torch.cat([mr, ct]))[0]
    torch.testing.assert_close(together, torch.cat([network.encode(mr)[0], network.encode(ct)[0]]))


@pytest.mark.parametrize("size", ((8, 8, 6), (7, 8, 8), (8, 2, 8)))
@pytest.mark.parametrize("stem, levels", (("haar", 2), ("conv", 3)))
def test_encode_refuses_a_size_that_does_not_divide(stem, levels, size):
    with pytest.raises(ValueError, match="multiple of 4"):
        tiny(stem, levels).encode(torch.zeros(1, 1, *size))


@pytest.mark.parametrize("settings, name", (({"latent_channels": 5}, "latent_channels"), ({"stem": "fourier"}, "stem")))
def test_wrong_settings_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        WaveletAutoencoderKL(**{"channels": (8, 16), "num_blocks": (1, 1), **settings})


@pytest.mark.parametrize("wavelet, count", (("haar", 6), ("db2", 6), (None, 0)))
def test_wavelet_modules_are_there_unless_vanilla(wavelet, count):
    network = WaveletAutoencoderKL(4, (8, 16), (1, 2), wavelet=wavelet)
    modules = [m for m in network.modules() if isinstance(m, WaveletResidualModule)]
    assert len(modules) == count
    assert all(m.transform.wavelet == wavelet for m in modules)


def test_haar_stem_shows_the_encoder_the_eight_bands_of_the_image():
    network = tiny()
    image = torch.randn(1, 1, 8, 16, 8)
    bands = pywt.dwtn(image[0, 0].numpy(), "haar")
    bands = torch.from_numpy(np.stack([bands[name] for name in sorted(bands)])[None])
    expected = network.encoder(bands).chunk(2, dim=1)
    torch.testing.assert_close(network.encode(image), (expected[0], expected[1].clamp(-30, 20)))


def test_haar_stem_puts_the_decoded_bands_together():
    network = tiny()
    latent = torch.randn(1, 4, 2, 4, 2)
    bands = network.decoder(latent).detach()[0].numpy()
    names = ("aaa", "aad", "ada", "add", "daa", "dad", "dda", "ddd")
    expected = torch.from_numpy(pywt.idwtn(dict(zip(names, bands)), "haar"))
    torch.testing.assert_close(network.decode(latent)[0, 0], expected, atol=1e-5, rtol=1e-5)


def test_posterior_sample_has_the_mean_and_deviation_it_was_given():
    mean, std = torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([0.1, 1.0, 4.0])
    count = 20000
    draws = WaveletAutoencoderKL.sample(mean.expand(count, 3), 2 * std.log().expand(count, 3))
    assert ((draws.mean(0) - mean).abs() < 5 * std / count**0.5).all()
    assert ((draws.std(0) / std - 1).abs() < 5 / (2 * count) ** 0.5).all()


def test_gradient_passes_through_the_posterior_sample():
    mean, log_variance = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    draw = WaveletAutoencoderKL.sample(mean, log_variance)
    draw.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(6))
    torch.testing.assert_close(log_variance.grad, (draw - mean).detach() / 2)  # d/dl of exp(l / 2) epsilon


def test_forward_decodes_a_draw_from_its_own_posterior():
    network = tiny()
    image = torch.randn(1, 1, 8, 8, 8)
    torch.manual_seed(1)
    reconstruction, latent, mean, log_variance = network(image)
    torch.manual_seed(1)
    epsilon = torch.randn_like(mean)
    torch.testing.assert_close((mean, log_variance), network.encode(image))
    torch.testing.assert_close(latent, mean + log_variance.exp().sqrt() * epsilon)
    torch.testing.assert_close(reconstruction, network.decode(latent))


@pytest.mark.parametrize("bias, bound", ((1e4, 20.0), (-1e4, -30.0)))
def test_log_variance_stays_bounded(bias, bound):
    network = tiny()
    nn.init.constant_(network.encoder[-1].bias, bias)
    log_variance = network.encode(torch.randn(1, 1, 8, 8, 8))[1]
    assert torch.equal(log_variance, torch.full_like(log_variance, bound))


def test_first_half_of_the_latent_is_structure_and_the_second_modality():
    latent = torch.arange(12.0).view(2, 6, 1, 1, 1)
    structure, modality = WaveletAutoencoderKL.split(latent)
    assert structure.flatten(1).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert modality.flatten(1).tolist() == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize("stem, levels, wavelet", (("haar", 2, "haar"), ("conv", 3, "haar"), ("haar", 2, None)))
def test_latent_moves_with_the_image(stem, levels, wavelet):
    network = tiny(stem, levels, wavelet=wavelet).eval()
    image = torch.randn(1, 1, 192 + 16, 16, 16)
    with torch.no_grad():
        latent, shifted = network.encode(image[:, :, :-16])[0], network.encode(image[:, :, 16:])[0]
    margin = 16  # latent voxels, more than the receptive field
    interior, moved = latent[:, :, 4 + margin : -margin], shifted[:, :, margin : -4 - margin]
    assert interior.shape[2] == 12 and interior.std() > 0.01
    torch.testing.assert_close(moved, interior, atol=1e-5, rtol=1e-4)


def test_image_moves_with_the_latent():
    network = tiny().eval()
    latent = torch.randn(1, 4, 48 + 4, 4, 4)
    with torch.no_grad():
        image, shifted = network.decode(latent[:, :, :-4]), network.decode(latent[:, :, 4:])
    margin = 64
    interior, moved = image[:, :, 16 + margin : -margin], shifted[:, :, margin : -16 - margin]
    assert interior.shape[2] == 48 and interior.std() > 0.01
    torch.testing.assert_close(moved, interior, atol=1e-5, rtol=1e-4)


def test_an_empty_region_does_not_change_what_is_encoded_elsewhere():
    network = tiny().eval()
    image = torch.randn(1, 1, 192, 16, 16)
    emptied = image.clone()
    emptied[:, :, :96] = -1
    with torch.no_grad():
        latent, changed = network.encode(image)[0], network.encode(emptied)[0]
    assert (latent - changed)[:, :, :24].abs().max() > 0.1
    torch.testing.assert_close(changed[:, :, 40:], latent[:, :, 40:], atol=1e-5, rtol=1e-4)


def test_gradient_reaches_every_parameter():
    network = tiny()
    reconstruction, _, mean, log_variance = network(torch.randn(1, 1, 32, 32, 32))
    (reconstruction.square().mean() + mean.square().mean() + log_variance.exp().mean()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

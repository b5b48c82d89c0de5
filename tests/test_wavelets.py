"""The 3D wavelet transform: PyWavelets' coefficients, an exact inverse, right gradients, full precision."""

from itertools import product

import numpy as np
import pytest
import pywt
import torch

from custom_modules.networks.wavelets import BANDS, WaveletTransform3d

WAVELETS = ("haar", "db1", "db2", "bior2.2", "sym4")
SIZES = ((8, 6, 4), (7, 5, 9), (4, 9, 6), (1, 2, 3))
BAND_NAMES = ["".join(letters) for letters in product("ad", repeat=3)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("size", (*SIZES, (4, 6, 16), (2, 4, 12)))
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_bands_are_the_coefficients_of_pywavelets(wavelet, size, channels):
    x = torch.randn(2, channels, *size)
    expected = pywt.dwtn(x.double().numpy(), wavelet, mode="symmetric", axes=(2, 3, 4))
    expected = np.concatenate([expected[name] for name in BAND_NAMES], axis=1)
    np.testing.assert_allclose(WaveletTransform3d(wavelet)(x).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_inverse_gives_the_input_back_at_its_own_size(wavelet, size, channels):
    transform = WaveletTransform3d(wavelet)
    x = torch.randn(2, channels, *size)
    torch.testing.assert_close(transform.inverse(transform(x), size), x, atol=5e-6, rtol=0)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_inverse_of_any_bands_is_that_of_pywavelets(wavelet):
    size = (8, 6, 10)
    bands = torch.randn_like(WaveletTransform3d(wavelet)(torch.zeros(1, 2, *size)))  # not the bands of any image
    named = dict(zip(BAND_NAMES, bands.double().numpy().reshape(1, BANDS, 2, *bands.shape[2:]).swapaxes(0, 1)))
    expected = pywt.idwtn(named, wavelet, mode="symmetric", axes=(2, 3, 4))
    np.testing.assert_allclose(WaveletTransform3d(wavelet).inverse(bands, size).numpy(), expected, atol=5e-6)


def test_haar_keeps_the_energy_of_even_sizes():
    x = torch.randn(2, 3, 8, 6, 4, dtype=torch.float64)
    bands = WaveletTransform3d("haar")(x)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())


@pytest.mark.parametrize("wavelet", ("haar", "db2"))
@pytest.mark.parametrize("band", range(1, BANDS))
def test_a_checkerboard_along_the_axes_of_a_band_fills_that_band_alone(wavelet, band):
    alternating = torch.tensor([1.0, -1.0]).repeat(8)
    axes = [axis for axis, bit in enumerate(format(band, "03b")) if bit == "1"]
    x = torch.ones(1, 1, 16, 16, 16)
    for axis in axes:
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = 16
        x = x * alternating.view(shape)
    energy = WaveletTransform3d(wavelet)(x)[..., 2:-2, 2:-2, 2:-2].square().sum(dim=(0, 2, 3, 4))
    assert energy[band] > 1
    assert energy.sum() - energy[band] < 1e-6 * energy[band]


@pytest.mark.parametrize("size", ((4, 2, 4), (3, 4, 5)))
@pytest.mark.parametrize("wavelet", ("haar", "db2", "bior2.2"))
def test_gradients_of_both_directions_are_those_of_finite_differences(wavelet, size):
    transform = WaveletTransform3d(wavelet).double()
    x = torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)
    bands = torch.randn_like(transform(x.detach())).requires_grad_()
    assert torch.autograd.gradcheck(transform, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda b: transform.inverse(b, size), (bands,), fast_mode=True)


@pytest.mark.parametrize("name", ("nope", "", "gaus1"))
def test_unknown_wavelet_is_refused(name):
    with pytest.raises(ValueError, match="wavelet"):
        WaveletTransform3d(name)


@pytest.mark.parametrize("wavelet", ("haar", "db2"))
def test_bfloat16_autocast_does_not_round(wavelet):
    transform = WaveletTransform3d(wavelet)
    x = torch.randn(1, 2, 6, 7, 8)
    bands = transform(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bands_autocast, x_autocast = transform(x), transform.inverse(bands, x.shape[2:])
    torch.testing.assert_close(bands_autocast, bands, atol=1e-6, rtol=0)
    torch.testing.assert_close(x_autocast, x, atol=5e-6, rtol=0)


@pytest.mark.parametrize("wavelet", ("haar", "db2"))
def test_gradient_is_not_rounded_under_bfloat16_autocast(wavelet):
    transform = WaveletTransform3d(wavelet)
    x = torch.randn(1, 2, 4, 6, 8, requires_grad=True)
    weight = torch.randn_like(transform(x))
    (expected,) = torch.autograd.grad((transform(x) * weight).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (actual,) = torch.autograd.grad((transform(x) * weight).sum(), x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wavelet", ("haar", "db2"))
@pytest.mark.parametrize("size", ((4, 6, 8), (5, 6, 7)))
def test_memory_format_does_not_change_the_values(wavelet, size):
    transform = WaveletTransform3d(wavelet)
    x = torch.randn(2, 3, *size)
    bands = transform(x)
    last = {"memory_format": torch.channels_last_3d}
    torch.testing.assert_close(transform(x.contiguous(**last)), bands)
    torch.testing.assert_close(transform.inverse(bands.contiguous(**last), size), transform.inverse(bands, size))

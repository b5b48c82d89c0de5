"""The building blocks: formulas written out by hand, Fig. 2 step by step, and no statistics over space."""

from itertools import product

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from torch import nn

from custom_modules.networks import wavelets
from custom_modules.networks.blocks import (
    ChannelRMSNorm,
    DepthwiseConv3d,
    ResidualBlock,
    WaveletBlock,
    WaveletResidualModule,
)

BAND_NAMES = ["".join(letters) for letters in product("ad", repeat=3)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(module):
    """Every parameter away from what it starts as, so that none can be left out unnoticed."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return module


def rms_norm(x, weight):
    return x / (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight.view(1, -1, 1, 1, 1)


def depthwise(x, conv):
    return F.conv3d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=x.shape[1])


def pywt_bands(x, wavelet):
    bands = pywt.dwtn(x.numpy(), wavelet, mode="symmetric", axes=(2, 3, 4))
    return torch.from_numpy(np.concatenate([bands[name] for name in BAND_NAMES], axis=1))


def pywt_inverse(bands, wavelet, size):
    named = dict(zip(BAND_NAMES, np.split(bands.numpy(), 8, axis=1)))
    x = torch.from_numpy(pywt.idwtn(named, wavelet, mode="symmetric", axes=(2, 3, 4)))
    return x[:, :, : size[0], : size[1], : size[2]]


@torch.no_grad()
def figure_2(module, x, wavelet):
    """The Wavelet Residual Module as section III.A tells it, with PyWavelets."""
    c = x.shape[1]
    group, point = module.primary
    primary = x + F.conv3d(depthwise(x, group), point.weight, point.bias)
    bands1 = pywt_bands(x, wavelet)  # L1, H1
    bands1_conv = depthwise(bands1, module.level1)
    low1_prime, high1_prime = bands1_conv[:, :c], bands1_conv[:, c:]
    bands2 = depthwise(pywt_bands(bands1[:, :c], wavelet), module.level2)  # L2, H2 and their convolution
    low1_double_prime = pywt_inverse(bands2, wavelet, bands1.shape[2:])
    enhanced = pywt_inverse(torch.cat([low1_prime + low1_double_prime, high1_prime], dim=1), wavelet, x.shape[2:])
    return F.conv3d(primary + module.scale * enhanced, module.out.weight, module.out.bias)


def test_rms_norm_is_the_formula_over_the_channels_of_each_voxel():
    norm = randomize(ChannelRMSNorm(5))
    x = torch.randn(2, 5, 3, 4, 2)
    torch.testing.assert_close(norm(x), rms_norm(x, norm.weight))


def test_rms_norm_of_an_empty_voxel_is_zero():
    assert torch.equal(ChannelRMSNorm(4)(torch.zeros(1, 4, 2, 2, 2)), torch.zeros(1, 4, 2, 2, 2))


def test_rms_norm_of_a_voxel_depends_on_that_voxel_alone():
    norm = ChannelRMSNorm(4)
    x = torch.randn(1, 4, 3, 4, 5)
    changed = x.clone()
    changed[0, 2, 1, 2, 3] += 100
    difference = (norm(changed) - norm(x)).abs().amax(dim=(0, 1))
    assert difference[1, 2, 3] > 0.1
    difference[1, 2, 3] = 0
    assert difference.max() == 0


@pytest.mark.parametrize("kernel_size", (1, 3, 5))
@pytest.mark.parametrize("size", ((6, 6, 6), (2, 5, 3)))
def test_depthwise_convolution_and_its_gradients_are_those_of_conv3d(kernel_size, size):
    conv = DepthwiseConv3d(4, kernel_size)
    reference = nn.Conv3d(4, 4, kernel_size, padding=kernel_size // 2, groups=4)
    reference.load_state_dict(conv.state_dict())
    x, x_reference = (t.requires_grad_() for t in torch.randn(1, 2, 4, *size).repeat(2, 1, 1, 1, 1, 1))
    y, y_reference = conv(x), reference(x_reference)
    torch.testing.assert_close(y, y_reference)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (y_reference * weight).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv.weight.grad, reference.weight.grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(conv.bias.grad, reference.bias.grad, atol=1e-4, rtol=1e-5)


def test_depthwise_convolution_without_gradients_gives_the_same():
    conv = DepthwiseConv3d(4, 3)
    x = torch.randn(1, 4, 5, 6, 7)
    with torch.no_grad():
        inference = conv(x)
    torch.testing.assert_close(inference, conv(x))


@pytest.mark.parametrize("channels", (1, 3, 24, 32, 48))
def test_gradient_of_the_kernel_is_right_for_every_number_of_channels(channels):
    conv = DepthwiseConv3d(channels, 3)
    x, weight = torch.randn(2, 2, channels, 4, 5, 3)
    (conv(x) * weight).sum().backward()
    expected = torch.func.grad(lambda w: (F.conv3d(x, w, padding=1, groups=channels) * weight).sum())(conv.weight)
    torch.testing.assert_close(conv.weight.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", (1, 3, 24, 32))
def test_wide_groups_with_a_diagonal_are_the_depthwise_convolution(channels):
    """What CUDA computes, here on the CPU."""
    conv = DepthwiseConv3d(channels, 3)
    x, weight = torch.randn(2, 2, channels, 4, 5, 3)
    wide = conv.wide_weight()
    y = F.conv3d(x, wide, conv.bias, padding="same", groups=channels // wide.shape[1])
    torch.testing.assert_close(y, conv(x), atol=1e-5, rtol=1e-5)
    own, expected = (torch.autograd.grad((out * weight).sum(), conv.weight)[0] for out in (y, conv(x)))
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_depthwise_convolution_follows_autocast_on_cpu():
    conv = DepthwiseConv3d(32, 3)
    x = torch.randn(1, 32, 8, 6, 7)

    def gradients() -> list[torch.Tensor]:
        conv.zero_grad()
        leaf = x.clone().requires_grad_()
        y = conv(leaf)
        y.float().square().sum().backward()
        return [y.float(), leaf.grad, conv.weight.grad, conv.bias.grad]

    exact = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
        for rounded, expected in zip(gradients(), exact):
            assert (rounded - expected).norm() < 0.01 * expected.norm()


def test_bfloat16_gradients_of_two_voxels_are_numbers():
    conv = DepthwiseConv3d(256, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(30):  # without care about one in two is NaN
            torch.full((2**20,), torch.nan)  # where the next tensor is made
            conv.zero_grad()
            conv(torch.randn(4, 256, 2, 2, 2)).sum().backward()
            assert conv.weight.grad.isfinite().all()


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size"):
        DepthwiseConv3d(4, 4)


@pytest.mark.parametrize("wavelet, kernel_size", (("haar", 3), ("haar", 5), ("db2", 3), ("bior2.2", 3)))
@pytest.mark.parametrize("size", ((8, 8, 8), (7, 5, 6), (3, 2, 1)))
def test_wavelet_residual_module_is_figure_2(wavelet, kernel_size, size):
    module = randomize(WaveletResidualModule(3, kernel_size, wavelet))
    x = torch.randn(2, 3, *size)
    actual, expected = module(x).detach(), figure_2(module, x, wavelet)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize(("width", "groups"), ((1, 8), (4, 2), (8, 1), (16, 1), (6, 4)))
def test_groups_are_as_wide_as_told_or_as_divides_the_channels(width, groups):
    module = randomize(WaveletResidualModule(8, group_width=width))
    assert module.primary[0].groups == groups and isinstance(module.primary[0], DepthwiseConv3d) == (width == 1)
    x = torch.randn(1, 8, 6, 6, 6)
    changed = x.clone()
    changed[:, 0] += 1
    convolution = module.primary[0]
    alike = torch.isclose(convolution(x), convolution(changed), atol=1e-6).flatten(2).all(2)[0]
    assert alike.tolist() == [channel >= 8 // groups for channel in range(8)]  # a group sees its own channels only
    assert module(x).shape == x.shape


def test_without_its_wavelet_branch_the_module_is_its_primary_stream():
    module = randomize(WaveletResidualModule(3))
    nn.init.zeros_(module.scale)
    group, point = module.primary
    x = torch.randn(1, 3, 7, 6, 5)
    primary = x + F.conv3d(depthwise(x, group), point.weight, point.bias)
    expected = F.conv3d(primary, module.out.weight, module.out.bias)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branch_scale", (0.1, 0.7))
def test_the_branch_starts_as_strong_as_told(branch_scale):
    module = WaveletResidualModule(3, branch_scale=branch_scale)
    whole, weaker = WaveletResidualModule(3, branch_scale=1.0), WaveletResidualModule(3, branch_scale=0.0)
    for other in (whole, weaker):
        state = {name: value for name, value in module.state_dict().items() if name != "scale"}
        other.load_state_dict(state, strict=False)
    x = torch.randn(1, 3, 4, 4, 4)
    assert (whole(x) - weaker(x)).abs().max() > 0.01
    torch.testing.assert_close(module(x), torch.lerp(weaker(x), whole(x), branch_scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wavelet", ("haar", "db2"))
def test_gradient_reaches_every_parameter_of_the_module(wavelet):
    module = WaveletResidualModule(3, wavelet=wavelet)
    x = torch.randn(1, 3, 8, 16, 8, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.abs().min() > 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and (parameter.grad != 0).all(), name


def test_gradients_of_the_module_are_those_of_autograd_through_plain_layers(monkeypatch):
    module = randomize(WaveletResidualModule(2))
    x = torch.randn(1, 2, 6, 5, 4)

    def gradients():
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        return [leaf.grad, *(p.grad for p in module.parameters())]

    actual = gradients()
    monkeypatch.setattr(DepthwiseConv3d, "forward", nn.Conv3d.forward)
    plain_haar = {False: wavelets._haar_forward, True: wavelets._haar_inverse}
    monkeypatch.setattr(wavelets, "_haar", lambda x, inverse: plain_haar[inverse](x))
    for a, e in zip(actual, gradients(), strict=True):
        torch.testing.assert_close(a, e, atol=1e-4 * e.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("widths", ((4, 4), (4, 6)))
def test_residual_block_is_its_formula(widths):
    block = randomize(ResidualBlock(*widths, embedding_channels=5))
    x, embedding = torch.randn(2, widths[0], 5, 4, 3), torch.randn(2, 5)
    h = F.conv3d(F.silu(rms_norm(x, block.norm1.weight)), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = F.linear(F.silu(embedding), block.embedding.weight, block.embedding.bias).split(widths[1], dim=1)
    h = rms_norm(h, block.norm2.weight) * (1 + scale.view(2, -1, 1, 1, 1)) + shift.view(2, -1, 1, 1, 1)
    h = F.conv3d(F.silu(h), block.conv2.weight, block.conv2.bias, padding=1)
    skip = x if widths[0] == widths[1] else F.conv3d(x, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, embedding), skip + h, atol=1e-4, rtol=1e-4)


def test_time_embedding_acts_on_its_own_sample_alone():
    block = ResidualBlock(4, 4, embedding_channels=5)
    x, embedding = torch.randn(1, 4, 4, 4, 4).repeat(2, 1, 1, 1, 1), torch.randn(1, 5).repeat(2, 1)
    before = block(x, embedding)
    embedding[1] += 1
    after = block(x, embedding)
    assert torch.equal(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_wavelet_block_has_the_module_as_its_second_layer():
    block = randomize(WaveletBlock(3, 5, kernel_size=5, wavelet="db2"))
    x = torch.randn(1, 3, 6, 5, 4)
    h = F.conv3d(F.silu(rms_norm(x, block.norm1.weight)), block.conv1.weight, block.conv1.bias, padding=1)
    h = figure_2(block.conv2, F.silu(rms_norm(h, block.norm2.weight)).detach(), "db2")
    expected = F.conv3d(x, block.skip.weight, block.skip.bias) + h
    torch.testing.assert_close(block(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block, reach", ((ResidualBlock, 3), (WaveletBlock, 8)))
def test_a_block_sees_no_farther_than_its_receptive_field(block, reach):
    block = block(3, 4)
    x = torch.randn(1, 3, 32, 4, 4)
    changed = x.clone()
    changed[:, :, 0] += 10
    difference = (block(changed) - block(x)).detach().abs().amax(dim=(0, 1, 3, 4))
    assert difference[reach - 1] > 1e-4
    assert difference[reach:].max() < 1e-5

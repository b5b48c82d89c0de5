"""The diffusion U-Net: shapes, refusals, and what its output depends on."""

import pytest
import torch
from torch import nn

from custom_modules.networks.denoiser import LatentDenoiser
from custom_modules.networks.dsca import DualSkipConnectionAttention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**settings):
    return LatentDenoiser(
        **{"latent_channels": 4, "channels": (8, 16, 16), "num_blocks": 1, "attention_channels": 8, **settings}
    )


def wake(network):
    """The attention of a fresh network is silent: give its output projections a voice."""
    for module in network.modules():
        if isinstance(module, DualSkipConnectionAttention):
            for attention in (module.structure_emphasis, module.modality_filtering):
                nn.init.normal_(attention.out.weight)
    return network.eval()


def times(*values):
    return torch.tensor(values)


@pytest.mark.parametrize("channels, size", (((8,), (3, 5, 2)), ((8, 16), (4, 6, 2)), ((8, 16, 16), (8, 4, 12))))
@pytest.mark.parametrize("dsca", (True, False))
def test_prediction_has_the_shape_of_the_ct_latent(channels, size, dsca):
    network = tiny(channels=channels, num_blocks=2, dsca=dsca)
    assert network(torch.randn(2, 8, *size), times(3, 900)).shape == (2, 4, *size)


@pytest.mark.parametrize("size", ((8, 8, 6), (7, 8, 8), (8, 2, 8)))
def test_size_that_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match="multiple of 4"):
        tiny()(torch.zeros(1, 8, *size), times(0))


def test_every_scale_has_its_attention_of_the_width_of_the_scale():
    network = tiny(channels=(8, 16, 24), attention_channels=4)
    modules = [m for m in network.modules() if isinstance(m, DualSkipConnectionAttention)]
    assert [m.structure_emphasis.out.out_channels for m in modules] == [8, 16, 24]
    assert [m.modality_filtering.query.out_channels for m in modules] == [4, 4, 4]


def test_without_dsca_no_attention_is_left():
    modules = list(tiny(dsca=False).modules())
    assert not any(isinstance(m, DualSkipConnectionAttention) for m in modules)


def test_fresh_network_is_that_without_dsca():
    plain, attentive = tiny(dsca=False), tiny()
    missing = attentive.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(key.startswith("skip.") for key in missing.missing_keys)
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(attentive(x, times(5)), plain(x, times(5)))


@torch.no_grad()
def test_mr_latent_guides_through_the_input_and_through_the_attention():
    network = wake(tiny())
    x = torch.randn(1, 8, 4, 4, 4)
    changed = x.clone()
    changed[:, 4:] += torch.randn(1, 4, 4, 4, 4)

    def influence():
        return (network(changed, times(500)) - network(x, times(500))).abs().max()

    assert influence() > 1e-3
    network.conv_in.weight[:, 4:] = 0
    assert influence() > 1e-3  # by the attention alone
    for module in network.skip:
        for attention in (module.structure_emphasis, module.modality_filtering):
            nn.init.zeros_(attention.out.weight)
    assert influence() == 0


@torch.no_grad()
@pytest.mark.parametrize("scale", (0, 1, 2))
def test_attention_of_every_scale_acts(scale):
    network = tiny().eval()
    x = torch.randn(1, 8, 4, 4, 4)
    silent = network(x, times(500))
    nn.init.normal_(network.skip[scale].structure_emphasis.out.weight)
    assert (network(x, times(500)) - silent).abs().max() > 1e-3


@torch.no_grad()
def test_samples_of_a_batch_have_their_own_timestep_and_nothing_in_common():
    network = wake(tiny())
    x = torch.randn(1, 8, 4, 4, 4)
    other = torch.randn(1, 8, 4, 4, 4)
    together = network(torch.cat([x, x, other]), times(10, 900, 10))
    early, late = network(x, times(10)), network(x, times(900))
    torch.testing.assert_close(together[:2], torch.cat([early, late]), atol=1e-5, rtol=1e-4)
    assert (early - late).abs().max() > 1e-3


@torch.no_grad()
def test_the_condition_is_all_that_the_mr_latent_has_to_say():
    network = wake(tiny())
    z, z_mr = torch.randn(2, 2, 4, 8, 4, 4)
    condition = network.condition(z_mr)
    assert all(len(tensor) == 2 for tensor in condition)
    for t in (10, 900):
        expected = network(torch.cat([z, z_mr], dim=1), times(t, t))
        torch.testing.assert_close(network.denoise(z, times(t, t), condition), expected)
    halves = [torch.cat(pair) for pair in zip(network.condition(z_mr[:1]), network.condition(z_mr[1:]))]
    torch.testing.assert_close(network.denoise(z, times(10, 10), halves), network.denoise(z, times(10, 10), condition))


@torch.no_grad()
def test_the_first_convolution_is_that_of_both_latents_at_once():
    network = tiny()
    z, z_mr = torch.randn(2, 1, 4, 8, 4, 4)
    weight = network.conv_in.weight[:, : network.latent_channels]
    halves = nn.functional.conv3d(z, weight, padding=1) + network.condition(z_mr)[0]
    torch.testing.assert_close(halves, network.conv_in(torch.cat([z, z_mr], dim=1)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_keys_are_those_of_the_pooled_latent():
    full, pooled = wake(tiny(window=4, pooling=1)), tiny(window=8, pooling=2).eval()
    pooled.load_state_dict(full.state_dict())
    z_mr = torch.randn(1, 4, 16, 8, 8)
    means = z_mr.unflatten(4, (4, 2)).unflatten(3, (4, 2)).unflatten(2, (8, 2)).mean(dim=(3, 5, 7))
    for actual, expected in zip(pooled.condition(z_mr)[1:], full.condition(means)[1:]):
        assert actual.shape[:2] == (2, 64)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("window, pooling, expected", ((16, 2, 16), (6, 2, 8), (8, 3, 12), (1, 8, 8)))
def test_window_is_rounded_up_to_what_the_scales_and_the_pooling_divide(window, pooling, expected):
    assert tiny(window=window, pooling=pooling).window == expected


@torch.no_grad()
@pytest.mark.parametrize("length", (64, 60))
def test_a_part_on_the_grid_of_windows_has_the_answer_of_the_whole_away_from_its_ends(length):
    """What makes tiles possible: the output at a place does not depend on how much of the volume is given."""
    network = wake(tiny(window=8))
    z, z_mr = torch.randn(2, 1, 4, length, 8, 8)

    def output(part):
        return network(torch.cat([z[:, :, part], z_mr[:, :, part]], dim=1), times(500))[:, :, 32 - part.start :]

    whole, alone, shifted = (output(slice(start, None)) for start in (0, 8, 12))
    scale = whole.std()
    torch.testing.assert_close(alone, whole, atol=1e-4 * scale, rtol=0)
    assert (shifted - whole)[:, :, :8].abs().max() > 1e-2 * scale  # off the grid of the windows


def test_context_of_monai_inferers_is_ignored():
    network = wake(tiny())
    x = torch.randn(1, 8, 4, 4, 4)
    assert torch.equal(network(x, times(10), context=torch.randn(1, 3)), network(x, timesteps=times(10)))


def test_gradient_reaches_every_parameter():
    network = wake(tiny(num_blocks=2)).train()
    network(torch.randn(2, 8, 8, 8, 8), times(10, 900)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_answer_is_single_precision_under_autocast():
    network = wake(tiny())
    x = torch.randn(1, 8, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = network(x, times(10))
    exact = network(x, times(10))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.std()

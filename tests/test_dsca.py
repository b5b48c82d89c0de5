"""Dual Skip Connection Attention against softmax attention in numpy, and which half of the latent feeds what."""

import numpy as np
import pytest
import torch
from torch import nn

from custom_modules.networks.dsca import (
    DualSkipConnectionAttention,
    ModalityFiltering,
    StructureEmphasis,
    join_windows,
    split_windows,
)

CHANNELS, LATENT, ATTENTION, WINDOW = 5, 6, 4, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def dual():
    return randomize(DualSkipConnectionAttention(CHANNELS, LATENT, ATTENTION, WINDOW))


def attend(module, features, context):
    """One of the two attentions, from the half of the latent that it looks at."""
    return module(features, *module.keys_and_values(context))


def skip(module, e, d, z):
    return module(e, d, *module.keys_and_values(z))


def features(channels, *size):
    return torch.randn(2, channels, *size)


def pointwise(conv, tokens):
    """A 1 x 1 x 1 convolution on (tokens, channels)."""
    return tokens @ conv.weight.detach().numpy().reshape(conv.out_channels, -1).T + conv.bias.detach().numpy()


def numpy_attention(module, x, context):
    """Queries and softmax(Q K^T / sqrt(d)) V of one sample, both (tokens, d), and the way back to a volume."""
    tokens, keys = (t.numpy().reshape(len(t), -1).T for t in (x, context))
    normed = tokens / np.sqrt((tokens**2).mean(1, keepdims=True)) * module.norm.weight.detach().numpy()
    q, k, v = pointwise(module.query, normed), pointwise(module.key, keys), pointwise(module.value, keys)
    scores = np.exp(q @ k.T / np.sqrt(ATTENTION))
    return q, scores / scores.sum(1, keepdims=True) @ v


def as_volume(module, tokens, x):
    return torch.from_numpy(pointwise(module.out, tokens).T.reshape(x.shape)).float()


@pytest.mark.parametrize("size, context_size", (((2, 3, 4), (3, 2, 2)), ((1, 1, 1), (4, 4, 4)), ((3, 3, 3), (1, 1, 1))))
def test_structure_emphasis_is_equation_9(size, context_size):
    module = randomize(StructureEmphasis(CHANNELS, LATENT // 2, ATTENTION, WINDOW))
    x, structure = features(CHANNELS, *size), features(LATENT // 2, *context_size)
    for actual, a, s in zip(attend(module, x, structure).detach(), x, structure):
        expected = as_volume(module, numpy_attention(module, a, s)[1], a)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size, context_size", (((2, 3, 4), (3, 2, 2)), ((1, 1, 1), (4, 4, 4)), ((3, 3, 3), (1, 1, 1))))
def test_modality_filtering_is_equation_10(size, context_size):
    module = randomize(ModalityFiltering(CHANNELS, LATENT // 2, ATTENTION, WINDOW))
    x, modality = features(CHANNELS, *size), features(LATENT // 2, *context_size)
    for actual, a, m in zip(attend(module, x, modality).detach(), x, modality):
        query, attended = numpy_attention(module, a, m)
        torch.testing.assert_close(actual, as_volume(module, query - attended, a), atol=1e-4, rtol=1e-4)


def test_skip_is_the_sum_of_figure_4_with_the_decoder_features_behind_it():
    module = dual()
    e, d, z = features(CHANNELS, 4, 2, 2), features(7, 4, 2, 2), features(LATENT, 3, 3, 3)
    structure, modality = z[:, : LATENT // 2], z[:, LATENT // 2 :]
    expected = e + attend(module.structure_emphasis, e, structure) + attend(module.modality_filtering, e, modality)
    out = skip(module, e, d, z)
    torch.testing.assert_close(out[:, :CHANNELS], expected)
    assert torch.equal(out[:, CHANNELS:], d)


def test_fresh_module_is_a_plain_concatenation_that_can_learn():
    module = DualSkipConnectionAttention(CHANNELS, LATENT, ATTENTION, WINDOW)
    e, d, z = features(CHANNELS, 4, 2, 2), features(7, 4, 2, 2), features(LATENT, 2, 2, 2)
    out = skip(module, e, d, z)
    assert torch.equal(out, torch.cat([e, d], dim=1))
    out.square().sum().backward()
    assert module.structure_emphasis.out.weight.grad.abs().min() > 0
    assert module.modality_filtering.out.weight.grad.abs().min() > 0


@pytest.mark.parametrize("silenced, seen", (("modality_filtering", "structure"), ("structure_emphasis", "modality")))
def test_each_half_of_the_latent_reaches_its_own_attention_alone(silenced, seen):
    module = dual()
    for parameter in getattr(module, silenced).out.parameters():
        nn.init.zeros_(parameter)
    e, d, z = features(CHANNELS, 2, 2, 2), features(7, 2, 2, 2), features(LATENT, 2, 2, 2)
    before = skip(module, e, d, z)
    other = {"structure": torch.cat([z[:, :3] + 1, z[:, 3:]], 1), "modality": torch.cat([z[:, :3], z[:, 3:] + 1], 1)}
    unseen = "modality" if seen == "structure" else "structure"
    assert torch.equal(skip(module, e, d, other[unseen]), before)
    assert (skip(module, e, d, other[seen]) - before).abs().max() > 0.1


@pytest.mark.parametrize("attention", (StructureEmphasis, ModalityFiltering))
def test_order_of_the_keys_does_not_matter(attention):
    module = randomize(attention(CHANNELS, 3, ATTENTION, WINDOW))
    x, context = features(CHANNELS, 2, 3, 2), features(3, 2, 3, 4)
    shuffled = context.flatten(2)[:, :, torch.randperm(24)].view_as(context)
    torch.testing.assert_close(attend(module, x, shuffled), attend(module, x, context), atol=1e-4, rtol=1e-4)


def test_features_at_a_voxel_do_not_reach_the_attention_of_another():
    module = dual()
    e, d, z = features(CHANNELS, 3, 3, 3), features(7, 3, 3, 3), features(LATENT, 2, 2, 2)
    changed = e.clone()
    changed[:, :, 1, 1, 1] += 5
    difference = (skip(module, changed, d, z) - skip(module, e, d, z)).detach().abs().amax(dim=(0, 1))
    assert difference[1, 1, 1] > 0.1
    difference[1, 1, 1] = 0
    assert difference.max() < 1e-5


@pytest.mark.parametrize("size", ((4, 8, 12), (5, 3, 9), (1, 1, 1), (4, 2, 7)))
def test_windows_are_blocks_of_the_volume_and_make_it_again(size):
    x = features(3, *size)
    windows = split_windows(x, WINDOW)
    sides = [min(WINDOW, length) for length in size]
    assert windows.shape[1:] == (3, *sides)
    margins = [(0, -length % side) for length, side in zip(size, sides)]
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), *margins], mode="edge")
    blocks = [
        padded[n, :, i : i + sides[0], j : j + sides[1], k : k + sides[2]]
        for n in range(2)
        for i in range(0, padded.shape[2], sides[0])
        for j in range(0, padded.shape[3], sides[1])
        for k in range(0, padded.shape[4], sides[2])
    ]
    np.testing.assert_array_equal(windows.numpy(), np.stack(blocks))
    assert torch.equal(join_windows(windows, x.shape, WINDOW), x)


def test_a_window_attends_to_its_own_keys_alone():
    module = dual()
    e, d, z = features(CHANNELS, 8, 4, 4), features(7, 8, 4, 4), features(LATENT, 8, 4, 4)

    def output(z):
        return module(e, d, *module.keys_and_values(split_windows(z, WINDOW)))

    changed = z.clone()
    changed[:, :, 5] += 5
    difference = (output(changed) - output(z)).detach().abs()
    assert difference[:, :, :4].max() == 0 and (difference[:, :CHANNELS, 4:].amax(dim=1) > 0).all()
    alone = skip(module, e[:, :, 4:], d[:, :, 4:], z[:, :, 4:])
    torch.testing.assert_close(output(z)[:, :, 4:], alone, atol=1e-5, rtol=1e-5)

"""The MR's skip connection to the decoder."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_network

from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.skip import MRSkip


@pytest.mark.parametrize(("stem", "levels"), [("haar", 2), ("conv", 3)])
def test_the_skip_has_the_shape_of_the_finest_features(stem, levels):
    autoencoder = WaveletAutoencoderKL(4, (8, 16, 16)[:levels], (1,) * levels, stem=stem)
    skip = MRSkip(autoencoder)
    torch.nn.init.normal_(skip.layers[-1].weight)
    mr, latent = torch.randn(2, 1, 16, 24, 8), torch.randn(2, 4, 4, 6, 2)
    with_mr, without = autoencoder.decode(latent, skip(mr)), autoencoder.decode(latent)
    assert with_mr.shape == without.shape == mr.shape and not torch.allclose(with_mr, without)


def test_an_untrained_skip_adds_nothing_and_is_trained():
    network = tiny_network()
    torch.nn.init.zeros_(network.mr_skip.layers[-1].weight)
    latent, mr = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 1, 16, 16, 16)
    image = network.decode(latent, detail=network.detail(mr))
    torch.testing.assert_close(image, network.decode(latent), atol=0, rtol=0)
    image.square().mean().backward()
    assert network.mr_skip.layers[-1].weight.grad.abs().max() > 0


def test_the_skip_changes_a_voxel_by_its_neighbourhood_only():
    network = tiny_network().eval()
    torch.nn.init.normal_(network.mr_skip.layers[-1].weight)
    latent, mr = torch.zeros(1, 4, 24, 24, 24), torch.zeros(1, 1, 96, 96, 96)
    changed = mr.clone()
    changed[0, 0, 48, 48, 48] = 1
    with torch.no_grad():
        difference = (
            network.decode(latent, detail=network.detail(mr)) - network.decode(latent, detail=network.detail(changed))
        ).abs()[0, 0]
    far = difference.clone()
    far[16:80, 16:80, 16:80] = 0
    assert difference[48, 48, 48] > 0 and far.max() == 0

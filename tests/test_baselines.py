"""Each baseline is what it says: its defining property, on tiny networks of its own config."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import nn

from bundle.compare.command import SYSTEMS
from custom_modules.baselines.diffusion import (
    AutoencoderKLLoss,
    ConditionalDiffusion,
    NoiseLoss,
    PairedPrepareBatch,
    SlicePrepareBatch,
    VolumeInferer,
    add_controlnet,
)
from custom_modules.baselines.gan import (
    ByChannel,
    CycleGAN,
    CycleLoss,
    ImagePool,
    PairAdversary,
    Pix2PixLoss,
    Pix2PixPrepareBatch,
    UnpairedAdversary,
    UnpairedPrepareBatch,
)
from custom_modules.networks.weights import save_weights
from custom_modules.training.losses import ValidL1Loss

TINY = {"channels": [32, 32, 32], "autoencoder_channels": [16, 16, 16], "blocks": [8], "seed": 0}


def config(name: str, base: str = "inference", **settings) -> ConfigParser:
    """The config of a system: ``base`` with its overlays."""
    files = [ROOT / "configs" / f"{file}.yaml" for file in (*base.split("+"), *SYSTEMS[name].overlays)]
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    channels = {"channels": [32] * 4} if name in ("ddpm", "ddim") else {}
    for key, value in {**TINY, **channels, **settings}.items():
        parser[key] = value
    return parser


def network(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    return config(name, **settings).get_parsed_content("network_def").eval()


def awake(module: nn.Module) -> nn.Module:
    """What MONAI starts at zero, the last convolutions of diffusion models, gets small weights, as by training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module


def sample(net: ConditionalDiffusion, sampler, seed: int, steps: int, monkeypatch) -> torch.Tensor:
    """From the same initial noise, with other seeds for whatever the sampler draws."""
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    torch.manual_seed(seed)
    return net.sample(torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16), sampler, steps)


@pytest.mark.parametrize(
    ("name", "kind", "stochastic"), [("ddpm", DDPMScheduler, True), ("ddim", DDIMScheduler, False)]
)
def test_ddpm_is_stochastic_and_ddim_with_eta_0_is_not(name, kind, stochastic, monkeypatch):
    settings = {"num_train_timesteps": 8, "num_inference_steps": 8 if stochastic else 4}
    parser = config(name, **settings)
    net, sampler = awake(parser.get_parsed_content("network_def").eval()), parser.get_parsed_content("sampler")
    assert type(sampler) is kind
    one, other = (sample(net, sampler, seed, settings["num_inference_steps"], monkeypatch) for seed in (1, 2))
    assert torch.equal(one, other) != stochastic


def test_ddim_samples_the_weights_of_ddpm():
    assert SYSTEMS["ddim"].stages == SYSTEMS["ddpm"].stages
    assert network("ddim").state_dict().keys() == network("ddpm").state_dict().keys()


@pytest.mark.parametrize("name", ["ddim", "stable_dm_2d", "stable_dm_3d", "controlnet"])
@pytest.mark.parametrize("key", ["num_inference_steps", "val_steps"])
def test_ddim_takes_the_steps_that_it_lists_and_ends_at_the_clean_image(name, key):
    parser = config(name)
    steps = parser.get_parsed_content(key)
    sampler = parser.get_parsed_content("val_sampler" if key == "val_steps" else "sampler")
    sampler.set_timesteps(steps)
    taken = sampler.timesteps - sampler.num_train_timesteps // steps
    assert taken.tolist() == [*sampler.timesteps[1:].tolist(), -1]
    assert int(sampler.timesteps[0]) == sampler.num_train_timesteps - 1


def test_latents_are_not_clipped_and_the_pixel_schedule_ends_in_noise_as_that_of_1000_steps():
    assert not config("stable_dm_2d").get_parsed_content("sampler").clip_sample
    short, long = (config(name).get_parsed_content("scheduler") for name in ("ddpm", "stable_dm_2d"))
    assert float(short.alphas_cumprod[-1]) < 1e-4 and float(long.alphas_cumprod[-1]) < 1e-4


@pytest.mark.parametrize("name", ["stable_dm_2d", "stable_dm_3d"])
def test_the_mr_reaches_the_noise_estimate_through_cross_attention_only(name):
    net = awake(network(name))
    size = (1, 1) + (32,) * (3 if name.endswith("3d") else 2)
    mr, ct = torch.rand(size), torch.rand(size)
    net.encode(ct)  # fixes the latents' scale

    def estimate(image: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return net(image, ct)[0]

    seen, other = estimate(mr), estimate(1 - mr)
    assert (seen - other).abs().max() > 1e-4
    for module in net.unet.modules():
        if type(module).__name__ == "CrossAttentionBlock":
            module.to_v.weight.data.zero_()
    torch.testing.assert_close(estimate(mr), estimate(1 - mr))


def test_the_tokens_say_where_they_are():
    net = network("stable_dm_2d")
    tokens = net.context(torch.zeros(1, 1, 32, 32))
    assert tokens.shape == (1, 64, 4 + 24)
    assert len({tuple(token.tolist()) for token in tokens[0, :, 4:]}) == 64


class Spy(nn.Module):
    """A U-Net that keeps what it is given."""

    def forward(self, x, timesteps, context=None):
        self.noisy, self.timestep = x, int(timesteps[0])
        return x


def test_the_target_is_what_the_sampler_takes_the_answer_for():
    """A perfect prediction leads back to the clean latent in one step of MONAI's sampler."""
    for name in ("ddpm", "stable_dm_2d"):
        parser = config(name)
        net, sampler = (parser.get_parsed_content(key) for key in ("network_def", "val_sampler"))
        net.unet = spy = Spy()
        ct = torch.rand(1, 1, 32, 32) * 2 - 1
        _, target = net(torch.rand(1, 1, 32, 32), ct)
        _, clean = sampler.step(target, spy.timestep, spy.noisy[:, : target.shape[1]])
        torch.testing.assert_close(clean, net.encode(ct), atol=2e-2, rtol=1e-2)


def test_the_autoencoder_below_a_latent_baseline_stays_as_it_is():
    net = network("stable_dm_2d")
    assert not any(p.requires_grad for p in net.autoencoder.parameters())
    prediction, noise = net(*torch.rand(2, 2, 1, 32, 32))
    NoiseLoss()((prediction, noise), torch.ones(2, 1, 32, 32)).backward()
    assert all(p.grad is None for p in net.autoencoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in net.unet.parameters())


def test_controlnets_copied_encoder_starts_as_a_zero_contribution_over_a_locked_model(tmp_path):
    below = awake(network("controlnet", **{"network_def#condition": "none", "network_def#controlnet": None}))
    below.encode(torch.rand(1, 1, 32, 32))
    save_weights(below, tmp_path / "below.pt", torch.float32)
    net = add_controlnet(network("controlnet"), str(tmp_path / "below.pt")).eval()
    mr, ct = torch.rand(2, 1, 1, 32, 32)

    def estimate(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(mr, ct)[0]

    assert torch.equal(estimate(net), estimate(below))
    copied, own = net.controlnet.state_dict(), net.unet.state_dict()
    shared = [key for key in copied if key in own]
    assert len(shared) > 20 and all(torch.equal(copied[key], own[key]) for key in shared)
    assert all(p.requires_grad == name.startswith("controlnet.") for name, p in net.named_parameters())
    awake(net.controlnet)
    assert not torch.equal(estimate(net), estimate(below))


def test_another_condition_or_a_controlnet_without_its_network_is_refused():
    for condition in ("sum", "controlnet"):
        with pytest.raises(ValueError, match="condition must be one of"):
            ConditionalDiffusion(nn.Identity(), DDPMScheduler(), condition)


def test_noise_is_not_learned_where_the_pair_cannot_teach():
    prediction, noise = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    prediction[..., :2] = 5
    valid = torch.ones(2, 1, 16, 16)
    valid[..., :8] = 0
    assert NoiseLoss()((prediction, noise), valid) == pytest.approx(1)


def test_the_kl_of_a_standard_normal_latent_is_zero():
    loss = AutoencoderKLLoss(adversary=lambda image: image.new_zeros(()), kl_weight=1.0)
    image = torch.rand(1, 1, 8, 8)
    assert loss((image, torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)), image) == pytest.approx(0)
    assert loss((image + 0.5, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2)), image) == pytest.approx(1.0, abs=1e-5)


def test_a_volume_comes_back_from_its_slices_as_it_was_and_each_slice_is_transverse():
    volume, seen = torch.rand(1, 1, 20, 18, 7), []

    def predict(images, _):
        seen.append(images.shape)
        return images + torch.arange(len(images)).view(-1, 1, 1, 1)

    result = VolumeInferer(predict, unit=16, slices=7)(volume, nn.Identity())
    assert seen == [(7, 1, 32, 32)]
    torch.testing.assert_close(result - volume, torch.arange(7.0).expand_as(volume))
    whole = VolumeInferer(lambda image, _: image, unit=16)(volume, nn.Identity())
    assert torch.equal(whole, volume)


class Sampler(nn.Module):
    """A network that returns the MR, and which keeps the sizes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def sample(self, mr, sampler, steps):
        self.seen.add(tuple(mr.shape[2:]))
        return mr

    def reconstruct(self, images):
        return self.sample(images, None, 1)


@pytest.mark.parametrize(
    ("base", "key"),
    [("inference", "inferer"), ("train+train_autoencoder", "inferer"), ("train+train_autoencoder", "val_inferer")],
)
def test_latents_in_3d_are_those_of_windows_of_the_training_crops_size(base, key):
    parser, net, volume = config("stable_dm_3d", base, slice_size=[16, 16, 16]), Sampler(), torch.rand(1, 1, 20, 12, 40)
    result = parser.get_parsed_content(key)(volume, net)
    assert net.seen == {tuple(parser.get_parsed_content("roi_size"))} == {(16, 16, 16)}
    torch.testing.assert_close(result, volume, atol=1e-2, rtol=1e-2)


def test_the_first_stage_in_3d_sees_such_windows_too():
    stage, parser, net = SYSTEMS["stable_dm_3d"].stages[0], ConfigParser(), Sampler()
    parser.read_config([str(ROOT / "configs" / f"{file}.yaml") for file in stage.files])
    parser.get_parsed_content("val_inferer")(torch.rand(1, 1, 60, 50, 50), net)
    assert net.seen == {tuple(parser.get_parsed_content("roi_size"))}


def test_a_volume_is_the_same_for_the_same_seed_and_the_generator_is_left_alone():
    inferer = [VolumeInferer(lambda image, _: torch.randn_like(image), 4, slices=2, seed=seed) for seed in (0, 0, 1)]
    before = torch.random.get_rng_state()
    one, again, other = (run(torch.zeros(1, 1, 4, 4, 5), nn.Identity()) for run in inferer)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(one[..., 0], one[..., 2])  # batches of slices have other noise


def pairs(count: int = 4) -> dict:
    """A batch in which patient n's MR is n everywhere and the CT n too."""
    image = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 10
    return {"image": image, "label": image.clone()}


def test_cyclegan_sees_no_pairs():
    mr, target, (ct,), _ = UnpairedPrepareBatch()(pairs(), "cpu")
    assert all(float(a.mean()) != float(b.mean()) for a, b in zip(mr, ct))
    assert torch.equal(target, torch.cat([mr, ct], dim=1))
    assert sorted(ct.flatten(1).mean(1).tolist()) == sorted(mr.flatten(1).mean(1).tolist())


def test_cyclegans_generators_go_round_and_its_loss_is_that_of_its_terms():
    gan = CycleGAN(ct_net := nn.Conv2d(1, 1, 1), mr_net := nn.Conv2d(1, 1, 1))
    to_ct, to_mr = (lambda image, net=net: net(image).tanh() for net in (ct_net, mr_net))
    mr, ct = torch.rand(2, 1, 1, 4, 4)
    output = gan(mr, ct)
    torch.testing.assert_close(gan(mr), to_ct(mr))
    torch.testing.assert_close(output["cycles"], torch.cat([to_mr(to_ct(mr)), to_ct(to_mr(ct))], dim=1))
    torch.testing.assert_close(output["same"], torch.cat([to_mr(mr), to_ct(ct)], dim=1))
    target = torch.cat([mr, ct], dim=1)
    perfect = {"fakes": target, "cycles": target, "same": target}
    assert CycleLoss(lambda fakes: fakes.new_tensor(0.25))(perfect, target) == pytest.approx(0.25)
    off = CycleLoss(lambda fakes: 0.0)({**perfect, "cycles": target + 0.1}, target)
    assert off == pytest.approx(10 * 2 * 0.1, abs=1e-5)


def test_cyclegans_discriminators_see_a_modality_each_and_images_from_the_pool():
    seen = []
    spies = [nn.Module() for _ in range(2)]
    for n, spy in enumerate(spies):
        spy.forward = lambda x, n=n: (seen.append((n, float(x.mean()))), [x])[1]
    ByChannel(spies)(torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])[None])
    assert seen == [(0, 0.0), (1, 1.0)]
    adversary = UnpairedAdversary(nn.Identity(), None, weight=0, pool=ImagePool(50))
    fakes, real = torch.rand(2, 1, 2, 4, 4)
    state = SimpleNamespace(state=SimpleNamespace(output={"pred": {"fakes": fakes}, "label": real}))
    assert torch.equal(adversary.images(state)[0], fakes) and torch.equal(adversary.images(state)[1], real)
    assert len(adversary.pool.pool) == 2


def test_a_full_pool_answers_with_old_images_and_keeps_new_ones():
    torch.manual_seed(0)
    pool = ImagePool(4)
    pool(torch.zeros(4, 1, 2, 2))
    result = pool(torch.ones(20, 1, 2, 2)).flatten(1).mean(1)
    assert 0 < result.mean() < 1 and len(pool.pool) == 4
    assert (result == 0).sum() == 4 - sum(float(image.mean()) == 0 for image in pool.pool)


def test_pix2pix_discriminator_sees_pairs_of_mr_and_ct():
    batch = {key: torch.rand(2, 1, 4, 4, 4) for key in ("image", "label")}
    mr, (ct, valid, seen) = Pix2PixPrepareBatch()(batch, "cpu")
    assert torch.equal(seen, mr) and torch.equal(mr, batch["image"]) and torch.equal(ct, batch["label"])
    fake = torch.rand(2, 1, 4, 4, 4)
    output = {"image": mr, "label": (ct, valid, mr), "pred": fake}
    adversary = PairAdversary(nn.Identity(), None, weight=0)
    generated, real = adversary.images(SimpleNamespace(state=SimpleNamespace(output=output)))
    assert torch.equal(generated, torch.cat([mr, fake], 1)) and torch.equal(real, torch.cat([mr, ct], 1))
    shown = []
    loss = Pix2PixLoss(lambda pair: (shown.append(pair), pair.new_tensor(0.5))[1])(fake, (ct, valid, mr))
    assert torch.equal(shown[0], generated)
    assert loss == pytest.approx(float(ValidL1Loss()(fake, (ct, valid))) + 0.5)
    parser = config("pix2pix", "train+train_autoencoder")
    assert parser.get_parsed_content("discriminator_def").initial_conv.conv.in_channels == 2
    assert parser["network_def"] == config("unet")["network_def"]


def test_the_unet_is_deterministic_regression():
    net = network("unet", **{"network_def#channels": [4, 8], "network_def#strides": [2]})
    assert config("unet", "train+train_autoencoder").get_parsed_content("loss").__class__ is ValidL1Loss
    mr = torch.rand(1, 1, 8, 8, 8)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(net(mr))
    assert torch.equal(*results)


def test_slices_go_to_another_prepare_batch_without_their_last_axis():
    batch = {key: torch.rand(2, 1, 8, 6, 1) for key in ("image", "label")} | {"patient": ["a", "b"]}
    mr, valid, (ct,), _ = SlicePrepareBatch(PairedPrepareBatch())(batch, "cpu")
    assert torch.equal(mr, batch["image"][..., 0]) and torch.equal(ct, batch["label"][..., 0])
    assert valid.shape == (2, 1, 8, 6)


# what a row of Table II leaves out of the full model, and nothing else
LEFT_OUT = {
    "vanilla": {"wavelet": None, "disentanglement_weight": 0.0, "dsca": False},
    "wrm": {"disentanglement_weight": 0.0, "dsca": False},
    "wrm_smd": {"dsca": False},
}


@pytest.mark.parametrize("name", list(LEFT_OUT))
@pytest.mark.parametrize("base", ["train+train_autoencoder", "train", "inference"])
def test_an_ablation_differs_from_the_full_model_by_what_its_row_says(name, base):
    plain, ablation = config("full", base).get(), config(name, base).get()
    assert {key: ablation[key] for key in ablation if ablation[key] != plain.get(key)} == {
        key: value for key, value in LEFT_OUT[name].items() if plain.get(key, "absent") != value
    }


def test_ablations_have_the_full_models_stages_and_shares():
    for name in LEFT_OUT:
        ours, full = (SYSTEMS[system].stages for system in (name, "full"))
        assert [stage.share for stage in ours] == [stage.share for stage in full]
        assert [set(a.files) - set(b.files) for a, b in zip(ours, full)] == [{f"ablations/{name}"}] * 2


def test_every_systems_stages_fill_its_budget_and_shared_ones_are_the_same():
    known = {}
    for system in SYSTEMS.values():
        assert sum(stage.share for stage in system.stages) == pytest.approx(1)
        for stage in system.stages:
            if stage.folder != "full_autoencoder":  # the ablation's overlay only changes stage 2 there
                assert known.setdefault(stage.folder, stage) == stage

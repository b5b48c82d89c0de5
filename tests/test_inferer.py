"""Whole-volume sampling: any size on its own grid, one sample for the patient, air left out, tiles that fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from custom_modules.errors import InputError
from custom_modules.inference.inferer import DENOISER_BYTES, TILE_BYTES, WholeVolumeInferer
from custom_modules.inference.tensorrt import through_forward
from custom_modules.inference.windows import WindowInferer
from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.denoiser import LatentDenoiser
from custom_modules.networks.schedule import DDIMSchedule
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.tiling import pad_to_windows

MODES = ("whole", "windows")
FACTOR = 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("custom_modules.inference.inferer.LEAST_TILE", 2**17)


class Mirror(nn.Module):
    """A synthesizer whose CT is the MR itself, exactly: encoder and decoder move 4 x 4 x 4 voxels to channels and back,
    the denoiser knows the result. What is left to be wrong is padding, tiling, blending, stepping and cropping."""

    downsampling = 2 * FACTOR
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.autoencoder = SimpleNamespace(downsampling=FACTOR, latent_channels=FACTOR**3)
        self.denoiser = SimpleNamespace(time_channels=8, window=4)
        self.schedule = DDIMSchedule()
        self.windows = []

    def encode(self, image, modality):
        assert modality == "MR" and not any(size % FACTOR for size in image.shape[2:])
        d, h, w = (size // FACTOR for size in image.shape[2:])
        blocks = image.reshape(-1, d, FACTOR, h, FACTOR, w, FACTOR)
        return blocks.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3).clone()

    def detail(self, mr):
        return None

    def decode(self, latent, detail):
        blocks = latent.unflatten(1, (FACTOR, FACTOR, FACTOR)).permute(0, 4, 1, 5, 2, 6, 3)
        return blocks.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, None].clone()

    def condition(self, z_mr):
        return (z_mr,)

    def predict(self, z, t, condition):
        (z_mr,) = condition
        self.windows += list(z_mr)
        return self.schedule.output_for(z_mr, z, t)

    def air_latent(self):
        return torch.full((1, FACTOR**3, 1, 1, 1), -1.0)


def tiny(prediction="v"):
    """Real networks, random weights, latents on a scale of 1; the denoiser needs multiples of 8 image voxels."""
    network = Synthesizer(
        WaveletAutoencoderKL(4, (8, 16), (1, 1)),
        LatentDenoiser(4, (8, 16), num_blocks=1, attention_channels=8, window=4),
        DDIMSchedule(prediction=prediction),
    )
    for module in network.denoiser.skip:  # silent in a fresh network
        nn.init.normal_(module.structure_emphasis.out.weight, std=0.2)
    nn.init.normal_(network.mr_skip.layers[-1].weight, std=0.2)
    for modality in ("MR", "CT"):
        network.set_latent_scale(modality, network.autoencoder.encode(torch.randn(4, 1, 16, 16, 16))[0].detach())
    return network.eval()


def inferer(sampling="whole", **settings):
    windows = {"window_size": (16, 16, 16), "overlap": 0.5}
    windows |= {name: settings.pop(name) for name in (*windows, "sw_batch_size") if name in settings}
    common = {"amp": False, "progress": False, "margin": 0, **settings}
    return WholeVolumeInferer(**common) if sampling == "whole" else WindowInferer(**common, **windows)


def volume(*size):
    return torch.rand(1, 1, *size) * 2 - 1


def slab(mr, length):
    """The body in the first voxels of the depth axis."""
    body = torch.zeros_like(mr)
    body[:, :, :length] = 1
    return body


@pytest.mark.parametrize(
    "size, padded", (((5, 9, 13), (16, 16, 24)), ((16, 17, 32), (16, 24, 32)), ((1, 30, 7), (16, 32, 24)))
)
def test_padding_replicates_the_edge_on_both_sides(size, padded):
    x = torch.randn(2, 3, *size)
    actual, inside = pad_to_windows(x, (16, 12, 24), 8)
    margins = [((p - s) // 2, (p - s + 1) // 2) for s, p in zip(size, padded)]
    assert torch.equal(actual, torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *margins], mode="edge")))
    assert torch.equal(actual[inside], x)


@pytest.mark.parametrize("sampling, steps", (("whole", 1), ("whole", 5), ("windows", 2)))
@pytest.mark.parametrize("size", ((16, 16, 16), (5, 9, 13), (33, 17, 21), (40, 6, 24), (1, 1, 1)))
@pytest.mark.parametrize("overlap", (0.5, 0.0))
def test_any_volume_comes_back_on_its_own_grid(size, sampling, steps, overlap):
    mr = volume(*size)
    ct = inferer(sampling=sampling, num_inference_steps=steps, overlap=overlap)(mr, Mirror())
    assert ct.shape == mr.shape
    torch.testing.assert_close(ct, mr, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window_size", ((9, 15, 23), (1, 1, 1), (64, 8, 16)))
def test_window_is_rounded_up_to_what_the_networks_divide_by(window_size):
    network, mr = Mirror(), volume(30, 20, 25)
    torch.testing.assert_close(inferer(window_size=window_size, sampling="windows")(mr, network), mr, atol=1e-4, rtol=0)
    expected = tuple(-(-size // 8) * 8 // FACTOR for size in window_size)
    assert {tuple(window.shape[1:]) for window in network.windows} == {expected}


@pytest.mark.parametrize("tile_voxels, halo", ((1, 0), (20_000, 0), (20_000, 4), (60_000, 16), (10**9, 32)))
def test_any_tile_gives_the_same(tile_voxels, halo):
    mr = volume(50, 34, 40)
    ct = inferer(tile_voxels=tile_voxels, halo=halo)(mr, Mirror())
    torch.testing.assert_close(ct, mr, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sampling", MODES)
@pytest.mark.parametrize("size", ((5, 9, 13), (19, 16, 21)))
def test_real_networks_take_any_volume(size, sampling):
    mr = volume(*size)
    ct = inferer(sampling=sampling)(mr, tiny())
    assert ct.shape == mr.shape and ct.isfinite().all()
    assert ct.abs().max() <= 1 and ct.std() > 0.01


@pytest.mark.parametrize("sampling", MODES)
@pytest.mark.parametrize("prediction, steps", (("v", 1), ("v", 3), ("epsilon", 3)))
def test_a_seed_has_one_answer_and_another_seed_another(sampling, prediction, steps):
    network, mr = tiny(prediction), volume(24, 16, 16)
    settings = {"sampling": sampling, "output": "sample", "sample_steps": steps}
    first = inferer(seed=3, **settings)(mr, network)
    torch.manual_seed(9)  # the global generator has no say
    assert torch.equal(inferer(seed=3, **settings)(mr, network), first)
    assert (inferer(seed=4, **settings)(mr, network) - first).abs().max() > 1e-3


def test_one_inferer_gives_every_patient_the_same_answer_twice():
    sampler, network, mr = inferer(seed=3), tiny(), volume(16, 16, 16)
    assert torch.equal(sampler(mr, network), sampler(mr, network))


@pytest.mark.parametrize("num_samples", (1, 2))
def test_answer_does_not_depend_on_the_window_batch(num_samples):
    network, mr = tiny(), volume(32, 24, 16)
    settings = {"sampling": "windows", "num_samples": num_samples}
    expected = inferer(sw_batch_size=1, **settings)(mr, network)
    for batch in (None, 3, 64):
        torch.testing.assert_close(inferer(sw_batch_size=batch, **settings)(mr, network), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sampling", MODES)
def test_one_window_over_everything_is_the_forward_of_the_network(sampling):
    network, mr = tiny(), volume(24, 16, 32)
    network.num_inference_steps = 3
    noise = torch.randn(1, 4, 6, 4, 8, generator=torch.Generator().manual_seed(5))
    settings = {"window_size": (24, 16, 32), "sampling": sampling, "seed": 5}
    sample = inferer(output="sample", sample_steps=3, **settings)(mr, network)
    torch.testing.assert_close(sample, network(mr, noise), atol=1e-5, rtol=0)
    estimate = inferer(num_inference_steps=3, **settings)(mr, network)
    torch.testing.assert_close(estimate, network(mr), atol=1e-5, rtol=0)  # from zeros


@torch.no_grad()
@pytest.mark.parametrize("sampling", MODES)
@pytest.mark.parametrize("size", ((16, 16, 16), (30, 24, 16)))
@pytest.mark.parametrize("timestep", (300, None))
def test_several_samples_are_those_of_single_runs_with_the_estimate_and_their_deviation(sampling, size, timestep):
    network, mr = tiny(), volume(*size)
    settings = {"sampling": sampling, "window_size": size, "sample_steps": 2, "sample_timestep": timestep}
    draws = torch.cat([inferer(seed=7 + k, output="sample", **settings)(mr, network) for k in range(3)])
    assert (draws[0] - draws[1]).abs().max() > 1e-3
    mean, deviation = inferer(seed=7, num_samples=3, **settings)(mr, network)[0]
    alone = inferer(seed=7, **settings)(mr, network)
    torch.testing.assert_close(mean, alone[0, 0], atol=1e-5, rtol=0)  # the estimate, however many samples
    assert (alone - draws[:1]).abs().max() > 1e-3
    torch.testing.assert_close(deviation, draws.std(0)[0], atol=1e-5, rtol=0)
    first = inferer(seed=7, num_samples=3, output="sample", **settings)(mr, network)[0]
    torch.testing.assert_close(first, torch.stack([draws[0, 0], deviation]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_samples_share_the_encoded_mr():
    network, mr = Mirror(), volume(32, 16, 16)
    encoded = []
    encode = network.encode
    network.encode = lambda *args: encoded.append(1) or encode(*args)
    inferer(num_samples=4, sample_steps=2, num_inference_steps=1)(mr, network)
    assert encoded == [1] and len(network.windows) == 1 + 4 * 2


def test_a_timestep_that_the_schedule_does_not_have_is_refused():
    network = Mirror()
    network.schedule = DDIMSchedule(num_train_timesteps=100)
    with pytest.raises(InputError, match="--sample_timestep 300: must be below num_train_timesteps, 100"):
        inferer(sample_timestep=300)(volume(16, 16, 16), network)
    assert inferer(sample_timestep=99, num_samples=2)(volume(16, 16, 16), network).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("steps", (1, 2))
def test_a_sample_starts_from_the_estimate_with_noise_of_its_timestep(steps):
    network, mr = tiny(), volume(16, 16, 16)
    z_mr = network.encode(mr, "MR")
    context, schedule = network.condition(z_mr), network.schedule
    estimate = schedule.sample(lambda z, t: network.predict(z, t, context), torch.zeros_like(z_mr), 1)
    noise = torch.randn(z_mr.shape, generator=torch.Generator().manual_seed(4))
    share = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[200]
    z = estimate * share**0.5 + noise * (1 - share) ** 0.5
    for t, next_t in ((200, -1),) if steps == 1 else ((200, 99), (99, -1)):
        z = schedule.step(network.predict(z, t, context), t, next_t, z)
    sample = inferer(output="sample", seed=4, margin=0, sample_steps=steps, sample_timestep=200)(mr, network)
    torch.testing.assert_close(sample, network.decode(z, detail=network.detail(mr)), atol=1e-4, rtol=0)


CUT = {  # windows of 16 at 0, 8, ..., tiles of 32
    "windows": {"sampling": "windows"},
    "whole": {"tile_voxels": 32 * 256 * DENOISER_BYTES // TILE_BYTES + 1, "halo": 0},
}


@pytest.mark.parametrize("sampling", MODES)
def test_where_there_is_no_body_samples_do_not_differ(sampling):
    mr = volume(160, 16, 16)
    _, deviation = inferer(num_samples=2, **CUT[sampling])(mr, tiny(), slab(mr, 8))[0]
    assert deviation[:8].max() > 1e-3
    far = deviation[120:]  # beyond what holds body and a decoder's reach
    torch.testing.assert_close(far, torch.zeros_like(far), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling, every, held, end", (("windows", 11, 3, 32), ("whole", 3, 1, 32)))
def test_windows_and_tiles_without_body_are_not_computed(sampling, every, held, end):
    mr, everywhere, masked = volume(96, 16, 16), Mirror(), Mirror()
    sampler = inferer(num_inference_steps=2, **CUT[sampling])
    sampler(mr, everywhere)
    ct = sampler(mr, masked, slab(mr, 20))
    assert len(everywhere.windows) == every * 2
    assert len(masked.windows) == held * 2
    torch.testing.assert_close(ct[:, :, :20], mr[:, :, :20], atol=1e-4, rtol=0)
    torch.testing.assert_close(ct[:, :, end:], torch.full_like(mr[:, :, end:], -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampling, held", (("windows", 2), ("whole", 1)))
def test_a_single_voxel_of_body_is_computed(sampling, held):
    mr, network = volume(64, 16, 16), Mirror()
    body = torch.zeros_like(mr)
    body[0, 0, 37, 5, 9] = 1
    ct = inferer(**CUT[sampling])(mr, network, body)
    assert len(network.windows) == held  # windows at 24 and 32, the tile at 32
    torch.testing.assert_close(ct[0, 0, 37, 5, 9], mr[0, 0, 37, 5, 9], atol=1e-4, rtol=0)


def test_body_far_from_skipped_windows_is_the_same_as_without_skipping():
    network, mr = tiny(), volume(192, 16, 16)
    body = slab(mr, 100)
    cut = inferer(tile_voxels=64 * 256 * DENOISER_BYTES // TILE_BYTES + 1, halo=16)
    whole, skipped = cut(mr, network), cut(mr, network, body)
    assert (whole - skipped)[:, :, 112:].abs().max() > 0.05
    torch.testing.assert_close(skipped[:, :, :36], whole[:, :, :36], atol=1e-5, rtol=0)  # 100 less a decoder's reach
    assert (whole - skipped)[:, :, :88].abs().max() < 0.05


@pytest.mark.parametrize("steps, samples", ((1, 1), (3, 2)))
def test_volume_without_body_is_air_and_nothing_is_computed(steps, samples):
    network, mr = Mirror(), volume(24, 16, 16)
    network.encode = network.decode = None
    ct = inferer(num_inference_steps=steps, num_samples=samples)(mr, network, torch.zeros_like(mr))
    assert (ct[:, 0] == -1).all() and (ct[:, 1:] == 0).all() and not network.windows


@pytest.mark.parametrize("halo, most", ((80, 1e-4), (32, 0.05), (0, None)))
def test_tiles_with_a_halo_are_the_whole(halo, most):
    """A halo that holds what the networks see makes tiles equal to the whole, none makes seams."""
    network, mr = tiny(), volume(320, 16, 16)
    whole = inferer()(mr, network)
    predict, sizes = network.predict, []
    network.predict = lambda z, *args: sizes.append(z.shape[2]) or predict(z, *args)
    tiled = inferer(tile_voxels=(96 + 2 * halo) * 256 * DENOISER_BYTES // TILE_BYTES, halo=halo)(mr, network)
    assert len(sizes) > 1 and max(sizes) < 80
    difference = ((tiled - whole).abs() / whole.std()).max()
    assert difference > 0.1 if most is None else difference < most


def test_when_memory_runs_out_smaller_tiles_give_the_same(caplog):
    network, mr = Mirror(), volume(96, 80, 80)

    def limited(work, most):
        def run(x, *args, **kwargs):
            if x.numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work(x, *args, **kwargs)

        return run

    network.encode, network.decode = limited(network.encode, 400_000), limited(network.decode, 400_000)
    network.predict = limited(network.predict, 300_000)
    warnings = []
    for steps in (1, 3):
        caplog.clear()
        torch.testing.assert_close(inferer(halo=16, num_inference_steps=steps)(mr, network), mr, atol=1e-4, rtol=0)
        warnings.append(caplog.text.count("voxels at once"))
    assert warnings[0] == warnings[1] >= 3  # encoding, denoising and decoding; not again at each step


def test_when_nothing_fits_it_says_so():
    network = tiny()

    def never(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    network.predict = never
    with pytest.raises(InputError, match="out of memory"):
        inferer()(volume(24, 16, 16), network)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    network, calls = tiny(), []

    def broken(*args):
        calls.append(1)
        raise RuntimeError("CUDA error: device lost")

    network.predict = broken
    with pytest.raises(RuntimeError, match="device lost"):
        inferer()(volume(24, 16, 16), network)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "settings, times", (({"num_samples": 3}, 2), ({"output": "sample", "num_samples": 3}, 1),
                        ({"num_inference_steps": 4}, 1)),
)  # fmt: skip
def test_what_depends_on_the_mr_only_is_computed_once_for_the_estimate_and_once_for_all_samples(settings, times):
    network, mr, seen = tiny(), volume(32, 16, 16), []
    condition = network.condition
    network.condition = lambda z_mr: seen.append(len(z_mr)) or condition(z_mr)
    inferer(**settings)(mr, network)
    assert seen == [1] * times
    inferer(**settings, **CUT["whole"])(volume(96, 16, 16), network)
    assert seen == [1] * times * (1 + 3)  # tiles


def test_mixed_precision_is_close_to_single_precision():
    network, mr = tiny(), volume(24, 16, 16)
    single, mixed = inferer(amp=False)(mr, network), inferer(amp=True)(mr, network)
    assert mixed.dtype == torch.float32
    assert 0 < (single - mixed).abs().mean() < 0.05 * single.std()


@pytest.mark.parametrize("sampling", MODES)
def test_the_autoencoder_is_in_single_precision_all_the_same(sampling):
    network, mr, mixed = tiny(), volume(96, 16, 16), {"encode": [], "decode": [], "predict": []}
    for name, calls in mixed.items():
        work = getattr(network, name)
        setattr(
            network,
            name,
            lambda *args, work=work, calls=calls, **kwargs: (
                calls.append(torch.is_autocast_enabled("cpu")) or work(*args, **kwargs)
            ),
        )
    inferer(amp=True, **CUT[sampling])(mr, network, slab(mr, 20))
    assert all(mixed.values()), "each was called"
    assert not any(mixed["encode"] + mixed["decode"]) and all(mixed["predict"])


def test_meta_tensors_and_masks_of_integers_are_taken():
    network, mr = tiny(), volume(40, 16, 16)
    body = slab(mr, 12)
    expected = inferer()(mr, network, body)
    assert torch.equal(inferer()(MetaTensor(mr), network, MetaTensor(body.byte())), expected)
    assert torch.equal(inferer()(mr, network, body.bool()), expected)


@pytest.mark.parametrize(
    "settings, name",
    (
        ({"sampling": "windows", "overlap": 1.0}, "overlap"),
        ({"sampling": "windows", "overlap": -0.1}, "overlap"),
        ({"seed": -1}, "seed"),
        ({"num_samples": 0}, "num_samples"),
        ({"output": "median"}, "output"),
    ),
)
def test_wrong_settings_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        inferer(**settings)


@pytest.mark.parametrize("margin", [0, 4, 8])
def test_a_margin_continues_the_edge_and_is_cut_off_again(margin):
    mr = volume(17, 20, 33)
    padded, inside = pad_to_windows(mr, (16, 16, 16), 8, margin)
    assert all(s.start >= margin and size - s.stop >= margin for s, size in zip(inside[1:], padded.shape[2:]))
    torch.testing.assert_close(padded[inside], mr)
    network = Mirror()
    torch.testing.assert_close(inferer(margin=margin)(mr, network), mr, atol=1e-4, rtol=0)


def test_the_way_through_the_denoisers_forward_is_the_same():
    network, mr = tiny(), volume(32, 16, 16)
    expected = inferer(num_inference_steps=2)(mr, network)
    calls = []
    network.denoiser.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(inferer(num_inference_steps=2)(mr, through_forward(network)), expected)
    assert calls


@pytest.mark.slow
def test_compiled_networks_give_the_same():
    network, mr = tiny(), volume(40, 24, 16)
    expected = inferer(num_inference_steps=2)(mr, network)
    network.compile()
    torch.testing.assert_close(inferer(num_inference_steps=2)(mr, network), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MODES)
def test_the_mr_passes_its_skip_connection_once_for_all_samples(kind):
    network, calls = tiny().eval(), []
    network.mr_skip.register_forward_hook(lambda *_: calls.append(1))
    inferer = WholeVolumeInferer if kind == "whole" else WindowInferer
    settings = {} if kind == "whole" else {"window_size": [32, 32, 32]}
    inferer(num_samples=3, margin=0, progress=False, **settings)(volume(32, 32, 32), network)
    assert calls == [1]

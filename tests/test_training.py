"""What the training stages feed their networks, and a few real steps of each through the configs."""

from __future__ import annotations

import copy

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TRAINING, tiny_network, train, train_workflow
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.inferers import SimpleInferer

from custom_modules.errors import InputError
from custom_modules.inference.inferer import WholeVolumeInferer
from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.denoiser import LatentDenoiser
from custom_modules.networks.schedule import DDIMSchedule
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.training.averaging import MovingAverage
from custom_modules.training.batches import (
    AutocastInferer,
    LatentPrepareBatch,
    OneStepEstimate,
    PairPrepareBatch,
    ReconstructionInferer,
    ReconstructionPrepareBatch,
    SynthesisPrepareBatch,
    _Positional,
)
from custom_modules.training.latents import LatentDataset
from custom_modules.training.losses import EstimateLoss, LatentDiffusionLoss, valid_voxels


def latents(phantoms, network, engine=None, copies=2, **kwargs):
    parser = train_workflow("train", **TRAINING, dataset_dir=str(phantoms)).parser
    data, transform = (parser.get_parsed_content(f"train#{key}") for key in ("dataset_data", "preprocessing"))
    dataset = LatentDataset(data[:3], transform, network, roi_size=[32, 32, 32], copies=copies, **kwargs)
    dataset.encode(engine)
    return dataset


def test_latents_are_normalised_distinct_and_of_the_crops_size(phantoms):
    network = tiny_network()
    dataset = latents(phantoms, network)
    assert network.has_latent_scale and len(dataset.sizes) == 3
    item = dataset[0]
    assert item["image"].shape == item["z_mr"].shape == (4, 8, 8, 8)
    assert (
        item["valid"].shape == (1, 32, 32, 32)
        and item["patient"] == "p0"
        and item["label"].shape == item["mr"].shape == (1, 32, 32, 32)
    )
    for key in ("image", "z_mr"):
        channels = torch.cat([patient[0][key].float().flatten(1) for patient in dataset.latents], dim=1)
        torch.testing.assert_close(channels.mean(1), torch.zeros(4), atol=5e-3, rtol=0)
        torch.testing.assert_close(channels.std(1), torch.ones(4), atol=5e-3, rtol=0)
    first, second = dataset.latents[0]
    assert not torch.equal(first["z_mr"].flatten()[:100], second["z_mr"].flatten()[:100])


def test_the_same_seed_encodes_the_same_copies_and_a_known_latent_scale_is_kept(phantoms):
    network = tiny_network()
    one = latents(phantoms, network, amp=False)
    mean = network.latent_mean.clone()
    other = latents(phantoms, network, amp=False)
    assert torch.equal(network.latent_mean, mean)
    for a, b in zip(one.latents, other.latents):
        for x, y in zip(a, b):
            assert torch.equal(x["label"], y["label"]) and torch.equal(x["valid"], y["valid"])
            torch.testing.assert_close(x["z_mr"], y["z_mr"])


def test_a_crop_of_the_ct_is_where_the_crop_of_the_latent_is(phantoms):
    dataset = latents(phantoms, tiny_network())
    (version, *_) = dataset.latents[1]
    dataset.latents[1] = [version]
    version["image"] = torch.nn.functional.avg_pool3d(version["label"].float()[None], 4)[0]
    item = dataset[1]
    torch.testing.assert_close(
        torch.nn.functional.avg_pool3d(item["label"][None], 4)[0], item["image"], atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_stage_two_batches_follow_the_forward_process(prediction):
    torch.manual_seed(0)
    schedule = DDIMSchedule(prediction=prediction)
    batch = {key: torch.randn(3, 4, 4, 4, 4) for key in ("image", "z_mr")}
    batch |= {key: torch.ones(3, 1, 16, 16, 16) for key in ("valid", "mr", "label")}
    clean, (target, *_), _, kwargs = LatentPrepareBatch(schedule)(batch, "cpu")
    noisy = schedule.add_noise(clean, kwargs["noise"], kwargs["timesteps"])
    torch.testing.assert_close(kwargs["condition"], batch["z_mr"])
    for n, t in enumerate(kwargs["timesteps"].tolist()):
        recovered = schedule.step(target[n], t, -1, noisy[n])
        torch.testing.assert_close(recovered, clean[n], atol=2e-2 if prediction == "epsilon" else 1e-4, rtol=0)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_share_of_a_batch_starts_where_sampling_does(share, count):
    torch.manual_seed(0)
    schedule = DDIMSchedule()
    batch = {k: torch.randn(4, 4, 2, 2, 2) for k in ("image", "z_mr")}
    batch |= {k: torch.rand(4, 1, 8, 8, 8) for k in ("label", "valid", "mr")}
    _, (target, valid, ct), _, kwargs = LatentPrepareBatch(schedule, share)(batch, "cpu")
    last = schedule.inference_timesteps(1)[0][0]
    assert (kwargs["timesteps"] == last).sum() == count and torch.equal(kwargs["mr"], batch["mr"])
    assert (
        target.shape == batch["image"].shape and torch.equal(ct, batch["label"]) and torch.equal(valid, batch["valid"])
    )


def test_crops_that_train_samples_start_from_zeros_where_sampling_does():
    torch.manual_seed(0)
    schedule = DDIMSchedule()
    batch = {k: torch.randn(4, 4, 2, 2, 2) for k in ("image", "z_mr")}
    batch |= {k: torch.rand(4, 1, 8, 8, 8) for k in ("label", "valid", "mr")}
    prepare = LatentPrepareBatch(schedule, last_timestep_share=0.0, sample_share=0.5)
    clean, (target, _, _), _, kwargs = prepare(batch, "cpu")
    assert (kwargs["timesteps"][:2] == schedule.inference_timesteps(1)[0][0]).all()
    assert not kwargs["noise"][:2].any() and kwargs["noise"][2:].all()
    assert kwargs["sample_noise"].shape == clean.shape and kwargs["sample_noise"].std() > 0.8
    torch.testing.assert_close(target, schedule.target(clean, kwargs["noise"], kwargs["timesteps"]))
    assert "sample_noise" not in LatentPrepareBatch(schedule)(batch, "cpu")[3]


@pytest.mark.parametrize("settings", ({"decodes": False}, {"sample_timestep": None}, {"sample_timestep": 1000}))
def test_samples_that_cannot_be_trained_are_refused(settings):
    with pytest.raises(SystemExit, match="--sample_share: needs an image_weight above 0 and a sample_timestep below"):
        OneStepEstimate(tiny_network(), sample_share=0.5, **settings)
    OneStepEstimate(tiny_network(), **settings)


@torch.no_grad()
def test_training_and_inference_make_the_same_samples():
    torch.manual_seed(0)
    network = Synthesizer(WaveletAutoencoderKL(4, (8, 16), (1, 1)), LatentDenoiser(4, (8, 16), window=4)).eval()
    mr, noise = torch.rand(2, 1, 16, 16, 16) * 2 - 1, [torch.Generator().manual_seed(k) for k in (5, 6)]
    z_mr = network.encode(mr, "MR")
    noise = torch.cat([torch.randn(1, *z_mr.shape[1:], generator=generator) for generator in noise])
    zeros, last = torch.zeros_like(z_mr), torch.full((2,), 999)
    made = OneStepEstimate(network, sample_timestep=200)(zeros, zeros, last, z_mr, mr, sample_noise=noise)[1]
    assert made.shape == (4, 1, 16, 16, 16)
    settings = {"margin": 0, "sample_timestep": 200, "sample_steps": 1, "progress": False}
    for k, seed in ((2, 5), (3, 6)):  # two samples of the first crop
        sample = WholeVolumeInferer(output="sample", seed=seed, **settings)(mr[:1], network)
        torch.testing.assert_close(made[k : k + 1], sample, atol=1e-4, rtol=0)
    for k in (0, 1):
        estimate = WholeVolumeInferer(**settings)(mr[k : k + 1], network)
        torch.testing.assert_close(made[k : k + 1], estimate, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "share"), [(1, 0.5), (2, 0.75), (3, 0.5)])
def test_a_share_that_is_no_whole_number_of_crops_is_met_on_average(size, share):
    torch.manual_seed(0)
    schedule = DDIMSchedule()
    last, images = schedule.inference_timesteps(1)[0][0], torch.zeros(size, 4, 2, 2, 2)
    drawn = [(LatentPrepareBatch(schedule, share).get_timesteps(images) == last).sum().item() for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(size * share, abs=0.1)
    assert set(drawn) <= {int(size * share), int(size * share) + 1}


def test_a_regression_batch_is_mr_ct_and_where_the_pair_is_valid():
    batch = {key: torch.rand(2, 1, 4, 4, 4) * 2 - 1 for key in ("image", "label")}
    mr, (ct, valid) = SynthesisPrepareBatch()(batch, "cpu")
    assert (
        torch.equal(mr, batch["image"]) and torch.equal(ct, batch["label"]) and torch.equal(valid, valid_voxels(mr, ct))
    )


def test_stage_one_validates_the_reconstruction_of_the_ct():
    batch = {"image": torch.zeros(1, 1, 4, 4, 4), "label": torch.rand(1, 2, 4, 4, 4)}
    ct, target = ReconstructionPrepareBatch()(batch, "cpu")
    assert torch.equal(ct, batch["label"][:, :1]) and torch.equal(target, batch["label"])


def test_a_stage_one_batch_is_both_modalities_and_its_own_target():
    batch = {key: torch.rand(2, 1, 4, 4, 4) for key in ("image", "label")}
    pair, target = PairPrepareBatch()(batch, "cpu")
    assert torch.equal(pair, target) and torch.equal(pair[:2], batch["image"]) and torch.equal(pair[2:], batch["label"])


def test_reconstruction_in_tiles_is_the_autoencoders_and_keeps_the_size():
    network = tiny_network().autoencoder.eval()
    volume = torch.rand(1, 1, 20, 24, 28)
    with torch.no_grad():
        whole = ReconstructionInferer([32, 32, 32], amp=False)(volume, network)
    assert whole.shape == volume.shape

    class Identity(WaveletAutoencoderKL):
        def encode(self, image):
            return image, None

        def decode(self, latent):
            return latent.clone()  # what a predictor returns is scaled in place

    same = ReconstructionInferer([16, 16, 16], amp=False)(
        volume, Identity(latent_channels=4, channels=[8, 16], num_blocks=[1, 1])
    )
    torch.testing.assert_close(same, volume, atol=1e-5, rtol=0)


def test_the_estimate_of_a_perfect_denoiser_is_the_image_itself():
    network = tiny_network()
    network.set_latent_scale("CT", [torch.randn(4, 8, 8, 8) * 3 + 1])
    clean, noise, condition = (torch.randn(2, 4, 8, 8, 8) for _ in range(3))
    timesteps, mr = torch.tensor([999, 10]), torch.randn(2, 1, 32, 32, 32)
    network.denoiser.forward = lambda x, t: network.schedule.target(clean, noise, t)
    output, image = OneStepEstimate(network)(clean, noise, timesteps, condition, mr)
    torch.testing.assert_close(image, network.decode(clean, detail=network.detail(mr)), atol=2e-3, rtol=1e-3)


def test_the_encoder_is_trained_for_the_mr_only_where_that_is_asked_for():
    torch.manual_seed(0)
    network = tiny_network()
    network.set_latent_scale("MR", [torch.randn(4, 8, 8, 8) * 3 + 1])
    torch.nn.init.normal_(network.denoiser.out[-1].weight, std=0.1)  # it starts at zero, and with it the gradient
    clean, mr = torch.randn(2, 4, 8, 8, 8), torch.rand(2, 1, 32, 32, 32) * 2 - 1
    given = [torch.randn(2, 4, 8, 8, 8), network.encode(mr, "MR").detach()]
    outputs = {}
    for train_encoder in (False, True):
        estimate = OneStepEstimate(network, train_encoder=train_encoder)
        outputs[train_encoder] = [estimate(clean, clean, torch.tensor([999, 10]), z_mr, mr)[0] for z_mr in given]
        network.zero_grad()
        outputs[train_encoder][0].square().mean().backward()
        moved = [p.grad is not None and bool(p.grad.any()) for p in network.autoencoder.encoder.parameters()]
        assert any(moved) == train_encoder
    frozen, trained = outputs[False], outputs[True]
    assert torch.equal(*trained) and torch.equal(trained[0], frozen[1]) and not torch.equal(*frozen)


class Epochs(Engine):
    """An engine that has completed some epochs and runs to another."""

    def __init__(self, completed):
        super().__init__(lambda engine, batch: None)
        self.state.epoch = completed

    def to(self, epoch):
        self.state.epoch = epoch
        self.fire_event(Events.EPOCH_STARTED)


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_are_renewed_as_if_training_had_begun_with_them(phantoms, workers):
    network, engine = tiny_network(), Epochs(0)
    dataset = latents(phantoms, network, engine=engine, amp=False, copies=3, renewed=2, workers=workers)
    first = [[copy["label"].clone() for copy in copies] for copies in dataset.latents]
    for epoch in (1, 2, 3):
        engine.to(epoch)
    later = latents(phantoms, network, engine=Epochs(2), amp=False, copies=3, renewed=2)  # copies 4, 5 and 6
    for copies, expected, old in zip(dataset.latents, later.latents, first):
        assert all(torch.equal(one["label"], other["label"]) for one, other in zip(copies, expected))
        assert all(torch.allclose(one["z_mr"], other["z_mr"], atol=1e-2) for one, other in zip(copies, expected))
        assert not any(torch.equal(copy["label"], label) for copy in copies for label in old)


def test_what_the_ct_is_encoded_as_stays_when_the_encoder_is_trained(phantoms):
    network, engine = tiny_network(), Epochs(0)
    dataset = latents(phantoms, network, engine=engine, amp=False, copies=1, renewed=1)
    air, untrained = network.air_latent().clone(), copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.autoencoder.parameters():
            weight.add_(torch.randn_like(weight))
    engine.to(1)
    engine.to(2)
    expected = latents(phantoms, untrained, engine=Epochs(1), amp=False, copies=1, renewed=1)
    for (one,), (other,) in zip(dataset.latents, expected.latents):
        torch.testing.assert_close(one["image"], other["image"])
    assert torch.equal(network.air_latent(), air)


def test_what_a_cuda_graph_captures_is_the_same_with_tensors_by_position():
    network, batch = OneStepEstimate(tiny_network()), torch.randn(2, 4, 8, 8, 8)
    named = {"noise": batch + 1, "timesteps": torch.tensor([999, 10]), "condition": batch * 2}
    named["mr"] = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        expected = AutocastInferer(SimpleInferer(), enabled=False, cuda_graph=True)(batch, network, **named)
        positional = _Positional(SimpleInferer(), network, False, tuple(named))(batch, *named.values())
    assert all(torch.equal(a, b) for a, b in zip(positional, expected))


def test_the_moving_average_of_a_short_training_holds_little_of_its_start():
    weights, model = [1.0, 4.0, 2.0, -3.0, 5.0], torch.nn.Linear(1, 1, bias=False)
    averaged = MovingAverage(model, 0.3)
    expected = weights[0]
    for step, weight in enumerate(weights):
        torch.nn.init.constant_(model.weight, weight)
        averaged.update_parameters(model)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_without_the_image_in_the_loss_the_autoencoder_stays_frozen():
    network = tiny_network()
    estimate = OneStepEstimate(network, decodes=False)
    latent = torch.randn(2, 4, 8, 8, 8)
    output, image = estimate(latent, latent, torch.tensor([999, 10]), latent, torch.randn(2, 1, 32, 32, 32))
    assert image is None and not any(p.requires_grad for p in network.autoencoder.parameters())
    valid = torch.ones(2, 1, 32, 32, 32)
    assert EstimateLoss(0.0, 1.0)((output, None), (latent, valid, valid)) == LatentDiffusionLoss()(
        output, (latent, valid)
    )


def test_all_stages_train_and_leave_weights_that_load_strictly(trained):
    before, state, tuned = (
        torch.load(trained / name, weights_only=True) for name in ("ae/autoencoder.pt", "ldm/model.pt", "fine/model.pt")
    )
    conditions = [weights.pop("trained_with") for weights in (before, state, tuned)]
    assert conditions[1] == conditions[2] and conditions[0].items() <= conditions[1].items()
    for key, value in before.items():  # the encoder stays frozen
        if key.startswith("encoder"):
            torch.testing.assert_close(state[f"autoencoder.{key}"], value)
    assert not bool((state["latent_std"] == 1).all())
    changed = {".".join(key.split(".")[:2]) for key in state if not torch.equal(state[key], tuned[key])}
    assert any(name.startswith("denoiser") for name in changed)
    assert "autoencoder.decoder" in changed and "autoencoder.encoder" not in changed
    assert set(state) == set(tuned)


def test_the_unet_baseline_trains_and_infers_by_the_same_overlay(phantoms, infer, tmp_path):
    small = {key: value for key, value in TRAINING.items()}
    train(
        "train+train_autoencoder+baselines/unet",
        **small,
        dataset_dir=str(phantoms),
        output_dir=str(tmp_path / "unet"),
        **{"network_def#channels": [4, 8], "network_def#strides": [2]},
    )
    workflow = ConfigWorkflow(
        config_file=["configs/inference.yaml", "configs/baselines/unet.yaml"], workflow_type="infer",
        logging_file=False, dataset_dir=str(phantoms / "p5/mr.nii.gz"), output_dir=str(tmp_path / "out"),
        roi_size=[32, 32, 32],
        checkpoint=str(tmp_path / "unet/model.pt"), **{"network_def#channels": [4, 8], "network_def#strides": [2]},
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    mr, sct = nib.load(phantoms / "p5/mr.nii.gz"), nib.load(tmp_path / "out/mr_sct.nii.gz")
    assert sct.shape == mr.shape and sct.get_data_dtype() == "int16"


@pytest.mark.parametrize("name", ["vanilla", "wrm", "wrm_smd"])
def test_an_ablation_leaves_out_what_it_says(name, phantoms, tmp_path):
    overlay = f"ablations/{name}"
    parser = train_workflow(f"train+train_autoencoder+{overlay}", **TRAINING, dataset_dir=str(phantoms)).parser
    blocks = {type(module).__name__ for module in parser.get_parsed_content("network_def").modules()}
    assert ("WaveletResidualModule" in blocks) == (name != "vanilla")
    assert (parser.get_parsed_content("loss").disentanglement_weight > 0) == (name == "wrm_smd")
    parser = train_workflow(f"train+{overlay}", **TRAINING, dataset_dir=str(phantoms)).parser
    assert len(parser.get_parsed_content("denoiser").skip) == 0


def test_the_papers_settings_train_and_sample_finite(phantoms, tmp_path):
    small = {
        **TRAINING,
        "autoencoder_channels": [4, 8, 8],
        "autoencoder_blocks": [1, 1, 1],
        "dataset_dir": str(phantoms),
    }
    train("train+train_autoencoder+paper", **small, output_dir=str(tmp_path / "ae"))
    workflow = train(
        "train+paper",
        **small,
        augmented_copies=1,
        autoencoder_checkpoint=str(tmp_path / "ae/autoencoder.pt"),
        output_dir=str(tmp_path / "ldm"),
    )
    schedule = workflow.parser.get_parsed_content("schedule")
    assert schedule.prediction == "epsilon" and float(schedule.betas[-1]) == pytest.approx(0.2)
    state = torch.load(tmp_path / "ldm/model.pt", weights_only=True)
    assert state["hu_window"].tolist() == [-800, 800]
    assert workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_mae"] < 2000


def test_a_ct_on_another_grid_is_refused_by_name(phantoms, tmp_path):
    ct = nib.load(phantoms / "p0/ct.nii.gz")
    nib.save(nib.Nifti1Image(ct.get_fdata()[1:], ct.affine), tmp_path / "ct.nii.gz")
    entry = {"image": str(phantoms / "p0/mr.nii.gz"), "label": str(tmp_path / "ct.nii.gz")}
    workflow = train_workflow("train", **TRAINING, dataset_dir=str(phantoms))
    with pytest.raises(Exception) as caught:
        workflow.parser.get_parsed_content("read")(entry)
    cause = caught.value
    while cause.__cause__ is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    assert isinstance(cause, InputError) and "ct.nii.gz" in str(cause)

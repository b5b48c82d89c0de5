"""Both training stages: batches, losses, latent data, and a few real steps through the configs."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from bundle.phantom import torso_phantom
from custom_modules.autoencoder import WaveletAutoencoderKL
from custom_modules.denoiser import LatentDenoiser
from custom_modules.schedule import DDIMSchedule
from custom_modules.synthesizer import Synthesizer
from custom_modules.training import (
    AutoencoderLoss,
    DistinctPatientSampler,
    EstimateLoss,
    EstimatePrepareBatch,
    GradientClipping,
    LatentDataset,
    LatentPrepareBatch,
    has_both,
)
from custom_modules.volumes import InputError

TINY_AUTOENCODER = {"latent_channels": 4, "channels": [8, 16], "num_blocks": [1, 1]}
TINY_DENOISER = {"latent_channels": 4, "channels": [8, 16, 16], "num_blocks": 1, "attention_channels": 8}


def tiny_network():
    torch.manual_seed(0)
    return Synthesizer(WaveletAutoencoderKL(**TINY_AUTOENCODER), LatentDenoiser(**TINY_DENOISER))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A datalist of four phantoms, three to train and one to validate."""
    root = tmp_path_factory.mktemp("phantoms")
    entries = []
    for n in range(4):
        mr, ct, affine = torso_phantom(shape=(40, 30, 24), spacing=8.0, seed=n)
        (root / f"p{n}").mkdir()
        for key, volume in (("mr", mr), ("ct", ct)):
            nib.save(nib.Nifti1Image(volume, affine), root / f"p{n}/{key}.nii.gz")
        entries.append({"image": f"p{n}/mr.nii.gz", "label": f"p{n}/ct.nii.gz"})
    (root / "datalist.json").write_text(json.dumps({"training": entries[:3], "validation": entries[3:]}))
    return root


def test_a_batch_holds_different_patients_and_large_volumes_come_more_often():
    sampler = DistinctPatientSampler(lambda: [100, 100, 400, 1600], batch_size=2, batches=2000, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 2000
    assert all(len(set(batch)) == 2 for batch in batches)
    count = np.bincount(np.concatenate(batches))
    assert count[3] > count[2] > count[0]


def test_order_depends_on_seed_and_goes_on_with_the_epoch():
    def first(seed):
        return list(DistinctPatientSampler(lambda: [1] * 10, 2, 20, seed))

    sampler = DistinctPatientSampler(lambda: [1] * 10, 2, 20, 0)
    one, two = list(sampler), list(sampler)
    assert one == first(0) != first(1)
    assert two != one


def test_fewer_patients_than_a_batch_needs_are_refused():
    with pytest.raises(ValueError, match="2 different patients, the datalist has 1"):
        next(iter(DistinctPatientSampler(lambda: [5], batch_size=2, batches=1)))


def test_pretraining_loss_is_the_sum_of_its_terms():
    torch.manual_seed(0)
    target, reconstruction = torch.rand(4, 1, 8, 8, 8), torch.rand(4, 1, 8, 8, 8)
    latent, mean, log_variance = (torch.randn(4, 4, 2, 2, 2) for _ in range(3))
    loss = AutoencoderLoss(kl_weight=0.3, disentanglement_weight=0.2)
    value = loss((reconstruction, latent, mean, log_variance), target)
    l2 = ((reconstruction - target) ** 2).mean()
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(value, l2 + 0.3 * kl + 0.2 * loss.terms["disentanglement"])
    assert loss.terms["reconstruction_mr"] == pytest.approx(float(((reconstruction - target)[:2] ** 2).mean()))


def test_no_disentanglement_weight_means_no_disentanglement_gradient():
    torch.manual_seed(0)
    latent = torch.randn(4, 4, 2, 2, 2, requires_grad=True)
    image, zeros = torch.rand(4, 1, 8, 8, 8), torch.zeros(4, 4, 2, 2, 2)
    AutoencoderLoss(disentanglement_weight=0.0)((image, latent, zeros + latent * 0, zeros), image).backward()
    assert latent.grad.abs().max() == 0


def test_latents_are_normalised_distinct_and_of_the_crops_size(phantoms):
    workflow = ConfigWorkflow(config_file="configs/train.yaml", workflow_type="train", dataset_dir=str(phantoms))
    workflow.initialize()
    data, transform = (workflow.parser.get_parsed_content(f"train#{k}") for k in ("dataset_data", "preprocessing"))
    network = tiny_network()
    dataset = LatentDataset(data, transform, network, roi_size=[32, 32, 32], versions=2)
    dataset.encode()
    assert network.has_latent_scale and len(dataset.sizes) == 3
    item = dataset[0]
    assert item["image"].shape == item["z_mr"].shape == (4, 8, 8, 8)
    for key in ("image", "z_mr"):
        channels = torch.cat([patient[0][key].float().flatten(1) for patient in dataset.latents], dim=1)
        torch.testing.assert_close(channels.mean(1), torch.zeros(4), atol=5e-3, rtol=0)
        torch.testing.assert_close(channels.std(1), torch.ones(4), atol=5e-3, rtol=0)
    first, second = dataset.latents[0]
    assert not torch.equal(first["z_mr"].flatten()[:100], second["z_mr"].flatten()[:100])


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_stage_two_batches_follow_the_forward_process(prediction):
    torch.manual_seed(0)
    schedule = DDIMSchedule(prediction=prediction)
    batch = {"image": torch.randn(3, 4, 4, 4, 4), "z_mr": torch.randn(3, 4, 4, 4, 4)}
    clean, target, _, kwargs = LatentPrepareBatch(schedule)(batch, "cpu")
    noisy = schedule.add_noise(clean, kwargs["noise"], kwargs["timesteps"])
    torch.testing.assert_close(kwargs["condition"], batch["z_mr"])
    for n, t in enumerate(kwargs["timesteps"].tolist()):
        recovered = schedule.step(target[n], t, -1, noisy[n])
        torch.testing.assert_close(recovered, clean[n], atol=2e-2 if prediction == "epsilon" else 1e-4, rtol=0)


def test_gradients_are_clipped():
    class Engine:
        network = torch.nn.Linear(3, 3)

    Engine.network(torch.full((1, 3), 1e3)).sum().backward()
    GradientClipping(1.0)(Engine)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in Engine.network.parameters()))
    assert norm == pytest.approx(1.0, rel=1e-4)


def run_config(name, **overrides):
    files = [f"configs/{n}.yaml" for n in (("train", "finetune") if name == "finetune" else (name,))]
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", **overrides)
    if name != "train_autoencoder":
        target = "custom_modules.autoencoder.WaveletAutoencoderKL"
        workflow.parser["network_def#autoencoder"] = {"_target_": target, **TINY_AUTOENCODER}
    if name == "finetune":
        target = "custom_modules.denoiser.LatentDenoiser"
        workflow.parser["network_def#denoiser"] = {"_target_": target, **TINY_DENOISER}
    workflow.initialize()
    workflow.run()
    return workflow


def test_all_stages_train_on_a_datalist_and_leave_weights_that_load_strictly(phantoms, tmp_path):
    small = {"dataset_dir": str(phantoms), "roi_size": [32, 32, 32], "batch_size": 2, "batches_per_epoch": 3}
    first = run_config(
        "train_autoencoder", **small, max_epochs=1, output_dir=str(tmp_path / "ae"),
        **{f"network_def#{k}": v for k, v in TINY_AUTOENCODER.items()},
    )  # fmt: skip
    assert first.parser.get_parsed_content("loss").terms["loss"] > 0
    before = torch.load(tmp_path / "ae/autoencoder.pt", weights_only=True)
    run_config(
        "train", **small, max_epochs=1, versions=1, val_interval=1, output_dir=str(tmp_path / "ldm"),
        autoencoder=str(tmp_path / "ae/autoencoder.pt"), **{f"denoiser#{k}": v for k, v in TINY_DENOISER.items()},
    )  # fmt: skip
    state = torch.load(tmp_path / "ldm/model.pt", weights_only=True)
    network = tiny_network()
    fresh = {k: v.clone() for k, v in network.denoiser.state_dict().items()}
    network.load_state_dict(state, strict=True)
    assert network.has_latent_scale
    for key, value in before.items():  # the autoencoder stays frozen
        torch.testing.assert_close(state[f"autoencoder.{key}"], value)
    assert any(not torch.equal(fresh[k], v) for k, v in network.denoiser.state_dict().items())
    run_config(
        "finetune", **small, max_epochs=1, versions=1, val_interval=1, output_dir=str(tmp_path / "fine"),
        checkpoint=str(tmp_path / "ldm/model.pt"),
    )  # fmt: skip
    tuned = torch.load(tmp_path / "fine/model.pt", weights_only=True)
    changed = {key.split(".")[0] + "." + key.split(".")[1] for key in state if not torch.equal(state[key], tuned[key])}
    assert any(name.startswith("denoiser") for name in changed)
    assert "autoencoder.decoder" in changed and "autoencoder.encoder" not in changed


def test_a_ct_on_another_grid_is_refused_by_name(phantoms, tmp_path):
    ct = nib.load(phantoms / "p0/ct.nii.gz")
    nib.save(nib.Nifti1Image(ct.get_fdata()[1:], ct.affine), tmp_path / "ct.nii.gz")
    entry = {"image": str(phantoms / "p0/mr.nii.gz"), "label": str(tmp_path / "ct.nii.gz")}
    workflow = ConfigWorkflow(config_file="configs/train.yaml", workflow_type="train", dataset_dir=str(phantoms))
    workflow.initialize()
    with pytest.raises(Exception) as caught:
        workflow.parser.get_parsed_content("read")(entry)
    cause = caught.value
    while cause.__cause__ is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    assert isinstance(cause, InputError) and "ct.nii.gz" in str(cause)


def test_tissue_in_the_mr_and_air_in_the_ct_cannot_teach():
    mr, ct = torch.tensor([-1.0, -1.0, 0.5, 0.5]), torch.tensor([-1.0, -0.2, -1.0, -0.2])
    assert has_both(mr, ct).tolist() == [True, True, False, True]


def test_fine_tuning_loss_counts_only_valid_voxels():
    torch.manual_seed(0)
    ct, image = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    valid, clean, prediction = torch.ones_like(ct), torch.zeros(1, 4, 2, 2, 2), torch.ones(1, 4, 2, 2, 2)
    image[..., :4], valid[..., :4], image[..., 4:] = 9.0, 0.0, 0.5
    loss = EstimateLoss(latent_weight=0.1)
    assert loss((prediction, image), (clean, ct, valid)) == pytest.approx(0.5 + 0.1 * 1.0)
    prediction[..., 0] = 7.0  # these latent voxels are not valid either
    assert loss((prediction, image), (clean, ct, valid)) == pytest.approx(0.5 + 0.1 * 1.0)


def test_half_of_a_fine_tuning_batch_starts_where_sampling_does():
    schedule = DDIMSchedule()
    batch = {k: torch.randn(4, 4, 2, 2, 2) for k in ("image", "z_mr")}
    batch |= {k: torch.rand(4, 1, 8, 8, 8) for k in ("label", "valid")}
    _, (target, ct, valid), _, kwargs = EstimatePrepareBatch(schedule)(batch, "cpu")
    assert kwargs["timesteps"][:2].tolist() == [schedule.inference_timesteps(1)[0][0]] * 2
    assert target.shape == batch["image"].shape and torch.equal(ct, batch["label"]) and torch.equal(valid, batch["valid"])

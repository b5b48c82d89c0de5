"""MR simulated from CT: the signal equations, the parts of a voxel, and what training makes of CTs without MR."""

from __future__ import annotations

import functools
import json

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TRAINING, save, small_torso, train
from monai.data import MetaTensor
from scipy import ndimage

from bundle.simulate import simulate
from custom_modules.data.pairs import check_pairs_or_stop, load_pairs
from custom_modules.data.regions import FIRST_REGION, MARROW, CTBodyd, tissue_regions
from custom_modules.data.sampler import PatientSampler
from custom_modules.data.simulation import (
    RandSimulateMRd,
    SimulateMR,
    SimulateMRd,
    contrast_of,
    voxel_parts,
)
from custom_modules.errors import InputError

CONTRASTS = yaml.safe_load((ROOT / "configs/whole_body.yaml").read_text())["contrasts"]
SPACING = (2.0, 2.0, 2.0)
FAT, MUSCLE, BONE, LUNG = -100.0, 50.0, 1300.0, -850.0


def plain(**settings) -> SimulateMR:
    """A simulation without anything random but the sequence."""
    off = {"organs": (0, 0), "dephasing": (0, 0), "shading": (1, 1), "noise": (0, 0)}
    off |= {"relaxation": 0.0, "thick_slices": 0.0}
    return SimulateMR(**{"contrasts": CONTRASTS, **off, **settings})


def blocks() -> np.ndarray:
    """Fat, muscle, bone and lung side by side in fat, 24 voxels each."""
    ct = np.full((96, 40, 40), FAT, np.float32)
    for n, hu in enumerate((FAT, MUSCLE, BONE, LUNG)):
        ct[24 * n + 4 : 24 * n + 20, 10:30, 10:30] = hu
    return ct


def middle(volume: np.ndarray, n: int) -> float:
    return float(volume[24 * n + 9 : 24 * n + 15, 15:25, 15:25].mean())


@functools.cache
def blocks_and_regions() -> tuple[np.ndarray, np.ndarray]:
    ct = blocks()
    return ct, tissue_regions(ct, np.ones(ct.shape, bool), SPACING)


def test_the_parts_of_a_voxel_follow_its_hu():
    parts = voxel_parts(*blocks_and_regions())
    assert [round(middle(parts.fat, n), 2) for n in range(4)] == [1, 0, 0, 0]
    assert [round(middle(parts.protons, n), 2) for n in range(4)] == [1, 1, 1, pytest.approx(0.17, abs=0.01)]
    assert [round(middle(parts.mineral, n), 2) for n in range(4)] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("contrast", "brighter"),
    [("t1_spin_echo", "fat"), ("t1_in_phase", "fat"), ("t1_fat_suppressed", "muscle"), ("t2_fat_suppressed", "muscle")],
)
def test_contrasts_show_fat_and_muscle_as_their_sequences_do(contrast, brighter):
    for seed in range(5):
        simulate = plain()
        simulate.set_random_state(seed)
        mr = simulate(*blocks_and_regions(), SPACING, contrast)
        fat, muscle, bone, lung = (middle(mr, n) for n in range(4))
        assert (fat > muscle) == (brighter == "fat")
        assert bone < 0.1 * max(fat, muscle) and lung < 0.4 * max(fat, muscle)


def test_a_crop_of_air_alone_has_no_signal():
    air = np.full((16, 16, 16), -1000.0, np.float32)
    mr = plain()(air, np.zeros(air.shape, int), SPACING, "t1_spin_echo")
    assert mr.shape == air.shape and not mr.any()


def test_spin_echo_is_its_signal_equation():
    sequence = {"sequence": "spin_echo", "repetition_time": (500, 500), "echo_time": (15, 15)}
    simulate = plain(contrasts={"one": sequence})
    ratios = set()
    for seed in range(8):
        simulate.set_random_state(seed)
        mr = simulate(*blocks_and_regions(), SPACING)
        ratios.add(round(middle(mr, 0) / middle(mr, 1), 3))

    # density (1 - exp(-TR / T1)) exp(-TE / T2), T1 and T2 of fat and muscle at 1.5 and 3 T
    def signal(density: float, t1: float, t2: float) -> float:
        return float(density * (1 - np.exp(-500 / t1)) * np.exp(-15 / t2))

    tissues = (((343, 58), (993, 31)), ((382, 68), (1159, 30)))
    expected = {round(signal(0.90, *fat) / signal(0.79, *muscle), 3) for fat, muscle in tissues}
    assert ratios == expected


def test_trabecular_bone_loses_signal_in_gradient_echoes_by_the_phase_that_has_passed():
    """R2' grows with the field as fast as the echo in phase comes sooner, so the loss depends on the number of cycles
    between water and fat only. The marrow here is fat, as its surroundings."""
    sequence = {"sequence": "gradient_echo", "repetition_time": (150, 150), "flip_angle": (60, 60), "fat_phase": (0, 0)}
    simulate = plain(contrasts={"one": sequence}, dephasing=(20, 20), trabecular=(5, 5), marrow_fat=(1, 1))
    ct, regions = np.full((48, 24, 24), FAT, np.float32), np.full((48, 24, 24), FIRST_REGION)
    regions[:24] = MARROW
    ratios = set()
    for seed in range(12):
        simulate.set_random_state(seed)
        mr = simulate(ct, regions, SPACING)
        ratios.add(round(float(mr[6:18, 6:18, 6:18].mean() / mr[30:42, 6:18, 6:18].mean()), 3))
    period = 1 / (3.4e-6 * 42.58e6 * 1.5)  # seconds at 1.5 T
    assert ratios == {round(float(np.exp(-cycles * period * (5 - 1) * 20)), 3) for cycles in (1, 2, 3)}


@pytest.mark.parametrize("blur", (0.5, 0.8, 1.2))
@pytest.mark.parametrize("contrast", ("t1_spin_echo", "t1_in_phase", "t1_opposed_phase", "t2"))
def test_muscle_beside_air_has_no_outline(contrast, blur):
    """Where the border runs through a voxel, the CT has the HU of fat. A layer of fat stays what it is."""
    ct = np.full((40, 40, 40), -1000, np.float32)
    ct[8:32] = MUSCLE
    ct = ndimage.gaussian_filter(ct, blur)
    simulate = plain()
    simulate.set_random_state(1)
    mr = simulate(ct, np.where(ct > -500, FIRST_REGION, 0), SPACING, contrast)[:, 20, 20]
    assert mr.max() < 1.02 * mr[20] and (np.diff(mr[:20]) > -0.02 * mr[20]).all()
    ct[28:32] = -100
    fat = voxel_parts(ct, np.where(ct > -500, FIRST_REGION, 0)).fat[:, 20, 20]
    assert fat[29] > 0.95 and fat[20] < 0.05


def test_in_opposed_phase_borders_of_fat_and_water_are_dark():
    ct = ndimage.gaussian_filter(blocks(), 1.0)  # voxels that hold both
    for contrast, dark in (("t1_in_phase", False), ("t1_opposed_phase", True)):
        simulate = plain()
        simulate.set_random_state(1)
        profile = simulate(ct, blocks_and_regions()[1], SPACING, contrast)[20:34, 20, 20]
        assert (profile.min() < 0.6 * min(profile[0], profile[-1])) == dark


def test_each_bone_has_marrow_of_its_own():
    ct = np.full((60, 40, 40), MUSCLE, np.float32)
    for start in (6, 34):
        ct[start : start + 20, 10:30, 10:30] = BONE
        ct[start + 4 : start + 16, 14:26, 14:26] = 100.0  # between muscle and spongy bone
    regions = tissue_regions(ct, np.ones(ct.shape, bool), SPACING)

    def ratio(seed: int, **settings) -> float:
        simulate = plain(**settings)
        simulate.set_random_state(seed)
        mr = simulate(ct, regions, SPACING, "t1_spin_echo")
        first, second = mr[13:19, 17:23, 17:23], mr[41:47, 17:23, 17:23]
        assert first.std() < 0.01 * first.mean() and second.std() < 0.01 * second.mean()
        return float(first.mean() / second.mean())

    ratios = [ratio(seed) for seed in range(6)]
    assert min(ratios) < 0.98 and max(ratios) > 1.02
    assert ratio(0, marrow_fat=(0.6, 0.6)) == pytest.approx(1)


def test_a_seed_gives_one_mr_and_another_seed_another():
    (ct, regions), simulate = blocks_and_regions(), SimulateMR(CONTRASTS)
    made = []
    for seed in (3, 3, 4):
        simulate.set_random_state(seed)
        made.append(simulate(ct, regions, SPACING))
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    assert all(np.isfinite(mr).all() and mr.dtype == np.float32 and (mr >= 0).all() for mr in made)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_every_contrast_has_its_brightest_signal_near_1000(contrast):
    for seed in range(3):
        simulate = SimulateMR(CONTRASTS, shading=(1, 1), noise=(0, 0.01), thick_slices=0.0)
        simulate.set_random_state(seed)
        assert np.percentile(simulate(*blocks_and_regions(), SPACING, contrast), 99.5) == pytest.approx(1000, rel=0.15)


def test_noise_is_rician():
    ct = np.full((40, 40, 40), -1000, np.float32)
    ct[:20] = MUSCLE
    simulate = plain(noise=(0.05, 0.05))
    simulate.set_random_state(0)
    regions = (ct > 0).astype(np.int16) * 2
    air = simulate(ct, regions, SPACING, "t1_spin_echo")[24:]
    assert air.mean() == pytest.approx(50 * np.sqrt(np.pi / 2), rel=0.02)


def test_thick_slices_blur_along_one_axis_only():
    simulate = plain(thick_slices=1.0, slice_thickness=(8, 8))
    sharp = plain()
    for made in (simulate, sharp):
        made.set_random_state(2)
    thick, thin = (made(*blocks_and_regions(), SPACING, "t1_spin_echo") for made in (simulate, sharp))
    edges = [(np.abs(ndimage.sobel(thick, a)).max() / np.abs(ndimage.sobel(thin, a)).max()) < 0.8 for a in range(3)]
    assert sum(edges) == 1


@pytest.mark.parametrize(
    ("contrasts", "message"),
    [
        ({}, "no contrasts"),
        ({"x": {"sequence": "epi", "repetition_time": (1, 2)}}, "sequence is 'epi'"),
        ({"x": {"sequence": "spin_echo", "repetition": (1, 2)}}, "repetition"),
    ],
)
def test_contrasts_that_cannot_be_simulated_are_refused_by_name(contrasts, message):
    with pytest.raises(InputError, match=message):
        SimulateMR(contrasts)


def test_an_unknown_contrast_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no contrast 'dwi'; there are t1_spin_echo"):
        SimulateMR(CONTRASTS)(*blocks_and_regions(), SPACING, "dwi")
    with pytest.raises(InputError, match="a contrast has sequence"):
        contrast_of("x", {"sequences": "spin_echo"})


def item(**more) -> dict:
    affine = torch.diag(torch.tensor([2.0, 2, 2, 1]))
    ct, regions = (MetaTensor(torch.from_numpy(volume)[None], affine=affine) for volume in blocks_and_regions())
    return {"label": ct, "regions": regions, "patient": "p", **more}


def test_a_ct_without_an_mr_gets_one_always_and_the_same_in_validation():
    one, again = (SimulateMRd(SimulateMR(CONTRASTS), 1050.0)(item()) for _ in range(2))
    assert torch.equal(one["image"], again["image"]) and "regions" not in one
    assert 900 <= np.percentile(one["image"], 99) <= 1250
    other = SimulateMRd(SimulateMR(CONTRASTS), 1050.0)(item(patient="q"))
    assert not torch.equal(one["image"], other["image"])


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_an_mr_is_replaced_with_the_probability_that_was_asked_for(prob):
    own = torch.full((1, 96, 40, 40), 5.0)
    made = RandSimulateMRd(SimulateMR(CONTRASTS), 1050.0, prob)
    made.set_random_state(0)
    assert torch.equal(made(item(image=own))["image"], own) == (prob == 0)
    assert not torch.equal(made(item())["image"], own)


def test_couch_and_clothes_are_no_body():
    ct = np.full((60, 60, 40), -1000, np.float32)
    ct[15:45, 20:50] = MUSCLE
    ct[5:55, 8:10] = 100.0  # a couch, two voxels thick
    data = CTBodyd("label")({"label": MetaTensor(torch.from_numpy(ct)[None])})
    assert (data["label"][0, 5:55, 8:10] == -1000).all() and (data["label"][0, 17:43, 22:48, 2:-2] == MUSCLE).all()


def test_patients_without_mr_are_drawn_with_their_share():
    class Data:
        sizes, unpaired = [100] * 20 + [10_000] * 4, [False] * 20 + [True] * 4

    sampler = PatientSampler(Data(), batch_size=2, batches=3000, unpaired_share=0.3)
    drawn = [index for batch in sampler for index, _ in batch]
    assert np.mean([index >= 20 for index in drawn]) == pytest.approx(0.3, abs=0.05)


def noise(ct: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 10, ct.shape)


def datalist(folder, entries) -> str:
    (folder / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries[:1]}))
    return str(folder / "datalist.json")


def test_entries_with_a_label_only_need_the_simulation(tmp_path):
    path = datalist(tmp_path, [{"label": "a.nii"}])
    with pytest.raises(InputError, match="no 'image'.*whole_body.yaml"):
        load_pairs(path, tmp_path)
    assert load_pairs(path, tmp_path, unpaired=True)["training"][0]["patient"] == "a"
    with pytest.raises(InputError, match="no 'label'"):
        load_pairs(datalist(tmp_path, [{"patient": "x"}]), tmp_path, unpaired=True)


@pytest.mark.parametrize(
    ("change", "message"), [(lambda ct: ct + 1024, "not Hounsfield"), (lambda ct: ct.clip(max=400), "clipped at 400")]
)
def test_a_ct_that_no_mr_can_be_simulated_from_is_refused_by_name(change, message, tmp_path, capsys):
    ct = np.full((40, 40, 20), -1000, np.float32)
    ct[8:32, 8:32], ct[12:20, 12:20] = 50, 900
    save(tmp_path / "a.nii", change(ct), np.diag([2.0, 2, 2, 1]))
    pairs = load_pairs(datalist(tmp_path, [{"label": "a.nii"}]), tmp_path, ("training",), unpaired=True)
    with pytest.raises(SystemExit, match=rf"a\.nii: .*{message}"):
        check_pairs_or_stop(pairs, 1)


@pytest.mark.integration
def test_pairs_and_cts_without_mr_train_together(tmp_path):
    entries = []
    for n in range(4):
        mr, ct, affine = small_torso((40, 30, 24), seed=n)
        save(tmp_path / f"p{n}/mr.nii.gz", mr, affine)
        save(tmp_path / f"p{n}/ct.nii.gz", ct + noise(ct), affine)
        entries.append({"image": f"p{n}/mr.nii.gz"} if n % 2 else {"patient": f"p{n}"})
        entries[-1]["label"] = f"p{n}/ct.nii.gz"
    splits = {"training": entries[:3], "validation": [entries[3], {"label": "p4/ct.nii.gz", "patient": "p4"}]}
    mr, ct, affine = small_torso((40, 30, 24), seed=9)
    save(tmp_path / "p4/ct.nii.gz", ct + noise(ct), affine)
    (tmp_path / "datalist.json").write_text(json.dumps(splits))
    settings = {**TRAINING, "dataset_dir": str(tmp_path), "largest": [32, 32, 32]}
    train("train+train_autoencoder+whole_body", **settings, adversarial_warmup=1, output_dir=str(tmp_path / "ae"))
    workflow = train(
        "train+whole_body", **settings, augmented_copies=2, output_dir=str(tmp_path / "ldm"),
        autoencoder_checkpoint=str(tmp_path / "ae/autoencoder.pt"),
    )  # fmt: skip
    dataset = workflow.parser.get_parsed_content("train#dataset")
    assert dataset.unpaired == [True, False, True] and (tmp_path / "ldm/model.pt").is_file()
    assert len(workflow.parser.get_parsed_content("validate#dataset")) == 2
    first, state = (torch.load(tmp_path / name, weights_only=True) for name in ("ae/autoencoder.pt", "ldm/model.pt"))
    weights = [key for key in first if key.startswith("encoder") and first[key].ndim > 1]
    assert weights and not any(torch.equal(first[key], state[f"autoencoder.{key}"]) for key in weights)


@pytest.mark.integration
def test_simulated_pairs_are_a_dataset_that_evaluate_takes(tmp_path):
    save(tmp_path / "ct/a.nii.gz", blocks(), np.diag([2.0, 2, 2, 1]))
    simulate(str(tmp_path / "ct"), str(tmp_path / "out"), "t1_spin_echo,t2")
    pairs = load_pairs(tmp_path / "out/datalist.json", tmp_path / "out", ["test"])["test"]
    assert [pair["patient"] for pair in pairs] == ["a_t1_spin_echo", "a_t2"]
    volumes = [nib.load(pair[key]) for pair in pairs for key in ("image", "label")]
    assert all(np.array_equal(volume.affine, volumes[0].affine) for volume in volumes)
    assert not np.array_equal(volumes[0].get_fdata(), volumes[2].get_fdata())
    with pytest.raises(InputError, match="no contrast 'flair'; there are"):
        simulate(str(tmp_path / "ct"), str(tmp_path / "out"), "flair")
    save(tmp_path / "mr.nii.gz", blocks() + 1100, np.diag([2.0, 2, 2, 1]))
    with pytest.raises(InputError, match="mr.nii.gz: .* not Hounsfield"):
        simulate(str(tmp_path / "mr.nii.gz"), str(tmp_path / "out"))

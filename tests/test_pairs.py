"""Reading and checking a datalist, and batches of different patients."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import save
from monai.data import MetaTensor
from monai.transforms import Compose, Transform

from bundle.phantom.command import torso_phantom
from custom_modules.data.cache import ProcessCacheDataset
from custom_modules.data.pairs import check_pairs_or_stop, load_pairs
from custom_modules.data.sampler import PatientSampler, SeededDataset, seed_of
from custom_modules.errors import InputError, one_line

AFFINE = np.diag([8.0, 8, 8, 1])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three patients, <patient>/mr.nii and ct.nii; two train, one validates."""
    entries = []
    for n in range(3):
        mr, ct, affine = torso_phantom(shape=(24, 18, 12), spacing=16.0, seed=n)
        save(tmp_path / f"p{n}/mr.nii", mr, affine)
        save(tmp_path / f"p{n}/ct.nii", ct, affine)
        entries.append({"image": f"p{n}/mr.nii", "label": f"p{n}/ct.nii"})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    return tmp_path


def pairs_of(folder: Path) -> dict:
    return load_pairs(folder / "datalist.json", folder)


def check(folder: Path, **kwargs) -> str:
    return check_pairs_or_stop(pairs_of(folder), **kwargs)


def refusal(folder: Path, **kwargs) -> str:
    with pytest.raises(SystemExit) as caught:
        check(folder, **kwargs)
    return str(caught.value)


def rewrite(path: Path, change) -> None:
    image = nib.load(path)
    save(path, change(np.array(image.dataobj)), image.affine)  # a copy: the file is mapped


def test_sound_data_pass_and_have_a_fingerprint_that_follows_them(folder):
    first = check(folder)
    assert len(first) == 64 and check(folder) == first
    rewrite(folder / "p1/ct.nii", lambda ct: ct + 1)
    assert check(folder) != first


def test_a_patient_is_named_by_the_datalist_or_by_what_tells_files_apart(folder):
    assert [p["patient"] for p in pairs_of(folder)["training"]] == ["p0", "p1"]
    flat = {
        "training": [{"image": "a.mr.nii.gz", "label": "c.nii"}],
        "validation": [{"image": "b.nii", "label": "d.nii", "patient": "x"}],
    }
    (folder / "flat.json").write_text(json.dumps(flat))
    pairs = load_pairs(folder / "flat.json", folder)
    assert pairs["training"][0]["patient"] == "a.mr" and pairs["validation"][0]["patient"] == "x"


def test_a_patient_named_as_a_folder_keeps_the_name(folder):
    entries = json.loads((folder / "datalist.json").read_text())
    named = {split: [{**e, "patient": e["image"].split("/")[0]} for e in part] for split, part in entries.items()}
    (folder / "datalist.json").write_text(json.dumps(named))
    assert [pair["patient"] for pair in pairs_of(folder)["training"]] == ["p0", "p1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "no usable split 'training'"),
        ("nonsense", "no usable split"),
        ('{"training": [{"image": "a"}], "validation": []}', "entry 0 of 'training' has no 'label'"),
        ('{"training": [], "validation": [{"label": "a"}]}', "entry 0 of 'validation' has no 'image'"),
    ],
)
def test_a_datalist_that_is_none_is_refused(folder, text, reason):
    (folder / "datalist.json").write_text(text)
    with pytest.raises(InputError, match=reason):
        pairs_of(folder)


def test_a_missing_datalist_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such datalist"):
        load_pairs(tmp_path / "datalist.json", tmp_path)


def test_a_missing_file_is_refused_by_name(folder):
    (folder / "p1/ct.nii").unlink()
    assert "p1/ct.nii: no such file" in refusal(folder)


def test_an_unreadable_file_is_refused_by_name(folder):
    (folder / "p2/mr.nii").write_bytes(b"x" * 1000)
    assert "p2/mr.nii: cannot be read" in refusal(folder)


def test_different_grids_are_refused_by_name(folder):
    rewrite(folder / "p0/ct.nii", lambda ct: ct[1:])
    assert "p0/ct.nii: its grid is not that of" in refusal(folder)


@pytest.mark.parametrize("change", [lambda ct: ct + 1024, lambda ct: (ct + 1000) / 2600])
def test_a_ct_that_is_not_in_hu_is_refused_by_name(folder, change):
    rewrite(folder / "p0/ct.nii", change)
    text = refusal(folder)
    assert "p0/ct.nii:" in text and "not Hounsfield units" in text


def test_swapped_modalities_are_refused_by_name(folder):
    one, other = folder / "p1/mr.nii", folder / "p1/ct.nii"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert "p1/ct.nii: MR and CT are swapped" in refusal(folder)


def test_a_ct_in_both_places_is_refused_by_name(folder):
    (folder / "p1/mr.nii").write_bytes((folder / "p1/ct.nii").read_bytes())
    assert "p1/mr.nii: goes down to -1000 as a CT does" in refusal(folder)


def test_an_mr_with_small_negative_values_from_resampling_is_accepted(folder):
    rewrite(folder / "p1/mr.nii", lambda mr: mr - 20)
    assert check(folder)


def test_a_patient_in_two_splits_is_refused_by_path_content_or_name(folder):
    entries = json.loads((folder / "datalist.json").read_text())
    both = {"training": entries["training"], "validation": entries["training"][:1]}
    (folder / "datalist.json").write_text(json.dumps(both))
    assert "p0/mr.nii: the same patient as" in refusal(folder, check_data=False)
    (folder / "copy").mkdir()
    for name in ("mr.nii", "ct.nii"):
        (folder / "copy" / name).write_bytes((folder / "p0" / name).read_bytes())
    copied = {"training": entries["training"], "validation": [{"image": "copy/mr.nii", "label": "copy/ct.nii"}]}
    (folder / "datalist.json").write_text(json.dumps(copied))
    assert "copy/mr.nii: the same patient as" in refusal(folder)
    named = {split: [{**entry, "patient": "Jo"} for entry in part] for split, part in entries.items()}
    (folder / "datalist.json").write_text(json.dumps(named))
    assert "p2/mr.nii: the same patient as" in refusal(folder, check_data=False)


def test_too_few_patients_and_empty_splits_are_refused(folder):
    assert "at least 4 different patients, the training split has 2" in refusal(folder, least_patients=4)
    entries = json.loads((folder / "datalist.json").read_text())
    (folder / "datalist.json").write_text(json.dumps({**entries, "validation": []}))
    assert "split 'validation' is empty" in refusal(folder)


def test_all_problems_are_listed_at_once(folder):
    (folder / "p0/mr.nii").unlink()
    (folder / "p2/ct.nii").unlink()
    text = refusal(folder)
    assert "p0/mr.nii" in text and "p2/ct.nii" in text


def patients(batches: list) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in batches]


def test_a_batch_holds_different_patients_and_large_volumes_come_more_often():
    batches = patients(PatientSampler(SimpleNamespace(sizes=[100, 100, 400, 1600]), batch_size=2, batches=2000, seed=1))
    assert len(batches) == 2000
    assert all(len(set(batch)) == 2 for batch in batches)
    count = np.bincount(np.concatenate(batches))
    assert count[3] > count[2] > count[0]


def test_a_large_batch_keeps_the_shares_where_patients_may_come_twice():
    data = SimpleNamespace(sizes=[100] * 6, unpaired=[False] * 4 + [True] * 2)
    drawn = np.concatenate(patients(PatientSampler(data, 5, 2000, unpaired_share=0.5, distinct=False)))
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.125] * 4 + [0.25] * 2, atol=0.01)


def test_order_depends_on_seed_and_goes_on_with_the_epoch():
    def first(seed):
        return list(PatientSampler(SimpleNamespace(sizes=[1] * 10), 2, 20, seed))

    sampler = PatientSampler(SimpleNamespace(sizes=[1] * 10), 2, 20, 0)
    one, two = list(sampler), list(sampler)
    assert one == first(0) != first(1)
    assert two != one


def test_a_sampler_that_starts_in_the_middle_goes_on_as_the_whole_one():
    whole = PatientSampler(SimpleNamespace(sizes=[1] * 10), 2, 20, 3)
    expected = list(whole) + list(whole)
    resumed = PatientSampler(SimpleNamespace(sizes=[1] * 10), 2, 20, 3)
    resumed.start = 27
    assert list(resumed) == expected[27:]


@pytest.mark.parametrize("count", [30, 5])  # enough patients for all batches of a step, and not
def test_two_ranks_draw_what_one_process_accumulates(count):
    one = PatientSampler(SimpleNamespace(sizes=[1] * count), 4, 20, seed=2, accumulation=2)
    ranks = [PatientSampler(SimpleNamespace(sizes=[1] * count), 4, 10, seed=2, rank=r, world_size=2) for r in (0, 1)]
    alone, together = list(one), [batch for pair in zip(*ranks) for batch in pair]
    assert alone == together
    assert all(len(set(batch)) == 4 for batch in patients(alone))
    if count >= 8:
        steps = patients(alone)
        assert all(not set(a) & set(b) for a, b in zip(steps[::2], steps[1::2]))


def test_a_batch_holds_all_patients_where_there_are_fewer_than_it_asks_for(caplog):
    sampler = PatientSampler(SimpleNamespace(sizes=[5, 5, 9]), batch_size=8, batches=4)
    assert all(sorted(index for index, _ in batch) == [0, 1, 2] for batch in sampler)
    assert [record.message for record in caplog.records] == ["batches of 3 patients instead of 8: there are no more"]


class Doubled(Transform):
    """Twice the image; an item without one is refused."""

    def __call__(self, data):
        if data["image"] is None:
            raise InputError("p2/mr.nii: cannot be read")
        return {"image": 2 * data["image"], "patient": data["patient"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cache_holds_what_its_transforms_make_however_many_processes_fill_it(workers):
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    items = [{"image": MetaTensor(torch.full((1, 2), float(n)), affine=affine), "patient": f"p{n}"} for n in range(5)]
    cached = ProcessCacheDataset(items, Compose([Doubled()]), num_workers=workers, progress=False)
    assert [item["patient"] for item in cached] == [f"p{n}" for n in range(5)]
    assert all(torch.equal(item["image"].as_tensor(), torch.full((1, 2), 2.0 * n)) for n, item in enumerate(cached))
    assert torch.equal(cached[3]["image"].affine, affine)
    assert not any(item["image"].is_shared() for item in cached)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_read_is_named_however_many_processes_fill_a_cache(workers):
    items = [{"image": torch.ones(1), "patient": "p1"}, {"image": None, "patient": "p2"}]
    with pytest.raises(Exception) as caught:
        ProcessCacheDataset(items, Compose([Doubled()]), num_workers=workers, progress=False)
    assert one_line(caught.value, "") == "p2/mr.nii: cannot be read"


def test_an_item_is_a_function_of_its_key():
    from monai.data import CacheDataset
    from monai.transforms import Compose, RandGaussianNoised

    noise = Compose([RandGaussianNoised("image", prob=1.0)])
    dataset = SeededDataset(CacheDataset([{"image": torch.zeros(1, 4)} for _ in range(2)], noise, progress=False))
    assert len(dataset) == 2
    one = dataset[0, 11]["image"].clone()
    dataset[1, 5]
    assert torch.equal(dataset[0, 11]["image"], one) and not torch.equal(dataset[0, 12]["image"], one)


def test_seeds_differ_with_each_counter():
    seeds = {seed_of(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and all(0 <= seed < 2**32 for seed in seeds)

"""Which files are taken for inputs, which are not and who hears of it, and what their outputs are called."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import files_in, save, stub
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from test_dicom import write
from test_volumes import VALUES, save_any

from custom_modules.data.inputs import OTHER_FORMATS, find_volumes, is_own_output
from custom_modules.data.transforms import Preprocess
from custom_modules.data.volumes import ReadVolumed, SaveVolumed, check_mr, read_grid, read_volume
from custom_modules.errors import InputError
from custom_modules.files import inside, walk
from custom_modules.inference.pipeline import VolumeDataset

RECORD = {"input": "/x/a.nii.gz", "output": "a_sct.nii.gz", "settings": {}}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def images(found: list[dict[str, str]], root: Path) -> list[str]:
    return sorted(Path(item["image"]).relative_to(root).as_posix() for item in found)


def outputs(found: list[dict[str, str]]) -> dict[str, str]:
    return {Path(item["image"]).name: item["output"] for item in found}


# outputs of this program


@pytest.mark.parametrize("out", ["", "out", "deep/out"])
def test_synthetic_cts_with_their_records_are_no_inputs(tmp_path, out):
    save_any(tmp_path / "a.nii.gz")
    (tmp_path / out).mkdir(parents=True, exist_ok=True)
    touch(tmp_path / out, "a_sct.nii.gz", "a_sct_sd.nii.gz", "b_sct.mha")
    for name in ("a", "b"):
        (tmp_path / out / f"{name}_sct.json").write_text(json.dumps(RECORD))
    assert images(find_volumes(tmp_path), tmp_path) == ["a.nii.gz"]
    with pytest.raises(InputError):
        (tmp_path / "a.nii.gz").unlink()
        find_volumes(tmp_path)


@pytest.mark.parametrize("record", [None, "{}", "no json", '["input"]', '{"EchoTime": 0.01, "Modality": "MR"}'])
def test_volumes_with_another_json_or_none_are_inputs(tmp_path, record):
    touch(tmp_path, "patient_sct.nii.gz")
    if record is not None:
        (tmp_path / "patient_sct.json").write_text(record)
    assert not is_own_output(tmp_path / "patient_sct.nii.gz") and len(find_volumes(tmp_path)) == 1


def test_a_second_run_into_the_folder_of_inputs_changes_nothing(tmp_path, infer):
    save(tmp_path / "a.nii.gz", VALUES.repeat(2, 2).astype(np.float32))
    for _ in range(2):
        infer(tmp_path, tmp_path, guard_statistics=None, calibration=None, **stub())
    assert files_in(tmp_path) == ["a.nii.gz", "a_sct.json", "a_sct.nii.gz"]


# outputs of their own


@given(
    st.sets(
        st.sampled_from(["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "A.NRRD", "a_mha.mha", "a_2.nii", "x/a.nii.gz"]),
        min_size=2,
    )
)
def test_no_two_volumes_share_an_output_or_a_record(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("in")
    touch(root, *names)
    found = find_volumes(root)
    assert len(found) == len(names)
    records = {item["output"].lower().removesuffix(".gz").rpartition(".")[0] for item in found}
    assert len(records) == len(names)
    assert all(Path(item["image"]).suffix.lower() == Path(item["output"]).suffix for item in found)


def test_names_do_not_depend_on_what_else_is_there(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.nrrd", "a.mha")
    expected = {"a.nii.gz": "a_sct.nii.gz", "a.nrrd": "a_sct.nrrd", "a.mha": "a_mha_sct.mha"}
    assert outputs(find_volumes(tmp_path)) == {**expected, "a.nrrd": "a_nrrd_sct.nrrd"}
    (tmp_path / "a.nrrd").unlink()
    assert outputs(find_volumes(tmp_path)) == {k: v for k, v in expected.items() if k != "a.nrrd"}


def test_a_series_and_a_nifti_in_one_folder_are_both_listed(tmp_path):
    write(tmp_path / "t1")
    save_any(tmp_path / "t1" / "localiser.nii.gz")
    found = find_volumes(tmp_path)
    assert sorted(item["output"] for item in found) == ["t1/localiser_sct.nii.gz", "t1_sct"]
    assert all(read_volume(item["image"]).ndim == 4 for item in found)


def test_an_output_of_another_input_is_not_written_over_in_silence(tmp_path, caplog):
    image = MetaTensor(np.ones((1, 3, 3, 3), np.int16), affine=np.eye(4), meta={"filename_or_obj": "/y/a.nii.gz"})
    (tmp_path / "a_sct.json").write_text(json.dumps(RECORD))
    data = {"image": image, "pred": image, "output": "a_sct.nii.gz"}
    with caplog.at_level(logging.WARNING):
        SaveVolumed("pred", tmp_path)(data)
    assert "from /y/a.nii.gz; before it was made from /x/a.nii.gz" in caplog.text


@pytest.mark.parametrize("name", ["../a_sct.nii.gz", "/tmp/a_sct.nii.gz"])
def test_nothing_is_written_outside_the_output_folder(tmp_path, name):
    image = MetaTensor(np.ones((1, 3, 3, 3), np.int16), affine=np.eye(4), meta={"filename_or_obj": "a"})
    with pytest.raises(InputError, match="leads out"):
        SaveVolumed("pred", tmp_path / "out")({"image": image, "pred": image, "output": name})
    assert files_in(tmp_path) == []


# what is left out, and what is named


def test_hidden_folders_and_those_of_archives_are_left_out(tmp_path):
    touch(tmp_path, "a.nii", ".git/b.nii", "__MACOSX/c.nii", "x/.y/d.nii", "x/._e.nii", "x/f.nii")
    assert images(find_volumes(tmp_path), tmp_path) == ["a.nii", "x/f.nii"]


def test_a_linked_folder_is_followed_once(tmp_path):
    touch(tmp_path, "in/a.nii", "real/b.nii")
    (tmp_path / "in/linked").symlink_to(tmp_path / "real")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "real/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/zagain").symlink_to(tmp_path / "real")
    assert images(find_volumes(tmp_path / "in"), tmp_path / "in") == ["a.nii", "linked/b.nii"]
    assert len(list(walk(tmp_path / "in"))) == 2


@pytest.mark.parametrize("extension", OTHER_FORMATS)
def test_formats_that_are_not_read_are_named(tmp_path, extension, caplog):
    touch(tmp_path, "a.nii", f"x/b{extension}")
    with caplog.at_level(logging.WARNING):
        assert images(find_volumes(tmp_path), tmp_path) == ["a.nii"]
    assert f"x/b{extension}" in caplog.text
    for path in (tmp_path / "x", tmp_path / "x" / f"b{extension}"):
        with pytest.raises(InputError, match=f"b{extension}.*(convert|give)"):
            find_volumes(path)


def broken_link(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def no_permission(path: Path) -> None:
    path.write_bytes(b"x" * 400)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


@pytest.mark.parametrize("name", ["b.nii.gz", "README", "IM0001", "b.dcm"])
@pytest.mark.parametrize(
    ("make", "reason"), [(broken_link, "link to /nowhere"), (os.mkfifo, "pipe"), (no_permission, "permissions")]
)
def test_what_cannot_be_opened_fails_by_name_and_the_others_go_on(tmp_path, make, reason, name):
    save_any(tmp_path / "a.nii.gz")
    (tmp_path / "sub").mkdir()
    make(tmp_path / "sub" / name)
    dataset = VolumeDataset(find_volumes(tmp_path), ReadVolumed("image"))
    assert len(dataset) == 2 and "failure" not in dataset[0]
    assert str(tmp_path / "sub" / name) in dataset[1]["failure"] and reason in dataset[1]["failure"]
    assert read_grid(tmp_path / "sub" / name) is None
    assert find_volumes(tmp_path / "sub" / name)[0]["output"].removesuffix(".nii.gz").endswith("_sct")


def test_a_series_goes_on_beside_a_pipe_and_a_link_to_nothing(tmp_path):
    folder = write(tmp_path / "t1")
    os.mkfifo(folder / "pipe")
    broken_link(folder / "link")
    found = find_volumes(tmp_path)
    assert [Path(item["image"]).name for item in found] == ["link", "pipe", "t1"]
    assert read_volume(folder).shape == (1, 7, 9, 8)


def test_a_slice_that_cannot_be_opened_is_not_left_out_of_its_series(tmp_path):
    folder = write(tmp_path / "t1")
    broken_link(folder / "IM9.dcm")
    with pytest.raises(InputError, match="IM9.dcm: seems to be a slice"):
        read_volume(folder)
    assert len(find_volumes(tmp_path)) == 2


# choosing


def test_a_pattern_chooses_by_name_or_path(tmp_path):
    touch(tmp_path, "a_t1.nii", "a_t2.nii", "x/b_t1.nii")
    write(tmp_path / "series_t1")
    for pattern, expected in {
        "*_t1*": ["a_t1.nii", "series_t1", "x/b_t1.nii"], "x/*": ["x/b_t1.nii"], "*_t2.nii": ["a_t2.nii"]
    }.items():  # fmt: skip
        assert images(find_volumes(tmp_path, pattern=pattern), tmp_path) == expected
    with pytest.raises(InputError, match="--pattern .*nrrd.* names; there are"):
        find_volumes(tmp_path, pattern="*.nrrd")
    assert find_volumes(tmp_path, strict=False, pattern="*.nrrd") == []


LISTS = {
    "l.txt": "# of today\np1/mr.nii.gz\n\np2/mr.nii.gz\np2/mr.nii.gz\nseries\n",
    "l.csv": "image,age\np1/mr.nii.gz,3\n\"p2/mr.nii.gz\",4\nseries,5\n",
    "bom.csv": "\ufeffp1/mr.nii.gz\np2/mr.nii.gz\nseries\n",
    "l.json": json.dumps({"name": "x", "training": [{"image": "p1/mr.nii.gz", "label": "ct"}],
                          "test": [{"image": "p2/mr.nii.gz"}, {"image": "series"}]}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LISTS))
def test_a_list_names_volumes_relative_to_it(tmp_path, name):
    touch(tmp_path, "p1/mr.nii.gz", "p2/mr.nii.gz", "p3/mr.nii.gz")
    write(tmp_path / "series")
    (tmp_path / name).write_text(LISTS[name])
    found = find_volumes(tmp_path / name)
    assert images(found, tmp_path) == ["p1/mr.nii.gz", "p2/mr.nii.gz", "series"]
    assert sorted(item["output"] for item in found) == ["p1/mr_sct.nii.gz", "p2/mr_sct.nii.gz", "series_sct"]


def test_volumes_of_a_list_from_anywhere_have_outputs_of_their_own_and_missing_ones_fail_by_name(tmp_path):
    touch(tmp_path, "u/x/mr.nii.gz", "v/y/mr.nii.gz", "w/a.nii", "w/b.nii")
    entries = [f"{tmp_path}/u/x/mr.nii.gz", "../v/y/mr.nii.gz", f"{tmp_path}/w", "missing.nii.gz"]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.txt").write_text("\n".join(entries))
    found = find_volumes(tmp_path / "lists" / "l.txt")
    assert sorted(item["output"] for item in found) == [
        "lists/missing_sct.nii.gz", "u/x/mr_sct.nii.gz", "v/y/mr_sct.nii.gz", "w/a_sct.nii", "w/b_sct.nii"
    ]  # fmt: skip
    with pytest.raises(InputError, match="missing.nii.gz: no such file"):
        read_volume(next(item["image"] for item in found if "missing" in item["image"]))


@pytest.mark.parametrize("content", ["", "# nothing\n", "no\nvolumes\n", b"\xff\xfe\x00binary"])
@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.json"])
def test_a_list_of_nothing_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=name):
        find_volumes(tmp_path / name)


# a CT given as the MR


def ct() -> np.ndarray:
    values = np.full((12, 12, 10), -1000, np.int16)
    values[3:9, 3:9] = np.random.default_rng(0).normal(40, 20, (6, 6, 10))
    values[5, 5] = 900
    return values


def test_hounsfield_units_are_no_mr_unless_allowed(tmp_path):
    path = save(tmp_path / "ct.nii.gz", ct())
    with pytest.raises(InputError, match="ct.nii.gz: goes from -1000 to 900 as a CT in HU does.*--allow_ct"):
        ReadVolumed("image", allow_ct=False)({"image": str(path)})
    ReadVolumed("image", allow_ct=True)({"image": str(path)})
    dataset = VolumeDataset([{"image": str(path)}], Preprocess([2.0] * 3, allow_ct=False))
    assert "--allow_ct true" in dataset[0]["failure"]


def test_an_mr_with_the_undershoot_of_a_filter_is_an_mr(tmp_path):
    values = np.random.default_rng(0).normal(400, 150, (20, 20, 20)).astype(np.float32)
    values[0, 0, :5] = -900
    check_mr(read_volume(save(tmp_path / "mr.nii.gz", values)))


# names from data


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..", "", "a\0b"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot be a name"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["x", "site/001", "a.b", "..a", "ä b"])
def test_other_names_are_paths_below_the_folder(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


def test_a_link_out_of_the_folder_is_no_way_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "site").symlink_to(tmp_path)
    with pytest.raises(InputError, match="through a link"):
        inside(tmp_path / "out", "site/001")

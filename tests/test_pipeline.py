"""A folder as a pipeline: shared out, restartable, written behind, and one broken volume does not stop the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import INFERENCE, ROOT, TINY, files_in, ramp, save, stub

from custom_modules.data.inputs import find_volumes
from custom_modules.inference.pipeline import VolumeDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five MRs, of which the fourth is broken."""
    for number in range(5):
        save(tmp_path / "in" / f"{number}.nii.gz", ramp((12, 10, 8), np.diag([2.0, 2, 2, 1])) + number)
    (tmp_path / "in" / "3.nii.gz").write_bytes(b"no image")
    return tmp_path / "in"


def test_processes_share_the_volumes_out(folder):
    volumes = find_volumes(folder)
    for world_size in (1, 2, 3, 7):
        parts = [VolumeDataset(volumes, dict, rank, world_size).data for rank in range(world_size)]
        assert sorted(item["image"] for part in parts for item in part) == [item["image"] for item in volumes]


def test_a_broken_volume_is_an_item_that_says_so(folder):
    def refuse(item):
        raise ValueError("not like that")

    assert VolumeDataset(find_volumes(folder), refuse)[0]["failure"] == f"{folder}/0.nii.gz: not like that"


def test_the_others_are_written_and_the_failures_listed(folder, tmp_path, infer):
    with pytest.raises(SystemExit, match=r"1 of 5 volumes failed:\n.*3\.nii\.gz"):
        infer(folder, tmp_path / "out", **stub())
    expected = {f"{n}_sct.{e}" for n in (0, 1, 2, 4) for e in ("nii.gz", "json")}
    assert set(files_in(tmp_path / "out")) == expected


def test_what_cannot_be_written_is_a_failure_of_its_own_volume(folder, tmp_path, infer, monkeypatch):
    (folder / "3.nii.gz").unlink()
    from custom_modules.data import volumes

    write, threads = volumes.write_volume, set()

    def full(volume, path):
        threads.add(threading.current_thread().name)
        if Path(path).name.startswith("1"):
            raise OSError("no space left")
        write(volume, path)

    monkeypatch.setattr(volumes, "write_volume", full)
    with pytest.raises(SystemExit, match=r"1 of 4 volumes failed:\n.*1\.nii\.gz: no space left"):
        infer(folder, tmp_path / "out", **stub())
    assert "1_sct.json" not in files_in(tmp_path / "out") and "2_sct.json" in files_in(tmp_path / "out")
    assert all(name.startswith("writing") for name in threads)  # not in the thread that computes


def test_resuming_leaves_what_is_finished_and_makes_the_rest(folder, tmp_path, infer):
    (folder / "3.nii.gz").unlink()
    out = infer(folder, tmp_path / "out", **stub(), seed=1)
    before = {name: (out / name).stat().st_mtime_ns for name in files_in(out)}
    (out / "0_sct.nii.gz").unlink()  # lost
    (out / "1_sct.json").unlink()  # killed before the record was written
    save(folder / "2.nii.gz", ramp((12, 10, 8), np.diag([2.0, 2, 2, 1])) + 70)  # another MR by now
    infer(folder, out, **stub(), seed=1, resume="true")
    made_anew = {name for name in files_in(out) if before[name] != (out / name).stat().st_mtime_ns}
    assert made_anew == {f"{n}_sct.{e}" for n in (0, 1, 2) for e in ("nii.gz", "json")}
    infer(folder, out, **stub(), seed=2, resume=True)  # other settings: all of them
    assert json.loads((out / "4_sct.json").read_text())["settings"]["seed"] == 2


@pytest.mark.slow
def test_torchrun_shares_a_folder_and_a_failure_does_not_stop_the_other_process(folder, tmp_path, checkpoint):
    settings = {"dataset_dir": folder, "output_dir": tmp_path / "out", "checkpoint": checkpoint, **TINY, **stub()}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "monai.bundle", "run", "--config_file", str(INFERENCE)]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "3.nii.gz" in result.stderr
    assert {f"{n}_sct.nii.gz" for n in (0, 1, 2, 4)} <= set(files_in(tmp_path / "out"))

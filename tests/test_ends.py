"""Runs that are killed, stopped, out of disk or in each other's way: no half-written file, and resuming completes
them."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import INFERENCE, ROOT, TINY, ellipsoid, files_in, save

MOMENTS = 10  # random ones, for each way to end
VOLUMES = 4
SUFFIXES = ("_sct.nii.gz", "_sct.json")


@pytest.fixture(scope="module")
def mrs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mrs")
    affine = np.diag([2.0, 2, 2, 1])
    for n in range(VOLUMES):
        save(folder / f"{n}.nii.gz", ellipsoid((60, 50, 40), affine, (40, 36, 60), (n, 0, 0))[0], affine)
    return folder


def start(mrs: Path, out: Path, checkpoint: Path, limit: int | None = None, **settings) -> subprocess.Popen:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(INFERENCE)]
    values = {
        "dataset_dir": mrs,
        "output_dir": out,
        "checkpoint": checkpoint,
        "guard_statistics": "null",
        **TINY,
        **settings,
    }
    for key, value in values.items():
        command += [f"--{key}", str(value)]
    preset = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=preset
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


@pytest.fixture(scope="module")
def expected(mrs, checkpoint, tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """Voxels of every synthetic CT of a run that nobody disturbs, and when after its start it wrote the first."""
    out = tmp_path_factory.mktemp("whole")
    started, process = time.monotonic(), start(mrs, out, checkpoint)
    while not list(out.glob("*_sct.nii.gz")):
        assert process.poll() is None or list(out.glob("*_sct.nii.gz"))
        time.sleep(0.02)
    first = time.monotonic() - started
    assert finish(process)[0] == 0
    return voxels(out), first


def voxels(out: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(nib.load(path).dataobj).tobytes() for path in sorted(out.glob("*_sct.nii.gz"))}


def check_whole(out: Path, expected: dict[str, bytes]) -> None:
    """Every synthetic CT and record that is there is a whole one, and no other file is, but hidden partial ones."""
    for path in out.iterdir() if out.exists() else ():
        if path.name.startswith(".partial-"):
            continue
        assert path.name.endswith(SUFFIXES), path
        if path.suffix == ".json":
            assert json.loads(path.read_text())["output"] in expected
        else:
            assert np.asarray(nib.load(path).dataobj).tobytes() == expected[path.name]


def check_complete(out: Path, expected: dict[str, bytes]) -> None:
    assert voxels(out) == expected
    assert files_in(out) == sorted(name.replace("_sct.nii.gz", suffix) for name in expected for suffix in SUFFIXES)


def moments(first: float, seed: int) -> list[float]:
    """Seconds after the start: some while it loads, most while it works and writes."""
    draw = random.Random(seed)
    return [draw.uniform(0.3 * first, 0.8 * first) for _ in range(3)] + [
        first + draw.uniform(-0.3, 2.0) for _ in range(MOMENTS - 3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_at_any_moment_leaves_whole_files_and_resumes(how, mrs, checkpoint, expected, tmp_path):
    wanted, first = expected
    for n, moment in enumerate(moments(first, int(how))):
        out = tmp_path / str(n)
        process = start(mrs, out, checkpoint)
        time.sleep(max(moment, 0.1))
        process.send_signal(how)
        status, errors = finish(process)
        # before the config has set it up, a signal ends the program as it ends any Python program
        assert status in (0, -how, 128 + how) or (how == signal.SIGINT and moment < first), errors
        if status == 128 + how:
            assert "Traceback" not in errors and f"error: stopped by {how.name}" in errors
        check_whole(out, wanted)
        assert finish(start(mrs, out, checkpoint, resume="true"))[0] == 0
        check_complete(out, wanted)


@pytest.mark.slow
def test_a_full_disk_fails_the_volumes_and_leaves_nothing_half_written(mrs, checkpoint, expected, tmp_path):
    wanted, _ = expected
    sizes = random.Random(0)
    for n in range(MOMENTS):
        out = tmp_path / str(n)
        status, errors = finish(start(mrs, out, checkpoint, limit=sizes.randint(100, 60_000)))
        assert status in (0, 1) and "Traceback" not in errors, errors
        check_whole(out, wanted)
        assert finish(start(mrs, out, checkpoint, resume="true"))[0] == 0
        check_complete(out, wanted)


@pytest.mark.slow
def test_two_processes_on_one_folder_leave_what_one_would(mrs, checkpoint, expected, tmp_path):
    wanted, first = expected
    delays = random.Random(1)
    for n in range(MOMENTS):
        out = tmp_path / str(n)
        one = start(mrs, out, checkpoint, resume="true")
        time.sleep(delays.uniform(0, first))
        other = start(mrs, out, checkpoint, resume="true")
        assert [finish(process)[0] for process in (one, other)] == [0, 0]
        check_complete(out, wanted)

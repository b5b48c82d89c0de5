"""From file to file by ``python -m monai.bundle run``, each in a process of its own: seconds and peak memory.

    python benchmarks/files.py [--repeats 3]

Start-up, reading, the input check, synthesis, the way back to the grid of the file, and writing are all in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import ROOT, publish
from pipeline import VOLUMES, volume

MR_MAXIMUM = 1250.0


def write(path: Path, shape: tuple[int, int, int], share: float, spacing: float) -> None:
    """The bodies of pipeline.py as an MR in noise, on a finer grid where ``spacing`` is below 2 mm."""
    values = ((volume(shape, share)[0][0, 0].numpy() + 1) / 2 * MR_MAXIMUM).astype(np.int16)
    for axis in range(3):
        values = values.repeat(round(2 / spacing), axis)
    values += np.random.default_rng(0).integers(0, 10, values.shape, dtype=np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([spacing] * 3 + [1])), path)


def run(source: Path, output: Path, **settings: Any) -> tuple[float, float]:
    """Seconds and GiB of one call of the command."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml"]
    for name, value in {"dataset_dir": source, "output_dir": output, "quiet": True, **settings}.items():
        command += [f"--{name}", str(value)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {' '.join(command)} ended with {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def main(repeats: int = 3) -> None:
    cases = {name: (*VOLUMES[name], 2.0, {}) for name in ("128³", "torso", "whole body")}
    cases["whole body at 1 mm, memory_limit 6"] = (*VOLUMES["whole body"], 1.0, {"memory_limit": 6})
    cases["whole body, memory_limit 3"] = (*VOLUMES["whole body"], 2.0, {"memory_limit": 3})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (shape, share, spacing, settings)) in enumerate(cases.items()):
            source = Path(folder, str(number), "mr.nii")
            write(source, shape, share, spacing)
            found = np.array([run(source, Path(folder, "out"), **settings) for _ in range(repeats)])
            size = "x".join(str(round(n * 2 / spacing)) for n in shape)
            rows.append(
                {"file": name, "voxels": size, "s": float(np.median(found[:, 0])), "GiB": float(found[:, 1].max())}
            )
            print(rows[-1], flush=True)
        many, single = Path(folder, "many"), Path(folder, "0", "mr.nii")
        for number in range(4):
            write(many / f"{number}.nii", *VOLUMES["128³"], 2.0)
        found = np.array([(run(many, Path(folder, "out")), run(single, Path(folder, "out"))) for _ in range(repeats)])
        four, one = np.median(found[:, :, 0], axis=0)
        rows.append({"file": f"folder of four of 128³, {four / one:.2f} times the time of one", "s": float(four),
                     "GiB": float(found[:, 0, 1].max())})  # fmt: skip
    publish("files", rows, list(rows[0]))


if __name__ == "__main__":
    fire.Fire(main)

"""Peak memory of the whole pipeline against its estimate, for fine, coarse and anisotropic files.

    python benchmarks/memory.py [--inferer stub|real|both] [--largest 6]

Each case is a child process that reads, preprocesses, synthesises and writes one volume whose body fills the field of
view. ``stub`` answers with the MR in place of a synthetic CT, so that preprocessing and writing are seen alone;
``real`` is the network with the smallest tiles that the pipeline goes down to, which takes its time: only for grids of
up to 10 Mvoxel.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from common import ROOT, publish
from monai.inferers import Inferer

from custom_modules.memory import GIB, needed_memory

SPACING = (2.0, 2.0, 2.0)
NETWORK_VOXELS = 10e6
CASES = {
    "least": ((20, 20, 20), (2.0, 2.0, 2.0)),
    "2 mm": ((200, 160, 300), (2.0, 2.0, 2.0)),
    "2 mm, whole body": ((266, 186, 566), (2.0, 2.0, 2.0)),
    "fine": ((360, 360, 300), (1.0, 1.0, 1.0)),
    "fine, large": ((512, 512, 500), (0.8, 0.8, 0.8)),
    "very fine": ((640, 640, 200), (0.3, 0.3, 0.5)),
    "thick slices": ((320, 320, 60), (1.2, 1.2, 8.0)),
    "thin in one direction": ((512, 40, 512), (0.8, 5.0, 0.8)),
    "coarse": ((30, 24, 30), (15.0, 15.0, 15.0)),
    "very coarse": ((28, 24, 20), (30.0, 30.0, 30.0)),
}


class Stub(Inferer):
    """Stands in for the sampler: the answer is the MR."""

    def __call__(self, inputs: torch.Tensor, network: Any, body: torch.Tensor | None = None) -> torch.Tensor:
        return inputs.clone()


def write(path: Path, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """An elliptic cylinder of tissue in noise, int16, uncompressed."""
    import nibabel as nib

    x, y = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape[:2]), indexing="ij")
    inside = (x**2 + y**2 < 0.98)[..., None]
    rng = np.random.default_rng(0)
    values = np.empty(shape, np.int16)
    for k in range(shape[2]):
        values[..., k] = rng.integers(0, 40, shape[:2]) + inside[..., 0] * rng.integers(500, 1100, shape[:2])
    nib.save(nib.Nifti1Image(values, np.diag([*spacing, 1])), path)


def child(path: str, out: str, stub: bool) -> None:
    """Run the pipeline on one file and print the peak before and after in bytes."""
    from monai.bundle import ConfigParser

    from custom_modules.inference.inferer import LEAST_TILE

    torch.set_num_threads(1)
    parser = ConfigParser(ConfigParser.load_config_file(str(ROOT / "configs" / "inference.yaml")))
    parser.update({"dataset_dir": path, "output_dir": out, "device": "$torch.device('cpu')", "guard": None})
    parser["inferers"]["whole"].update({"progress": False, "tile_voxels": LEAST_TILE})
    parser["preprocessing"]["transforms"] = parser["preprocessing"]["transforms"][1:]  # nothing is refused here
    if stub:
        parser["inferer"] = Stub()
    parser.parse(True)
    evaluator = parser.get_parsed_content("evaluator")
    before = peak()
    evaluator.run()
    if evaluator.failures:
        raise SystemExit(f"error: {evaluator.failures[0]}")
    print(json.dumps([before, peak()]))


def peak() -> int:
    """The most that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(shape: tuple[int, ...], spacing: tuple[float, ...], stub: bool) -> int:
    """Bytes that one volume takes at its peak, above what the process holds before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mr.nii")
        write(path, shape, spacing)
        command = [sys.executable, __file__, "child", str(path), str(Path(folder, "out")), str(stub)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {shape}, {spacing} mm: {done.stderr.strip().splitlines()[-1:]}")
    before, after = json.loads(done.stdout.strip().splitlines()[-1])
    return after - before


def main(inferer: str = "both", largest: float = 6.0, only: str | None = None) -> None:
    kinds = {"stub": [True], "real": [False], "both": [True, False]}[inferer]
    rows = []
    for name, (shape, spacing) in CASES.items():
        need = needed_memory(shape, spacing, SPACING)
        if need > largest * GIB or (only and only != name):
            continue
        grid = math.prod(n * s / t for n, s, t in zip(shape, spacing, SPACING))
        found = {stub: measure(shape, spacing, stub) for stub in kinds if stub or grid <= NETWORK_VOXELS}
        if not found:
            continue
        row = {
            "file": name, "voxels": "x".join(map(str, shape)), "mm": "x".join(f"{s:g}" for s in spacing),
            "Mvoxel of the file": math.prod(shape) / 1e6, "Mvoxel at 2 mm": grid / 1e6,
            "stub, GiB": found[True] / GIB if True in found else None,
            "network, GiB": found[False] / GIB if False in found else None,
            "estimate, GiB": need / GIB, "estimate / peak": need / max(found.values()),
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    if not only and inferer == "both":
        publish("memory", rows, list(rows[0]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4] == "True")
    else:
        fire.Fire(main)

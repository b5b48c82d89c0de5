"""How far the synthetic CT of real patients moves with what should not matter, and with how it is cut into windows.

    python benchmarks/invariance.py --dataset_dir DIR [--split validation]

Differences in HU within the body, by the whole road from file to file, from the default settings on the same seed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from common import publish

from bundle.workflow import inference_workflow
from custom_modules.pairs import load_pairs
from custom_modules.volumes import read_volume

CASES: dict[str, dict[str, Any]] = {
    "again": {},
    "window batch 1": {"sw_batch_size": 1},
    "window batch 7": {"sw_batch_size": 7},
    "one thread": {"threads": 1},
    "smaller tiles, as when memory runs out": {"tile_voxels": 600_000},
    "the same in single precision": {"tile_voxels": 600_000, "amp": False},
    "halo of 16 voxels": {"tile_voxels": 600_000, "halo": 16, "amp": False},
    "single precision": {"amp": False},
    "another seed, for comparison": {"seed": 1},
    "windows of 48³": {"roi_size": [48, 48, 48]},
    "windows of 96³": {"roi_size": [96, 96, 96]},
    "overlap 0.5": {"overlap": 0.5},
    "each window on its own": {"sampling": "windows"},
}
SINGLE = ("the same in single precision", "halo of 16 voxels")  # compared with whole tiles in single precision


def synthesize(mr: str, folder: Path, threads: int | None = None, **settings: Any) -> np.ndarray:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        quiet = {"guard_statistics": None}
        volumes = [{"image": mr, "output": "sct.nii.gz"}]
        inference_workflow(output_dir=str(folder), **{"dataset#data": volumes}, **quiet, **settings).run()
    finally:
        torch.set_num_threads(before)
    return np.asarray(read_volume(folder / "sct.nii.gz")[0])


def main(dataset_dir: str, split: str = "validation") -> None:
    found: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pair in load_pairs(Path(dataset_dir) / "datalist.json", dataset_dir, [split])[split]:
            default = synthesize(pair["image"], Path(folder))
            single = synthesize(pair["image"], Path(folder), amp=False)
            for name, settings in CASES.items():
                other = synthesize(pair["image"], Path(folder), **settings)
                difference = np.abs(other - (single if name in SINGLE else default))
                found.setdefault(name, []).append(difference[default > -1000])
    rows = []
    for name, differences in found.items():
        values = np.concatenate(differences)
        rows.append({
            "what changes": name, "mean, HU": float(values.mean()), "99.9 % below": float(np.percentile(values, 99.9)),
            "largest": float(values.max()),
        })  # fmt: skip
    publish("invariance", rows, list(rows[0]))


if __name__ == "__main__":
    fire.Fire(main)

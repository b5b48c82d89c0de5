"""How far the synthetic CT of real patients moves with what should not matter, and with how it is cut.

    python benchmarks/invariance.py --dataset_dir DIR [--split validation]

Differences in HU within the body, by the whole pipeline from file to file, with the default settings and the same seed
unless stated otherwise.
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
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import read_volume

SMALL = {"tile_voxels": 100_000}  # so that these patients are more than one tile, for the denoiser too
WINDOWS = {"sampling": "windows"}
# what changes: settings, and those that the result is compared with
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "again": ({}, {}),
    "one thread": ({"threads": 1}, {}),
    "smaller tiles, as when memory runs out": (SMALL, {}),
    "smaller tiles with a halo of 16 voxels": ({**SMALL, "halo": 16}, {}),
    "bfloat16": ({"amp": True}, {}),
    "bfloat16: smaller tiles": ({**SMALL, "amp": True}, {"amp": True}),
    "a sample and one of another seed, for comparison": ({"output": "sample", "seed": 1}, {"output": "sample"}),
    "each window on its own": (WINDOWS, {}),
    "each window on its own: batches of 7": ({**WINDOWS, "sw_batch_size": 7}, WINDOWS),
    "each window on its own: overlap 0.5": ({**WINDOWS, "overlap": 0.5}, WINDOWS),
}


def synthesize(mr: str, folder: Path, threads: int | None = None, **settings: Any) -> np.ndarray:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        volumes = [{"image": mr, "output": "sct.nii.gz"}]
        own: dict[str, Any] = {"guard_statistics": None, "dataset#data": volumes}
        inference_workflow(output_dir=str(folder), **own, **settings).run()
    finally:
        torch.set_num_threads(before)
    return np.asarray(read_volume(folder / "sct.nii.gz")[0])


def main(dataset_dir: str, split: str = "validation") -> None:
    found: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pair in load_pairs(Path(dataset_dir) / "datalist.json", dataset_dir, [split])[split]:
            for name, both in CASES.items():
                other, default = (synthesize(pair["image"], Path(folder), **settings) for settings in both)
                found.setdefault(name, []).append(np.abs(other - default)[default > -1000])
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

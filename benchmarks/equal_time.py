"""Validation error against minutes of the systems that were trained equally long, and their scores beside each other.

    python benchmarks/equal_time.py            # one CPU core, 55 minutes
    python benchmarks/equal_time.py --on gpu   # one GPU for all, 7.4 minutes (benchmarks/side_by_side.py)

Draws docs/figures/equal_time.png or equal_time_gpu.png from the records of ``wldm compare`` in docs/results/one_core or
gpu, and prints the means over the test patients with the two-sided p of Wilcoxon's paired test against the U-Net and
against Vanilla, with and without bone that counts three times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fire
import numpy as np
from scipy.stats import wilcoxon

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bundle.compare.command import SYSTEMS  # noqa: E402
from bundle.compare.report import SCORES, write_curves  # noqa: E402
from bundle.workflow import ROOT  # noqa: E402

FIGURES = {"one_core": "equal_time.png", "gpu": "equal_time_gpu.png"}
FOUR = "four crops per step"  # in stage 2, and 64³ in stage 1: the defaults until version 0.12
TITLES = {name: system.title for name, system in SYSTEMS.items()} | {
    "vanilla_four_crops": f"Vanilla, {FOUR}", "wrm_four_crops": f"w/ WRM, {FOUR}",
    "wrm_smd_four_crops": f"w/ WRM+SMD, {FOUR}", "full_four_crops": f"3D-WLDM, {FOUR}",
    "full_voxelwise": f"3D-WLDM, L_D voxel by voxel, {FOUR}", "unet_lr_0.001": "3D U-Net, learning rate 0.001",
    "unet_one_crop": "3D U-Net, one crop per step", "full_seed_1": "3D-WLDM, seed 1",
    "full_group_width_16": "3D-WLDM, groups of 16 channels",
    "full_group_width_16_bone_weight_3": "3D-WLDM, groups of 16 channels, bone counts three times",
    "full_bone_weight_3": "3D-WLDM, bone counts three times",
    "full_last_timestep_share_0.75": "3D-WLDM, bone counts three times, three of four crops at the last timestep",
    "unet_bone_weight_3": "3D U-Net, bone counts three times",
    "vanilla_bone_weight_3": "Vanilla, bone counts three times",
    "wrm_smd_group_width_16": "w/ WRM+SMD, groups of 16 channels",
    "full_train_encoder": "3D-WLDM, groups of 16 channels, encoder trained in stage 2, too",
}  # fmt: skip
REFERENCES = ("unet", "vanilla", "unet_bone_weight_3", "vanilla_bone_weight_3")
DRAWN = {
    "one_core": (
        "unet", "unet_bone_weight_3", "pix2pix", "vanilla", "full", "full_group_width_16", "full_bone_weight_3",
        "vanilla_bone_weight_3",
    ),
    "gpu": ("unet", "pix2pix", "vanilla", "wrm", "wrm_smd", "full"),
}  # fmt: skip


def main(on: str = "one_core") -> None:
    """Draw and print the records in docs/results/ON."""
    folder = ROOT / "docs" / "results" / on
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    records = {name: found[name] for name in TITLES if name in found}
    if curves := write_curves({name: records[name] for name in DRAWN[on]}, TITLES, folder):
        curves.replace(ROOT / "docs" / "figures" / FIGURES[on])
    for name, record in records.items():
        print(TITLES[name])
        for score in SCORES:
            own = [row[score] for row in record["rows"]]
            beside = [
                f"p {wilcoxon(own, [row[score] for row in records[other]['rows']]).pvalue:.3f} against {TITLES[other]}"
                for other in REFERENCES
                if other != name and other in records
            ]
            print(f"  {score:<26}{np.mean(own):9.3f}  {', '.join(beside)}")


if __name__ == "__main__":
    fire.Fire(main)

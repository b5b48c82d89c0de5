"""Error against the number of DDIM steps, on real patients.

    python benchmarks/steps.py --dataset_dir DIR [--split validation] [--steps 1,2,4,8,16,50]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import fire
from common import publish

from bundle.evaluate import evaluate


def main(dataset_dir: str, split: str = "validation", steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in steps:
            out = Path(folder, str(count))
            evaluate(dataset_dir, split=split, output_dir=str(out), pictures=False, num_inference_steps=count)
            means = json.loads((out / "metrics.json").read_text())["systems"]["3D-WLDM"]
            rows.append({"steps": count, **scores(means)})
    publish("steps", rows, list(rows[0]))


def scores(means: dict) -> dict[str, float]:
    names = {"in-body MAE, HU": "synthrad2025_mae", "bias, HU": "synthrad2025_bias", "bone Dice": "synthrad2025_bone_dice"}
    return {title: float(means[name]["mean"]) for title, name in names.items()}


if __name__ == "__main__":
    fire.Fire(main)

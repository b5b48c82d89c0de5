"""Error against the number of DDIM steps, on real patients.

python benchmarks/steps.py --dataset_dir DIR [--split validation] [--steps 1,2,4,8,16,50]
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import fire
import numpy as np
from common import publish

from bundle.evaluate import evaluate


def main(dataset_dir: str, split: str = "validation", steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in steps:
            out = Path(folder, str(count))
            evaluate(dataset_dir, split=split, output_dir=str(out), pictures=False, num_inference_steps=count)
            with open(out / "metrics.csv", newline="") as file:
                patients = [row for row in csv.DictReader(file) if row["system"] == "3D-WLDM"]
            rows.append({"steps": count, **scores(patients)})
    publish("steps", rows, list(rows[0]))


def scores(patients: list[dict[str, str]]) -> dict[str, float]:
    """Means over patients; of the Dice over those whose CT has bone."""

    def column(name: str) -> np.ndarray:
        return np.array([float(patient[f"synthrad2025_{name}"]) for patient in patients])

    has_bone = ~np.isnan(column("bone_mae"))
    return {
        "in-body MAE, HU": float(column("mae").mean()),
        "bias, HU": float(column("bias").mean()),
        "bone Dice": float(column("bone_dice")[has_bone].mean()),
    }


if __name__ == "__main__":
    fire.Fire(main)

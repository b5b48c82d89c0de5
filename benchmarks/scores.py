"""The scores of the shipped weights, in one record that the pages quote.

    wldm evaluate --dataset_dir DIR --num_samples 8 --output_dir TEST
    wldm evaluate --dataset_dir DIR --split validation --output_dir VALIDATION
    wldm simulate CTS --output_dir PAIRS; wldm evaluate --dataset_dir PAIRS --output_dir SIMULATED
    wldm demo
    python benchmarks/scores.py --test TEST --validation VALIDATION --simulated SIMULATED --demo demo

The record is ``benchmarks/results/scores.json``. The tables of docs/evaluation.md and docs/whole_body.md and
``eval_metrics`` of configs/metadata.json are written from it, and tests/test_docs.py holds against it what other pages
say. Several folders of simulated MRs are joined by commas.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import fire
from common import RESULTS, ROOT, put_table
from monai.bundle import ConfigParser

from bundle.demo import scores_of

EVALUATION, WHOLE_BODY = ROOT / "docs" / "evaluation.md", ROOT / "docs" / "whole_body.md"
METADATA = ROOT / "configs" / "metadata.json"
SYSTEMS = ("3D-WLDM", "MR lookup", "0 HU")
SCORES = {  # name in metrics.json: title in the table, decimals
    "synthrad2025_mae": ("`synthrad2025`: MAE, HU", 1),
    "synthrad2025_bias": ("bias, HU", 1),
    "synthrad2025_soft_mae": ("soft tissue MAE, HU", 1),
    "synthrad2025_bone_mae": ("bone MAE, HU", 0),
    "synthrad2025_bone_bias": ("bone bias, HU", 0),
    "synthrad2025_bone_dice": ("bone Dice", 2),
    "synthrad2025_psnr": ("PSNR, dB (range 4095)", 1),
    "synthrad2025_ms_ssim": ("MS-SSIM", 3),
    "paper_mae": ("`paper`: MAE, HU", 1),
    "paper_psnr": ("PSNR, dB (range 1600)", 1),
    "paper_ssim": ("SSIM", 3),
    "paper_ncc": ("NCC", 3),
}
INTERVALS = ("50", "80", "95")
CURVES = ("sparsification", "oracle")
TISSUES = {"": "all", "soft_": "soft tissue", "bone_": "bone"}


def metrics(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "metrics.json").read_text())


def rows(folder: str, system: str = "3D-WLDM") -> list[dict[str, str]]:
    """The rows of a system in metrics.csv, a patient each."""
    with (Path(folder) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["system"] == system]


def scores_of_patients(folder: str) -> dict[str, Any]:
    """Means with their 95 % intervals, the range over patients, the SD of samples and what it leaves out."""
    found = metrics(folder)
    patients = {
        row["patient"]: {name: float(row[f"synthrad2025_{name}"]) for name in ("mae", "bone_dice")}
        for row in rows(folder)
    }
    mean = {
        system: {name: found["systems"][system][name]["mean"] for name in SCORES if name in found["systems"][system]}
        for system in SYSTEMS
    }
    ours = found["systems"]["3D-WLDM"]
    sd = {
        f"{tissue}coverage_{interval}": ours[f"sd_{tissue}coverage_{interval}"]["mean"]
        for tissue in TISSUES
        for interval in INTERVALS
    }
    sd |= {"ence": ours["sd_ence"]["mean"], "spearman": ours["sd_spearman"]["mean"]}
    for name in ("coverage_95", "spearman"):
        by_patient = [float(row[f"sd_{name}"]) for row in rows(folder)]
        sd[f"{name}_range"] = [min(by_patient), max(by_patient)]
    without = {name: dict(zip(found["uncertainty"]["fractions"], found["uncertainty"][name])) for name in CURVES}
    fifth = min(without["oracle"], key=lambda fraction: abs(fraction - 0.2))
    sd |= {f"mae_without_a_fifth_{name}": curve[fifth] for name, curve in without.items()}
    sd["spearman_by_patient"] = found["uncertainty"]["spearman_by_patient"]
    return {
        "mean": mean, "interval": {name: ours[name]["ci95"] for name in SCORES}, "patients": patients, "sd": sd,
    }  # fmt: skip


def simulated_scores(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Means over the CTs of each contrast of configs/whole_body.yaml, and the MAE of each CT."""
    contrasts = ConfigParser.load_config_file(ROOT / "configs" / "whole_body.yaml")["contrasts"]
    found = [row for folder in folders for row in rows(folder)]
    names = ("mae", "bone_dice", "air_dice", "air_bias")
    record = {}
    for contrast in contrasts:
        chosen = {
            row["patient"].removesuffix(f"_{contrast}"): {name: float(row[f"synthrad2025_{name}"]) for name in names}
            for row in found
            if row["patient"].endswith(f"_{contrast}")
        }
        if chosen:
            mean = {name: fmean(row[name] for row in chosen.values()) for name in names}
            record[contrast] = mean | {"mae_of": {ct: row["mae"] for ct, row in chosen.items()}}
    return record


def score_table(test: dict[str, Any]) -> list[dict[str, str]]:
    table = []
    for name, (title, decimals) in SCORES.items():
        ours, *others = (test["mean"][system].get(name) for system in SYSTEMS)
        low, high = test["interval"][name]
        texts = [f"{ours:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"]
        texts += ["not defined" if value is None else f"{value:.{decimals}f}" for value in others]
        table.append(dict(zip(("", *SYSTEMS), (title, *texts))))
    return table


def coverage_table(sd: dict[str, Any]) -> list[dict[str, str]]:
    table = []
    for interval in INTERVALS:
        row = {"SD of 8 samples, calibrated on the validation patients": f"in the {interval} % interval"}
        row |= {title: f"{100 * sd[f'{tissue}coverage_{interval}']:.1f} %" for tissue, title in TISSUES.items()}
        table.append(row)
    low, high = sd["coverage_95_range"]
    table[-1]["all"] += f" ({100 * low:.1f} to {100 * high:.1f} by patient)"
    return table


def simulated_table(simulated: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "contrast": contrast.replace("_", " "),
            "MAE, HU": f"{found['mae']:.0f}",
            "bone Dice": f"{found['bone_dice']:.2f}",
            "air Dice": f"{found['air_dice']:.2f}",
            "bias of air and lung, HU": f"{found['air_bias']:.0f}",
        }
        for contrast, found in simulated.items()
    ]


def write_metadata(mean: dict[str, float]) -> None:
    lines = ",\n".join(f'        "{name}": {mean[name]:.{decimals}f}' for name, (_, decimals) in SCORES.items())
    block = re.compile(r'("eval_metrics": \{\n).*?(\n    \})', re.S)
    METADATA.write_text(block.sub(lambda found: found[1] + lines + found[2], METADATA.read_text()))


def main(test: str, validation: str, simulated: str | Sequence[str], demo: str = "demo") -> None:
    """Write the record and the tables.

    Args:
        test: folder of ``wldm evaluate`` of the test split, with samples.
        validation: the same of the validation split; samples are not needed.
        simulated: folders of CTs that were never trained on, with simulated MRs.
        demo: folder of ``wldm demo``.
    """
    folders = simulated.split(",") if isinstance(simulated, str) else simulated
    calibration = json.loads((ROOT / "models" / "calibration.json").read_text())
    error, dice = scores_of(Path(demo) / "sct.nii.gz", Path(demo) / "ct.nii.gz")
    record: dict[str, Any] = {
        "weights": calibration["model_sha256"],
        "sd_scale": calibration["sd_scale"],
        "test": scores_of_patients(test),
        "validation": {"mae": metrics(validation)["systems"]["3D-WLDM"]["synthrad2025_mae"]["mean"]},
        "simulated": simulated_scores(folders),
        "demo": {"mae": error, "bone_dice": dice},
    }
    (RESULTS / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
    put_table("scores", score_table(record["test"]), EVALUATION)
    put_table("coverage", coverage_table(record["test"]["sd"]), EVALUATION)
    put_table("scores_simulated", simulated_table(record["simulated"]), WHOLE_BODY)
    write_metadata(record["test"]["mean"]["3D-WLDM"])


if __name__ == "__main__":
    fire.Fire(main)

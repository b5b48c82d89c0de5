"""The scores of the shipped weights, in one record that the pages quote.

    wldm evaluate --dataset_dir DIR --num_samples 8 --output_dir TEST
    wldm evaluate --dataset_dir DIR --split validation --output_dir VALIDATION
    wldm simulate CTS --output_dir PAIRS; wldm evaluate --dataset_dir PAIRS --output_dir SIMULATED
    wldm demo
    python benchmarks/scores.py --test TEST --validation VALIDATION --simulated SIMULATED --demo demo

The record is ``benchmarks/results/scores.json``. The tables of docs/evaluation.md and docs/whole_body.md,
``eval_metrics`` of configs/metadata.json and the sentences of :data:`QUOTES` are written from it, and
tests/test_docs.py compares them.
Several folders of simulated MRs are joined by commas.
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
from custom_modules.evaluation.split import SHOWN

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

QUOTES = {  # what pages say of the shipped weights, with figures of the record
    "README.md": (
        "| **3D-WLDM**, these weights (about 800 minutes of training, and 25 on a GPU) | {row} |",
        "(STS_017; in-body MAE {limb[mae]:.0f} HU, bone Dice {limb[bone_dice]:.2f})",
        "(MAE {demo[mae]:.0f} HU, bone Dice {demo[bone_dice]:.2f};",
        "too soft, by {too_soft:.0f} HU on average",
        "from {mae_range} HU and from {dice_range} Dice",
        "T1 spin echo, the MAE is {spin_echo[mae]:.0f} HU and the bone Dice {spin_echo[bone_dice]:.2f}",
    ),
    "docs/README.md": (
        "weights {weights}",
        "| **3D-WLDM** | {row} |",
        "bone is {too_soft:.0f} HU too soft on average",
        "from {mae_range} HU MAE and from {dice_range} bone Dice",
        "interval of the mean MAE is {low:.0f} to {high:.0f} HU",
    ),
    "docs/evaluation.md": (
        "weights {weights}",
        "| **3D-WLDM, these weights** | {row} |",
        "bone is {too_soft:.0f} HU too soft on average",
        "ENCE is {sd[ence]:.2f}",
        "is {sd[spearman]:.2f} per voxel ({sd[spearman_range][0]:.2f} to {sd[spearman_range][1]:.2f} by patient) "
        "and {sd[spearman_by_patient]:.2f} per patient",
        "lowers the MAE from {mean[synthrad2025_mae]:.0f} to {sd[mae_without_a_fifth_sparsification]:.0f} HU "
        "({sd[mae_without_a_fifth_oracle]:.0f} HU if",
        "The scaling factor is {sd_scale:.1f}",
        "MAE per patient ranges from {mae_range} HU, bone Dice from {dice_range}.",
        "reach {validation[mae]:.1f} HU",
    ),
    "docs/whole_body.md": (
        "weights {weights}",
        "abdomen alone is at {spin_echo[mae_of][liver]:.0f} HU in T1 spin echo, the chest at "
        "{spin_echo[mae_of][chest_lidc]:.0f}",
    ),
    "docs/troubleshooting.md": ("by {too_soft:.0f} HU on average",),
    "docs/training.md": ("shipped ({weights})",),
    "docs/clinical.md": ("weights {weights}",),
}


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


def in_words(record: dict[str, Any]) -> dict[str, Any]:
    """The record and what the quotes make of it."""
    test, mean = record["test"], record["test"]["mean"]["3D-WLDM"]
    ranges = {
        name: [choose(patient[name] for patient in test["patients"].values()) for choose in (min, max)]
        for name in ("mae", "bone_dice")
    }
    low, high = test["interval"]["synthrad2025_mae"]
    decimals = {"mae": 1, "bias": 1, "bone_mae": 0, "bone_dice": 2}
    row = [f"{mean[f'synthrad2025_{name}']:.{digits}f}" for name, digits in decimals.items()]
    return record | {
        "weights": record["weights"][:8], "mean": mean, "sd": test["sd"], "low": low, "high": high,
        "row": " | ".join([*row, f"{mean['paper_ssim']:.3f}"]), "too_soft": -mean["synthrad2025_bone_bias"],
        "limb": test["patients"]["STS_017"], "spin_echo": record["simulated"]["t1_spin_echo"],
        "mae_range": "{:.0f} to {:.0f}".format(*ranges["mae"]),
        "dice_range": "{:.2f} to {:.2f}".format(*ranges["bone_dice"]),
    }  # fmt: skip


def requote(text: str, old: str, new: str) -> str:
    """Replace ``old`` by ``new``, of as many words, wherever lines break in it."""
    pattern = r"(\s+)".join(map(re.escape, old.split(" ")))
    return re.sub(pattern, lambda found: "".join(map("".join, zip(new.split(" "), (*found.groups(), "")))), text)


def write_quotes(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Bring the quotes in the pages up to date; tests/test_docs.py names those that were not found."""
    before, after = in_words(old), in_words(new)
    for page, quotes in QUOTES.items():
        text = (ROOT / page).read_text()
        for quote in quotes:
            text = requote(text, quote.format(**before), quote.format(**after))
        (ROOT / page).write_text(text)


def write_metadata(mean: dict[str, float]) -> None:
    shown = {name: decimals for name, (_, decimals) in SCORES.items() if name.split("_", 1)[1] in SHOWN}
    lines = ",\n".join(f'        "{name}": {mean[name]:.{decimals}f}' for name, decimals in shown.items())
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
    path = RESULTS / "scores.json"
    write_quotes(json.loads(path.read_text()), record)
    path.write_text(json.dumps(record, indent=1) + "\n")
    put_table("scores", score_table(record["test"]), EVALUATION)
    put_table("coverage", coverage_table(record["test"]["sd"]), EVALUATION)
    put_table("scores_simulated", simulated_table(record["simulated"]), WHOLE_BODY)
    write_metadata(record["test"]["mean"]["3D-WLDM"])


if __name__ == "__main__":
    fire.Fire(main)

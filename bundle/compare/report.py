"""``compare.csv``, the page of tables and its figure, made from the records of the systems."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import kendalltau, wilcoxon

from custom_modules.files import write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Record = dict[str, Any]

# key of a row: heading, decimals, and whether larger is better (None: nearer to 1 is better)
SCORES: dict[str, tuple[str, int, bool | None]] = {
    "paper_psnr": ("PSNR, dB", 2, True),
    "paper_ssim": ("SSIM", 3, True),
    "paper_mae": ("MAE, HU", 1, False),
    "paper_ncc": ("NCC", 3, True),
    "synthrad2025_bone_dice": ("bone Dice", 2, True),
    "synthrad2025_bone_mae": ("bone MAE, HU", 0, False),
    "slice_inconsistency": ("inter-slice inconsistency", 2, None),
}
PAPER_SCORES = tuple(SCORES)[:4]
# means of the paper's Tables I and II, in the order of PAPER_SCORES
PAPER = {
    "I": {
        "ddpm": (21.35, 0.60, 101.04, 0.93), "ddim": (24.29, 0.45, 76.64, 0.97),
        "stable_dm_2d": (22.59, 0.71, 67.52, 0.95), "controlnet": (22.64, 0.73, 66.72, 0.95),
        "stable_dm_3d": (21.82, 0.66, 85.44, 0.95), "cyclegan": (23.44, 0.79, 55.04, 0.96),
        "full": (25.33, 0.81, 47.28, 0.97),
    },
    "II": {
        "vanilla": (23.02, 0.58, 75.36, 0.96), "wrm": (24.65, 0.68, 59.60, 0.97), "wrm_smd": (25.02, 0.78, 52.24, 0.97),
        "full": (25.33, 0.81, 47.28, 0.98),
    },
}  # fmt: skip
REFERENCE = "full"
IN_A_ROW = 5  # columns of the figure, so that each can be read
REASONS = ("<!-- reasons: what stands from here to the end mark is kept when the page is written -->", "<!-- end -->")


def read_records(results: Path, identity: Mapping[str, Any], systems: Sequence[str]) -> dict[str, Record]:
    """Read the record of each system; without one for this budget and data it says ``not run``."""
    records = {}
    for name in systems:
        path = results / f"{name}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        same = all(record.get(key) == value for key, value in identity.items())
        records[name] = record if record and same else {"system": name, "problem": "not run"}
    return records


def values(record: Record, score: str) -> dict[str, float]:
    """Return a score by patient, where it is defined."""
    return {row["patient"]: row[score] for row in record.get("rows", []) if isinstance(row.get(score), (int, float))}


def p_value(record: Record, reference: Record, score: str) -> float | None:
    """Return p of Wilcoxon's signed-rank test over the patients in both records; None for fewer than 2 patients, or
    without any difference."""
    one, other = values(record, score), values(reference, score)
    differences = np.array([one[patient] - other[patient] for patient in one if patient in other])
    return float(wilcoxon(differences).pvalue) if len(differences) > 1 and differences.any() else None


def write_report(results: Path, identity: Mapping[str, Any], titles: Mapping[str, str], table: Path) -> Path:
    """Write ``table`` (CSV, one line per system and patient), the page ``RESULTS.md``, and the figure in RESULTS.

    Args:
        results: folder of the records.
        identity: ``budget`` and ``data_sha256`` of the records to include.
        titles: of all systems, in the order of the rows.
    """
    records = read_records(results, identity, list(titles))
    write_table(records, table)
    page = results.with_suffix(".md")
    kept = page.read_text().split(REASONS[0])[-1].split(REASONS[1])[0] if page.exists() else ""
    kept = kept if kept.strip() and REASONS[0] in page.read_text() else "\n"
    figure, curves = write_figure(records, results), write_curves(records, titles, results)
    parts = [
        _head(records, identity),
        _scores(records, titles),
        _p_values(records, titles),
        _cost(records, titles),
        f"![Validation error against minutes of training]({results.name}/{curves.name})" if curves else "",
        _rankings(records, titles),
        REASONS[0] + kept + REASONS[1],
        f"![One test patient: MR, CT and one column per system]({results.name}/{figure.name})" if figure else "",
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text("\n\n".join(part for part in parts if part) + "\n", page)
    return page


def write_table(records: Mapping[str, Record], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["system", "patient", "problem", *SCORES])
        writer.writeheader()
        for name, record in records.items():
            for row in record.get("rows") or [{"problem": record["problem"]}]:
                writer.writerow({"system": name, **row})


def _head(records: Mapping[str, Record], identity: Mapping[str, Any]) -> str:
    run = [record for record in records.values() if "date" in record]
    dates = sorted({record["date"] for record in run}) or ["-"]
    machines = {_machine(record["hardware"]) for record in run}
    patients = {patient for record in run for patient in values(record, "paper_mae")}
    return (
        "# Tables I and II, repeated\n\n"
        "Written by `python -m bundle compare`; do not edit except between the marks below.\n\n"
        f"{len(patients)} test patients, never used for training or tuning (data {identity['data_sha256'][:12]}). Each "
        f"system had {identity['budget']:g} min of wall time, including all its stages and validation but not reading "
        "the volumes; the weights are those of its best validation. CPU minutes are those of its own process: where "
        "they are well below the minutes times the threads, the machine was shared. "
        f"Run {dates[0]}"
        + (f" to {dates[-1]}" if len(dates) > 1 else "")
        + f" on {'; '.join(sorted(machines)) or '-'}."
    )


def _machine(hardware: Mapping[str, Any]) -> str:
    gpus = f", {', '.join(hardware['gpus'])}" if hardware["gpus"] else ", no GPU"
    return f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads used{gpus}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _mean(record: Record, score: str) -> str:
    numbers, digits = list(values(record, score).values()), SCORES[score][1]
    if not numbers:
        return ""
    spread = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{spread}"


def _scores(records: Mapping[str, Record], titles: Mapping[str, str]) -> str:
    head = ["", *(heading for heading, _, _ in SCORES.values()), "s per volume", "parameters, M"]
    rows = []
    for name, record in records.items():
        if record["problem"]:
            rows.append([titles[name], record["problem"].replace("|", "/"), *[""] * (len(head) - 2)])
            continue
        missing = [row["patient"] for row in record["rows"] if row["problem"]]
        note = f" (without {', '.join(missing)}: not scored)" if missing else ""
        cost = [f"{np.mean(record['seconds']):.1f}", f"{record['parameters'] / 1e6:.1f}"]
        rows.append([titles[name] + note, *(_mean(record, score) for score in SCORES), *cost])
    return (
        "## Scores\n\nMean ± SD over patients, inside the body, on the MR's own grid. PSNR, SSIM, MAE and NCC by the "
        "paper's protocol (HU within ±800), bone (over 250 HU) with HU as they are. Inter-slice inconsistency: mean "
        "absolute axial difference of neighbours divided by that of the CT; 1 is as in the CT.\n\n"
        + _markdown(head, rows)
    )


def _p_values(records: Mapping[str, Record], titles: Mapping[str, str]) -> str:
    reference = records[REFERENCE]
    if reference["problem"]:
        return ""
    rows = []
    for name, record in records.items():
        if name != REFERENCE and not record["problem"]:
            found = [p_value(record, reference, score) for score in SCORES]
            rows.append([titles[name], *("" if p is None else f"{p:.3f}" for p in found)])
    least = 2.0 ** (1 - len(values(reference, "paper_mae")))
    return (
        f"Paired Wilcoxon p against {titles[REFERENCE]}, two-sided, not corrected for the number of tests; with this "
        f"many patients the smallest possible p is {least:.3f}:\n\n"
        + _markdown(["", *(heading for heading, _, _ in SCORES.values())], rows)
    )


def _cost(records: Mapping[str, Record], titles: Mapping[str, str]) -> str:
    head = ["", "stage", "steps", "minutes", "CPU minutes", "best validation MAE, HU", "date", "commit"]
    rows = [
        [titles[name], stage["stage"], f"{stage['steps']}", f"{stage['minutes']:.1f}", f"{stage['cpu_minutes']:.1f}",
         f"{stage['val_mae']:.1f}" if isinstance(stage["val_mae"], float) else "", record["date"],
         (record["commit"] or "")[:9]]
        for name, record in records.items()
        for stage in record.get("stages", [])
    ]  # fmt: skip
    if not rows:
        return ""
    return (
        "## Training\n\nA stage that two systems share was trained once and counts for both; the validation error of "
        "an autoencoder is that of reconstruction.\n\n" + _markdown(head, rows)
    )


def _rankings(records: Mapping[str, Record], titles: Mapping[str, str]) -> str:
    lines = ["## Comparison with the paper's ranking"]
    for table, paper in PAPER.items():
        here = [name for name in paper if not records[name]["problem"]]
        for n, score in enumerate(PAPER_SCORES):
            heading, _, more = SCORES[score]
            ours = {name: float(np.mean(list(values(records[name], score).values()) or [np.nan])) for name in here}
            if len(here) < 3 or np.isnan(list(ours.values())).any():
                continue
            theirs = {name: paper[name][n] for name in here}
            tau = kendalltau(list(theirs.values()), list(ours.values())).statistic
            orders = [
                " > ".join(titles[name] for name in sorted(means, key=means.__getitem__, reverse=bool(more)))
                for means in (theirs, ours)
            ]
            lines.append(f"Table {table}, {heading}: Kendall's tau {tau:+.2f} over {len(here)} systems.  \n"
                         f"Paper: {orders[0]}.  \nHere: {orders[1]}.")  # fmt: skip
    return "\n\n".join(lines) if len(lines) > 1 else ""


def write_figure(records: Mapping[str, Record], results: Path) -> Path | None:
    """Write ``figure.png`` in the folder: MR, CT and the column of every system, :data:`IN_A_ROW` side by side; None
    without columns."""
    done = [name for name, record in records.items() if not record["problem"]]
    columns = [plt.imread(path) for name in ("mr", "ct", *done) if (path := results / f"{name}.png").exists()]
    if not done or not columns:
        return None
    height, width = (max(image.shape[axis] for image in columns) for axis in (0, 1))
    columns += [np.ones((1, 1, columns[0].shape[2]), np.float32)] * (-len(columns) % IN_A_ROW)
    padded = [
        np.pad(image, ((height - len(image), 0), (0, width - image.shape[1]), (0, 0)), constant_values=1)
        for image in columns
    ]
    rows = [np.concatenate(padded[start : start + IN_A_ROW], axis=1) for start in range(0, len(padded), IN_A_ROW)]
    path = results / "figure.png"
    plt.imsave(path, np.concatenate(rows))
    return path


def write_curves(records: Mapping[str, Record], titles: Mapping[str, str], results: Path) -> Path | None:
    """Write ``curves.png`` in the folder: validation error of each system's last stage against the minutes of all its
    stages; None without curves."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, record in records.items():
        *earlier, last = record.get("stages") or [{}]
        if points := last.get("curve"):
            minutes, _, errors = zip(*points)
            start = sum(stage["minutes"] for stage in earlier)
            axes.plot([start + m for m in minutes], errors, marker="o", markersize=3, label=titles[name])
    drawn = bool(axes.lines)
    if drawn:
        axes.set(xlabel="minutes of training, all stages", ylabel="validation MAE, HU")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(results / "curves.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return results / "curves.png" if drawn else None

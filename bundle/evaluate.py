"""``python -m bundle evaluate``: scores of a split of a datalist, beside the trivial baselines."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import load_decathlon_datalist
from tqdm import tqdm

from bundle.synthesize import picture
from bundle.workflow import inference_workflow
from custom_modules.metrics import ct_body_mask, score
from custom_modules.volumes import InputError, read_volume

BORDER_MM = 6.0
LOOKUP_BIN = 10.0  # MR units
LOOKUP_TOP = 2000.0


def evaluate(
    dataset_dir: str,
    datalist: str | None = None,
    split: str = "test",
    output_dir: str = "eval",
    pred_dir: str | None = None,
    pictures: bool = True,
    **settings: Any,
) -> None:
    """Synthesise the MRs of ``split`` and score them on their own grid against the CTs (``label``).

    Prints a row a patient and the means, and writes them to ``OUTPUT_DIR/metrics.csv`` with a picture a patient.
    Beside them stand two baselines: 0 HU everywhere, and the training patients' mean HU for each MR intensity.

    Args:
        dataset_dir: folder that the datalist's paths are relative to.
        datalist: MONAI datalist; ``DATASET_DIR/datalist.json`` when None.
        pred_dir: finished synthetic CTs, named ``<patient>_sct.nii.gz``; synthesised when None.
        settings: of configs/inference.yaml.
    """
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    pairs = _read_datalist(path, split, dataset_dir)
    predictions = Path(pred_dir or output_dir)
    if pred_dir is None:
        volumes = [{"image": pair["image"], "output": f"{pair['patient']}_sct.nii.gz"} for pair in pairs]
        inference_workflow(output_dir=output_dir, **{"dataset#data": volumes}, **settings).run()
    lookup = fit_lookup(_read_datalist(path, "training", dataset_dir))
    rows = []
    for pair in tqdm(pairs, desc="scoring", unit="patient"):
        sct = predictions / f"{pair['patient']}_sct.nii.gz"
        rows += score_patient(pair, sct, lookup)
        if pictures:
            picture(pair["image"], sct, np.asarray(read_volume(pair["label"])[0]))
    report(rows, Path(output_dir) / "metrics.csv")


def _read_datalist(path: Path, split: str, base_dir: str) -> list[dict[str, str]]:
    """The pairs of ``split``, each with ``patient``: the name of its folder."""
    try:
        pairs = load_decathlon_datalist(str(path), True, split, base_dir=str(base_dir))
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: has no split '{split}' ({error})") from error
    return [{**pair, "patient": Path(pair["image"]).parent.name} for pair in pairs]


def fit_lookup(pairs: list[dict[str, str]]) -> np.ndarray:
    """Mean HU of each MR intensity (bins of 10 units) over the bodies of ``pairs``: what intensity alone can tell."""
    bins = int(LOOKUP_TOP / LOOKUP_BIN) + 1
    total, count = np.zeros(bins), np.zeros(bins)
    for pair in pairs:
        mr, ct = (np.asarray(read_volume(pair[key])[0]) for key in ("image", "label"))
        mask = ct_body_mask(ct, mr)
        index = _lookup_index(mr[mask])
        total += np.bincount(index, ct[mask], bins)
        count += np.bincount(index, minlength=bins)
    filled = np.flatnonzero(count)
    return np.interp(np.arange(bins), filled, total[filled] / count[filled])


def _lookup_index(mr: np.ndarray) -> np.ndarray:
    return (np.clip(mr, 0, LOOKUP_TOP) / LOOKUP_BIN).astype(int)


def score_patient(pair: dict[str, str], sct: Path, lookup: np.ndarray) -> list[dict[str, Any]]:
    """Rows of one patient: the prediction, with its bias near cut surfaces and inside, and the baselines."""
    mr, label, pred = read_volume(pair["image"]), read_volume(pair["label"]), read_volume(sct)
    if pred.shape != label.shape or not np.allclose(pred.affine, label.affine, atol=1e-2):
        raise InputError(f"{sct}: its grid is not that of {pair['label']}")
    spacing = np.asarray(mr.pixdim)
    mr, ct, pred = (np.asarray(x[0]) for x in (mr, label, pred))
    mask = ct_body_mask(ct, mr)
    near = mask & near_border(mask.shape, spacing)
    systems = {"3D-WLDM": pred, "0 HU": np.zeros_like(ct), "MR lookup": lookup[_lookup_index(mr)]}
    rows = [{"patient": pair["patient"], "system": name, **score(p, ct, mask)} for name, p in systems.items()]
    rows[0]["border_bias"] = score(pred, ct, near)["bias"]
    rows[0]["inside_bias"] = score(pred, ct, mask & ~near)["bias"]
    return rows


def near_border(shape: tuple[int, ...], spacing: np.ndarray) -> np.ndarray:
    """Voxels within 6 mm of a face of the field of view; in the body, these are at a cut surface."""
    near = np.zeros(shape, dtype=bool)
    for axis, (size, step) in enumerate(zip(shape, spacing)):
        index = np.arange(size)
        line = (np.minimum(index, size - 1 - index) + 0.5) * step < BORDER_MM
        near |= line.reshape([-1 if a == axis else 1 for a in range(3)])
    return near


def report(rows: list[dict[str, Any]], path: Path) -> None:
    """Write all rows as CSV and print each patient's and each system's mean."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(rows[0])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    values = fields[2:]
    print(f"{'patient':<12}{'system':<12}" + "".join(f"{v:>13}" for v in values))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    means = [_mean_row([row for row in rows if row["system"] == system]) for system in systems]
    for row in [r for r in rows if r["system"] == systems[0]] + means:
        cells = "".join(f"{row[v]:>13.3f}" if v in row else f"{'':>13}" for v in values)
        print(f"{row['patient']:<12}{row['system']:<12}{cells}")
    print(f"written to {path}")


def _mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over patients of every value that is defined."""
    values = {name: np.nanmean([row[name] for row in rows]) for name in rows[0] if name not in ("patient", "system")}
    return {"patient": "mean", "system": rows[0]["system"], **values}

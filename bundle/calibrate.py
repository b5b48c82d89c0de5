"""``python -m bundle calibrate`` and ``guard``: statistics of the data, stored with the weights."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from tqdm import tqdm

from bundle.simulate import simulate
from bundle.workflow import ROOT, inference_workflow
from custom_modules.data.body import ct_body_mask
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import read_volume, sibling_path
from custom_modules.errors import InputError
from custom_modules.evaluation.uncertainty import coverage, fit_scale
from custom_modules.files import inside, sha256, write_json
from custom_modules.inference.calibration import DENSE_BONE, calibrate_bone_, fit_bone_curve
from custom_modules.inference.guard import Measurements

# contrasts of configs/whole_body.yaml on which the shipped weights are of use
KNOWN = "t1_spin_echo,t1_in_phase,t1_opposed_phase,t2,proton_density"

MOST_PATIENTS = 24  # of the training split, on whom the curve of bone is fitted


def calibrate(
    dataset_dir: str,
    datalist: str | None = None,
    split: str = "validation",
    path: str = str(ROOT / "models" / "calibration.json"),
    pred_dir: str | None = None,
    num_samples: int = 8,
    **settings: Any,
) -> None:
    """Fit the curve of dense bone and the factor from SD to error, in HU, and store them with the weights.

    The factor is fitted on ``split`` alone, after the curve. The curve is fitted on it and on the training split: few
    validation patients have much dense bone, and that of training patients is synthesised hardly better.

    Args:
        split: validation patients; never those for whom results are reported.
        path: the JSON that inference.yaml reads.
        pred_dir: folder that keeps the synthetic CTs and their SD, both without calibration; a temporary one when None.
        num_samples: number of samples that inference will draw.
        settings: further settings of configs/inference.yaml, as in later use.
    """
    pairs = _paired(dataset_dir, datalist, split)
    if not pairs:
        raise InputError(f"split '{split}' has no pair of MR and CT to calibrate on")
    training = [] if split == "training" else _paired(dataset_dir, datalist, "training")
    training = training[:: math.ceil(len(training) / MOST_PATIENTS) or 1]
    with tempfile.TemporaryDirectory() as scratch:
        folder, other = Path(pred_dir or scratch), Path(scratch) / "training"
        parser = _synthesise(pairs, folder, num_samples=num_samples, **settings)
        cases = [_within_body(pair, folder, "", "_sd") for pair in pairs]
        if training:
            _synthesise(training, other, **settings)
        dense = [case[:2, case[1] >= DENSE_BONE] for case in cases]
        for pair in training:  # one at a time: all bodies at once may not fit into memory
            case = _within_body(pair, other, "")
            dense.append(case[:, case[1] >= DENSE_BONE])
    highest = parser.get_parsed_content("hu_window")[1]
    truth, predicted = np.concatenate(dense, axis=1)
    curve = fit_bone_curve(predicted, truth, highest)
    errors = [(calibrate_bone_(pred, curve) - ct, sd) for ct, pred, sd in cases]
    scale = fit_scale(*zip(*errors))
    covered = [float(np.mean([coverage(e, scale * s, level) for e, s in errors])) for level in (0.5, 0.8, 0.95)]
    record = {
        "sd_scale": scale,
        "bone_curve": curve,
        "model_sha256": sha256(parser.get_parsed_content("checkpoint")),
        "settings": parser.get_parsed_content("stored_calibration").settings,
        "split": split,
        "patients": [pair["patient"] for pair in pairs],
        "patients_of_bone_curve": [pair["patient"] for pair in training + pairs],
        "coverage": dict(zip(("50", "80", "95"), covered)),
    }
    write_json(record, path)
    bone = " ".join(f"{x:.0f}:{y:.0f}" for x, y in curve or ())
    print(f"HU of dense bone {bone or 'unchanged: there is too little of it'}")
    print(f"SD x {scale:.3g} covers {covered[0]:.1%}, {covered[1]:.1%}, {covered[2]:.1%} (50, 80, 95 %): {path}")


def _synthesise(pairs: Sequence[Mapping[str, str]], folder: Path, **settings: Any) -> ConfigParser:
    """Write the synthetic CTs of ``pairs``, not calibrated, as ``<patient>_sct.nii.gz``; return the config."""
    for pair in pairs:
        inside(folder, pair["patient"])
    volumes = [{"image": pair["image"], "output": f"{pair['patient']}_sct.nii.gz"} for pair in pairs]
    own: dict[str, Any] = {"calibration": None, "guard_statistics": None, "dataset#data": volumes}
    workflow = inference_workflow(output_dir=str(folder), **own, **settings)
    workflow.run()
    return workflow.parser


def _within_body(pair: Mapping[str, str], folder: Path, *suffixes: str) -> np.ndarray:
    """Return HU within the body of the CT, then of what ``folder`` has with each of ``suffixes``: "" is the synthetic
    CT, (1 + suffixes, voxels)."""
    sct = folder / f"{pair['patient']}_sct.nii.gz"
    paths: list[str | Path] = [pair["image"], pair["label"], *(sibling_path(sct, suffix) for suffix in suffixes)]
    mr, *volumes = (np.asarray(read_volume(path)[0], dtype=np.float32) for path in paths)
    mask = ct_body_mask(volumes[0], mr)
    return np.stack([volume[mask] for volume in volumes])


def guard(
    dataset_dir: str,
    datalist: str | None = None,
    split: str = "training",
    path: str = str(ROOT / "models" / "guard.json"),
    contrasts: str = KNOWN,
    **settings: Any,
) -> None:
    """Measure the MRs of the training split and store their statistics, for the check before each synthesis.

    Args:
        path: the JSON that inference.yaml reads.
        contrasts: of which an MR is simulated from each CT without one, names joined by commas: those on which the
            weights are of use (docs/whole_body.md).
        settings: further settings of configs/inference.yaml.
    """
    pairs = _pairs(dataset_dir, datalist, split)
    with tempfile.TemporaryDirectory() as scratch:
        images = [pair["image"] for pair in pairs if "image" in pair]
        alone = [pair["label"] for pair in pairs if "image" not in pair]
        for number, ct in enumerate(alone):
            simulate(ct, f"{scratch}/{number}", contrasts, quiet=True)
        images += sorted(str(path) for path in Path(scratch).rglob("mr.nii.gz"))
        own: dict[str, Any] = {
            "guard_statistics": None,
            "dataset#data": [{"image": image, "output": ""} for image in images],
        }
        parser = inference_workflow(**own, **settings).parser
        measured = Measurements(parser.get_parsed_content("network"))
        for batch in tqdm(parser.get_parsed_content("dataloader"), desc="measuring", total=len(images), unit="MR"):
            measured.add(_raise_failure(batch))
    statistics = measured.statistics()
    write_json({**statistics, "split": split, "model_sha256": sha256(parser.get_parsed_content("checkpoint"))}, path)
    for name, spread in statistics["measures"].items():
        print(f"{name:<42}{spread['low']:>10.4g} to {spread['high']:.4g}")
    print(f"written to {path}")


def _raise_failure(batch: dict[str, Any]) -> dict[str, Any]:
    if "failure" in batch:
        raise InputError(batch["failure"])
    return batch


def _paired(dataset_dir: str, datalist: str | None, split: str) -> list[dict[str, str]]:
    return [pair for pair in _pairs(dataset_dir, datalist, split) if "image" in pair]


def _pairs(dataset_dir: str, datalist: str | None, split: str) -> list[dict[str, str]]:
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    return load_pairs(path, dataset_dir, list(dict.fromkeys((split, "training"))), unpaired=True)[split]

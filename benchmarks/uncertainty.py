"""Does the SD of samples predict the error, and what does it cost? For the patients of a split, and by patient.

    python benchmarks/uncertainty.py --dataset_dir DIR [--split test] [--num_samples 8] [--pred_dir DIR] [--patients 2]

Coverage of the 95 % interval (all, soft tissue, bone) and the rank correlation of SD with the absolute error. Beside it
stands what a perfect ranking could reach: CT noise is part of every error and nothing can foresee it, so the absolute
error is ranked by its own mean over 4 mm, noise and all. Then the time of N samples in one pass over that of N runs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bundle.workflow import inference_workflow  # noqa: E402
from custom_modules.data.body import ct_body_mask
from custom_modules.data.pairs import load_pairs  # noqa: E402
from custom_modules.data.volumes import read_volume, sibling_path  # noqa: E402
from custom_modules.evaluation.uncertainty import assess, spearman  # noqa: E402

SHOWN = ["coverage_50", "coverage_80", "coverage_95", "soft_coverage_95", "bone_coverage_95", "ence", "spearman"]


def synthesize(pairs: list[dict[str, str]], folder: Path, **settings: Any) -> float:
    """Seconds of inference.yaml on the MRs, everything but the reading of the weights: of the processor, which other
    programs do not lengthen, or of the clock on a GPU."""
    volumes = [{"image": pair["image"], "output": f"{pair['patient']}_sct.nii.gz"} for pair in pairs]
    own: dict[str, Any] = {"dataset#data": volumes}
    workflow = inference_workflow(output_dir=str(folder), **own, **settings)
    workflow.parser.get_parsed_content("inferer").progress = False
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    workflow.run()
    return clock() - started


def row(pair: dict[str, str], sct: Path) -> list[float]:
    """The numbers of :data:`SHOWN` and the perfect ranking's correlation."""
    mr, label, pred, sd = (read_volume(path) for path in (pair["image"], pair["label"], sct, sibling_path(sct, "_sd")))
    spacing = np.asarray(mr.pixdim)
    mr, ct, pred, sd = (np.asarray(volume[0]) for volume in (mr, label, pred, sd))
    mask = ct_body_mask(ct, mr)
    error = np.abs(pred - ct)
    local = ndimage.gaussian_filter(error, 4 / spacing)
    values = assess(pred, ct, sd, mask)
    return [*(values[name] for name in SHOWN), spearman(error[mask], local[mask])]


def main(
    dataset_dir: str,
    split: str = "test",
    num_samples: int = 8,
    pred_dir: str | None = None,
    patients: int | None = None,
    **settings: Any,
) -> None:
    root = Path(dataset_dir)
    pairs = load_pairs(root / "datalist.json", root, [split, "training"])[split][:patients]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(pred_dir or scratch)
        if pred_dir is None:
            synthesize(pairs, folder, num_samples=num_samples, **settings)
        rows = {pair["patient"]: row(pair, folder / f"{pair['patient']}_sct.nii.gz") for pair in pairs}
        titles = [*SHOWN, "perfect ranking"]
        print(f"{'':<12}" + "".join(f"{title:>18}" for title in titles))
        for name, values in [*rows.items(), ("mean", np.nanmean(list(rows.values()), axis=0))]:
            print(f"{name:<12}" + "".join(f"{value:>18.3f}" for value in values))
        once = synthesize(pairs[-1:], Path(scratch), **settings)
        together = synthesize(pairs[-1:], Path(scratch), num_samples=num_samples, **settings)
    share = together / (num_samples * once)
    print(f"{pairs[-1]['patient']}: one run {once:.2f} s, {num_samples} samples {together:.2f} s, "
          f"{share:.0%} of {num_samples} runs")  # fmt: skip


if __name__ == "__main__":
    fire.Fire(main)

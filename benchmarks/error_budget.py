"""What the error of simulated torsos is made of: kinds of tissue, and the noise of the CT, which nothing can predict.

    wldm simulate FOLDER --output_dir SIMULATED
    wldm evaluate --dataset_dir SIMULATED --output_dir SCTS
    python benchmarks/error_budget.py SIMULATED SCTS

Within the body; the part of each kind of tissue, by the HU of the CT, adds up to the MAE. The CT without noise is its
median over 3 x 3 x 3 voxels.
"""

from __future__ import annotations

import json
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from common import ROOT, publish
from scipy import ndimage
from tqdm import tqdm

from custom_modules.data.body import ct_body_mask

TISSUES = {"air and lung": (-np.inf, -300), "fat": (-300, -30), "soft tissue": (-30, 200), "bone": (200, np.inf)}  # HU
MAE, QUIET, NOISE = "MAE", "against the CT without noise", "the CT against itself without noise"
CONTRASTS = {"t1_spin_echo": "T1 spin echo", "t1_in_phase": "T1 in phase", "t1_opposed_phase": "T1 opposed phase",
             "t2": "T2"}  # fmt: skip


def budget(mr: np.ndarray, ct: np.ndarray, sct: np.ndarray) -> dict[str, float]:
    """HU of error of a synthetic CT, all (D, H, W)."""
    body = ct_body_mask(ct, mr)
    error, quiet = np.abs(sct - ct), ndimage.median_filter(ct, 3)
    parts = {
        name: (error * (body & (ct >= low) & (ct < high))).sum() / body.sum() for name, (low, high) in TISSUES.items()
    }
    whole = {MAE: error, QUIET: np.abs(sct - quiet), NOISE: np.abs(ct - quiet)}
    return {**{name: values[body].mean() for name, values in whole.items()}, **parts}


def main(simulated: str, scts: str) -> None:
    """Publish the budget of every CT in every contrast of the ``simulated`` MRs that has a synthetic CT."""

    def load(path: Path) -> np.ndarray:
        return nib.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32)

    folder, rows = Path(simulated), []
    entries = [entry for part in json.loads((folder / "datalist.json").read_text()).values() if isinstance(part, list)
               for entry in part]  # fmt: skip
    for entry in tqdm(entries, unit="MR"):
        mr = folder / entry["image"]
        patient, contrast = mr.parts[-3:-1]
        sct = Path(scts) / f"{entry['patient']}_sct.nii.gz"
        if contrast in CONTRASTS and sct.exists():
            found = budget(load(mr), load(folder / entry["label"]), load(sct))
            hu = {name: round(float(value)) for name, value in found.items()}
            rows.append({"CT": patient, "contrast": CONTRASTS[contrast], **hu})
    publish("error_budget", rows, list(rows[0]), page=ROOT / "docs" / "whole_body.md")


if __name__ == "__main__":
    fire.Fire(main)

"""What the error of simulated torsos is made of: kinds of tissue, and what a small median takes out of the CT.

    wldm simulate FOLDER --output_dir SIMULATED
    wldm evaluate --dataset_dir SIMULATED --output_dir SCTS
    python benchmarks/error_budget.py SIMULATED SCTS

Within the body; the parts of the tissues, by the HU of the CT, add up to the MAE. The median over 3 x 3 x 3 voxels
takes most noise out of a CT, and its finest detail as well.
"""

from __future__ import annotations

from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from common import ROOT, publish
from monai.data import load_decathlon_datalist
from scipy import ndimage
from tqdm import tqdm

from custom_modules.data.body import ct_body_mask
from custom_modules.data.hu import LEAN_HU, tissue


def budget(mr: np.ndarray, ct: np.ndarray, sct: np.ndarray) -> dict[str, int]:
    """HU of error of a synthetic CT, all (D, H, W)."""
    body, error, smooth = ct_body_mask(ct, mr), np.abs(sct - ct), ndimage.median_filter(ct, 3)
    soft = tissue(ct, "soft")
    parts = {
        "air and lung": tissue(ct, "air"), "fat": soft & (ct <= LEAN_HU), "soft tissue": soft & (ct > LEAN_HU),
        "bone": tissue(ct, "bone"),
    }  # fmt: skip
    found = {
        "MAE": error, "against the median of the CT": np.abs(sct - smooth), "CT and its median": np.abs(ct - smooth),
    }  # fmt: skip
    found |= {name: error * where for name, where in parts.items()}
    return {name: round(float(values[body].mean())) for name, values in found.items()}


def main(simulated: str, scts: str) -> None:
    """Publish the budget of every CT in every contrast."""
    rows = []
    for pair in tqdm(load_decathlon_datalist(Path(simulated) / "datalist.json", True, "test", simulated), unit="MR"):
        ct, contrast = Path(pair["image"]).parts[-3:-1]
        paths = (pair["image"], pair["label"], Path(scts) / f"{pair['patient']}_sct.nii.gz")
        volumes = (nib.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32) for path in paths)
        rows.append({"CT": ct, "contrast": contrast.replace("_", " "), **budget(*volumes)})
    publish("error_budget", rows, list(rows[0]), page=ROOT / "docs" / "whole_body.md")


if __name__ == "__main__":
    fire.Fire(main)

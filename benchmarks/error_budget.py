"""What the error of simulated torsos is made of: kinds of tissue, and what a small median takes out of the CT.

    wldm simulate FOLDER --output_dir SIMULATED
    wldm evaluate --dataset_dir SIMULATED --output_dir SCTS
    python benchmarks/error_budget.py SIMULATED SCTS

Within the body; the parts of the tissues, by the HU of the CT, add up to the MAE. The median over 3 x 3 x 3 voxels
takes most noise out of a CT, and its finest detail as well; *without its contrast medium* it is the median of what
`wldm prepare --remove_contrast true` makes of the CT.
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

from bundle.prepare.contrast import remove_contrast
from custom_modules.data.body import ct_body_mask
from custom_modules.data.hu import LEAN_HU, tissue


def budget(mr: np.ndarray, ct: np.ndarray, sct: np.ndarray, spacing: np.ndarray) -> dict[str, int]:
    """HU of error of a synthetic CT, all (D, H, W) in RAS order."""
    body, error, smooth = ct_body_mask(ct, mr), np.abs(sct - ct), ndimage.median_filter(ct, 3)
    native = ndimage.median_filter(remove_contrast(ct, body, spacing), 3)
    soft = tissue(ct, "soft")
    parts = {
        "air and lung": tissue(ct, "air"), "fat": soft & (ct <= LEAN_HU), "soft tissue": soft & (ct > LEAN_HU),
        "bone": tissue(ct, "bone"),
    }  # fmt: skip
    found = {
        "MAE": error, "against the median of the CT": np.abs(sct - smooth),
        "without its contrast medium": np.abs(sct - native), "CT and its median": np.abs(ct - smooth),
    }  # fmt: skip
    found |= {name: error * where for name, where in parts.items()}
    return {name: round(float(values[body].mean())) for name, values in found.items()}


def main(simulated: str, scts: str) -> None:
    """Publish the budget of every CT in every contrast."""
    rows = []
    for pair in tqdm(load_decathlon_datalist(Path(simulated) / "datalist.json", True, "test", simulated), unit="MR"):
        ct, contrast = Path(pair["image"]).parts[-3:-1]
        paths = (pair["image"], pair["label"], Path(scts) / f"{pair['patient']}_sct.nii.gz")
        images = [nib.as_closest_canonical(nib.Nifti1Image.from_filename(path)) for path in paths]
        mr, truth, sct = (image.get_fdata(dtype=np.float32) for image in images)
        found = budget(mr, truth, sct, np.array(images[1].header.get_zooms()))
        rows.append({"CT": ct, "contrast": contrast.replace("_", " "), **found})
    publish("error_budget", rows, list(rows[0]), page=ROOT / "docs" / "whole_body.md")


if __name__ == "__main__":
    fire.Fire(main)

"""What the error of simulated torsos is made of: kinds of tissue, and what of the CT no MR shows.

    wldm simulate FOLDER --output_dir SIMULATED
    wldm evaluate --dataset_dir SIMULATED --output_dir SCTS
    python benchmarks/error_budget.py SIMULATED SCTS

Within the body; the parts of the tissues, by the HU of the CT, add up to the MAE. The median over 3 x 3 x 3 voxels
takes most noise out of a CT, and its finest detail as well; *without its contrast medium* it is the median of what
`wldm prepare --remove_contrast true` makes of the CT. The last rows are means over the CTs.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from common import ROOT, publish
from monai.data import load_decathlon_datalist
from scipy import ndimage
from tqdm import tqdm

from bundle.prepare.cleaning import ct_body
from bundle.prepare.contrast import remove_contrast
from custom_modules.data.body import ct_body_mask
from custom_modules.data.hu import LEAN_HU, tissue


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A volume in RAS order and its spacing in mm."""
    image = nib.as_closest_canonical(nib.Nifti1Image.from_filename(path))
    return image.get_fdata(dtype=np.float32), np.array(image.header.get_zooms(), float)


def budget(sct: np.ndarray, ct: np.ndarray, smooth: np.ndarray, native: np.ndarray) -> dict[str, float]:
    """HU of error of a synthetic CT, all (voxels,) of the body; ``smooth`` and ``native`` are medians of the CT, the
    second without contrast medium."""
    error, soft = np.abs(sct - ct), tissue(ct, "soft")
    parts = {
        "air and lung": tissue(ct, "air"), "fat": soft & (ct <= LEAN_HU), "soft tissue": soft & (ct > LEAN_HU),
        "bone": tissue(ct, "bone"),
    }  # fmt: skip
    found = {
        "MAE": error, "against the median of the CT": np.abs(sct - smooth),
        "without its contrast medium": np.abs(sct - native), "CT and its median": np.abs(ct - smooth),
    }  # fmt: skip
    found |= {name: error * where for name, where in parts.items()}
    return {name: float(values.mean()) for name, values in found.items()}


def main(simulated: str, scts: str) -> None:
    """Publish the budget of every CT in every contrast."""
    pairs = load_decathlon_datalist(Path(simulated) / "datalist.json", True, "test", simulated)
    budgets: dict[tuple[str, str], dict[str, float]] = {}
    with tqdm(total=len(pairs), unit="MR") as bar:
        for name, alike in groupby(pairs, lambda pair: Path(pair["image"]).parts[-3]):
            contrasts = list(alike)  # of one CT
            ct, spacing = read(contrasts[0]["label"])
            native = ndimage.median_filter(remove_contrast(ct, ct_body(ct, spacing), spacing), 3)
            volumes = ct, ndimage.median_filter(ct, 3), native
            for pair in contrasts:
                (mr, _), (sct, _) = read(pair["image"]), read(Path(scts) / f"{pair['patient']}_sct.nii.gz")
                body = ct_body_mask(ct, mr)
                contrast = Path(pair["image"]).parts[-2].replace("_", " ")
                budgets[name, contrast] = budget(*(volume[body] for volume in (sct, *volumes)))
                bar.update()
    names = list(dict.fromkeys(name for name, _ in budgets))
    for contrast in dict.fromkeys(contrast for _, contrast in budgets):
        each = [budgets[name, contrast] for name in names]
        budgets["mean", contrast] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
    rows = [
        {"CT": name, "contrast": contrast, **{key: round(value) for key, value in found.items()}}
        for (name, contrast), found in budgets.items()
    ]
    publish("error_budget", rows, list(rows[0]), page=ROOT / "docs" / "whole_body.md")


if __name__ == "__main__":
    fire.Fire(main)

"""HU in the organs of real MRs of the torso, which have no CT: is each near what is usual there?

    python benchmarks/regions.py --mr_dir DIR [--sct_dir DIR] [--checkpoint WEIGHTS]

DIR holds the MRs that are named below. The median of the synthetic CT is taken in spheres of 8 mm radius, placed by
hand in the middle of an organ. Without the folder of their synthetic CTs these are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import ROOT, publish
from tqdm import tqdm

from bundle import synthesize
from custom_modules.evaluation.organs import usual_hu

RADIUS = 8.0  # mm
Points = list[tuple[int, int, int]]  # mm, to the right, to the front, upwards

GE: dict[str, Points] = {
    "liver": [(89, -17, 118), (89, -12, 135)],
    "spleen": [(-67, -37, 153)],
    "kidneys": [(-64, -19, 85), (81, -4, 65)],
    "muscle": [(-39, 8, -2), (58, 11, -12), (-44, -34, 41), (66, -34, 41)],
    "lungs": [(-52, -43, 216), (73, -43, 216)],
    "vertebrae": [(6, 10, -32), (8, 10, 10), (8, 1, 47), (8, -9, 83), (8, -17, 116), (8, -26, 149), (8, -34, 181)],
}
# the gradient echoes of the first maker are of one patient
SPHERES: dict[str, dict[str, Points]] = {
    "abdomen_t1_gre_ge": GE,
    "abdomen_t1_opposed_ge": GE,
    "abdomen_t1_gre_siemens": {
        "liver": [(87, -37, 89), (78, -28, 91)],
        "spleen": [(-114, -46, 81)],
        "kidneys": [(-90, -39, 48), (69, -28, -1)],
        "muscle": [(-48, -18, -45), (33, -19, -40)],
        "lungs": [(-63, -61, 151), (63, -64, 163)],
        "vertebrae": [(-12, -5, -79), (-12, -13, -44), (-12, -21, -9), (-12, -28, 23), (-12, -35, 55), (-12, -42, 85)],
    },
    "abdomen_t2": {
        "liver": [(140, 17, -72), (106, -17, 24)],
        "spleen": [(-72, -24, 24)],
        "kidneys": [(-79, -27, -24), (88, -8, -72)],
        "muscle": [(-35, -61, -72), (47, -61, -72)],
        "fat": [(17, 126, -72), (-120, -72, -128), (119, -79, -128)],
        "lungs": [(-79, -38, 72), (106, -31, 72)],
        "vertebrae": [(5, -10, -128), (3, -6, -72), (3, -20, -24), (6, -42, 24), (14, -47, 72)],
    },
}
TITLES = {
    "abdomen_t1_gre_ge": "T1 near in phase, 1.5 T", "abdomen_t1_opposed_ge": "opposed phase, the same patient",
    "abdomen_t1_gre_siemens": "T1 gradient echo, 3 T", "abdomen_t2": "T2",
}  # fmt: skip
ORGANS = ("liver", "spleen", "kidneys", "muscle", "fat", "lungs", "vertebrae")
USUAL = {name: hu for name in ORGANS if (hu := usual_hu(name))}


def measure(sct: nib.Nifti1Image, organs: dict[str, Points]) -> dict[str, Any]:
    """Median HU of each organ as text, vertebrae one by one from below, and how many of the organs are as usual."""
    hu, voxels = sct.get_fdata(dtype=np.float32).ravel(), np.indices(sct.shape).reshape(3, -1).T
    places = nib.affines.apply_affine(sct.affine, voxels)
    row: dict[str, Any] = {}
    usual = []
    for name, points in organs.items():
        values = [hu[np.linalg.norm(places - point, axis=1) <= RADIUS] for point in points]
        medians = [np.median(each) for each in values] if name == "vertebrae" else [np.median(np.concatenate(values))]
        row[name] = ", ".join(f"{median:.0f}" for median in medians)
        low, high = USUAL[name]
        usual += [low <= median <= high for median in medians]
    return {**row, "usual": f"{sum(usual)} of {len(usual)}"}


def main(mr_dir: str, sct_dir: str | None = None, **settings: Any) -> None:
    rows = []
    for name, organs in tqdm(SPHERES.items(), unit="MR"):
        if sct_dir:
            sct = nib.Nifti1Image.from_filename(Path(sct_dir) / f"{name}_sct.nii.gz")
        else:
            sct = synthesize(str(Path(mr_dir) / f"{name}.nii.gz"), **settings).hu
        rows.append({"MR": TITLES[name], **measure(sct, organs)})
    rows.append({"MR": "usual", **{name: f"{low} to {high}" for name, (low, high) in USUAL.items()}})
    publish("regions", rows, ["MR", *USUAL, "usual"], page=ROOT / "docs" / "whole_body.md")


if __name__ == "__main__":
    fire.Fire(main)

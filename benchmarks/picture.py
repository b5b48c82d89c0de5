"""Draw the picture of README.md: MR, synthetic CT, CT and error of one test patient, axial and coronal.

python -m bundle synthesize DIR/sts/STS_017/mr.nii.gz --output_dir sct.nii.gz
python benchmarks/picture.py DIR/sts/STS_017 sct.nii.gz docs/figures/limb.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import fire
import matplotlib
import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from custom_modules.data.body import ct_body_mask  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HU = (-250.0, 650.0)
ERROR = (-400.0, 400.0)


def read(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """A volume in RAS order and its spacing in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    return image.get_fdata(dtype=np.float32), image.header.get_zooms()


def main(
    patient: str, sct: str, path: str, axial: int = 30, coronal: int = 120, below: int = 5, name: str = "synthetic CT",
    other: str | None = None, other_name: str = "",
) -> None:  # fmt: skip
    """Write ``path`` from ``mr.nii.gz`` and ``ct.nii.gz`` of the folder ``patient`` and the synthetic CT ``sct``.

    Args:
        axial, coronal: voxel along the last and the second axis, in RAS order.
        below: slices that are cut off at the lower end, where the CT's field of view has ended.
        name: above the synthetic CT.
        other, other_name: a synthetic CT of another system, shown beside it.
    """
    (mr, spacing), (ct, _), (pred, _) = (read(Path(p)) for p in (f"{patient}/mr.nii.gz", f"{patient}/ct.nii.gz", sct))
    error = np.where(ct_body_mask(ct, mr), pred - ct, 0)
    top = float(np.percentile(mr, 99.5))
    columns = {
        "MR": (mr, "gray", 0, top),
        **({other_name: (read(Path(other))[0], "gray", *HU)} if other else {}),
        name: (pred, "gray", *HU),
        "CT": (ct, "gray", *HU),
        f"{name} - CT": (error, "RdBu_r", *ERROR),
    }
    heights = [mr.shape[1] * spacing[1], (mr.shape[2] - below) * spacing[2]]
    width = mr.shape[0] * spacing[0]
    scale = 2.5 / width
    figure, axes = plt.subplots(
        2, len(columns), figsize=(2.55 * len(columns), scale * sum(heights) + 0.9), layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for (title, (volume, colours, low, high)), (upper, lower) in zip(columns.items(), axes.T):
        planes = [volume[::-1, :, axial].T[::-1], volume[::-1, coronal, below:].T[::-1]]  # as radiologists see them
        for axis, plane, aspect in zip((upper, lower), planes, (spacing[1], spacing[2])):
            shown = axis.imshow(
                plane, cmap=colours, vmin=low, vmax=high, aspect=aspect / spacing[0], interpolation="bilinear"
            )
            axis.set_axis_off()
        upper.set_title(title, fontsize=11)
        bar = figure.colorbar(shown, ax=lower, orientation="horizontal", shrink=0.7, aspect=25, pad=0.02)
        bar.set_ticks([low, 0, high])
        bar.ax.tick_params(labelsize=8)
        bar.set_label("HU", fontsize=8, labelpad=1)
        bar.ax.set_visible(title != "MR")  # takes its room all the same, so that the rows stay level
    figure.savefig(path, dpi=90, facecolor="white", bbox_inches="tight")


if __name__ == "__main__":
    fire.Fire(main)

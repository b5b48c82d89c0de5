"""Back to the grid of the MR: our splines against the interpolation of MONAI and of SciPy, on one grid each.

python benchmarks/resampling.py
"""

from __future__ import annotations

from typing import Any

import fire
import numpy as np
import torch
from common import medians, publish
from monai.data import MetaTensor
from scipy import ndimage

from custom_modules.data.grid import interpolate, resample

GRIDS = {  # spacing in mm and voxels of the file; the networks' grid has 2 mm over the same extent
    "limb": ((0.98, 0.98, 3.27), (256, 256, 100)),
    "torso, 1 mm": ((1.0, 1.0, 1.0), (320, 280, 460)),
    "torso, 2 mm": ((2.0, 2.0, 2.0), (250, 250, 400)),
}


def measure(name: str, spacing: tuple[float, ...], shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    size = [round(n * s / 2) for n, s in zip(shape, spacing)]
    volume = MetaTensor(torch.rand(1, *size), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])).double())
    affine = np.diag([*spacing, 1.0])
    values, steps = volume[0].numpy(), np.array(spacing) / 2
    works = {
        "cubic splines, s": lambda: interpolate(volume, affine, shape, 3),
        "ours, linear": lambda: interpolate(volume, affine, shape, 1),
        "MONAI's SpatialResample, linear": lambda: resample(volume, torch.from_numpy(affine), shape, True),
        "SciPy's affine_transform, cubic": lambda: ndimage.affine_transform(
            values, steps, output_shape=shape, order=3, mode="nearest"
        ),
    }
    (ours, own), *others = medians(works, repeats).items()
    return {"to": f"{name}, {'x'.join(map(str, shape))}", ours: own, **{other: time / own for other, time in others}}


def main(repeats: int = 3) -> None:
    rows = [measure(name, *grid, repeats) for name, grid in GRIDS.items()]
    publish("resampling", rows, list(rows[0]))


if __name__ == "__main__":
    fire.Fire(main)

"""Draw the TensorBoard scalars of both training stages as one picture.

python benchmarks/curves.py runs/autoencoder runs/diffusion docs/figures/training_curves.png
"""

from __future__ import annotations

from pathlib import Path

import fire
import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = {
    "reconstruction (L2)": ("reconstruction_mr", "reconstruction_ct"),
    "cosines, Eqs. 3-6": (
        "cosine_structure_pair", "cosine_structure_unpaired", "cosine_modality_pair", "cosine_modality_unpaired",
    ),
    "denoiser (L2)": ("loss",),
    "validation MAE, HU": ("val_mae",),
    "validation bone Dice": ("val_bone_dice",),
}  # fmt: skip


def read_scalars(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All scalars of a run: name to steps and values."""
    scalars = {}
    for file in sorted(Path(folder).glob("events.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag)
            scalars[tag] = (np.array([p.step for p in points]), np.array([p.value for p in points]))
    return scalars


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """Running mean over the last ``width`` points, shorter at the beginning."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    start = np.maximum(np.arange(1, len(total)) - width, 0)
    return (total[1:] - total[start]) / (np.arange(1, len(total)) - start)


def main(autoencoder: str, diffusion: str, path: str) -> None:
    first, second = read_scalars(autoencoder), read_scalars(diffusion)
    first.pop("loss", None)
    scalars = {**second, **first}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for axis, (title, names) in zip(axes, PANELS.items()):
        for name in names:
            if name in scalars:
                steps, values = scalars[name]
                axis.plot(steps, values if len(values) < 50 else smooth(values), label=name)
        axis.set(title=title, xlabel="epoch" if name.startswith("val_") else "step")
        if "L2" in title:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    fire.Fire(main)

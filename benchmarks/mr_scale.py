"""By what should the scale of an MR be found? Several statistics, each judged by what it does to real MRs.

    python benchmarks/mr_scale.py --dataset_dir DIR [--torso FOLDER]

Fat and muscle (by the CT) of the training and validation patients: how far their medians scatter between patients once
every MR is divided by the statistic. Field of view: how far the statistic moves when half of the volume, along any
axis, is cut away; that is also measured in the MRs of ``torso``. Shading: how far it moves under a further bias field
that doubles along one axis. All as a factor: 1.00 is no scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fire
import numpy as np
from common import ROOT, publish
from tqdm import tqdm

from custom_modules.data.pairs import load_pairs
from custom_modules.data.transforms import Preprocess

SPACING, REFERENCE = (2.0, 2.0, 2.0), 1050.0
TISSUES = {"fat": (-130, -70), "muscle": (30, 80)}


def peak(values: np.ndarray) -> float:
    """The most frequent signal of tissue: above a tenth of the 99th percentile, smoothed."""
    top = np.percentile(values, 99)
    counts, edges = np.histogram(values, bins=100, range=(0.1 * top, 1.2 * top))
    smooth = np.convolve(counts, np.ones(7) / 7, mode="same")
    return float(edges[np.argmax(smooth)] + np.diff(edges)[0] / 2)


STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "none, as stored": lambda mr, body: 1.0,
    "99th percentile of the volume": lambda mr, body: float(np.percentile(mr, 99)),
    "99.9th percentile of the volume": lambda mr, body: float(np.percentile(mr, 99.9)),
    "99th percentile of the body": lambda mr, body: float(np.percentile(mr[body], 99)),
    "95th percentile of the body": lambda mr, body: float(np.percentile(mr[body], 95)),
    "75th percentile of the body": lambda mr, body: float(np.percentile(mr[body], 75)),
    "median of the body": lambda mr, body: float(np.median(mr[body])),
    "mean of the body": lambda mr, body: float(np.mean(mr[body])),
    "peak of the histogram": lambda mr, body: peak(mr[body]),
}  # fmt: skip


def halves(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Both halves along each axis, the middle half along the last, and the middle half along all."""
    boxes = []
    for axis, size in enumerate(shape):
        for part in (slice(0, size // 2), slice(size // 2, size)):
            boxes.append(tuple(part if a == axis else slice(None) for a in range(len(shape))))
    return [*boxes, tuple(slice(size // 4, size - size // 4) for size in shape)]


def factor(logarithms: list[float] | np.ndarray) -> float:
    """The root mean square of logarithms, as a factor."""
    return round(float(np.exp(np.sqrt(np.mean(np.square(logarithms))))), 3) if len(logarithms) else float("nan")


def main(dataset_dir: str, torso: str | None = None) -> None:
    splits = load_pairs(f"{dataset_dir}/datalist.json", dataset_dir)
    pairs = [pair for name in ("training", "validation") for pair in splits[name]]
    read, alone = (Preprocess(SPACING, label=label, mr_reference=REFERENCE) for label in (True, False))
    tissue: dict[tuple[str, str], list[float]] = {}
    moved: dict[tuple[str, str], list[float]] = {}
    items = [("limbs", read, pair) for pair in pairs]
    torsos = sorted(Path(torso).glob("abdomen_*.nii.gz")) if torso else []
    items += [("torso", alone, {"image": str(path)}) for path in torsos]
    for region, transform, item in tqdm(items, unit="MR"):
        data = transform(item)
        mr, body = np.asarray(data["image"][0]), np.asarray(data["body"][0]) > 0
        shading = np.exp2(np.linspace(-0.5, 0.5, mr.shape[1]))[None, :, None]
        for name, statistic in STATISTICS.items():
            whole = statistic(mr, body)
            for box in halves(mr.shape):
                if body[box].any():
                    moved.setdefault((region, name), []).append(np.log(statistic(mr[box], body[box]) / whole))
            moved.setdefault(("shaded", name), []).append(np.log(statistic(mr * shading, body) / whole))
            if region == "limbs":
                ct = np.asarray(data["label"][0])
                for key, (low, high) in TISSUES.items():
                    inside = body & (ct > low) & (ct < high)
                    tissue.setdefault((key, name), []).append(np.log(np.median(mr[inside]) / whole))
    rows = [
        {
            "divided by": name,
            **{f"{key}, limbs": factor(np.subtract(tissue[key, name], np.mean(tissue[key, name]))) for key in TISSUES},
            "half the field of view, limbs": factor(moved["limbs", name]),
            "half the field of view, torso": factor(moved.get(("torso", name), [])),
            "shading": factor(moved["shaded", name]),
        }
        for name in STATISTICS
    ]
    publish("mr_scale", rows, list(rows[0]), page=ROOT / "docs" / "whole_body.md")


if __name__ == "__main__":
    fire.Fire(main)

"""Simulated beside real MRs: a picture, and what fat, muscle, marrow and cortical bone measure in either.

    python benchmarks/simulation.py --dataset_dir DIR [--torso CT]

Of the validation patients, whose MR is T1-weighted, the MR is simulated from their own CT, too. Writes
docs/figures/simulation.png. Of the training patients: how the signal within bones falls with HU, for several HU at
which none is left (``cortical_hu``).
"""

from __future__ import annotations

import itertools
from typing import Any

import fire
import matplotlib
import numpy as np
import yaml
from common import ROOT, publish
from scipy import ndimage

from custom_modules.data.pairs import load_pairs
from custom_modules.data.regions import MARROW
from custom_modules.data.simulation import SimulateMR, SimulateMRd
from custom_modules.data.transforms import Preprocess

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PAGE = ROOT / "docs/whole_body.md"
SPACING, REFERENCE = (2.0, 2.0, 2.0), 1050.0
TISSUES = {"fat": (-130, -70), "muscle": (30, 80), "spongy bone and marrow": (150, 400), "cortical bone": (800, 3000)}
BONE_HU, CORTICAL_HU = (120, 200, 300, 400, 500, 600, 800), (500, 600, 800, 1000, 1300)
SHOWN = ("t1_spin_echo", "t1_in_phase", "t1_opposed_phase", "t2", "t1_fat_suppressed")


def read(item: dict[str, str]) -> dict:
    return Preprocess(SPACING, label=True, mr_reference=REFERENCE, regions=True)(item)


def simulated(data: dict, contrast: str, seed: int = 0, **settings: Any) -> np.ndarray:
    """The simulated MR of an item that :func:`read` has read, on the networks' scale."""
    contrasts = yaml.safe_load((ROOT / "configs/whole_body.yaml").read_text())["contrasts"]
    make = SimulateMRd(SimulateMR(contrasts, thick_slices=0.0, **settings), REFERENCE, contrast, seed)
    return np.asarray(make({key: data[key] for key in ("label", "regions", "patient")})["image"][0])


def values(volume: np.ndarray, ct: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """The MR where the CT, and its neighbours for soft tissue, lie within a window of HU."""
    inside = (ct > window[0]) & (ct < window[1])
    return volume[ndimage.binary_erosion(inside) if window[1] < 150 else inside]


def main(dataset_dir: str, torso: str | None = None) -> None:
    pairs = load_pairs(f"{dataset_dir}/datalist.json", dataset_dir)
    patients = [read(pair) for pair in pairs["validation"]]
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {"real": [], "simulated": []} for name in TISSUES}
    for data in patients:
        ct = np.asarray(data["label"][0])
        kinds = {"real": np.asarray(data["image"][0]), "simulated": simulated(data, "t1_spin_echo")}
        for name, window in TISSUES.items():
            for kind, volume in kinds.items():
                found[name][kind].append(values(volume, ct, window))
    rows = []
    for name, kinds in found.items():
        row = {"tissue": name, "HU": " to ".join(map(str, TISSUES[name]))}
        for kind, parts in kinds.items():
            low, middle, high = np.percentile(np.concatenate(parts), (10, 50, 90))
            row[f"{kind}, median (10 to 90 %)"] = f"{middle:.0f} ({low:.0f} to {high:.0f})"
        rows.append(row)
    publish("simulation", rows, list(rows[0]), page=PAGE)
    rows = bones([read(pair) for pair in pairs["training"]])
    publish("simulation_bones", rows, list(rows[0]), page=PAGE)
    draw(patients[0], found, read({"label": torso, "patient": "torso"}) if torso else None)


def bones(patients: list[dict]) -> list[dict[str, Any]]:
    """Median of the MR inside of bones by the HU of the CT, over all patients, relative to that at the lowest HU: a row
    for the real MRs and one for each ``cortical_hu``."""
    marrow = [np.asarray(data["regions"][0]) == MARROW for data in patients]
    hu, windows = inside([data["label"][0] for data in patients], marrow), list(itertools.pairwise(BONE_HU))

    def row(name: str, volumes: list[np.ndarray]) -> dict[str, Any]:
        signal = inside(volumes, marrow)
        medians = [float(np.median(signal[(hu >= low) & (hu < high)])) for low, high in windows]
        return {"MR": name} | {f"{low} to {high} HU": m / medians[0] for (low, high), m in zip(windows, medians)}

    rows = [row("real", [data["image"][0] for data in patients])]
    for cortical in CORTICAL_HU:
        volumes = [simulated(data, "t1_spin_echo", cortical_hu=(cortical, cortical)) for data in patients]
        rows.append(row(f"simulated, no signal at {cortical} HU", volumes))
    return rows


def inside(volumes: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(volume)[mask] for volume, mask in zip(volumes, masks)])


def draw(limb: dict, found: dict, torso: dict | None) -> None:
    """The picture: a limb's CT, real and simulated MR, histograms, and the contrasts of a torso."""
    figure, axes = plt.subplots(2, 6, figsize=(15, 7), height_ratios=(3, 4))
    for axis in axes.ravel():
        axis.set_axis_off()
    k = limb["label"].shape[3] // 2
    first = {
        "CT of a limb": (limb["label"][0, :, :, k], -200, 800), "its MR, real": (limb["image"][0, :, :, k], 0, 1250),
        "its MR, simulated": (simulated(limb, "t1_spin_echo")[:, :, k], 0, 1250),
    }  # fmt: skip
    show(axes[0], first)
    for axis, (name, kinds) in zip(axes[0, 3:], found.items()):
        axis.set_axis_on()
        for kind, parts in kinds.items():
            axis.hist(np.concatenate(parts), np.linspace(0, 1400, 60), density=True, histtype="step", label=kind)
        axis.set(title=name, yticks=[], xlabel="MR")
        axis.legend(fontsize=8, frameon=False)
    if torso is not None:
        k = int((np.asarray(torso["regions"][0]) == MARROW).sum((1, 2)).argmax())  # the sagittal plane of the spine
        second = {"CT of a torso": (torso["label"][0, k], -200, 400)}
        second |= {name.replace("_", " "): (simulated(torso, name)[k], 0, 1250) for name in SHOWN}
        show(axes[1], second)
    figure.tight_layout(h_pad=2)
    figure.savefig(ROOT / "docs/figures/simulation.png", dpi=70)


def show(axes: np.ndarray, planes: dict) -> None:
    for axis, (title, (plane, low, high)) in zip(axes, planes.items()):
        axis.imshow(np.asarray(plane)[::-1].T[::-1], cmap="gray", vmin=low, vmax=high)
        axis.set_title(title, fontsize=10)


if __name__ == "__main__":
    fire.Fire(main)

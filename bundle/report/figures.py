"""The plots of the report, as PNG within the page."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import ndimage

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure as Plot  # noqa: E402

from bundle.montage import PLANES, Voxel, _centre, _planes, _view, montage  # noqa: E402

Volumes = Mapping[str, tuple[np.ndarray, str]]
Figure = dict[str, str]  # caption and source

HU_AXIS = (-1000.0, 1600.0)
REFERENCE, SYNTHETIC, OTHER = "0.15", "tab:red", "0.55"


def figure(png: bytes, caption: str) -> Figure:
    return {"caption": caption, "source": f"data:image/png;base64,{base64.b64encode(png).decode()}"}


def planes(volumes: Volumes, affine: np.ndarray, centre: Voxel | None, caption: str) -> list[Figure]:
    """Draw each plane of all volumes, in windows for soft tissue and bone."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for plane in PLANES:
            path = montage(volumes, affine, Path(folder) / "plane.png", centre=centre, planes=[plane])
            figures.append(figure(path.read_bytes(), f"{plane.capitalize()} plane {caption}."))
    return figures


def thumbnail(volume: np.ndarray, affine: np.ndarray, window: tuple[float, float]) -> str:
    """Return the axial plane through the middle as the source of a small picture."""
    view = _view({"": (volume, "HU")}, affine, None)
    image = _planes(view.columns[""][0], _centre(view.columns[""][0] + 1000))[0]
    buffer = io.BytesIO()
    plt.imsave(buffer, image[:: max(1, len(image) // 160), :: max(1, len(image) // 160)], cmap="gray", vmin=window[0],
               vmax=window[1], format="png")  # fmt: skip
    return figure(buffer.getvalue(), "")["source"]


def bone_voxel(weight: np.ndarray, mask: np.ndarray) -> Voxel | None:
    """Return the voxel in the mask where smoothed ``weight`` is largest; None if it is nowhere above 0."""
    smooth = np.where(mask, ndimage.gaussian_filter(weight.clip(min=0).astype(np.float32), 2), 0)
    if smooth.max() <= 0:
        return None
    i, j, k = (int(index) for index in np.unravel_index(smooth.argmax(), smooth.shape))
    return i, j, k


def profile(volumes: Volumes, affine: np.ndarray, voxel: Voxel, where: str) -> Figure:
    """Draw HU along the left-right line through a voxel of bone, with the 95 % interval if there is an SD."""
    axis = int(np.abs(affine[0, :3]).argmax())
    line = tuple(slice(None) if a == axis else voxel[a] for a in range(3))
    sct = volumes["synthetic CT"][0][line]
    x = np.arange(len(sct)) * float(np.linalg.norm(affine[:3, axis]))
    plot, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    if "CT" in volumes:
        axes.plot(x, volumes["CT"][0][line], label="CT", color=REFERENCE, linewidth=1)
    axes.plot(x, sct, label="synthetic CT", color=SYNTHETIC, linewidth=1)
    if "SD" in volumes:
        half = 1.96 * volumes["SD"][0][line]
        axes.fill_between(x, sct - half, sct + half, color=SYNTHETIC, alpha=0.2, linewidth=0, label="95 % interval")
    axes.set(xlabel="mm, left to right as stored", ylabel="HU", ylim=(-1100, 1700))
    axes.legend(fontsize=8)
    return figure(_png(plot), f"HU along the line through bone {where}, left to right as stored.")


def histogram(volumes: Volumes, mask: np.ndarray) -> Figure:
    """Draw the distribution of HU in a mask."""
    plot, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    edges = np.arange(HU_AXIS[0], HU_AXIS[1] + 1, 20)
    for name, colour in (("CT", REFERENCE), ("synthetic CT", SYNTHETIC)):
        if name in volumes:
            values = volumes[name][0][mask]
            weights = np.full(len(values), 100 / max(len(values), 1))
            axes.hist(values.clip(*HU_AXIS), edges, weights=weights, histtype="step", color=colour, label=name)
    axes.set(xlabel="HU", ylabel="% of voxels per 20 HU", yscale="log")
    axes.legend(fontsize=8)
    return figure(_png(plot), "Distribution of HU in the body.")


def joint_histogram(ct: np.ndarray, sct: np.ndarray) -> Figure:
    plot, axes = plt.subplots(figsize=(4.4, 3.6), layout="constrained")
    edges = np.linspace(*HU_AXIS, 131)
    counts = np.histogram2d(ct, sct, bins=edges)[0].T
    shown = axes.pcolormesh(edges, edges, np.log10(counts + 1), cmap="viridis", rasterized=True)
    axes.plot(edges[[0, -1]], edges[[0, -1]], color="white", linewidth=0.6)
    axes.set(xlabel="CT, HU", ylabel="synthetic CT, HU", aspect="equal")
    plot.colorbar(shown, label="log10 of voxels + 1")
    return figure(_png(plot), "Joint histogram in the body; both agree on the line.")


def distributions(values: Mapping[str, Mapping[str, Sequence[float]]], main: str) -> Figure:
    """Draw a box per system with one point per patient.

    Args:
        values: of the patients, by system, by title of the measure.
        main: the system that is drawn in red.
    """
    plot, axes = plt.subplots(1, len(values), figsize=(3.1 * len(values), 3.2), layout="constrained", squeeze=False)
    for axis, (title, systems) in zip(axes[0], values.items()):
        numbers = [np.asarray(v)[np.isfinite(v)] for v in systems.values()]
        axis.boxplot(numbers, tick_labels=list(systems), widths=0.5, showfliers=False)
        for x, (name, each) in enumerate(zip(systems, numbers), start=1):
            colour = SYNTHETIC if name == main else OTHER
            axis.plot(np.full(len(each), x), each, "o", markersize=4, alpha=0.7, color=colour)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
    return figure(_png(plot), f"Each patient a point; {main} in red.")


def sparsification(uncertainty: Mapping[str, Any]) -> Figure:
    plot, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    x = 100 * np.asarray(uncertainty["fractions"])
    axes.plot(x, uncertainty["sparsification"], label="most uncertain left out", color=SYNTHETIC)
    axes.plot(x, uncertainty["oracle"], label="largest errors left out", color=REFERENCE)
    axes.set(xlabel="voxels left out, %", ylabel="MAE of the rest, HU", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure(_png(plot), "Sparsification: the closer the curves, the better SD predicts where the errors are.")


def _png(plot: Plot) -> bytes:
    buffer = io.BytesIO()
    plot.savefig(buffer, dpi=100, format="png", facecolor="white")
    plt.close(plot)
    return buffer.getvalue()

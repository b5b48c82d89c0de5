"""Pictures of axial, coronal and sagittal planes of volumes side by side, in a soft-tissue and a bone window."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.patheffects import AbstractPathEffect, withStroke

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from bundle.pages.layers import scale_end  # noqa: E402
from custom_modules.data.hu import BONE_HU  # noqa: E402

Voxel = tuple[int, int, int]
Columns = Mapping[str, tuple[np.ndarray, str]]


class Scale(NamedTuple):
    """Ends, unit and colours of a map that is not in HU; without an upper end it ends at the map's largest value."""

    low: float
    high: float | None
    unit: str
    colours: str


WINDOWS = {"soft": (-160.0, 240.0), "bone": (-450.0, 1050.0)}  # HU: width 400, level 40; width 1500, level 300
PLANES = ("axial", "coronal", "sagittal")
AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}  # to the right, up, through
ENDS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom
SIDES = ("RL", "AP", "SI")  # of a coordinate above and below zero
MAPS = {
    "mu": Scale(0, 0.15, "cm⁻¹", "gray"), "percent": Scale(-20, 20, "%", "RdBu_r"),
    "few percent": Scale(-5, 5, "%", "RdBu_r"), "dose": Scale(0, None, "Gy", "inferno"),
    "gamma": Scale(0, 2, "index; grey: not scored", "viridis"),
}  # fmt: skip
COLOURS = {"error": "RdBu_r", "SD": "magma"} | {kind: scale.colours for kind, scale in MAPS.items()}
OUTLINES = ("tomato", "gold", "deepskyblue")  # of bone in the first, second ... volume in HU
LINEAR = 100.0  # HU; errors beyond are shown on a logarithmic scale, so that neither soft tissue nor bone saturates
STROKE: list[AbstractPathEffect] = [withStroke(linewidth=2, foreground="black")]  # text is read on white fat too
WIDTH, HEIGHT = 3.2, 6.0  # inches of a column, and of the highest plane


def _planes(volume: np.ndarray, centre: Voxel) -> list[np.ndarray]:
    """Return the axial, coronal and sagittal plane of an RAS volume in radiological convention: the patient's right on
    the left, anterior or superior up."""
    i, j, k = centre
    return [volume[::-1, :, k].T[::-1], volume[::-1, j, :].T[::-1], volume[i, ::-1, :].T[::-1]]


@dataclass(frozen=True)
class View:
    """Volumes in RAS order, the voxel that the planes go through, spacing and origin in mm."""

    columns: dict[str, tuple[np.ndarray, str]]
    centre: Voxel
    spacing: np.ndarray
    origin: np.ndarray

    def extent(self, plane: str) -> tuple[float, float]:
        """Width and height of a plane, mm."""
        shape = next(iter(self.columns.values()))[0].shape
        right, up, _ = AXES[plane]
        return shape[right] * self.spacing[right], shape[up] * self.spacing[up]

    def place(self, plane: str) -> str:
        """The plane and where it lies, such as ``axial, S 34 mm``."""
        axis = AXES[plane][2]
        mm = float(self.origin[axis] + self.centre[axis] * self.spacing[axis])
        return f"{plane}, {SIDES[axis][0 if mm >= 0 else 1]} {abs(mm):.0f} mm"


def montage(
    columns: Columns,
    affine: np.ndarray,
    path: str | Path,
    title: str = "",
    centre: Voxel | None = None,
    notes: Sequence[str] = (),
    planes: Sequence[str] = PLANES,
    windows: Sequence[str] = tuple(WINDOWS),
) -> Path:
    """Write a PNG with one column per volume. Each plane has two rows if there are volumes in HU: the first in a
    soft-tissue window, the second in a bone window, with the outlines of bone on the MR and the SD below the error.
    Other maps are in the first.

    Args:
        columns: title to (volume (D, H, W), kind), kind one of ``MR``, ``HU``, ``error``, ``SD``, or of :data:`MAPS`.
            NaN is shown grey.
        affine: of all volumes, voxel to RAS mm.
        centre: voxel that the planes go through; the middle of the first volume's foreground when None.
        notes: warnings, below the title.
        planes: of :data:`PLANES`.
        windows: of :data:`WINDOWS`, for volumes in HU.
    """
    view = _view(columns, affine, centre)
    in_hu = any(kind == "HU" for _, kind in view.columns.values())
    windows = windows if in_hu else ["soft"]
    rows = [(plane, window) for plane in planes for window in windows]
    grid = _grid(view, windows)
    scale = min([WIDTH / max(view.extent(p)[0] for p in planes)] + [HEIGHT / view.extent(p)[1] for p in planes])
    heights = [scale * view.extent(plane)[1] for plane, _ in rows]
    width = len(grid) * scale * max(view.extent(p)[0] for p in planes)
    note = "\n".join(line for text in notes for line in textwrap.wrap(f"⚠ {text}", max(40, int(width * 13))))
    top = 0.3 + 0.24 * bool(title) + 0.16 * note.count("\n") + 0.2 * bool(note)
    figure = plt.figure(figsize=(width, sum(heights) + top), facecolor="black")
    axes = figure.subplots(
        len(rows), len(grid), squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.015, "wspace": 0.015, "left": 0, "right": 1, "bottom": 0,
                     "top": 1 - top / (sum(heights) + top)},
    )  # fmt: skip
    for line, (plane, window) in zip(axes, rows):
        for axis, names in zip(line, grid):
            axis.set_axis_off()
            name = names.get(window)
            if name is not None:
                _draw(axis, view, name, plane, window, first_plane=plane == planes[0])
        _mark(line[0], view, plane, window == rows[0][1])
    for axis, names in zip(axes[0], grid):
        axis.set_title(names[windows[0]], fontsize=10, color="white", pad=4)
    height = figure.get_figheight()
    figure.text(0.005, 1 - 0.06 / height, title, fontsize=9, color="0.75", va="top")
    figure.text(0.005, 1 - (0.06 + 0.22 * bool(title)) / height, note, fontsize=8, color="orange", va="top")
    figure.savefig(path, dpi=110, facecolor="black", format="png")
    plt.close(figure)
    return Path(path)


def _view(columns: Columns, affine: np.ndarray, centre: Voxel | None) -> View:
    canonical = {}
    for name, (volume, kind) in columns.items():
        image = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(volume, dtype=np.float32), affine))
        canonical[name] = (image.get_fdata(dtype=np.float32), kind)
    first = next(iter(canonical.values()))[0]
    stored = next(iter(columns.values()))[0].shape
    middle = _centre(first) if centre is None else _in_canonical(centre, affine, stored)
    return View(canonical, middle, nib.affines.voxel_sizes(image.affine), image.affine[:3, 3])


def _grid(view: View, windows: Sequence[str]) -> list[dict[str, str]]:
    """Return the volume in the row of each window of each column: the MR and volumes in HU in all, others in the first,
    and the SD below the error if there are two."""
    kinds = {name: kind for name, (_, kind) in view.columns.items()}
    grid = [dict.fromkeys(windows if kind in ("MR", "HU") else windows[:1], name) for name, kind in kinds.items()]
    errors, spreads = ([line for line in grid if kinds[line[windows[0]]] == kind] for kind in ("error", "SD"))
    if errors and spreads and len(windows) > 1:
        errors[0][windows[1]] = spreads[0][windows[0]]
        grid.remove(spreads[0])
    return grid


def _draw(axis: Axes, view: View, name: str, plane: str, window: str, first_plane: bool) -> None:
    """Draw a plane of a volume, in mm, with its colour bar in the first plane."""
    volume, kind = view.columns[name]
    image = _planes(volume, view.centre)[PLANES.index(plane)]
    width, height = view.extent(plane)
    norm, ticks = _scale(volume, kind, window)
    colours = plt.get_cmap(COLOURS.get(kind, "gray")).with_extremes(bad="0.35")
    extent = (0, width, 0, height)
    shown = axis.imshow(np.ma.masked_invalid(image), cmap=colours, norm=norm, extent=extent, interpolation="nearest")
    if kind == "MR" and window == "bone":
        _outlines(axis, view, plane, first_plane)
    elif kind != "MR" and first_plane:
        bar = axis.figure.colorbar(shown, cax=axis.inset_axes((0.955, 0.25, 0.018, 0.5)), extend="both")
        bar.set_ticks(ticks, labels=[f"{tick:.4g}" for tick in ticks])
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=7, colors="white", length=2, pad=1)
        bar.ax.yaxis.set_ticks_position("left")
        for text in bar.ax.get_yticklabels():
            text.set_path_effects(STROKE)
        bar.outline.set_edgecolor("0.5")
        labels = {"SD": "SD, HU", "HU": f"{window} window, HU", "error": "HU; grey: not scored"}
        label = MAPS[kind].unit if kind in MAPS else labels[kind]
        _write(axis, 0.99, 0.02, label, ha="right", va="bottom")


def _scale(volume: np.ndarray, kind: str, window: str) -> tuple[Normalize, list[float]]:
    """Return the scale of a kind of volume and the ticks of its colour bar."""
    if kind == "HU":
        low, high = WINDOWS[window]
        return Normalize(low, high), [low, 0, high]
    if kind in MAPS:
        low, end = MAPS[kind][:2]
        high = max(float(np.nanmax(volume)), 1e-3) if end is None else end
        return Normalize(low, high), [low, (low + high) / 2, high]
    high = scale_end(volume, kind)
    if kind == "error":
        high = max(high, 2 * LINEAR)
        return SymLogNorm(LINEAR, vmin=-high, vmax=high), [-high, -LINEAR, 0, LINEAR, high]
    return Normalize(0, high), [0, high]


def _write(axis: Axes, x: float, y: float, text: str, color: str = "white", size: float = 7, **options: Any) -> None:
    """Write on a picture; x and y are shares of its width and height."""
    axis.text(x, y, text, transform=axis.transAxes, fontsize=size, color=color, path_effects=STROKE, **options)


def _outlines(axis: Axes, view: View, plane: str, legend: bool) -> None:
    """Draw the outline of bone in each volume in HU, with a legend."""
    width, height = view.extent(plane)
    names = [name for name, (_, kind) in view.columns.items() if kind == "HU"]
    for number, (name, colour) in enumerate(zip(names, OUTLINES)):
        lines = _planes(view.columns[name][0], view.centre)[PLANES.index(plane)][::-1]
        if np.nanmin(lines) < BONE_HU < np.nanmax(lines):
            axis.contour(lines, [BONE_HU], colors=[colour], linewidths=0.8, extent=(0, width, 0, height))
        if legend:
            _write(axis, 0.02, 0.08 + 0.07 * number, f"— bone (> {BONE_HU:g} HU) in {name}", colour)


def _mark(axis: Axes, view: View, plane: str, first: bool) -> None:
    """Write the directions at the four sides; in the first row also where the plane lies, and a scale bar."""
    places = ((0.01, 0.5, "left", "center"), (0.99, 0.5, "right", "center"), (0.5, 0.99, "center", "top"),
              (0.5, 0.01, "center", "bottom"))  # fmt: skip
    for letter, (x, y, horizontal, vertical) in zip(ENDS[plane], places):
        _write(axis, x, y, letter, "deepskyblue", 8, ha=horizontal, va=vertical)
    if first:
        _write(axis, 0.02, 0.98, view.place(plane), size=8, va="top")
        width, height = view.extent(plane)
        bar = next(length for length in (100.0, 50.0, 20.0, 10.0, 5.0, 1.0, 0.0) if length < 0.45 * width)
        ends = [0.03 * width, 0.03 * width + bar]
        axis.plot(ends, [0.03 * height] * 2, color="white", linewidth=1.6, path_effects=STROKE)
        _write(axis, 0.03, 0.045, f"{bar:g} mm", va="bottom")


def _in_canonical(voxel: Voxel, affine: np.ndarray, shape: tuple[int, ...]) -> Voxel:
    """Return the index in RAS order of a voxel of the volume as stored."""
    to_ras = nib.orientations.inv_ornt_aff(nib.io_orientation(affine), shape)
    i, j, k = (int(c) for c in nib.affines.apply_affine(np.linalg.inv(to_ras), voxel).round())
    return i, j, k


def _centre(volume: np.ndarray) -> Voxel:
    """Return the voxel in the middle of the foreground."""
    inside = np.argwhere(volume > 0.1 * np.percentile(volume, 99))
    i, j, k = (int(c) for c in (np.median(inside, axis=0) if len(inside) else np.array(volume.shape) // 2))
    return i, j, k

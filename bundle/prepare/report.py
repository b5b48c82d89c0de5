"""Report on the prepared patients: overlays of MR and CT before and after registration, and an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from bundle.montage import PLANES, WIDTH, WINDOWS, View, _mark, _planes, _view, _write  # noqa: E402
from bundle.pages.layers import LIMIT_MB, Layer, layers  # noqa: E402
from bundle.pages.niivue import MISSING, packed_script  # noqa: E402
from bundle.pages.render import anchor, render  # noqa: E402
from bundle.report.figures import figure  # noqa: E402
from bundle.report.tables import Cell, Table  # noqa: E402
from custom_modules.data.hu import BONE_HU, TISSUE_HU  # noqa: E402
from custom_modules.data.volumes import read_volume  # noqa: E402

BEFORE = "before"  # file of the CT as scanned, on the grid of the MR, where registration has moved it
PICTURE = "overlay.png"  # file of the picture of a patient
SHOWN = {"MR": ("image", "MR"), "CT as scanned": (BEFORE, "HU"), "CT prepared": ("label", "HU")}  # in the viewer
CONTOURS = {TISSUE_HU: "deepskyblue", BONE_HU: "gold"}  # by HU
NAMES = {TISSUE_HU: "skin", BONE_HU: "bone"}
COLUMNS = {
    "state": ("", "{}"),
    "stage": ("registration", "{}"),
    "dice_before": ("body Dice before", "{:.3f}"),
    "dice": ("after", "{:.3f}"),
    "mutual_information_before": ("mutual information before, nats", "{:.3f}"),
    "mutual_information": ("after", "{:.3f}"),
    "shift": ("rigid shift, mm", "{:.1f}"),
    "deformation": ("largest deformation, mm", "{:.1f}"),
    "folded": ("folded", "{:.2%}"),
    "covered": ("covered by the CT", "{:.0%}"),
    "seconds": ("time, s", "{:.0f}"),
    "memory": ("peak memory, GiB", "{:.1f}"),
}


def overlay(
    mr: np.ndarray, columns: Mapping[str, np.ndarray], affine: np.ndarray, path: str | Path, title: str = ""
) -> Path:
    """Write a PNG: the MR with the outlines of each CT (skin blue, bone yellow), and the last CT itself; one row per
    plane.

    Args:
        mr: (D, H, W) in RAS order, as the CTs (HU).
        columns: CT by title.
        affine: of all volumes, voxel to RAS mm.
    """
    names, volumes = list(columns), {name: (ct, "HU") for name, ct in columns.items()}
    view = _view({"MR": (mr, "MR"), **volumes}, affine, most_bone(columns[names[-1]]))
    scale = WIDTH / max(view.extent(plane)[0] for plane in PLANES)
    heights = [scale * view.extent(plane)[1] for plane in PLANES]
    figure, axes = plt.subplots(
        len(PLANES), len(names) + 1, figsize=(WIDTH * (len(names) + 1), sum(heights) + 0.6), squeeze=False,
        facecolor="black", gridspec_kw={"height_ratios": heights, "hspace": 0.02, "wspace": 0.02, "left": 0, "right": 1,
                                        "bottom": 0, "top": 1 - 0.6 / (sum(heights) + 0.6)},
    )  # fmt: skip
    for line, plane in zip(axes, PLANES):
        for axis, name in zip(line, [*names, ""]):
            _draw_outlines(axis, view, plane, name or names[-1], on_mr=bool(name))
        _mark(line[0], view, plane, first=True)
    for axis, text in zip(axes[0], [*(f"MR, outlines of the CT {name}" for name in names), f"CT {names[-1]}"]):
        axis.set_title(text, fontsize=9, color="white")
    figure.suptitle(title, fontsize=9, color="0.75", y=0.995)
    figure.savefig(path, dpi=100, facecolor="black", format="png")
    plt.close(figure)
    return Path(path)


def _draw_outlines(axis: Any, view: View, plane: str, name: str, on_mr: bool) -> None:
    """Draw a plane of the MR with the outlines of a CT and a legend, or of the CT itself."""
    mr, lines = (_planes(view.columns[key][0], view.centre)[PLANES.index(plane)] for key in ("MR", name))
    width, height = view.extent(plane)
    low, high = (0.0, float(np.percentile(view.columns["MR"][0], 99.5))) if on_mr else WINDOWS["bone"]
    extent = (0, width, 0, height)
    axis.imshow(mr if on_mr else lines, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="nearest")
    axis.set_axis_off()
    for number, (level, colour) in enumerate(CONTOURS.items()):
        if on_mr and lines.min() < level < lines.max():
            axis.contour(lines[::-1], levels=[level], colors=[colour], linewidths=0.7, extent=extent)
        if on_mr and plane == PLANES[0]:
            _write(axis, 0.98, 0.03 + 0.06 * number, f"— {NAMES[level]} ({level:g} HU)", colour, ha="right")


def most_bone(ct: np.ndarray) -> tuple[int, int, int]:
    """Return the planes with the most bone, as (sagittal, coronal, axial) indices."""
    bone = ct > BONE_HU
    counts = [bone.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return tuple(int(c.argmax()) if c.any() else len(c) // 2 for c in counts)  # type: ignore[return-value]


def page(rows: Sequence[Mapping[str, Any]], limits: str, out: Path) -> str:
    """Return the report as HTML, in one file.

    Args:
        rows: for each patient ``patient``, ``state`` (its split, or why it was left out or failed), ``used``, ``notes``
            and the available measures of :data:`COLUMNS`.
        limits: limits of the measures, as text.
        out: folder of the prepared patients.
    """
    number = sum("source" in row for row in rows)
    head = ["patient", *(title for title, _ in COLUMNS.values())]
    patients = [_patient(row, out / row["patient"], LIMIT_MB / max(number, 1)) for row in rows]
    return render(
        "prepare.html", title="Prepared pairs", used=sum(row["used"] for row in rows), limits=limits,
        table=Table(head, [_row(row) for row in rows]), patients=patients,
        with_viewer=any(patient["layers"] for patient in patients),
    )  # fmt: skip


def _row(row: Mapping[str, Any]) -> list[Cell]:
    """Return one row of the table."""
    cells = [Cell(row["patient"], row["patient"], link=f"#{anchor(row['patient'])}")]
    for key, (_, form) in COLUMNS.items():
        value = row.get(key, "")
        cells.append(Cell(form.format(value) if key in row else "", value, "" if row["used"] else "out"))
    return cells


def _patient(row: Mapping[str, Any], folder: Path, viewer_mb: float) -> dict[str, Any]:
    """Return what the page shows of one patient: notes, the picture, and MR and CT before and after in the viewer."""
    shown: list[Layer] = []
    note = "" if packed_script() else MISSING
    files = {name: (folder / f"{file}.nii.gz", kind) for name, (file, kind) in SHOWN.items()}
    if "source" in row and not note:
        volumes = {name: (read_volume(path), kind) for name, (path, kind) in files.items() if path.is_file()}
        affine = np.asarray(volumes["CT prepared"][0].affine)
        shown, note = layers({n: (np.asarray(v[0]), kind) for n, (v, kind) in volumes.items()}, affine, viewer_mb)
    picture = folder / PICTURE
    caption = "MR with the outlines of the CT as scanned and prepared (skin blue, bone yellow), and the prepared CT."
    caption = "The prepared CT, which has no MR." if row.get("unpaired") else caption
    return {
        "id": anchor(row["patient"]), "name": row["patient"], "state": row["state"], "notes": row["notes"],
        "used": row["used"], "layers": shown, "note": note if "source" in row else "",
        "figure": figure(picture.read_bytes(), caption) if "source" in row and picture.is_file() else None,
    }  # fmt: skip

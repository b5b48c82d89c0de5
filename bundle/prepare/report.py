"""Report on the prepared patients: overlays of MR and CT before and after registration, and an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from bundle.montage import WINDOWS, _planes  # noqa: E402
from bundle.style import STYLE  # noqa: E402
from custom_modules.data.hu import BONE_HU, TISSUE_HU

CONTOURS = {TISSUE_HU: "deepskyblue", BONE_HU: "gold"}  # HU: skin and bone
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


def overlay(mr: np.ndarray, columns: Mapping[str, np.ndarray], path: str | Path, title: str = "") -> Path:
    """Write a PNG: the MR with the outlines of each CT (skin blue, bone yellow), and the last CT itself; one row per
    plane.

    Args:
        mr: (D, H, W) in RAS order on an isotropic grid, as the CTs (HU).
        columns: CT by title.
    """
    last = list(columns.values())[-1]
    centre = most_bone(last)
    shape = mr.shape
    heights = [shape[1], shape[2], shape[2]]
    width = max(shape[0], shape[1])
    figure, axes = plt.subplots(
        3, len(columns) + 1, figsize=(3.6 * (len(columns) + 1), 3.4 * sum(heights) / width + 0.8), squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.03, "wspace": 0.03, "top": 0.92},
    )  # fmt: skip
    high = float(np.percentile(mr, 99.5))
    for column, (name, ct) in enumerate({**columns, "CT": last}.items()):
        shown = _planes(last if name == "CT" else mr, centre)
        for axis, plane, lines in zip(axes[:, column], shown, _planes(ct, centre)):
            low, top = WINDOWS["HU"] if name == "CT" else (0.0, high)
            axis.imshow(plane, cmap="gray", vmin=low, vmax=top, interpolation="nearest")
            for level, colour in CONTOURS.items():
                if name != "CT" and lines.min() < level < lines.max():
                    axis.contour(lines, levels=[level], colors=[colour], linewidths=0.7)
            axis.set_axis_off()
        axes[0, column].set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=9, y=0.99)
    figure.savefig(path, dpi=100, bbox_inches="tight", facecolor="white", format="png")
    plt.close(figure)
    return Path(path)


def most_bone(ct: np.ndarray) -> tuple[int, int, int]:
    """Return the planes with the most bone, as (sagittal, coronal, axial) indices."""
    bone = ct > BONE_HU
    counts = [bone.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return tuple(int(c.argmax()) if c.any() else len(c) // 2 for c in counts)  # type: ignore[return-value]


def page(rows: Sequence[Mapping[str, Any]], limits: str) -> str:
    """Return the report as HTML.

    Args:
        rows: for each patient ``patient``, ``state`` (its split, or why it was left out or failed), ``used``, ``notes``
            and the available measures of :data:`COLUMNS`.
        limits: limits of the measures, as text.
    """
    used = sum(row["used"] for row in rows)
    table = "".join(f"<th>{escape(title)}</th>" for title, _ in COLUMNS.values())
    body = "".join(map(_row, rows))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Prepared pairs</title><style>{STYLE}</style>\n"
        f"<h1>Prepared pairs</h1><p>{used} of {len(rows)} patients are in the datalist. Limits: {escape(limits)}.</p>\n"
        f"<table><tr><th>patient</th>{table}</tr>\n{body}</table>\n{''.join(map(_patient, rows))}</html>\n"
    )


def _row(row: Mapping[str, Any]) -> str:
    """Return one row of the table."""
    name = row["patient"]
    cells = [escape(form.format(row[key])) if key in row else "" for key, (_, form) in COLUMNS.items()]
    link = f"<a href='#{quote(name)}'>{escape(name)}</a>"
    return f"<tr{'' if row['used'] else ' class=out'}>{''.join(f'<td>{cell}</td>' for cell in [link, *cells])}</tr>\n"


def _patient(row: Mapping[str, Any]) -> str:
    """Return heading, notes and picture of one patient."""
    name = row["patient"]
    notes = "".join(f"<p>{escape(note)}</p>" for note in row["notes"])
    source = f"{quote(name)}/overlay.png"
    picture = f"<img src='{source}' loading=lazy alt='MR and CT before and after'>" if "dice" in row else ""
    mark = "" if row["used"] else " class=out"
    return f"<div{mark} id='{quote(name)}'><h2>{escape(name)}</h2><p>{escape(row['state'])}</p>{notes}{picture}</div>\n"

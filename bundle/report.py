"""``python -m bundle report OUT``: synthetic CTs and their scores in one HTML file."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from bundle.montage import montage  # noqa: E402
from bundle.style import STYLE  # noqa: E402
from custom_modules.data.body import ct_body_mask
from custom_modules.data.grid import check_same_grid  # noqa: E402
from custom_modules.data.hu import BONE_HU
from custom_modules.data.volumes import read_volume, sibling_path
from custom_modules.errors import InputError  # noqa: E402
from custom_modules.evaluation.clinical import clinical_figures
from custom_modules.files import (
    writable_or_stop,
    write_text,  # noqa: E402
)

Case = dict[str, Any]
MAIN = "synthrad2025_mae"  # patients are sorted by it
COLUMNS = {
    "synthrad2025_mae": "MAE, HU", "synthrad2025_bias": "bias, HU", "synthrad2025_rmse": "RMSE, HU",
    "synthrad2025_psnr": "PSNR, dB", "synthrad2025_ms_ssim": "MS-SSIM", "synthrad2025_soft_mae": "soft tissue MAE, HU",
    "synthrad2025_bone_mae": "bone MAE, HU", "synthrad2025_bone_dice": "bone Dice", "paper_mae": "MAE (paper), HU",
    "paper_psnr": "PSNR (paper), dB", "paper_ssim": "SSIM (paper)", "paper_ncc": "NCC (paper)",
}  # fmt: skip
SPREAD = {
    "sd_mean_sd": "mean SD, HU", "sd_coverage_50": "in the 50 % interval", "sd_coverage_80": "in the 80 % interval",
    "sd_coverage_95": "in the 95 % interval", "sd_soft_coverage_95": "soft tissue in 95 %",
    "sd_bone_coverage_95": "bone in 95 %", "sd_ence": "ENCE", "sd_spearman": "Spearman", "sd_ause": "AUSE",
}  # fmt: skip
CLINICAL = {
    "pet_acf": "PET correction factors, %", "pet_soft": "activity, soft tissue, %", "pet_bone": "activity, bone, %",
    "pet_lesion": "activity, lesions, %", "dose_photons": "photon dose, absolute, %",
    "dose_photons_gamma": "photons, gamma 2 %/2 mm, %", "dose_protons": "proton dose, absolute, %",
    "dose_protons_gamma": "protons, gamma 2 %/2 mm, %", "dose_path": "path length, absolute, mm",
}  # fmt: skip


def report(out: str, output: str | None = None) -> None:
    """Write ``OUT/report.html``: an overview of the cohort, worst case first, and a section per patient. The page needs
    no network.

    Args:
        out: folder of ``bundle evaluate``, or of any synthesis, whose JSON records then give the paths of the MRs;
            without CTs the report has no scores.
        output: the file to write.
    """
    folder = Path(str(out))
    cases = read_cases(folder)
    target = Path(output) if output else folder / "report.html"
    writable_or_stop(target.parent)
    summary = _json(folder / "metrics.json")
    sections = [_section(case) for case in tqdm(cases, desc="drawing", unit="patient")]
    write_text(_page(folder, cases, summary, sections), target)
    print(f"{target}: {len(cases)} patients, {target.stat().st_size / 1e6:.1f} MB")


def read_cases(folder: Path) -> list[Case]:
    """Read the patients of a folder, worst first. Each has ``name``, ``sct``, ``image``, ``label``, ``sidecar``,
    ``rows`` (of ``metrics.csv``, by system), ``problem`` and ``curves``; unknown ones are None or empty.

    Raises:
        InputError: when there is no such folder, or no synthetic CT or scores in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the output folder of evaluate or of a synthesis")
    summary = _json(folder / "metrics.json")
    cases = _scored(folder, summary) if summary else _unscored(folder)
    if not cases:
        raise InputError(f"{folder}: holds neither metrics.json nor the JSON sidecar of a synthetic CT")
    return sorted(cases, key=lambda case: -_number(case["rows"].get(summary.get("system"), {}).get(MAIN), np.inf))


def _scored(folder: Path, summary: Mapping[str, Any]) -> list[Case]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = []
    for name, files in summary["patients"].items():
        sct = Path(files["sct"]) if files.get("sct") else None
        case = {"name": name, "sct": sct, "rows": {row["system"]: row for row in rows if row["patient"] == name}}
        case |= {key: files.get(key) for key in ("image", "label", "problem", "organs", "curves")}
        cases.append({**case, "sidecar": _json(sibling_path(sct, "", ".json")) if sct else {}})
    return cases


def _unscored(folder: Path) -> list[Case]:
    cases = []
    for path in sorted(folder.rglob("*.json")):
        sidecar = _json(path)
        if {"input", "output", "settings"} <= set(sidecar):
            case = {"name": sibling_path(sidecar["output"], "", "").name, "sct": path.with_name(sidecar["output"])}
            case |= dict.fromkeys(("label", "problem", "organs", "curves"))
            cases.append({**case, "image": sidecar["input"], "rows": {}, "sidecar": sidecar})
    return cases


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(text: Any, otherwise: float = np.nan) -> float:
    """Convert a cell of metrics.csv or a value of metrics.json; an empty or undefined one becomes ``otherwise``."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return otherwise
    return otherwise if np.isnan(value) else value


# a patient


def _section(case: Case) -> str:
    """Return the section of one patient; if a volume cannot be shown, it says why."""
    sidecar, guard = case["sidecar"], case["sidecar"].get("guard") or {}
    parts = [f"<h2 id='{_id(case)}'>{html.escape(case['name'])}</h2>"]
    parts += [f"<p class=warning>{html.escape(text)}</p>" for text in filter(None, [case["problem"]])]
    parts += [f"<p class=warning>not like the training MRs: {html.escape(w)}</p>" for w in guard.get("warnings", [])]
    if sidecar and not guard:
        parts.append("<p>The MR was not compared with the training set.</p>")
    try:
        parts += _pictures(case)
    except InputError as error:
        parts.append(f"<p class=warning>not shown: {html.escape(str(error))}</p>")
    if case["rows"]:
        parts += [_table(case["rows"], COLUMNS), _table(case["rows"], SPREAD)]
    if case["sct"] and (figures := clinical_figures(case["sct"])):
        parts.append(_table({"PET and dose, difference from the CT": figures}, CLINICAL))
    if case["organs"]:
        parts.append(f"<p>Organ Dice: {html.escape(str(case['organs']))}</p>")
    if sidecar:
        text = json.dumps(sidecar, indent=1)
        parts.append(f"<details><summary>settings and versions</summary><pre>{html.escape(text)}</pre></details>")
    return "\n".join(parts)


def _pictures(case: Case) -> list[str]:
    """Draw planes of all volumes, through the middle and through the worst bone, the joint histogram and a profile."""
    volumes = _volumes(case)
    affine, mr, sct, ct = volumes.pop("affine"), volumes["MR"][0], volumes.get("synthetic CT"), volumes.get("CT")
    parts = [_montage(volumes, affine, None, "Planes through the middle of the body.")]
    if sct is None:
        return [*parts, "<p>No synthetic CT to show.</p>"]
    if ct is None:
        voxel = _bone_voxel(sct[0], np.ones(mr.shape, bool))
        return [*parts, _profile(volumes, affine, voxel, "at its densest") if voxel else "<p>No bone in it.</p>"]
    mask = ct_body_mask(ct[0], mr)
    voxel = _bone_voxel(np.where(ct[0] > BONE_HU, np.abs(sct[0] - ct[0]), 0), mask)
    if voxel is not None:
        parts.append(_montage(volumes, affine, voxel, "Planes through the bone with the largest error."))
        parts.append(_profile(volumes, affine, voxel, "with the largest error"))
    if mask.any():
        parts.append(_joint_histogram(ct[0][mask], sct[0][mask]))
    return parts


def _volumes(case: Case) -> dict[str, Any]:
    """Return (volume, kind) by title, as :func:`~bundle.montage.montage` takes them, and ``affine``.

    Raises:
        InputError: when a volume cannot be read or is on another grid than the MR.
    """
    paths = {"MR": case["image"], "CT": case["label"], "synthetic CT": case["sct"]}
    if case["sct"] and sibling_path(case["sct"], "_sd").exists():
        paths["SD"] = sibling_path(case["sct"], "_sd")
    read = {name: read_volume(path) for name, path in paths.items() if path}
    mr = read["MR"]
    for volume in read.values():
        check_same_grid(volume, mr)
    kinds = {"MR": "MR", "SD": "SD"}
    shown = {name: (np.asarray(volume[0]), kinds.get(name, "HU")) for name, volume in read.items()}
    if "CT" in shown and "synthetic CT" in shown:
        sd = {name: shown.pop(name) for name in ("SD",) if name in shown}  # the last column
        shown["synthetic CT - CT"] = (shown["synthetic CT"][0] - shown["CT"][0], "error")
        shown |= sd
    return {**shown, "affine": np.asarray(mr.affine)}


def _bone_voxel(weight: np.ndarray, mask: np.ndarray) -> tuple[int, ...] | None:
    """Return the voxel in the mask where smoothed ``weight`` is largest; None if it is nowhere above 0."""
    smooth = np.where(mask, ndimage.gaussian_filter(weight.clip(min=0).astype(np.float32), 2), 0)
    return tuple(int(i) for i in np.unravel_index(smooth.argmax(), smooth.shape)) if smooth.max() > 0 else None


def _montage(volumes: Mapping[str, tuple[np.ndarray, str]], affine: np.ndarray, centre: Any, caption: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = montage(volumes, affine, Path(folder) / "planes.png", centre=centre)
        return _figure(path.read_bytes(), f"{caption} Axial, coronal, sagittal.")


def _profile(volumes: Mapping[str, Any], affine: np.ndarray, voxel: tuple[int, ...], where: str) -> str:
    """Draw HU along the left-right line through a voxel of bone, with the 95 % interval if there is an SD."""
    axis = int(np.abs(affine[0, :3]).argmax())
    line = tuple(slice(None) if a == axis else voxel[a] for a in range(3))
    sct = volumes["synthetic CT"][0][line]
    x = np.arange(len(sct)) * float(np.linalg.norm(affine[:3, axis]))
    figure, plot = plt.subplots(figsize=(8, 2.8), layout="constrained")
    if "CT" in volumes:
        plot.plot(x, volumes["CT"][0][line], label="CT", color="black", linewidth=1)
    plot.plot(x, sct, label="synthetic CT", color="tab:red", linewidth=1)
    if "SD" in volumes:
        half = 1.96 * volumes["SD"][0][line]
        plot.fill_between(x, sct - half, sct + half, color="tab:red", alpha=0.2, linewidth=0, label="95 % interval")
    plot.set(xlabel="mm", ylabel="HU", ylim=(-1100, 1700))
    plot.legend(fontsize=8)
    return _figure(_png(figure), f"HU along the line through bone {where}, left to right as stored.")


def _joint_histogram(ct: np.ndarray, sct: np.ndarray) -> str:
    figure, plot = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
    edges = np.linspace(-1000, 1600, 131)
    counts = np.histogram2d(ct, sct, bins=edges)[0].T
    shown = plot.pcolormesh(edges, edges, np.log10(counts + 1), cmap="viridis", rasterized=True)
    plot.plot(edges[[0, -1]], edges[[0, -1]], color="white", linewidth=0.6)
    plot.set(xlabel="CT, HU", ylabel="synthetic CT, HU", aspect="equal")
    figure.colorbar(shown, label="log10 of voxels + 1")
    return _figure(_png(figure), "Joint histogram in the body; both agree on the line.")


# the cohort


def _page(folder: Path, cases: Sequence[Case], summary: Mapping[str, Any], sections: Sequence[str]) -> str:
    title = f"Synthetic CT: {html.escape(folder.resolve().name)}"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{title}</h1>'
    )
    return "\n".join([head, *_cohort(cases, summary), *sections, "</body></html>", ""])


def _cohort(cases: Sequence[Case], summary: Mapping[str, Any]) -> list[str]:
    """Return the overview: list of patients, means of the systems, distributions, and the reliability of SD."""
    links = "".join(f"<li>{_line(case, summary.get('system'))}</li>" for case in cases)
    order = ", worst first" if summary else ""
    parts = [f"<p>{len(cases)} patients{order}. For research only, not for diagnosis or treatment.</p>"]
    parts.append(f"<ol>{links}</ol>")
    if not summary:
        return [*parts, "<p>No CT to compare with.</p>"]
    systems = {name: {k: _cell(v) for k, v in values.items()} for name, values in summary["systems"].items()}
    parts.append("<p>Mean over patients (95 % bootstrap interval) [number of patients, if not all].</p>")
    parts += [
        _table(systems, COLUMNS),
        _table(systems, SPREAD),
        _table(systems, CLINICAL),
        _distributions(cases, summary["system"]),
    ]
    uncertainty = summary.get("uncertainty")
    if uncertainty:
        parts.append(_sparsification(uncertainty))
        value = _number(uncertainty["spearman_by_patient"])
        parts.append(f"<p>Rank correlation of mean SD and MAE by patient: {value:.2f}.</p>")
    return parts


def _line(case: Case, system: str | None) -> str:
    row = case["rows"].get(system, {})
    error, bone = (_number(row.get(key)) for key in (MAIN, "synthrad2025_bone_dice"))
    bone_text = f", bone Dice {bone:.2f}" if np.isfinite(bone) else ""
    text = f"MAE {error:.1f} HU{bone_text}" if np.isfinite(error) else ""
    warnings = len((case["sidecar"].get("guard") or {}).get("warnings", []))
    notes = [text, f"{warnings} warnings on the MR" if warnings else "", case["problem"] or ""]
    return f"<a href='#{_id(case)}'>{html.escape(case['name'])}</a> {html.escape('; '.join(filter(None, notes)))}"


def _cell(values: Mapping[str, Any]) -> str:
    if values["mean"] is None:
        return "not defined"
    mean, interval = _number(values["mean"]), values["ci95"]
    text = f"{mean:.3g}" + (f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else "")
    return f"{text} [{values['n']}]" if values["not_defined"] else text


def _table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return a table of systems by metrics, without empty rows and columns."""
    rows = {name: row for name, row in rows.items() if any(row.get(key) for key in columns)}
    columns = {key: title for key, title in columns.items() if any(row.get(key) for row in rows.values())}
    if not columns:
        return ""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = ""
    for name, row in rows.items():
        cells = "".join(f"<td>{html.escape(_text(row.get(key)))}</td>" for key in columns)
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    if value in (None, ""):
        return ""
    number = _number(value)
    return "not defined" if str(value).lower() == "nan" else str(value) if np.isnan(number) else f"{number:.3g}"


def _distributions(cases: Sequence[Case], system: str) -> str:
    """Draw error, bone and similarity with one point per patient and one box per system."""
    names = list(dict.fromkeys(name for case in cases for name in case["rows"]))
    keys = [MAIN, "synthrad2025_bone_mae", "synthrad2025_bone_dice", "synthrad2025_ms_ssim"]
    figure, plots = plt.subplots(1, len(keys), figsize=(12, 3), layout="constrained")
    for plot, key in zip(plots, keys):
        values = [np.array([_number(case["rows"].get(name, {}).get(key)) for case in cases]) for name in names]
        values = [v[np.isfinite(v)] for v in values]
        plot.boxplot(values, tick_labels=names, widths=0.5, showfliers=False)
        for x, each in enumerate(values, start=1):
            plot.plot(np.full(len(each), x), each, "o", markersize=4, alpha=0.7, color="tab:red" if x == 1 else "gray")
        plot.set_title(COLUMNS[key], fontsize=9)
        plot.tick_params(labelsize=8)
    return _figure(_png(figure), f"Each patient a point; {html.escape(system)} in red.")


def _sparsification(uncertainty: Mapping[str, Any]) -> str:
    figure, plot = plt.subplots(figsize=(5, 3), layout="constrained")
    x = 100 * np.asarray(uncertainty["fractions"])
    plot.plot(x, uncertainty["sparsification"], label="most uncertain left out")
    plot.plot(x, uncertainty["oracle"], label="largest errors left out")
    plot.set(xlabel="voxels left out, %", ylabel="MAE of the rest, HU", ylim=(0, None))
    plot.legend(fontsize=8)
    return _figure(_png(figure), "Sparsification: the closer the curves, the better SD predicts where the errors are.")


def _id(case: Case) -> str:
    return "p-" + "".join(c if c.isalnum() else "-" for c in case["name"])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _figure(png: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'

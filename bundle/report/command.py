"""``python -m bundle report OUT``: synthetic CTs and their scores in one HTML file."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bundle.montage import WINDOWS
from bundle.pages.layers import LIMIT_MB, layers
from bundle.pages.niivue import MISSING, packed_script
from bundle.pages.render import anchor, render
from bundle.report import figures, tables
from bundle.synthesis import shown
from custom_modules.data.body import ct_body_mask
from custom_modules.data.hu import BONE_HU
from custom_modules.data.volumes import sibling_path
from custom_modules.errors import InputError
from custom_modules.evaluation.clinical import clinical_figures
from custom_modules.files import writable_or_stop, write_text

Case = dict[str, Any]
MAIN = "synthrad2025_mae"  # patients are sorted by it
DISTRIBUTIONS = (MAIN, "synthrad2025_bone_mae", "synthrad2025_bone_dice", "synthrad2025_ms_ssim")


def report(out: str, output: str | None = None, viewer_mb: float = LIMIT_MB) -> None:
    """Write ``OUT/report.html``: an overview of the cohort, worst case first, and a section per patient with an
    interactive viewer. The page is one file and needs no network.

    Args:
        out: folder of ``bundle evaluate``, or of any synthesis, whose JSON records then give the paths of the MRs;
            without CTs the report has no scores.
        output: the file to write.
        viewer_mb: size of the volumes in the page. Each patient has an equal share; volumes beyond it are resampled to
            2 mm, or left out of the viewer, which the page then says. With 0 there are only pictures.
    """
    folder = Path(str(out))
    cases = read_cases(folder)
    target = Path(output) if output else folder / "report.html"
    writable_or_stop(target.parent)
    summary = _json(folder / "metrics.json")
    sections = [_section(case, viewer_mb / len(cases)) for case in tqdm(cases, desc="drawing", unit="patient")]
    text = render(
        "report.html", title=f"Synthetic CT: {folder.resolve().name}", patients=sections, scored=bool(summary),
        with_viewer=any(section["layers"] for section in sections), **_cohort(cases, summary, sections),
    )  # fmt: skip
    write_text(text, target)
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
    system = summary.get("system")
    return sorted(cases, key=lambda case: -tables.number(case["rows"].get(system, {}).get(MAIN), np.inf))


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
    """Cases by their path below the folder, for ``A/mr`` and ``B/mr`` are two."""
    cases = []
    for path in sorted(folder.rglob("*.json")):
        sidecar = _json(path)
        if {"input", "output", "settings"} <= set(sidecar):
            sct = path.with_name(sidecar["output"])
            case = {"name": sibling_path(sct.relative_to(folder), "", "").as_posix(), "sct": sct}
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


def _section(case: Case, viewer_mb: float) -> dict[str, Any]:
    """Return what the page shows of one patient; if a volume cannot be shown, it says why."""
    sidecar, guard = case["sidecar"], case["sidecar"].get("guard") or {}
    clinical = clinical_figures(case["sct"]) if case["sct"] else {}
    warnings = [f"not like the training MRs: {warning}" for warning in guard.get("warnings", [])]
    section: dict[str, Any] = {
        "id": anchor(case["name"]), "name": case["name"], "note": "", "layers": [], "planes": [], "plots": [],
        "thumbnail": "", "tissues": None, "organs": case["organs"], "guard": tables.guard_table(guard),
        "warnings": [text for text in [case["problem"]] if text] + warnings,
        "unguarded": bool(sidecar) and not guard,
        "scores": [
            tables.scores(case["rows"], tables.COLUMNS, "system"), tables.scores(case["rows"], tables.SPREAD, "system"),
            tables.scores({"PET and dose, difference from the CT; organs": clinical}, tables.CLINICAL),
        ],
        "record": json.dumps(sidecar, indent=1) if sidecar else "",
        "made_with": {
            "version": sidecar.get("version"), "weights": str(sidecar.get("model_sha256") or "")[:12],
            "time, s": sidecar.get("time_s"), "device": sidecar.get("device"), **(sidecar.get("software") or {}),
            **(sidecar.get("settings") or {}),
        } if sidecar else {},
    }  # fmt: skip
    try:
        volumes, affine = shown(case["image"], case["sct"], case["label"])
    except InputError as error:
        section["warnings"].append(f"not shown: {error}")
        return section
    if not packed_script():
        section["note"] = MISSING
    elif viewer_mb > 0:
        section["layers"], section["note"] = layers(volumes, affine, viewer_mb)
    return section | _pictures(volumes, affine)


def _pictures(volumes: figures.Volumes, affine: np.ndarray) -> dict[str, Any]:
    """Draw planes through the middle and through the worst bone, the histograms and a profile."""
    mr, (sct, _), ct = volumes["MR"][0], volumes.get("synthetic CT", (None, "")), volumes.get("CT")
    made: dict[str, Any] = {"planes": figures.planes(volumes, affine, None, "through the middle of the body")}
    if sct is None:
        return {**made, "thumbnail": figures.thumbnail(mr, affine, (0, float(np.percentile(mr, 99.5))))}
    made["thumbnail"] = figures.thumbnail(sct, affine, WINDOWS["bone"])
    mask = ct_body_mask(sct if ct is None else ct[0], mr)
    weight = sct if ct is None else np.where(ct[0] > BONE_HU, np.abs(sct - ct[0]), 0)
    voxel = figures.bone_voxel(np.where(sct > BONE_HU, sct, 0) if ct is None else weight, mask)
    made["plots"] = [figures.histogram(volumes, mask)] if mask.any() else []
    if voxel is not None:
        where = "at its densest" if ct is None else "with the largest error"
        made["plots"].append(figures.profile(volumes, affine, voxel, where))
        if ct is not None:
            made["planes"] += figures.planes(volumes, affine, voxel, f"through the bone {where}")
    if ct is not None and mask.any():
        made["plots"].append(figures.joint_histogram(ct[0][mask], sct[mask]))
        made["tissues"] = tables.by_tissue(ct[0], sct, mask, abs(float(np.linalg.det(affine[:3, :3]))) / 1000)
    return made


def _cohort(cases: Sequence[Case], summary: Mapping[str, Any], sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the overview: the patients, means of the systems, distributions, and the reliability of SD."""
    contents = [
        {"id": section["id"], "name": case["name"], "thumbnail": section["thumbnail"],
         "text": _line(case, summary.get("system"))}
        for case, section in zip(cases, sections)
    ]  # fmt: skip
    if not summary:
        return {"contents": contents}
    system, links = summary["system"], {case["name"]: f"#{anchor(case['name'])}" for case in cases}
    rows = {case["name"]: case["rows"].get(system, {}) for case in cases}
    names = list(dict.fromkeys(name for case in cases for name in case["rows"]))
    values = {
        tables.COLUMNS[key].title: {
            name: [tables.number(case["rows"].get(name, {}).get(key)) for case in cases] for name in names
        }
        for key in DISTRIBUTIONS
    }
    plots = [figures.distributions(values, system)]
    uncertainty = summary.get("uncertainty")
    if uncertainty:
        plots.append(figures.sparsification(uncertainty))
    measures = (tables.COLUMNS, tables.SPREAD, tables.CLINICAL)
    return {
        "contents": contents,
        "patient_tables": [tables.scores(rows, columns, "patient", links) for columns in measures],
        "system_tables": [tables.means(summary["systems"], columns) for columns in measures],
        "cohort_plots": plots,
        "correlation": tables.number(uncertainty["spearman_by_patient"]) if uncertainty else None,
    }


def _line(case: Case, system: str | None) -> str:
    """Return the error, the number of warnings and the problem of a patient in one line."""
    row = case["rows"].get(system, {})
    error, bone = (tables.number(row.get(key)) for key in (MAIN, "synthrad2025_bone_dice"))
    text = f"MAE {error:.1f} HU" if np.isfinite(error) else ""
    text += f", bone Dice {bone:.2f}" if text and np.isfinite(bone) else ""
    warnings = len((case["sidecar"].get("guard") or {}).get("warnings", []))
    return "; ".join(filter(None, [text, f"{warnings} warnings on the MR" if warnings else "", case["problem"] or ""]))

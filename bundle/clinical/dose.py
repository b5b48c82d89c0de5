"""``python -m bundle dose``: the error that a synthetic CT would cause in photon and proton dose."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from bundle.clinical.maps import moved, save_map
from bundle.clinical.pair import Pair, read_pair
from bundle.montage import montage, plt
from bundle.workflow import ROOT
from custom_modules.clinical.attenuation import Grid
from custom_modules.clinical.density import ELECTRON
from custom_modules.clinical.study import MARK
from custom_modules.data.hu import AIR_HU
from custom_modules.data.volumes import read_volume, sibling_path
from custom_modules.errors import InputError
from custom_modules.files import write_json

WORKER = Path(__file__).with_name("plan_worker.py")
PYTHON = ROOT / ".venv-dose" / "bin" / "python"
BALL = 20.0  # mm, radius of the target where none is given
GAMMA = ((2.0, 2.0), (1.0, 1.0))  # percent of the largest dose, mm
ANGLES = {"photons": (0, 72, 144, 216, 288), "protons": (0, 90)}  # of the gantry, degrees
DOSE = 2.0  # Gy
Volumes = Mapping[str, np.ndarray]


def dose(
    ct: str, sct: str, target: str | None = None, mr: str | None = None, outline: bool = False, spacing: float = 3.0,
    bixel: float = 7.0, modes: str = "photons,protons", output: str | None = None,
) -> None:  # fmt: skip
    """Compare the dose of the same photon and proton plan on a CT and on a synthetic CT.

    The plans, of generic machines, are optimised on the CT for 2 Gy in the target, with five photon and two proton
    beams. Prints, and writes to SCT_dose.json: differences, gamma, dose-volume figures and water-equivalent path
    lengths; writes the doses as NIfTI, and pictures. `make dose` installs what it needs.

    Args:
        ct: the CT, HU.
        sct: the synthetic CT, HU, in the same frame of reference.
        target: mask of the target, any grid; a ball of 20 mm radius in the middle of the body when None.
        mr: the MR; where it is 0 the synthetic CT had nothing to go by, and both are air.
        outline: keep the synthetic CT beyond the body of the CT, otherwise it is air there.
        spacing: mm, of the dose grid.
        bixel: mm, width of the beamlets.
        modes: photons, protons, or both separated by a comma.
        output: the JSON file to write; SCT_dose.json when None.
    """
    chosen = [name.strip() for name in (modes if isinstance(modes, (list, tuple)) else str(modes).split(","))]
    if not chosen or set(chosen) - set(ANGLES):
        raise InputError(f"--modes {modes}: give {' or '.join(ANGLES)}")
    if not (1 <= spacing <= 10 and 2 <= bixel <= 30):
        raise InputError("--spacing must be 1 to 10 mm, --bixel 2 to 30 mm")
    if not PYTHON.is_file():
        raise InputError(f"{PYTHON.parent.parent.name}: the environment for dose is not there; run `make dose`")
    started = time.perf_counter()
    pair = read_pair(ct, sct, mr, outline)
    grid = pair.upright(spacing)
    volumes = on_dose_grid(pair, grid)
    volumes["target"] = target_mask(target, volumes["body"], grid)
    made = plan(volumes, grid, chosen, bixel)
    figures = {mode: compare(made, volumes, mode) for mode in chosen}
    figures["wepl"] = {axis: wepl(volumes, grid, n) for n, axis in ((1, "front to back"), (0, "left to right"))}
    path = Path(output) if output else sibling_path(sct, "_dose", ".json")
    record: dict[str, Any] = {
        "ct": str(Path(ct).resolve()),
        "sct": str(Path(sct).resolve()),
        "target": str(target or "ball of 20 mm"),
    }
    record |= {"settings_dose": {"spacing": spacing, "bixel": bixel, "dose": DOSE, "angles": ANGLES}, **figures}
    seconds = time.perf_counter() - started
    write_json({**record, "time_s": round(seconds, 1), "peak_memory_gib": children_memory(), "note": MARK}, path)
    for mode in chosen:
        write_mode(made, volumes, grid, mode, path)
    draw_wepl(volumes, grid, path.with_name(f"{path.stem}_wepl.png"))
    report(figures, chosen)
    print(f"written        {path} and beside it\ntime           {seconds:.0f} s")


def children_memory() -> float:
    """Return the peak memory of finished child processes in GiB."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)


def on_dose_grid(pair: Pair, grid: Grid) -> dict[str, np.ndarray]:
    """Return CT, synthetic CT (HU) and body on the grid of the dose."""
    both = {"ct": pair.ct, "sct": pair.sct}
    hu = {name: moved(values - AIR_HU, pair.grid, grid, name) + AIR_HU for name, values in both.items()}
    return {**hu, "body": moved(pair.body.astype(np.float32), pair.grid, grid, "body") > 0.5}


def target_mask(path: str | None, body: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the target on the grid of the dose.

    Raises:
        InputError: for a target that is empty or not in the body.
    """
    if path is None:
        depth = ndimage.distance_transform_edt(np.pad(body, 1))[1:-1, 1:-1, 1:-1]
        middle = np.unravel_index(depth.argmax(), body.shape)
        away = np.linalg.norm(np.indices(body.shape) - np.reshape(middle, (3, 1, 1, 1)), axis=0) * grid.spacing[0]
        return (away <= BALL) & body
    volume = read_volume(path)
    source = Grid(tuple(volume.shape[1:]), np.asarray(volume.affine, dtype=np.float64))
    mask = moved((np.asarray(volume[0]) > 0.5).astype(np.float32), source, grid, f"{path} and the CT") > 0.5
    if not mask.any() or not (mask & body).any():
        raise InputError(f"{path}: the target is not in the body of the CT, so that a plan for it would miss; check it")
    return mask & body


def plan(volumes: Volumes, grid: Grid, modes: list[str], bixel: float) -> dict[str, np.ndarray]:
    """Run the worker in its own environment; return its doses and gamma as (D, H, W) on ``grid``, RAS order."""
    flipped: dict[str, Any] = {
        name: values[::-1, ::-1].transpose(2, 1, 0) for name, values in volumes.items()
    }  # to z, y, x in LPS
    last = grid.affine[:3, 3] + grid.affine[:3, :3] @ (np.array(grid.shape) - 1)
    origin = np.array([-last[0], -last[1], grid.affine[2, 3]])
    angles: dict[str, Any] = {f"{mode}_angles": np.array(ANGLES[mode], dtype=float) for mode in modes}
    given: dict[str, Any] = {
        "spacing": grid.spacing[0],
        "origin": origin,
        "dose": DOSE,
        "modes": np.array(modes),
        "bixel": bixel,
    }
    with tempfile.TemporaryDirectory(prefix="dose") as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, gamma=np.array(GAMMA), **given, **angles, **flipped)
        done = subprocess.run(
            [str(PYTHON), str(WORKER), str(source), str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode or not target.is_file():
            reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise InputError(f"the plan cannot be made: {reason[:200]}")
        with np.load(target) as made:
            return {name: made[name].transpose(2, 1, 0)[::-1, ::-1] for name in made.files}


# figures


def compare(made: Volumes, volumes: Volumes, mode: str) -> dict[str, Any]:
    """Return the figures of one kind of plan: dose differences in percent of the prescription, the share of voxels
    with a gamma of at most 1 in percent, and dose-volume figures in Gy."""
    reference, other = made[f"{mode}_ct"], made[f"{mode}_sct"]
    difference = 100 * (other - reference) / DOSE
    high = volumes["body"] & (reference > 0.1 * reference.max())
    figures: dict[str, Any] = {
        "difference": {"mean": float(difference[high].mean()), "mean_abs": float(np.abs(difference[high]).mean())}
    }
    for percent, distance in GAMMA:
        index = made[f"{mode}_gamma_{percent:g}_{distance:g}"]
        index = index[np.isfinite(index)]
        figures[f"gamma {percent:g} %/{distance:g} mm"] = float(100 * (index <= 1).mean())
    for name in ("target", "body"):
        for system, values in (("ct", reference), ("sct", other)):
            inside = values[volumes[name]]
            at = {f"D{share}": float(np.percentile(inside, 100 - share)) for share in (2, 50, 95, 98)}
            figures[f"{name} {system}"] = {"mean": float(inside.mean()), **at}
    return figures


def path_lengths(hu: np.ndarray, grid: Grid, axis: int) -> np.ndarray:
    """Return the water-equivalent path length through (D, H, W) along an axis, mm, by relative electron density."""
    return (ELECTRON(hu) - ELECTRON(np.array([AIR_HU]))).sum(axis=axis) * grid.spacing[axis]


def wepl(volumes: Volumes, grid: Grid, axis: int) -> dict[str, float]:
    """Return the difference of path lengths through the body along an axis: mean, mean absolute value and 95th
    percentile of that, mm."""
    lengths = [path_lengths(volumes[name], grid, axis) for name in ("ct", "sct")]
    through = (lengths[1] - lengths[0])[volumes["body"].any(axis=axis)]
    return {
        "mean": float(through.mean()), "mean_abs": float(np.abs(through).mean()),
        "p95": float(np.percentile(np.abs(through), 95)),
    }  # fmt: skip


def report(figures: Mapping[str, Any], modes: list[str]) -> None:
    """Print the figures."""
    for mode in modes:
        found = figures[mode]
        gammas = ", ".join(f"{name} {value:.1f} %" for name, value in found.items() if name.startswith("gamma"))
        mean, mean_abs = found["difference"]["mean"], found["difference"]["mean_abs"]
        print(f"{mode:<15}difference {mean:+.2f} %, absolute {mean_abs:.2f} %; {gammas}")
        for name in ("mean", "D95", "D2"):
            one, other = (found[f"target {system}"][name] for system in ("ct", "sct"))
            print(f"  target {name:<6}{one:.3f} Gy on the CT, {other:.3f} Gy on the synthetic CT")
    for axis, found in figures["wepl"].items():
        mean, mean_abs, p95 = (found[name] for name in ("mean", "mean_abs", "p95"))
        print(f"path, {axis:<14}{mean:+.2f} mm, absolute {mean_abs:.2f}, 95 % below {p95:.2f}")


# files


def write_mode(made: Volumes, volumes: Volumes, grid: Grid, mode: str, path: Path) -> None:
    """Write the two doses, and pictures of them and of their histograms."""
    reference, other = made[f"{mode}_ct"], made[f"{mode}_sct"]
    for system, values in (("ct", reference), ("sct", other)):
        save_map(values, grid, path.with_name(f"{path.stem}_{mode}_{system}.nii.gz"), f"dose, Gy; {MARK}")
    index = made[f"{mode}_gamma_{GAMMA[0][0]:g}_{GAMMA[0][1]:g}"]  # NaN where the dose is too low to score
    columns = {
        "CT": (volumes["ct"], "HU"), "synthetic CT": (volumes["sct"], "HU"), "dose on the CT": (reference, "dose"),
        "difference, of 2 Gy": (100 * (other - reference) / DOSE, "few percent"), "gamma 2 %/2 mm": (index, "gamma"),
    }  # fmt: skip
    x, y, z = (int(round(c)) for c in ndimage.center_of_mass(volumes["target"]))
    target = path.with_name(f"{path.stem}_{mode}.png")
    montage(columns, grid.affine, target, f"{mode} ({MARK})", (x, y, z), windows=["bone"])
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for name, colour in (("target", "tab:red"), ("body", "tab:blue")):
        for values, style, system in ((reference, "-", "CT"), (other, "--", "synthetic CT")):
            inside = np.sort(values[volumes[name]])
            axis.plot(inside, np.linspace(100, 0, len(inside)), style, color=colour, label=f"{name}, {system}", lw=1.2)
    axis.set(xlabel="dose, Gy", ylabel="volume, %", xlim=(0, None), ylim=(0, 101), title=f"{mode} ({MARK})")
    axis.legend(fontsize=8)
    figure.savefig(path.with_name(f"{path.stem}_{mode}_dvh.png"), dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def draw_wepl(volumes: Volumes, grid: Grid, path: Path) -> None:
    """Draw the maps of path lengths along both axes."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 6))
    for row, (axis, name) in zip(axes, ((1, "front to back"), (0, "left to right"))):
        one, other = (path_lengths(volumes[system], grid, axis).T[::-1] for system in ("ct", "sct"))
        for place, values, title, window in (
            (row[0], one, "CT", (0, one.max())), (row[1], other, "synthetic CT", (0, one.max())),
            (row[2], other - one, "difference", (-15, 15)),
        ):  # fmt: skip
            drawn = place.imshow(values, vmin=window[0], vmax=window[1], cmap="RdBu_r" if window[0] else "viridis")
            place.set_title(f"{title}, {name}", fontsize=9)
            place.set_axis_off()
            figure.colorbar(drawn, ax=place, label="mm of water", shrink=0.8)
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)

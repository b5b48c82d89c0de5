"""What ``prepare`` does to real pairs: alignment before and after, against a given registration; time and memory.

    python benchmarks/prepare.py pairs DIR OUT [--splits validation,misaligned] [--ct ct_raw] [--parameters MAPS]
    python benchmarks/prepare.py cost OUT [--shape 250,250,400]
    python benchmarks/prepare.py scaling DIR [--workers 1,2] [--patients 4]

``pairs`` reads ``DIR/datalist.json`` and registers the CT named by ``--ct`` in the folder of each MR (that of the
datalist if there is none of that name). The error of the training patients' lookup from MR to HU is taken on the MR's
own grid, for the CT as scanned, as prepared, and as the datalist gives it; an overlay of the three goes to OUT. Results
are kept by patient in OUT and not measured twice. ``scaling`` times the command on the limbs of validation and
``misaligned``.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fire
import itk
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, ResampleToMatch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bundle.phantom.command import whole_body_phantom  # noqa: E402
from bundle.prepare.cleaning import RemoveCouchd  # noqa: E402
from bundle.prepare.command import Settings, choose, clean, prepare_patient  # noqa: E402
from bundle.prepare.patients import Patient  # noqa: E402
from bundle.prepare.registration import PARAMETERS, measure, measure_motion, on_grid, register  # noqa: E402
from bundle.prepare.report import overlay  # noqa: E402
from custom_modules.data.body import ct_body_mask
from custom_modules.data.pairs import load_pairs  # noqa: E402
from custom_modules.data.volumes import read_volume, write_volume  # noqa: E402
from custom_modules.evaluation.split import _lookup_index, fit_lookup  # noqa: E402
from custom_modules.files import write_json  # noqa: E402


def scan_of(pair: dict[str, str], ct: str = "ct_raw") -> Path:
    """Return the CT named ``ct`` in the folder of the MR, or that of the datalist without one."""
    scan = Path(pair["image"]).with_name(f"{ct}.nii.gz")
    return scan if scan.is_file() else Path(pair["label"])


def lookup_error(mr: MetaTensor, ct: MetaTensor, lookup: np.ndarray) -> float:
    """Mean absolute error in HU, in the CT's body, of what the MR's intensity alone tells."""
    image, hu = np.asarray(mr[0]), np.asarray(ct[0])
    mask = ct_body_mask(hu, image)
    return float(np.abs(lookup[_lookup_index(image)] - hu)[mask].mean())


def measure_pair(
    pair: dict[str, str], scan: Path, lookup: np.ndarray, out: Path, parameters: str | Path = PARAMETERS
) -> dict[str, Any]:
    torch.set_num_threads(1)
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(1)
    started, cpu = time.perf_counter(), time.process_time()
    mr = Orientation(axcodes="RAS", labels=None)(read_volume(pair["image"]))
    given = Orientation(axcodes="RAS", labels=None)(read_volume(pair["label"]))
    data = clean({"image": mr, "label": read_volume(scan)}, None, Settings(), [])
    ct = data["label"] = RemoveCouchd("label")(data)["label"]
    body = np.asarray(data["body"][0]) > 0.5
    alignments = register(data["image"], ct, body, parameters=parameters)
    measures = measure(alignments, data["image"], body)
    stage = choose(measures)
    row: dict[str, Any] = {"patient": pair["patient"], "stage": stage, "measures": measures}
    row.update(measure_motion(alignments, stage, ct, body))
    row["seconds"], row["cpu"] = time.perf_counter() - started, time.process_time() - cpu
    native = {name: on_grid(alignments[key], ct, mr).ct for name, key in (("raw", "none"), ("prepared", stage))}
    native["given"] = given
    row["lookup"] = {name: lookup_error(mr, volume, lookup) for name, volume in native.items()}
    columns = {"as scanned": alignments["none"].ct, "given": None, "prepared": alignments[stage].ct}
    columns["given"] = ResampleToMatch(mode="bilinear", padding_mode="border")(given, data["image"])
    pictures = {name: np.asarray(volume[0]) for name, volume in columns.items()}
    picture = out / f"{pair['patient']}.png"
    overlay(np.asarray(data["image"][0]), pictures, np.asarray(data["image"].affine), picture, pair["patient"])
    row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def pairs(
    dataset_dir: str, output: str, splits: str | tuple = "validation", ct: str = "ct_raw",
    parameters: str | Path = PARAMETERS, workers: int = 1,
) -> None:  # fmt: skip
    names = splits.split(",") if isinstance(splits, str) else list(splits)
    out = Path(output)
    out.mkdir(parents=True, exist_ok=True)
    found = load_pairs(Path(dataset_dir) / "datalist.json", dataset_dir, ["training", *names])
    if not (out / "lookup.json").is_file():
        write_json(fit_lookup(found["training"]).tolist(), out / "lookup.json")
    lookup = np.array(json.loads((out / "lookup.json").read_text()))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {}
        for pair in (pair for name in names for pair in found[name]):
            target = out / f"{pair['patient']}.json"
            if not target.is_file():
                jobs[pool.submit(measure_pair, pair, scan_of(pair, ct), lookup, out, parameters)] = target
        for job, target in tqdm(jobs.items(), unit="patient"):
            write_json(job.result(), target)
    show([json.loads((out / f"{pair['patient']}.json").read_text()) for name in names for pair in found[name]])


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'patient':<10}{'stage':<9}{'Dice':>7}{'after':>7}{'MI':>7}{'after':>7}{'lookup raw':>12}{'prepared':>10}"
        f"{'given':>8}{'shift':>7}{'deform':>8}{'folded':>8}{'time':>7}{'CPU':>6}{'GiB':>6}"
    )
    for row in rows:
        before, after, lookup = row["measures"]["none"], row["measures"][row["stage"]], row["lookup"]
        print(
            f"{row['patient']:<10}{row['stage']:<9}{before['dice']:>7.3f}{after['dice']:>7.3f}"
            f"{before['mutual_information']:>7.3f}{after['mutual_information']:>7.3f}{lookup['raw']:>12.1f}"
            f"{lookup['prepared']:>10.1f}{lookup['given']:>8.1f}{row['shift']:>7.1f}{row['deformation']:>8.1f}"
            f"{row['folded']:>8.2%}{row['seconds']:>7.0f}{row['cpu']:>6.0f}{row['memory']:>6.1f}"
        )


def cost(output: str, shape: tuple[int, int, int] = (250, 250, 400), spacing: float = 2.0) -> None:
    """Time and peak memory of one patient, a phantom's trunk in a field of view of ``shape`` at ``spacing`` mm."""
    torch.set_num_threads(1)
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(1)
    folder = Path(output) / "in" / "torso"
    volumes = whole_body_phantom(1700.0, spacing)[:2]
    low = [max(0, (size - want) // 2) for size, want in zip(volumes[0].shape[1:], shape)]
    low[2] = int(700 / spacing)  # from the thighs up
    part = (slice(None), *(slice(start, start + want) for start, want in zip(low, shape)))
    for name, volume in zip(("mr", "ct"), volumes):
        pad = [max(0, want - size) for want, size in zip(shape, volume[part].shape[1:])]
        values = np.int16(np.pad(np.asarray(volume[part])[0], [(0, p) for p in pad], mode="edge"))
        write_volume(MetaTensor(torch.from_numpy(values)[None], affine=volume.affine), folder / f"{name}.nii.gz")
    started, cpu = time.perf_counter(), time.process_time()
    result = prepare_patient(Patient("torso", folder, folder.parent), Path(output) / "torso", Settings())
    print(
        f"{'x'.join(map(str, shape))} at {spacing:g} mm: {time.perf_counter() - started:.0f} s, "
        f"{time.process_time() - cpu:.0f} s of CPU, "
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB; "
        f"Dice {result['dice_before']:.3f} -> {result['dice']:.3f}, folded {result['folded']:.2%}"
    )


def scaling(dataset_dir: str, workers: tuple[int, ...] = (1, 2), patients: int = 4) -> None:
    """Wall time of ``python -m bundle prepare`` on limbs as scanned, by the number of workers."""
    found = load_pairs(Path(dataset_dir) / "datalist.json", dataset_dir, ["validation", "misaligned"])
    with tempfile.TemporaryDirectory() as root:
        for pair in [pair for group in found.values() for pair in group][:patients]:
            folder = Path(root, "in", pair["patient"])
            folder.mkdir(parents=True)
            shutil.copy(pair["image"], folder / "mr.nii.gz")
            shutil.copy(scan_of(pair), folder / "ct.nii.gz")
        for number in np.atleast_1d(workers):
            command = [sys.executable, "-m", "bundle", "prepare", f"{root}/in", f"{root}/{number}"]
            started = time.perf_counter()
            subprocess.run([*command, "--workers", str(number)], cwd=ROOT, check=True)
            print(f"{number} workers: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    fire.Fire({"pairs": pairs, "cost": cost, "scaling": scaling})

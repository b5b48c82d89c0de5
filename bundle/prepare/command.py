"""``python -m bundle prepare IN OUT``: from clinical files to registered training pairs."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, Orientationd, ResampleToMatch, Spacingd
from tqdm import tqdm

from bundle.montage import montage
from bundle.prepare.cleaning import RemoveCouchd, ct_body
from bundle.prepare.contrast import remove_contrast
from bundle.prepare.datalist import FINISHED, Limits, read_result, summarise
from bundle.prepare.patients import Patient, find_patients, load_patient
from bundle.prepare.registration import PARAMETERS, STAGES, crop_around, measure, measure_motion, register
from bundle.prepare.report import BEFORE, PICTURE, most_bone, overlay, page
from custom_modules.data.body import BodyMaskd, CropAboveShouldersd
from custom_modules.data.mr import CorrectBiasFieldd, SubtractBackgroundd
from custom_modules.data.transforms import StandardizeMRd
from custom_modules.data.volumes import write_volume
from custom_modules.errors import InputError, one_line, stop
from custom_modules.files import atomic_write, inside, writable_or_stop, write_text
from custom_modules.memory import peak_memory_gib
from custom_modules.settings import PREPARATION, parse_settings

logger = logging.getLogger(__name__)

ENVELOPE = 8.0  # mm between the body and the faces of the box it is cropped to
VOLUMES = ("image", "label", "body")
VOLUMES_UNPAIRED = ("label", "body")


@dataclass(frozen=True)
class Settings:
    """How each patient is prepared.

    Attributes:
        mr, ct: shell patterns that name the MR and the CT in a patient's folder.
        spacing: of the output, mm.
        hu_window: that the CT is clipped to.
        registration: the last step to take: ``bspline``, ``rigid`` or ``none``.
        parameters: folder of Elastix' parameter maps ``rigid.txt`` and ``bspline.txt``.
        bias_correction: of the MR, by N4.
        crop_above_shoulders: leave out head and neck, as the paper does.
        unpaired: patients may have a CT alone.
        remove_contrast: take contrast medium out of CTs alone.
    """

    mr: str | None = None
    ct: str | None = None
    spacing: float = 2.0
    hu_window: tuple[float, float] = (-1000.0, 1600.0)
    registration: str = "bspline"
    parameters: str = str(PARAMETERS)
    bias_correction: bool = True
    crop_above_shoulders: bool = True
    unpaired: bool = False
    remove_contrast: bool = False


def prepare(input: str, output: str, workers: int = 1, **settings: Any) -> None:
    """Register the CT of every patient in INPUT to the MR and write both as training pairs to OUTPUT.

    INPUT is a folder with a folder per patient (DICOM series, NIfTI, NRRD or MHA), SynthRAD's folders or a MONAI
    datalist. OUTPUT gets ``<patient>/image.nii.gz`` (MR), ``label.nii.gz`` (CT in HU) and ``body.nii.gz``,
    ``datalist.json`` and ``report.html``. Finished patients are skipped; those that fail are listed at the end.

    Args:
        workers: patients at a time, each in a process of its own.
        settings: --mr PATTERN, --ct PATTERN, --spacing 2, --hu_window "(-1000, 1600)", --registration
            bspline|rigid|none, --parameters DIR (Elastix' maps), --bias_correction True, --crop_above_shoulders
            True, --unpaired False (True: patients may have a CT alone, for training on simulated MRs),
            --remove_contrast False (of CTs alone); --test 0.2, --validation 0 and --seed 0 of the split; the limits
            --min_dice, --min_mutual_information, --max_deformation, --max_folded and --min_covered.
    """
    settings = parse_settings(settings, PREPARATION)
    split = {name: settings.pop(name, default) for name, default in (("test", 0.2), ("validation", 0.0), ("seed", 0))}
    limits = Limits(**{f.name: settings.pop(f.name) for f in fields(Limits) if f.name in settings})
    how = _settings(settings)
    _check_fractions(**split)
    root, out = Path(str(input)), Path(str(output))
    patients = find_patients(root, how.unpaired)
    folder = root if root.is_dir() else root.parent
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies in the input; give a folder outside of it")
    writable_or_stop(out)
    failures = prepare_all(patients, out, how, int(workers))
    rows = summarise(patients, out, limits, failures, split)
    bounds = ", ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in asdict(limits).items())
    write_text(page(rows, bounds, out), out / "report.html")
    used = [row for row in rows if row["used"]]
    print(f"{len(used)} of {len(rows)} patients are in {out / 'datalist.json'}; look at {out / 'report.html'}")
    for row in rows:
        if not row["used"] and row["patient"] not in failures:
            print(f"  {row['patient']}: {row['state']}")
    if failures:
        stop(f"{len(failures)} of {len(patients)} patients failed:\n" + "\n".join(f"  {f}" for f in failures.values()))


def _settings(values: Mapping[str, Any]) -> Settings:
    converted: dict[str, Any] = {k: tuple(v) if k == "hu_window" else v for k, v in values.items()}
    settings = Settings(**converted)
    if settings.remove_contrast and not settings.unpaired:
        raise InputError("--remove_contrast true is for CTs alone: give --unpaired true, too")
    for stage in STAGES[1 : STAGES.index(settings.registration) + 1]:
        if not Path(settings.parameters, f"{stage}.txt").is_file():
            raise InputError(f"--parameters {settings.parameters}: holds no {stage}.txt")
    return settings


def _check_fractions(test: float, validation: float, seed: int) -> None:
    if not (0 <= test < 1 and 0 <= validation < 1 and test + validation < 1):
        raise InputError(f"--test {test:g} and --validation {validation:g} must be shares that leave some for training")


# one patient


def prepare_patient(patient: Patient, folder: Path, settings: Settings) -> dict[str, Any]:
    """Prepare one patient and write its volumes and picture to ``folder``.

    Returns:
        The measures, the notes and where the volumes came from.

    Raises:
        InputError: when its files cannot be used.
    """
    volumes, notes = load_patient(patient, settings.mr, settings.ct, settings.unpaired)
    registered = "mask" in volumes
    source = {kind: volume.meta["filename_or_obj"] for kind, volume in volumes.items()}
    if "mr" not in volumes:
        write_ct(finish(clean_ct(volumes["ct"], settings, notes), settings), folder, patient.name)
        return {"unpaired": True, "notes": notes, "source": source}
    data: dict[Hashable, MetaTensor] = {"image": volumes["mr"], "label": volumes["ct"]}
    data = clean(data, volumes.get("mask"), settings, notes)
    if registered:
        notes.append("registered as it came: registration and couch removal are skipped, its mask is kept")
    else:
        data["label"] = RemoveCouchd("label")(data)["label"]
    body = np.asarray(data["body"][0]) > 0.5
    stage = "none" if registered else settings.registration
    alignments = register(data["image"], data["label"], body, stage, settings.parameters)
    measures = measure(alignments, data["image"], body)
    stage = choose(measures)
    if stage != list(measures)[-1]:
        notes.append(f"{list(measures)[-1]} registration does not bring MR and CT closer: kept at '{stage}'")
    best = alignments[stage]
    motion = measure_motion(alignments, stage, data["label"], body)
    data = {**data, "label": best.ct, "before": alignments["none"].ct}
    write_pair(finish(data, settings), folder, patient.name)
    before = {f"{name}_before": value for name, value in measures["none"].items()}
    covered = float(best.covered[body].mean())
    return {**before, **measures[stage], **motion, "covered": covered, "stage": stage, "notes": notes, "source": source}


def clean(
    data: dict[Hashable, MetaTensor], mask: MetaTensor | None, settings: Settings, notes: list[str]
) -> dict[Hashable, MetaTensor]:
    """The MR corrected and on the output's grid with its ``body``, the CT cut to its surroundings on its own grid."""
    keys = ["image", "label"]
    steps = [
        Orientationd(keys, axcodes="RAS", labels=None),
        SubtractBackgroundd("image"),
        *([CorrectBiasFieldd("image")] if settings.bias_correction else []),
        Spacingd("image", pixdim=[settings.spacing] * 3, mode="bilinear", padding_mode="border"),
    ]
    data = Compose(steps)(data)
    if mask is None:
        data = BodyMaskd("image", margin=0.0)(data)
    else:
        data["body"] = ResampleToMatch(mode="nearest", padding_mode="zeros")((mask > 0).float(), data["image"])
    data = crop_above_shoulders(data, "image", settings, notes)
    data["label"] = crop_around(data["label"], data["image"])
    return data


def clean_ct(ct: MetaTensor, settings: Settings, notes: list[str]) -> dict[Hashable, MetaTensor]:
    """A CT without an MR, without couch and on the output's grid, with its ``body``."""
    steps = [
        Orientationd("label", axcodes="RAS", labels=None),
        RemoveCouchd("label"),
        Spacingd("label", pixdim=[settings.spacing] * 3, mode="bilinear", padding_mode="border"),
    ]
    label = Compose(steps)({"label": ct})["label"]
    hu, spacing = np.asarray(label[0]), np.asarray(label.pixdim)
    body = ct_body(hu, spacing)
    if settings.remove_contrast:
        hu = remove_contrast(hu, body, spacing)
        notes.append("contrast medium taken out")
    volumes = {"label": hu, "body": body.astype(np.float32)}
    data: dict[Hashable, MetaTensor] = {
        key: MetaTensor(torch.from_numpy(volume)[None], affine=label.affine) for key, volume in volumes.items()
    }
    return crop_above_shoulders(data, "label", settings, notes)


def crop_above_shoulders(
    data: dict[Hashable, MetaTensor], key: str, settings: Settings, notes: list[str]
) -> dict[Hashable, MetaTensor]:
    """Cut ``key`` and ``body`` above the shoulders, if the settings say so, with a note of how much."""
    if not settings.crop_above_shoulders:
        return data
    height = data[key].shape[-1]
    data = CropAboveShouldersd([key, "body"])(data)
    cut = (height - data[key].shape[-1]) * settings.spacing
    notes.append(f"{cut:g} mm above the shoulders are cut off" if cut else "no shoulders found, nothing is cut off")
    return data


def choose(measures: Mapping[str, Mapping[str, float]]) -> str:
    """The stage of the highest mutual information: a registration that lowers it is not taken."""
    return max(measures, key=lambda stage: measures[stage]["mutual_information"])


def finish(data: dict[Hashable, MetaTensor], settings: Settings) -> dict[Hashable, MetaTensor]:
    """Cut to the rectangular envelope of the body, bring the MR to the training set's scale, clip the CT."""
    margin = round(ENVELOPE / settings.spacing)
    data = CropForegroundd(list(data), source_key="body", margin=margin, allow_smaller=True)(data)
    if "image" in data:
        data = StandardizeMRd("image")(data)
        data["image"] = data["image"].clamp(0, torch.iinfo(torch.int16).max).round().to(torch.int16)
    low, high = settings.hu_window
    for key in {"label", BEFORE} & set(data):
        data[key] = data[key].clamp(low, high).round().to(torch.int16)
    return {**data, "body": (data["body"] > 0.5).to(torch.uint8)}


def write_pair(data: Mapping[Hashable, MetaTensor], folder: Path, title: str) -> None:
    """Write the volumes and the picture, each whole or not at all."""
    moved = not torch.equal(torch.as_tensor(data[BEFORE]), torch.as_tensor(data["label"]))
    for key in (*VOLUMES, *([BEFORE] if moved else [])):
        write_volume(data[key], folder / f"{key}.nii.gz")
    columns = {"as scanned": np.asarray(data[BEFORE][0]), "prepared": np.asarray(data["label"][0])}
    with atomic_write(folder / PICTURE) as temporary:
        overlay(np.asarray(data["image"][0]), columns, np.asarray(data["image"].affine), temporary, title)


def write_ct(data: Mapping[Hashable, MetaTensor], folder: Path, title: str) -> None:
    """Write a CT without an MR, its body and its picture, each whole or not at all."""
    for key in VOLUMES_UNPAIRED:
        write_volume(data[key], folder / f"{key}.nii.gz")
    ct = np.asarray(data["label"][0])
    with atomic_write(folder / PICTURE) as temporary:
        montage({"CT prepared": (ct, "HU")}, np.asarray(data["label"].affine), temporary, title, most_bone(ct))


# all patients


def prepare_all(patients: Sequence[Patient], out: Path, settings: Settings, workers: int = 1) -> dict[str, str]:
    """Prepare those that are not finished, ``workers`` at a time, each in its own process: a crash costs one patient.

    Returns:
        For each patient that failed, its name and one line that says why.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bundle.prepare.worker"])
    failures: dict[str, str] = {}
    todo = [patient for patient in patients if not is_finished(patient, out, settings)]
    done = len(patients) - len(todo)
    bar = tqdm(total=len(patients), initial=done, unit="patient", desc="preparing")
    with ThreadPoolExecutor(max(1, workers)) as pool, bar:
        jobs = {pool.submit(_in_process, context, patient, out, settings): patient for patient in todo}
        try:
            for job in as_completed(jobs):
                failure = job.result()
                if failure:
                    failures[jobs[job].name] = failure
                    bar.write(f"failed: {failure}")
                bar.update()
        except BaseException:  # Ctrl-C and SIGTERM too: nobody waits for patients that were begun
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return {patient.name: failures[patient.name] for patient in patients if patient.name in failures}


def _in_process(context: Any, patient: Patient, out: Path, settings: Settings) -> str | None:
    """Prepare ``patient`` in a process of its own; returns what went wrong."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(patient, out, settings, send), daemon=True)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:  # it died without a word
        process.join()
        return f"{patient.folder}: its process died (exit code {process.exitcode}), of too little memory or in Elastix"
    finally:
        process.join()


def _work(patient: Patient, out: Path, settings: Settings, send: Any) -> None:
    """The body of a patient's process: one thread, so that results do not depend on how many workers there are."""
    torch.set_num_threads(1)
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(1)
    started = time.perf_counter()
    name = str(patient.given.get("mr", patient.folder))
    try:
        folder = inside(out, patient.name)
        for file in (FINISHED, *(f"{key}.nii.gz" for key in (*VOLUMES, BEFORE))):  # of an earlier run
            (folder / file).unlink(missing_ok=True)
        result = prepare_patient(patient, folder, settings)
        result["seconds"] = time.perf_counter() - started
        result["memory"] = peak_memory_gib("cpu")
        result["fingerprint"] = fingerprint(patient, settings)
        write_text(json.dumps(result, indent=1), folder / FINISHED)  # a measure may be NaN
        send.send(None)
    except Exception as error:
        send.send(one_line(error, name))


def fingerprint(patient: Patient, settings: Settings) -> str:
    """SHA-256 over the settings and the names, sizes and times of the patient's files and the parameter maps."""
    paths = [Path(p) for p in patient.given.values()] or [patient.folder]
    paths.append(Path(settings.parameters))
    files = sorted(f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps([asdict(settings), stats]).encode()).hexdigest()


def is_finished(patient: Patient, out: Path, settings: Settings) -> bool:
    """Whether the patient was prepared from these very files with these settings, and is still all there."""
    result = read_result(out / patient.name)
    volumes = VOLUMES_UNPAIRED if result.get("unpaired") else VOLUMES
    there = all((out / patient.name / f"{key}.nii.gz").is_file() for key in volumes)
    return bool(result) and there and result["fingerprint"] == fingerprint(patient, settings)

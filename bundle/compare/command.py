"""``python -m bundle compare``: Tables I and II, with every system trained equally long and scored by the same code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow

from bundle.compare.report import SCORES, write_report
from bundle.montage import montage
from bundle.train import STEP_SECONDS, of_inference, refuse_own
from bundle.workflow import ROOT, inference_workflow
from custom_modules.data.pairs import check_pairs_or_stop, load_pairs
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError, one_line
from custom_modules.evaluation.split import Evaluation, write_csv
from custom_modules.files import writable_or_stop, write_json
from custom_modules.training.record import commit, hardware

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Stage:
    """One training: ``files`` in configs, combined, for the fraction ``share`` of the system's time. Systems that name
    the same folder share the training. In the texts of ``settings``, {runs} is the folder of all runs."""

    folder: str
    files: Sequence[str]
    share: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """A row of the tables: its name, its trainings in turn, and the overlays on inference.yaml for the last weights."""

    title: str
    stages: Sequence[Stage]
    overlays: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # of inference.yaml


FIRST = ("train", "train_autoencoder")  # the first stage, on which the baselines are overlays


def _regression(name: str, title: str, *overlays: str) -> System:
    return System(title, [Stage(name, [*FIRST, *overlays])], overlays)


SLICES = "baselines/slices"
AVERAGE = "baselines/moving_average"
KL = (SLICES, "baselines/autoencoder_kl")
LATENT = (*KL, "baselines/stable_dm_2d")
LATENT_3D = (*LATENT, "baselines/stable_dm_3d")
CONTROL = (*LATENT, "baselines/controlnet")
PIXEL = (SLICES, "baselines/ddpm")


def _encoded(weights: str) -> dict[str, Any]:
    """Return the settings that load the weights of a first stage into the second."""
    load = {
        "_target_": "custom_modules.networks.weights.load_weights_or_stop",
        "network": "@autoencoder_def",
        "path": weights,
    }
    return {"network_def#autoencoder": load}


def _project(name: str, title: str, *overlay: str, autoencoder: str | None = None) -> System:
    """Return the two stages of this project with an ablation; ``autoencoder`` names a system with the same first
    stage."""
    first = f"{autoencoder or name}_autoencoder"
    stages = [
        Stage(first, [*FIRST, *overlay], 0.3, {"best_weights": "model.pt"}),
        Stage(name, ["train", *overlay], 0.7, {"autoencoder_checkpoint": f"{{runs}}/{first}/model.pt"}),
    ]
    return System(title, stages, overlay)


KL_2D = Stage("kl_2d", [*FIRST, *KL], 0.3)
KL_3D = Stage("kl_3d", [*FIRST, *KL, "baselines/stable_dm_3d"], 0.4)
NO_MR = {**_encoded("{runs}/kl_2d/model.pt"), "network_def#condition": "none", "network_def#controlnet": None}
LOCKED = {
    "_target_": "custom_modules.baselines.diffusion.add_controlnet",
    "network": "@network_def",
    "path": "{runs}/ldm_2d/model.pt",
}

SYSTEMS = {
    "ddpm": System("DDPM", [Stage("ddpm", [*FIRST, *PIXEL, AVERAGE])], PIXEL),
    "ddim": System("DDIM", [Stage("ddpm", [*FIRST, *PIXEL, AVERAGE])], (*PIXEL, "baselines/ddim")),
    "stable_dm_2d": System(
        "StableDM-2D",
        [KL_2D, Stage("stable_dm_2d", [*FIRST, *LATENT, AVERAGE], 0.7, _encoded("{runs}/kl_2d/model.pt"))],
        LATENT,
    ),
    "controlnet": System(
        "ControlNet",
        [
            KL_2D,
            Stage("ldm_2d", [*FIRST, *CONTROL, AVERAGE], 0.35, NO_MR),
            Stage("controlnet", [*FIRST, *CONTROL, AVERAGE], 0.35, {"initial_network": LOCKED}),
        ],
        CONTROL,
    ),
    "stable_dm_3d": System(
        "StableDM-3D",
        [
            KL_3D,
            Stage("stable_dm_3d", [*FIRST, *LATENT_3D, AVERAGE], 0.6, _encoded("{runs}/kl_3d/model.pt")),
        ],
        LATENT_3D,
    ),
    "cyclegan": _regression("cyclegan", "CycleGAN", SLICES, "baselines/cyclegan"),
    "unet": _regression("unet", "3D U-Net, L1", "baselines/unet"),
    "pix2pix": _regression("pix2pix", "pix2pix 3D", "baselines/unet", "baselines/pix2pix"),
    "vanilla": _project("vanilla", "Vanilla", "ablations/vanilla"),
    "wrm": _project("wrm", "w/ WRM", "ablations/wrm"),
    "wrm_smd": _project("wrm_smd", "w/ WRM+SMD", "ablations/wrm_smd", autoencoder="full"),
    "full": _project("full", "3D-WLDM"),
}


def compare(
    dataset_dir: str,
    datalist: str | None = None,
    budget: float = 30.0,
    systems: str | Sequence[str] = "all",
    output_dir: str = "runs/compare",
    results: str | None = None,
    **settings: Any,
) -> None:
    """Train each of ``systems`` for ``budget`` minutes on the training split and score it on the test split.

    Trainings are kept in ``output_dir`` and continue where they were stopped. A system that has been scored leaves
    ``RESULTS/<system>.json``, small enough to be committed. With this file, for the same budget and data, the system is
    done on any machine. ``compare.csv``, ``RESULTS.md`` and the picture are made from these files only.

    Args:
        budget: minutes of wall time per system, all its stages together; reading the volumes is not counted.
        systems: ``all``, names joined by commas, or a list; none (an empty text) only writes the report.
        results: folder of the records; ``OUTPUT_DIR/results`` when None.
        settings: of all trainings, such as ``patience``.

    Raises:
        InputError: before any training, for an unknown system, a setting that this command chooses itself, a budget too
            small for one step, a datalist without the three splits, or an ``output_dir`` of another budget or other
            data.
    """
    names = _names(systems)
    refuse_own(settings, "compare")
    if (
        not isinstance(budget, (int, float))
        or min(60 * budget * stage.share for name in names or SYSTEMS for stage in SYSTEMS[name].stages) < STEP_SECONDS
    ):
        raise InputError(f"a budget of {budget} min is too small for one step of each stage; give a larger --budget")
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    pairs = load_pairs(path, dataset_dir, SPLITS)
    writable_or_stop(output_dir)
    identity = {"budget": float(budget), "data_sha256": check_pairs_or_stop(pairs, 1)}
    marker = Path(output_dir) / "compare.json"
    if marker.exists() and json.loads(marker.read_text()) != identity:
        raise InputError(f"{output_dir}: holds a comparison of another budget or data; give another --output_dir")
    write_json(identity, marker)
    titles, table = {name: system.title for name, system in SYSTEMS.items()}, Path(output_dir) / "compare.csv"
    records = Path(results or Path(output_dir) / "results")
    for name in names:
        if _done(records / f"{name}.json", identity):
            print(f"{name}: done, {records}/{name}.json")
            continue
        print(f"{name}: {budget:g} min")
        _compare_one(name, identity, pairs["test"], dataset_dir, path, Path(output_dir), records, settings)
        write_report(records, identity, titles, table)
    write_report(records, identity, titles, table)


def _names(systems: str | Sequence[str]) -> list[str]:
    if systems == "all":
        return list(SYSTEMS)
    names = [n.strip() for n in systems.split(",") if n.strip()] if isinstance(systems, str) else list(systems)
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise InputError(f"no system '{unknown[0]}'; there are {', '.join(SYSTEMS)}")
    return names


def _done(path: Path, identity: Mapping[str, Any]) -> bool:
    record = json.loads(path.read_text()) if path.exists() else {"problem": "not run"}
    return not record["problem"] and all(record.get(key) == value for key, value in identity.items())


def _compare_one(
    name: str, identity: Mapping[str, Any], pairs: Sequence[Mapping[str, str]], dataset_dir: str, datalist: Path,
    output_dir: Path, results: Path, settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Train and score one system, and write its record; a failure is recorded too."""
    record = {"system": name, **identity, "date": datetime.now(UTC).date().isoformat(), "commit": commit(),
              "hardware": {**hardware(), "threads": torch.get_num_threads()}, "problem": ""}  # fmt: skip
    try:
        runs, stages = output_dir / "runs", SYSTEMS[name].stages
        record["stages"] = [train(stage, identity, dataset_dir, datalist, runs, settings) for stage in stages]
        record |= evaluate(name, dataset_dir, datalist, output_dir, settings)
        _strip(name, pairs[0], output_dir, results)
    except (Exception, SystemExit) as error:
        record["problem"] = one_line(error, name)
        print(f"{name}: failed, {record['problem']}")
    write_json(record, results / f"{name}.json")


def train(
    stage: Stage, identity: Mapping[str, Any], dataset_dir: str, datalist: Path, runs: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train a stage, or continue it, unless it is complete. Return the record of the time used."""
    folder = runs / stage.folder
    used = folder / "budget.json"
    if not used.exists():
        files = [str(ROOT / "configs" / f"{file}.yaml") for file in (*stage.files, "equal_time")]
        own = json.loads(json.dumps(stage.settings).replace("{runs}", str(runs)))
        workflow = ConfigWorkflow(
            config_file=files, workflow_type="train", logging_file=False, dataset_dir=str(dataset_dir),
            datalist=str(datalist), output_dir=str(folder), minutes=identity["budget"] * stage.share, resume=True,
            **{"check_data": False, **own, **settings},
        )  # fmt: skip
        workflow.initialize()
        workflow.run()
        for path in folder.glob("checkpoint_*.pt"):
            path.unlink()
    return {"stage": stage.folder, **json.loads(used.read_text())}


def evaluate(
    name: str, dataset_dir: str, datalist: Path, output_dir: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the scores of the test patients, the seconds per volume, and the number of parameters at inference."""
    system, folder = SYSTEMS[name], output_dir / name
    overlays = [str(ROOT / "configs" / f"{overlay}.yaml") for overlay in system.overlays]
    chosen = {name: value for name, value in of_inference(settings, overlays).items() if name != "seed"}
    chosen |= {**system.settings, "checkpoint": str(output_dir / "runs" / system.stages[-1].folder / "model.pt")}
    evaluation = Evaluation(
        str(dataset_dir), str(datalist), "test", str(folder), config=overlays, name=name,
        settings={**chosen, "guard_statistics": "null", "calibration": "null"},
    )  # fmt: skip
    evaluation.synthesize()
    rows = [row for row in evaluation.score() if row["system"] == name]
    write_csv(rows, folder / "metrics.csv")
    if all(row["problem"] for row in rows):
        raise InputError(rows[0]["problem"])
    sidecars = [json.loads((folder / f"{row['patient']}_sct.json").read_text()) for row in rows if "sct" in row]
    workflow = inference_workflow(overlays, logging_file=False, **system.settings)
    network = workflow.parser.get_parsed_content("network_def")
    return {
        "rows": [{key: row.get(key) for key in ("patient", "problem", *SCORES)} for row in rows],
        "seconds": [sidecar["time_s"] for sidecar in sidecars],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _strip(name: str, pair: Mapping[str, str], output_dir: Path, results: Path) -> None:
    """Draw a column of the figure: three planes of the first test patient, the same for all systems."""
    mr, ct = (read_volume(pair[key]) for key in ("image", "label"))
    sct = read_volume(output_dir / name / f"{pair['patient']}_sct.nii.gz")
    centre = tuple(size // 2 for size in mr.shape[1:])
    columns = {"MR": (mr, "MR"), "CT": (ct, "HU"), SYSTEMS[name].title: (sct, "HU")}
    for title, (volume, kind) in columns.items():
        key = name if volume is sct else title.lower()
        results.mkdir(parents=True, exist_ok=True)
        column, affine = {title: (np.asarray(volume[0]), kind)}, np.asarray(mr.affine)
        montage(column, affine, results / f"{key}.png", centre=centre, windows=["bone"])

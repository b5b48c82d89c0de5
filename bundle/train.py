"""``python -m bundle train``: all stages of training, calibration and guard, in one command that can be stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from bundle.evaluate import evaluate
from bundle.release.ship import ship
from bundle.workflow import ROOT
from custom_modules.config_check import used_ids
from custom_modules.errors import InputError
from custom_modules.files import sha256, to_plain, writable_or_stop, write_json

TRAINING_ONLY = {"amp", "seed"}  # of the settings that inference.yaml has too
OWN = {"resume", "minutes", "autoencoder_checkpoint", "best_weights"}  # settings that the commands choose
STEP_SECONDS = 1.0  # a stage with less time than this must be a mistake


@dataclass(frozen=True)
class Stage:
    """One training: its folder, its ``files`` in configs, its share of the time, and what it starts from, a setting and
    a file below the folder of the run."""

    folder: str
    files: Sequence[str]
    share: float
    start: tuple[str, str] | None = None


@dataclass(frozen=True)
class Recipe:
    """The stages in turn, and the overlay on inference.yaml for networks that are not the default."""

    stages: Sequence[Stage]
    overlay: str | None = None


def _two_stages(*overlays: str) -> list[Stage]:
    return [
        Stage("autoencoder", ["train", "train_autoencoder", *overlays], 0.3),
        Stage("diffusion", ["train", *overlays], 0.7, ("autoencoder_checkpoint", "autoencoder/autoencoder.pt")),
    ]


RECIPES = {
    "default": Recipe(_two_stages()),
    "whole_body": Recipe(_two_stages("whole_body")),
    "paper": Recipe(_two_stages("paper"), str(ROOT / "configs" / "paper.yaml")),
    "finetune": Recipe([Stage("finetune", ["train", "finetune"], 1.0)]),
    "finetune_whole_body": Recipe([Stage("finetune", ["train", "whole_body", "finetune"], 1.0)]),
}


def train(
    dataset_dir: str,
    datalist: str | None = None,
    output_dir: str = "runs",
    recipe: str = "default",
    budget: float | None = None,
    **settings: Any,
) -> None:
    """Train on a datalist, make the weights ready for use, and score the validation patients.

    The same command again goes on where it was stopped. Ends in ``OUTPUT_DIR/models`` (weights, calibration, guard) and
    ``OUTPUT_DIR/validation`` (scores and pictures). Use the weights by ``--checkpoint OUTPUT_DIR/models/model.pt``,
    with ``--calibration`` and ``--guard_statistics`` beside them.

    Args:
        datalist: MONAI datalist; ``DATASET_DIR/datalist.json`` when None.
        recipe: ``default``; ``whole_body``, where CTs without an MR take part; ``paper``, the paper's own settings;
            ``finetune``, from the shipped weights; ``finetune_whole_body``, from them and with such CTs.
        budget: minutes for all stages together; as many steps as the configs say when None.
        settings: of the training configs, such as --batch_size or --device.

    Raises:
        InputError: for an unknown recipe, a budget too small for one step of each stage, or a folder that holds the
            run of another recipe.
    """
    if recipe not in RECIPES:
        raise InputError(f"no recipe '{recipe}'; there are {', '.join(RECIPES)}")
    refuse_own(settings, "train")
    stages = RECIPES[recipe].stages
    if budget is not None and min(60 * budget * stage.share for stage in stages) < STEP_SECONDS:
        raise InputError(f"--budget {budget:g}: too small for one step of each stage; give more minutes")
    folder, data = Path(writable_or_stop(output_dir)), str(datalist or Path(dataset_dir) / "datalist.json")
    claim(folder, {"recipe": recipe, "budget": budget, "datalist": data, **settings})
    for number, stage in enumerate(stages, start=1):
        time = "as many steps as the configs say" if budget is None else f"{budget * stage.share:.3g} min"
        print(f"stage {number} of {len(stages)}: {' + '.join(stage.files)}, {time}", flush=True)
        run_stage(stage, folder, str(dataset_dir), data, budget, settings)
    weights = folder / "models" / "model.pt"
    overlay = RECIPES[recipe].overlay
    network: dict[str, Any] = {"config": overlay} if overlay else {}
    known = of_inference(settings, [overlay] if overlay else [])
    network |= {name: value for name, value in known.items() if name not in TRAINING_ONLY}
    ship(str(folder / stages[-1].folder / "model.pt"), str(weights), str(dataset_dir), data, **network)
    beside = {"calibration": "calibration.json", "guard_statistics": "guard.json"}
    network |= {"checkpoint": str(weights)} | {name: str(weights.with_name(file)) for name, file in beside.items()}
    evaluate(str(dataset_dir), data, "validation", str(folder / "validation"), **network)
    print(f"weights: {weights}; scores and pictures: {folder / 'validation'}")


def refuse_own(settings: Mapping[str, Any], command: str) -> None:
    """Raise InputError for a setting that the ``command`` chooses itself."""
    if own := OWN & set(settings):
        raise InputError(f"--{min(own)}: `{command}` chooses it itself; leave it out")


def of_inference(settings: Mapping[str, Any], overlays: Sequence[str] = ()) -> dict[str, Any]:
    """Return those settings of a training that inference.yaml, with ``overlays``, uses too: what is trained must be run
    alike."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / "inference.yaml"), *overlays])
    used = used_ids(parser.get())
    return {name: value for name, value in settings.items() if name in used}


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what a run is into its folder, or raise InputError if the folder holds another run."""
    path, wanted = folder / "train.json", to_plain(dict(settings))
    found = json.loads(path.read_text()) if path.is_file() else wanted
    other = [f"{name} {found.get(name)}, not {wanted.get(name)}" for name in sorted({*found, *wanted})
             if found.get(name) != wanted.get(name)]  # fmt: skip
    if other:
        raise InputError(f"{folder}: holds a run with {'; '.join(other)}; give these settings or another --output_dir")
    write_json(wanted, path)


def run_stage(
    stage: Stage, folder: Path, dataset_dir: str, datalist: str, budget: float | None, settings: Mapping[str, Any]
) -> None:
    """Train a stage from its newest checkpoint, unless it is complete."""
    done = folder / stage.folder / "complete.json"
    if done.is_file():
        print(f"{stage.folder}: complete")
        return
    files = [str(ROOT / "configs" / f"{name}.yaml") for name in stage.files]
    own: dict[str, Any] = dict(settings)
    if budget is not None:
        files.append(str(ROOT / "configs" / "equal_time.yaml"))
        own["minutes"] = budget * stage.share
    if stage.start:
        own[stage.start[0]] = str(folder / stage.start[1])
    workflow = ConfigWorkflow(
        config_file=files, workflow_type="train", logging_file=False, dataset_dir=dataset_dir, datalist=datalist,
        output_dir=str(folder / stage.folder), resume=True, **own,
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    weights = folder / stage.folder / str(workflow.parser.get_parsed_content("best_weights"))
    write_json({"weights": str(weights), "sha256": sha256(weights)}, done)
    for checkpoint in weights.parent.glob("checkpoint_*.pt"):
        checkpoint.unlink()

"""The train task: fine-tunes the current weights on the MRs of the studies folder that have a CT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import partition_dataset
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from bundle.label_app.options import Options
from bundle.release.ship import ship
from bundle.workflow import ROOT
from custom_modules.errors import InputError
from custom_modules.files import sha256, write_json
from custom_modules.settings import Setting

VAL_SPLIT = Setting("float", "fraction of the pairs for validation", low=0.01, high=0.9)
CONFIGS = [str(ROOT / "configs" / name) for name in ("train.yaml", "finetune.yaml")]


class FineTuning(TrainTask):
    """Fine-tuning: ``configs/train.yaml`` with the overlay ``configs/finetune.yaml``.

    Args:
        weights: file for the result; the run is in the folder ``training`` next to it.
        checkpoint: returns the path of the weights to start from.
    """

    def __init__(self, weights: Path, checkpoint: Callable[[], Path]) -> None:
        super().__init__("Fine-tunes denoiser and decoder on the MR/CT pairs of the studies folder")
        config = ConfigParser.load_config_files(CONFIGS)
        names = ["max_epochs", "steps_per_epoch", "batch_size", "augmented_copies", "learning_rate", "seed"]
        self.options = Options(config, names, {"val_split": (VAL_SPLIT, 0.2)})
        self.val_interval = config["val_interval"]
        self.weights, self.checkpoint = weights, checkpoint

    def config(self) -> dict[str, Any]:
        return self.options.shown()

    def stats(self) -> dict[str, Any]:
        """Return the record of the last training."""
        record = self.weights.with_suffix(".json")
        return json.loads(record.read_text()) if record.is_file() else {}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train on the images with a ``final`` label; a run that fails leaves the current weights unchanged.

        Raises:
            InputError: for fewer than two pairs, or pairs that cannot be used.
        """
        settings = self.options.chosen(request)
        training, validation = split(datastore.datalist(), settings.pop("val_split"), settings["seed"])
        settings["batch_size"] = min(settings["batch_size"], len(training))
        run, start = self.weights.with_name("training"), self.checkpoint()
        started_from = sha256(start) if start.is_file() else None
        shutil.rmtree(run, ignore_errors=True)
        write_json({"training": training, "validation": validation}, run / "datalist.json")
        workflow = ConfigWorkflow(
            config_file=CONFIGS, workflow_type="train", logging_file=False, initial_checkpoint=str(start),
            output_dir=str(run), dataset_dir=str(run), datalist=str(run / "datalist.json"),
            val_interval=min(self.val_interval, settings["max_epochs"]), **settings,
        )  # fmt: skip
        try:
            workflow.initialize()
            workflow.run()
        except SystemExit as error:  # training ends the program with one line
            raise InputError(str(error).removeprefix("error: ")) from error
        finally:
            for checkpoint in run.glob("checkpoint_*.pt"):
                checkpoint.unlink()
        ship(str(run / "model.pt"), str(self.weights))
        evaluator = workflow.parser.get_parsed_content("validate#evaluator")
        stats = {
            "trained": datetime.now(UTC).isoformat(timespec="seconds"),
            "pairs": len(training), "validation_pairs": len(validation),
            "best_metric": evaluator.state.best_metric,  # in-body MAE, HU
            "model_sha256": sha256(self.weights), "started_from_sha256": started_from, **settings,
        }  # fmt: skip
        write_json(stats, self.weights.with_suffix(".json"))
        (run / "model.pt").unlink()
        return stats


def split(pairs: list[dict[str, Any]], share: float, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Split pairs into training and validation pairs, at least one of each.

    Raises:
        InputError: for fewer than two pairs.
    """
    if len(pairs) < 2:
        raise InputError(f"training needs at least two images with a CT as 'final' label, there are {len(pairs)}")
    pairs = sorted(({"image": pair["image"], "label": pair["label"]} for pair in pairs), key=lambda pair: pair["image"])
    held_back = min(max(1, round(share * len(pairs))), len(pairs) - 1)
    ratios = [len(pairs) - held_back, held_back]
    training, validation = partition_dataset(pairs, ratios=ratios, shuffle=True, seed=seed)
    return list(training), list(validation)

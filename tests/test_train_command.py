"""``wldm train``: all stages, calibration and guard in one command."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TRAINING, train_workflow

from bundle import train as train_module
from bundle.train import RECIPES, claim, train
from custom_modules.errors import InputError

SMALL = {**TRAINING, "denoiser_channels": [8, 16, 16], "augmented_copies": 1, "adversarial_warmup": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "fast"}, "no recipe 'fast'; there are default, whole_body, paper, finetune"),
        ({"budget": 0.01}, "--budget 0.01: too small"),
        ({"minutes": 3}, "--minutes: `train` chooses it itself"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(str(tmp_path), output_dir=str(tmp_path / "runs"), **arguments)
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_another_run_is_refused_with_the_difference(tmp_path):
    claim(tmp_path, {"recipe": "default", "budget": None, "batch_size": 2})
    claim(tmp_path, {"recipe": "default", "budget": None, "batch_size": 2})
    with pytest.raises(InputError, match="holds a run with batch_size 2, not 4; give these settings or another"):
        claim(tmp_path, {"recipe": "default", "budget": None, "batch_size": 4})


@pytest.mark.integration
def test_one_command_trains_ships_and_scores_and_does_nothing_twice(phantoms, tmp_path, monkeypatch, capsys):
    shipped, settings = [], {**SMALL, "output_dir": str(tmp_path / "runs")}

    def interrupted(*args, **kwargs):
        shipped.append(args)
        if len(shipped) == 1:
            raise KeyboardInterrupt
        return ship(*args, **kwargs)

    ship = train_module.ship
    monkeypatch.setattr(train_module, "ship", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(str(phantoms), **settings)
    before = (tmp_path / "runs/diffusion/model.pt").stat().st_mtime_ns
    train(str(phantoms), **settings)
    assert (tmp_path / "runs/diffusion/model.pt").stat().st_mtime_ns == before
    assert "autoencoder: complete" in capsys.readouterr().out
    models = {path.name for path in (tmp_path / "runs/models").iterdir()}
    assert models == {"model.pt", "model.pt.sha256", "calibration.json", "guard.json"}
    assert json.loads((tmp_path / "runs/train.json").read_text())["recipe"] == "default"
    assert (tmp_path / "runs/validation/metrics.csv").is_file()
    assert not list((tmp_path / "runs").rglob("checkpoint_*.pt"))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "finetune" in name])
def test_fine_tuning_needs_no_latent_of_a_ct(recipe):
    """An encoder that was trained further for MRs gives none: with half of the crops at other timesteps, the validation
    error of the shipped weights rose by 5 HU within 200 steps."""
    (stage,) = RECIPES[recipe].stages
    parser = train_workflow("+".join(stage.files), **TRAINING).parser
    prepare, loss = parser.get_parsed_content("prepare_batch"), parser.get_parsed_content("loss")
    last = prepare.schedule.inference_timesteps(1)[0][0]
    assert bool((prepare.get_timesteps(torch.zeros(8, 4, 2, 2, 2)) == last).all()) and loss.latent_weight == 0

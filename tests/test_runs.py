"""Runs that survive: checkpoints, resuming after a kill, several processes, the record, the non-finite loss."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TRAINING, TRAINING_DENOISER, train, train_workflow
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from custom_modules.training.checkpoints import BestWeights, CheckpointSaver
from custom_modules.training.handlers import (
    AfterStep,
    GradientClipping,
    ProgressBar,
    StepSeed,
    StopOnNonFinite,
    ValidateAtEnd,
    handlers_of_rank,
)
from custom_modules.training.record import RunRecord, version, write_record

LONG = {"steps_per_epoch": 4, "max_epochs": 3, "val_interval": 2, "checkpoint_interval": 3}

# a run that kills itself: in the middle of a step, or half-way through writing a checkpoint
SUICIDE = """
import json, os, signal, sys
import torch
from conftest import train_workflow
when, iteration, name, settings = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
workflow = train_workflow(name, **settings)
trainer = workflow.parser.get_parsed_content("train#trainer")
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == "step":
    from monai.engines import IterationEvents
    die_at = lambda engine: die() if engine.state.iteration == iteration else None
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, die_at)
else:
    save = torch.save
    def half(content, path):
        save(content, path)
        if trainer.state.iteration >= iteration:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    torch.save = half
workflow.run()
"""


def losses_of(workflow) -> dict[int, float]:
    """Run a training workflow; the loss of each iteration."""
    losses = {}
    trainer = workflow.parser.get_parsed_content("train#trainer")

    @trainer.on(Events.ITERATION_COMPLETED)
    def collect(engine):
        losses[engine.state.iteration] = engine.state.output["loss"].item()

    workflow.run()
    return losses


def scalar(folder: Path, tag: str) -> dict[int, float]:
    """A TensorBoard scalar of a run: step to value."""
    values = {}
    for file in folder.glob("events.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        values |= {e.step: e.value for e in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
    return values


def killed(when: str, iteration: int, name: str, settings: dict) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SUICIDE, when, str(iteration), name, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("train+train_autoencoder", "step"),
        ("train", "checkpoint"),
        pytest.param("train+train_autoencoder", "checkpoint", marks=pytest.mark.slow),
        pytest.param("train", "step", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_on_the_curve_of_the_uninterrupted_one(name, when, phantoms, trained, tmp_path):
    settings = {**TRAINING, **LONG, "dataset_dir": str(phantoms), "check_data": False}
    if name == "train":
        settings |= {"autoencoder_checkpoint": str(trained / "ae/autoencoder.pt"), "augmented_copies": 2}
        settings |= {"renewed_copies": 1}
    expected = losses_of(train_workflow(name, **settings, output_dir=str(tmp_path / "whole")))
    assert list(expected) == list(range(1, 13))
    folder = tmp_path / "killed"
    killed(when, 8, name, {**settings, "output_dir": str(folder)})
    last = {"step": 6, "checkpoint": 6}[when]  # every 3 iterations, and at the end of the epochs at 4, 8 and 12
    newest = sorted(folder.glob("checkpoint_*.pt"))[-1]
    assert int(re.findall(r"\d+", newest.name)[0]) == last
    assert bool(list(folder.glob(".partial-*"))) == (when == "checkpoint")
    resumed = losses_of(train_workflow(name, **settings, output_dir=str(folder), resume=True))
    assert list(resumed) == list(range(last + 1, 13))
    for iteration, loss in resumed.items():
        assert loss == pytest.approx(expected[iteration], rel=1e-3)
    weights = [
        torch.load(sorted(f.glob("checkpoint_*.pt"))[-1], weights_only=True) for f in (folder, tmp_path / "whole")
    ]
    one, other = (w["network"] for w in weights)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)
    assert not list(folder.glob(".partial-*"))


@pytest.mark.parametrize("name", ["train+train_autoencoder", "train"])
def test_two_processes_train_as_one_that_accumulates(name, phantoms, trained, tmp_path):
    settings = {**TRAINING, "dataset_dir": str(phantoms), "check_data": False, "steps_per_epoch": 3, "amp": False}
    settings |= {"max_epochs": 2, "val_interval": 2}
    if name == "train":
        settings |= {"autoencoder_checkpoint": str(trained / "ae/autoencoder.pt"), "augmented_copies": 1}
    train(name, **settings, accumulation=2, output_dir=str(tmp_path / "one"))
    files = [str(ROOT / "configs" / f"{n}.yaml") for n in (*name.split("+"), "multi_gpu_train")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "monai.bundle",
    ]
    command += ["run", "--config_file", str(files)]
    denoiser = TRAINING_DENOISER if name == "train" else {}
    for key, value in {**settings, **denoiser, "output_dir": str(tmp_path / "two")}.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (scalar(tmp_path / name, "loss") for name in ("one", "two"))
    # the first rank logs its own batches, which are every other one of the single process
    assert list(two.values()) == pytest.approx([one[iteration] for iteration in range(1, 13, 2)], rel=0.01)
    one, two = (scalar(tmp_path / name, "val_mae") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=0.01)
    assert len(json.loads((tmp_path / "two/run.json").read_text())) == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(trained, phantoms):
    with pytest.raises(SystemExit, match="holds a run already; continue it with --resume true"):
        train("train+train_autoencoder", **TRAINING, dataset_dir=str(phantoms), output_dir=str(trained / "ae"))


def test_a_complete_run_says_so(trained, phantoms):
    with pytest.raises(SystemExit, match="the run is complete; give a larger --max_epochs"):
        train(
            "train+train_autoencoder",
            **TRAINING,
            dataset_dir=str(phantoms),
            output_dir=str(trained / "ae"),
            resume=True,
        )


def test_a_checkpoint_of_another_network_is_refused(trained, phantoms):
    other = {**TRAINING, "autoencoder_channels": [8, 24], "max_epochs": 9}
    with pytest.raises(SystemExit, match="belongs to another model or config"):
        train(
            "train+train_autoencoder", **other, dataset_dir=str(phantoms), output_dir=str(trained / "ae"), resume=True
        )


class Trainer(Engine):
    """As much of MONAI's trainer as the handlers look at."""

    def __init__(self, length: int = 4, epochs: int = 2) -> None:
        super().__init__(lambda engine, batch: {"loss": torch.tensor(1.0)})
        self.network = nn.Linear(3, 3)
        self.data_loader = type("Loader", (), {"batch_sampler": type("Sampler", (), {"start": 0})()})()
        self.state.epoch_length, self.state.max_epochs = length, epochs


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog):
    network, engine = nn.Linear(2, 2), Trainer()
    checkpoints = CheckpointSaver(tmp_path, {"network": network}, interval=1)
    for iteration in (1, 2):
        engine.state.iteration = iteration
        nn.init.constant_(network.weight, iteration)
        checkpoints.save(engine)
    newest = checkpoints.found()[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    fresh = Trainer()
    checkpoints.begin(fresh, resume=True)
    assert fresh.state.iteration == 1 and fresh.data_loader.batch_sampler.start == 1
    assert network.weight[0, 0] == 1 and "using the previous one" in caplog.text


def test_only_the_last_checkpoints_are_kept(tmp_path):
    checkpoints, engine = CheckpointSaver(tmp_path, {"network": nn.Linear(1, 1)}, interval=1, keep=2), Trainer()
    for iteration in (9, 10, 100):
        engine.state.iteration = iteration
        checkpoints.save(engine)
    assert [path.name for path in checkpoints.found()] == ["checkpoint_00000010.pt", "checkpoint_00000100.pt"]


def test_resuming_nothing_starts_from_the_beginning(tmp_path):
    engine = Trainer()
    CheckpointSaver(tmp_path, {}, interval=1).begin(engine, resume=True)
    assert engine.state.iteration == 0


def test_best_weights_are_those_of_the_smallest_error_also_after_resuming(tmp_path):
    network, path = nn.Linear(1, 1), tmp_path / "best.pt"
    best, evaluator = BestWeights(network, path, "error"), Trainer()

    def validate(handler, value):
        nn.init.constant_(network.weight, value)
        evaluator.state.metrics = {"error": value}
        handler(evaluator)
        return float(torch.load(path, weights_only=True)["weight"])

    assert validate(best, 3.0) == 3
    assert validate(best, float("nan")) == 3
    assert validate(best, 2.0) == 2
    resumed = BestWeights(network, path, "error")
    resumed.load_state_dict(best.state_dict())
    assert validate(resumed, 2.5) == 2
    assert validate(resumed, 1.0) == 1


def test_gradients_are_clipped_where_the_optimiser_steps():
    engine = Trainer()

    def norm(iteration):
        engine.network.zero_grad()
        engine.network(torch.full((1, 3), 1e3)).sum().backward()
        engine.state.iteration = iteration
        GradientClipping(1.0, accumulation=2)(engine)
        return float(torch.sqrt(sum(p.grad.square().sum() for p in engine.network.parameters())))

    assert norm(1) > 100 and norm(2) == pytest.approx(1.0, rel=1e-4)


def test_actions_follow_each_optimiser_step():
    calls, engine = [], Trainer()
    AfterStep([lambda: calls.append("a"), lambda: calls.append("b")], accumulation=2).attach(engine)
    engine.run(range(4), max_epochs=1)
    assert calls == ["a", "b"] * 2


def test_the_seed_is_a_function_of_seed_iteration_and_rank():
    def draws(seed, **ranks):
        engine, values = Trainer(), []
        StepSeed(seed, **ranks).attach(engine)
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: values.append(float(torch.rand(1))))
        engine.run(range(4), max_epochs=1)
        return values

    alone, ranks = draws(1), [draws(1, rank=r, world_size=2) for r in (0, 1)]
    assert len(set(alone)) == 4 and draws(1) == alone != draws(2)
    assert [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]] == alone


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step_and_names_the_patients(phantoms, tmp_path):
    weights = {}

    class Poison(nn.Module):
        def forward(self, output, target):
            bad = weights["iteration"] == 2
            return output[0].square().mean() * (float("nan") if bad else 1.0)

    workflow = train_workflow(
        "train+train_autoencoder", **TRAINING, dataset_dir=str(phantoms), output_dir=str(tmp_path)
    )
    workflow.parser["checkpoint_interval"] = 1
    trainer = workflow.parser.get_parsed_content("train#trainer")
    trainer.loss_function = Poison()
    workflow.parser.get_parsed_content("loss").terms = {"loss": 0.0}

    @trainer.on(Events.ITERATION_STARTED)
    def remember(engine):
        weights["iteration"] = engine.state.iteration
        weights["before"] = [p.detach().clone() for p in engine.network.parameters()]

    with pytest.raises(
        SystemExit, match=r"the loss is nan at iteration 2, patients p\d, p\d; the last checkpoint is good"
    ):
        workflow.run()
    assert all(torch.equal(a, b) for a, b in zip(weights["before"], trainer.network.parameters()))
    saved = torch.load(sorted(tmp_path.glob("checkpoint_*.pt"))[-1], weights_only=True)
    assert saved["iteration"] == 1 and all(v.isfinite().all() for v in saved["network"].values())


def test_only_the_first_rank_writes(tmp_path):
    handlers = [StepSeed(0), ProgressBar(), BestWeights(nn.Linear(1, 1), tmp_path / "a.pt", "x"), StopOnNonFinite()]
    assert handlers_of_rank(handlers, 0) == handlers
    assert handlers_of_rank(handlers, 1) == [handlers[0], handlers[3]]


def test_a_package_that_is_not_installed_has_no_version():
    assert version("no-such-package") is None and version("torch").split("+")[0] == torch.__version__.split("+")[0]


def test_the_record_says_what_ran_and_grows_when_resumed(tmp_path):
    settings = {"batch_size": 2, "roi_size": [8, 8], "name": "x"}
    write_record(tmp_path, settings, data_sha256="abc")
    RunRecord(tmp_path, rank=1).write()
    (record,) = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"] == {"batch_size": 2, "roi_size": [8, 8], "name": "x"}
    assert record["data_sha256"] == "abc" and torch.__version__.startswith(record["versions"]["torch"].split("+")[0])
    assert record["hardware"]["cores"] == os.cpu_count() and record["command"] == sys.argv
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert record["commit"] is None or record["commit"].rstrip("+") == commit
    write_record(tmp_path, settings)
    assert len(json.loads((tmp_path / "run.json").read_text())) == 2


def test_a_run_leaves_its_record_scalars_and_a_montage(trained):
    (record,) = json.loads((trained / "ldm/run.json").read_text())
    assert record["settings"]["batch_size"] == TRAINING["batch_size"] and len(record["data_sha256"]) == 64
    events = EventAccumulator(str(trained / "ldm"))
    events.Reload()
    assert {"loss", "val_mae", "val_bone_dice", "val_psnr", "val_ssim"} <= set(events.Tags()["scalars"])
    image = events.Images("validation")[0]
    assert image.width > image.height > 0
    stage1 = EventAccumulator(str(trained / "ae"))
    stage1.Reload()
    terms = {"reconstruction_mr", "reconstruction_ct", "kl", "disentanglement", "adversarial", "discriminator"}
    cosines = {f"cosine_{half}_{kind}" for half in ("structure", "modality") for kind in ("pair", "unpaired")}
    assert terms | cosines <= set(stage1.Tags()["scalars"])


@pytest.mark.parametrize(("epochs", "interval", "expected"), [(3, 2, [2, 3]), (4, 2, [2, 4]), (2, 100, [2])])
def test_a_training_validates_at_its_end_whatever_the_interval(epochs, interval, expected):
    seen = []
    validator = Engine(lambda *_: None)
    validator.add_event_handler(Events.COMPLETED, lambda _: seen.append(trainer.state.epoch))
    validator_of = SimpleNamespace(run=lambda epoch: validator.run([0]), add_event_handler=validator.add_event_handler)
    trainer = Engine(lambda *_: None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=interval), lambda _: validator.run([0]))
    ValidateAtEnd(validator_of).attach(trainer)
    trainer.run([0, 1], max_epochs=epochs)
    assert seen == expected

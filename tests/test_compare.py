"""The comparison: equal time by the clock, every system from training to its row, the page, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, save
from ignite.engine import Engine
from monai.bundle import ConfigParser, ConfigWorkflow
from scipy.stats import wilcoxon

import bundle.compare.command as comparison
from bundle.compare.report import SCORES, p_value, values, write_report
from bundle.phantom.command import torso_phantom
from custom_modules.data.mr import CorrectBiasFieldd
from custom_modules.errors import InputError
from custom_modules.evaluation import split as evaluation
from custom_modules.evaluation.metrics import PROTOCOLS, slice_inconsistency
from custom_modules.training.budget import TimeBudget

DIFFUSION = {"channels": [32, 32, 32], "num_train_timesteps": 4, "num_inference_steps": 2, "val_steps": 2}
PROJECT = {
    "latent_channels": 4, "autoencoder_channels": [8, 16], "autoencoder_blocks": [1, 1],
    "denoiser_channels": [8, 16, 16], "roi_size": [32, 32, 32],
}  # fmt: skip
UNET = {"network_def#channels": [4, 8], "network_def#strides": [2], "roi_size": [32, 32, 32]}
SLICES = {"slice_size": [32, 32]}
KL = {**SLICES, "autoencoder_channels": [16, 16, 16]}
TINY = {
    "ddpm": {**DIFFUSION, **SLICES, "channels": [32] * 4, "num_inference_steps": 4},
    "ddim": {**DIFFUSION, **SLICES, "channels": [32] * 4},
    "stable_dm_2d": {**DIFFUSION, **KL}, "controlnet": {**DIFFUSION, **KL},
    "stable_dm_3d": {**DIFFUSION, **KL, "slice_size": [32, 32, 32]},
    "cyclegan": {**SLICES, "channels": [8, 8, 8], "blocks": [8]},
    **dict.fromkeys(["unet", "pix2pix"], UNET),
    **dict.fromkeys(["vanilla", "wrm", "wrm_smd", "full"], PROJECT),
}  # fmt: skip
FAST = {
    "steps_per_epoch": 2, "max_epochs": 1, "amp": False, "augmented_copies": 1, "batch_size": 2, "validations": 1,
    "device": "$torch.device('cpu')", "correct_bias": False,
}  # fmt: skip
QUICK = ("ddim", "controlnet", "cyclegan", "pix2pix", "full")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A datalist of small phantoms: three to train, one to validate and two to test."""
    root = tmp_path_factory.mktemp("data")
    entries = []
    for n in range(6):
        mr, ct, affine = torso_phantom(shape=(20, 16, 12), spacing=4.0, seed=n)
        entries.append({"image": f"p{n}/mr.nii.gz", "label": f"p{n}/ct.nii.gz"})
        save(root / entries[-1]["image"], mr * (1 + n / 50), affine)
        save(root / entries[-1]["label"], ct + n, affine)
    splits = {"training": entries[:3], "validation": entries[3:4], "test": entries[4:]}
    (root / "datalist.json").write_text(json.dumps(splits))
    return root


@pytest.fixture
def tiny(monkeypatch):
    """Every system with networks of a few channels; their output is scored, although it is not in Hounsfield units
    yet."""

    def shrink(name: str, system: comparison.System) -> comparison.System:
        stages = [dataclasses.replace(s, settings={**s.settings, **TINY[name]}) for s in system.stages]
        sampling = {key: value for key, value in TINY[name].items() if key != "roi_size"}
        return dataclasses.replace(system, stages=stages, settings=sampling)

    monkeypatch.setattr(comparison, "SYSTEMS", {k: shrink(k, v) for k, v in comparison.SYSTEMS.items()})
    monkeypatch.setattr(evaluation, "check_hu", lambda *_: None)
    for metrics in PROTOCOLS.values():
        monkeypatch.setitem(metrics, "ms_ssim", lambda pred, ct, mask: float("nan"))


def run(data: Path, folder: Path, systems: str, budget: float = 5.0, **settings) -> dict[str, dict]:
    comparison.compare(
        str(data), budget=budget, systems=systems, output_dir=str(folder / "runs"), results=str(folder / "results"),
        **{**FAST, **settings},
    )  # fmt: skip
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in comparison.SYSTEMS]
)
def test_a_system_trains_and_is_scored_by_one_command(name, data, tiny, tmp_path):
    record = run(data, tmp_path, name)[name]
    assert not record["problem"]
    assert [row["patient"] for row in record["rows"]] == ["p4", "p5"]
    assert all(isinstance(row["paper_mae"], float) for row in record["rows"])
    assert [stage["steps"] for stage in record["stages"]] == [2] * len(record["stages"])
    assert record["parameters"] > 0 and len(record["seconds"]) == 2
    rows = list(csv.DictReader((tmp_path / "runs/compare.csv").open()))
    assert {row["system"] for row in rows} == set(comparison.SYSTEMS)  # no row left out
    page = (tmp_path / "results.md").read_text()
    assert page.count("not run") == len(comparison.SYSTEMS) - 1 and "results/figure.png" in page
    assert record["stages"][-1]["curve"][-1][1:] == [2, pytest.approx(record["stages"][-1]["val_mae"], abs=0.01)]
    assert "results/curves.png" in page and (tmp_path / "results/curves.png").stat().st_size > 5000


def test_what_is_trained_with_other_settings_is_scored_with_them(data, tiny, tmp_path):
    others = {"spacing": [4.0, 4.0, 4.0], "mr_window": [0.0, 1500.0], "seed": 3, "group_width": 2}  # it has no groups
    record = run(data, tmp_path, "unet", **others)["unet"]
    assert not record["problem"]
    sidecar = json.loads((tmp_path / "runs/unet/p4_sct.json").read_text())
    assert sidecar["settings"]["spacing"] == [4.0, 4.0, 4.0] and sidecar["settings"]["mr_window"] == [0.0, 1500.0]


def test_a_scored_system_is_not_trained_again_and_another_failing_keeps_its_row(data, tiny, tmp_path, monkeypatch):
    run(data, tmp_path, "unet")
    before = (tmp_path / "results/unet.json").read_text()
    monkeypatch.setattr(comparison, "evaluate", lambda *_: (_ for _ in ()).throw(InputError("it broke")))
    records = run(data, tmp_path / "other", "pix2pix")
    assert records["pix2pix"]["problem"].endswith("it broke")
    monkeypatch.setattr(comparison, "train", lambda *_: pytest.fail("trained again"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "results").rename(tmp_path / "elsewhere/results")  # as if committed, and taken to another machine
    run(data, tmp_path / "elsewhere", "unet")
    assert (tmp_path / "elsewhere/results/unet.json").read_text() == before
    assert "it broke" in (tmp_path / "other/results.md").read_text()


def test_a_system_that_is_stopped_goes_on_where_it_was(data, tiny, tmp_path, monkeypatch):
    step = TimeBudget._step

    def killed(self: TimeBudget, engine: Engine) -> None:
        step(self, engine)
        if engine.state.iteration == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TimeBudget, "_step", killed)
    long = {"steps_per_epoch": 2, "max_epochs": 3, "checkpoint_interval": 2}
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, "unet", **long)
    assert not (tmp_path / "results").exists()
    taken: list[int] = []
    monkeypatch.setattr(TimeBudget, "_step", lambda self, engine: taken.append(engine.state.iteration))
    record = run(data, tmp_path, "unet", **long)["unet"]
    assert taken == [3, 4, 5, 6] and record["stages"][0]["steps"] == 6 and not record["problem"]
    assert not list((tmp_path / "runs/runs/unet").glob("checkpoint_*.pt"))  # complete


def test_what_was_written_by_hand_stays_in_the_page(tmp_path):
    titles = {name: system.title for name, system in comparison.SYSTEMS.items()}
    identity = {"budget": 1.0, "data_sha256": "a" * 64}
    for name, offset in (("full", 0.0), ("unet", 5.0)):
        numbers = [10.0 + n + offset * (n + 1) for n in range(6)]
        rows = [{"patient": f"p{n}", "problem": "", **dict.fromkeys(SCORES, x)} for n, x in enumerate(numbers)]
        record = {
            "system": name, **identity, "date": "2026-01-01", "commit": "c" * 40, "problem": "", "rows": rows,
            "hardware": {"cpu": "a CPU", "cores": 2, "threads": 2, "gpus": []}, "seconds": [1.0], "parameters": 2_000,
            "stages": [{"stage": name, "steps": 7, "minutes": 1.0, "cpu_minutes": 1.9, "val_mae": 40.0}],
        }  # fmt: skip
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / f"results/{name}.json").write_text(json.dumps(record))
    page = write_report(tmp_path / "results", identity, titles, tmp_path / "a.csv")
    text = page.read_text()
    assert "12.50 ± 1.87" in text and "0.031" in text and "a CPU, 2 cores" in text and "| DDPM | not run |" in text
    page.write_text(text.replace("is written -->\n", "is written -->\n\nBecause.\n\n"))
    assert "\n\nBecause.\n\n" in write_report(tmp_path / "results", identity, titles, tmp_path / "a.csv").read_text()
    other = write_report(tmp_path / "results", {**identity, "budget": 2.0}, titles, tmp_path / "a.csv").read_text()
    assert other.count("not run") == len(titles)


def test_p_is_that_of_the_paired_test_over_the_patients_that_both_have():
    one = {"rows": [{"patient": f"p{n}", "paper_mae": 40.0 + n**2} for n in range(7)]}
    other = {"rows": [{"patient": f"p{n}", "paper_mae": 41.0 + n} for n in reversed(range(6))]}
    expected = wilcoxon([40 + n**2 - 41 - n for n in range(6)]).pvalue
    assert p_value(one, other, "paper_mae") == pytest.approx(expected)
    assert p_value(one, one, "paper_mae") is None and len(values(one, "paper_psnr")) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"systems": "unet,gpt"}, "no system 'gpt'"), ({"systems": "full", "budget": 0.01}, "too small"),
     ({"systems": "unet", "minutes": 3}, "--minutes: `compare` chooses it itself"),
     ({"systems": "unet", "budget": 0}, "too small"), ({"systems": "unet", "budget": "long"}, "too small")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_training(settings, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(InputError, match=message) as error:
        run(data, tmp_path, **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "results").exists()


@pytest.mark.parametrize("split", ["absent", "empty"])
def test_a_datalist_without_a_test_split_is_refused_before_training(split, data, tmp_path):
    datalist = json.loads((data / "datalist.json").read_text())
    datalist.pop("test")
    (tmp_path / "list.json").write_text(json.dumps(datalist | ({"test": []} if split == "empty" else {})))
    with pytest.raises(InputError, match="'test'"):
        run(data, tmp_path, "unet", datalist=str(tmp_path / "list.json"))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


@pytest.mark.integration
def test_a_refusal_by_the_command_is_one_line(data, tmp_path):
    command = [sys.executable, "-m", "bundle", "compare", "--dataset_dir", str(data), "--systems", "unet"]
    command += ["--datalist", str(tmp_path / "none.json"), "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode and "none.json" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_a_folder_of_another_budget_is_refused(data, tiny, tmp_path):
    run(data, tmp_path, "")
    with pytest.raises(InputError, match="another budget or data"):
        run(data, tmp_path, "", budget=6.0)


class Clock:
    """Seconds that pass by a step."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def budget(tmp_path: Path, scores: list[float], clock: Clock, **settings) -> tuple[TimeBudget, list[int]]:
    ran: list[int] = []
    state = SimpleNamespace(metrics={})

    def validate(epoch: int) -> None:
        state.metrics["val_mae"] = scores[min(len(ran), len(scores) - 1)]
        ran.append(epoch)

    validator = SimpleNamespace(run=validate, state=state)
    return TimeBudget(validator=validator, path=tmp_path / "budget.json", clock=clock, **settings), ran


def train_by(handler: TimeBudget, clock: Clock, seconds: float, epochs: int = 100) -> Engine:
    engine = Engine(lambda *_: setattr(clock, "now", clock.now + seconds))
    handler.attach(engine)
    handler.start(None)
    engine.run(range(10), max_epochs=epochs)
    return engine


def test_a_training_ends_with_its_time_and_validates_at_even_shares(tmp_path):
    clock = Clock()
    handler, ran = budget(tmp_path, [3.0, 1.0, 2.0], clock, minutes=1, validations=4)
    engine = train_by(handler, clock, seconds=1.0)
    assert engine.state.iteration == 60 and len(ran) == 4
    used = json.loads((tmp_path / "budget.json").read_text())
    assert used["steps"] == 60 and used["minutes"] == pytest.approx(1) and used["val_mae"] == 1.0
    assert used["curve"] == [[0.25, 15, 3.0], [0.5, 30, 1.0], [0.75, 45, 2.0], [1.0, 60, 2.0]]


def test_the_time_before_a_resumption_counts_and_that_in_between_does_not(tmp_path):
    clock = Clock()
    handler, _ = budget(tmp_path, [1.0], clock, minutes=1)
    handler.start(None)
    clock.now = 40.0
    handler.curve.append((0.5, 30, 4.0))
    saved = handler.state_dict()
    clock.now = 9000.0
    again, ran = budget(tmp_path, [1.0], clock, minutes=1)
    again.load_state_dict(saved)
    assert train_by(again, clock, seconds=1.0).state.iteration == 20
    assert json.loads((tmp_path / "budget.json").read_text())["curve"][0] == [0.5, 30, 4.0]


def test_patience_ends_a_training_before_its_time(tmp_path):
    clock = Clock()
    handler, ran = budget(tmp_path, [1.0, 2.0, 3.0, 4.0], clock, minutes=1, validations=6, patience=2)
    assert train_by(handler, clock, seconds=1.0).state.iteration == 30 and len(ran) == 3


def test_time_that_is_over_before_the_first_step_ends_the_program(tmp_path):
    clock = Clock()
    handler, _ = budget(tmp_path, [1.0], clock, minutes=1)
    engine = Engine(lambda *_: pytest.fail("a step was taken"))
    handler.attach(engine)
    handler.start(None)
    clock.now = 61.0
    with pytest.raises(SystemExit, match="before the first step"):
        engine.run(range(3))
    assert not (tmp_path / "budget.json").exists()


def test_the_learning_rate_warms_up_and_falls_to_zero_with_the_time(tmp_path):
    clock = Clock()
    handler, _ = budget(tmp_path, [1.0], clock, minutes=1)
    handler.start(None)
    assert handler.rate(0) == pytest.approx(0.01) and handler.rate(500) == 1.0
    clock.now = 30.0
    assert handler.rate(500) == pytest.approx(0.5)
    clock.now = 60.0
    assert handler.rate(500) == pytest.approx(0)


def by_the_clock(data: Path, folder: Path, **settings) -> ConfigWorkflow:
    """Stage 1 with equal_time.yaml, which reads the data when it is initialised."""
    files = [str(ROOT / "configs" / f"{file}.yaml") for file in ("train", "train_autoencoder", "equal_time")]
    return ConfigWorkflow(
        config_file=files, workflow_type="train", logging_file=False, dataset_dir=str(data), output_dir=str(folder),
        **{**FAST, **PROJECT, **settings},
    )  # fmt: skip


def test_settings_given_as_text_are_converted_before_the_data_are_read(data, tmp_path):
    workflow = by_the_clock(data, tmp_path, correct_bias="false", check_data="no")
    workflow.initialize()
    read = workflow.parser.get_parsed_content("read")
    assert not any(isinstance(step, CorrectBiasFieldd) for step in read.transform.transforms)


def test_a_setting_that_is_not_allowed_ends_a_training_by_the_clock_in_one_line(data, tmp_path):
    with pytest.raises(SystemExit, match="--batch_size few: must be a whole number"):
        by_the_clock(data, tmp_path, batch_size="few").initialize()


def test_the_overlays_put_what_they_replace_in_its_place():
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{f}.yaml") for f in ("train", "train_autoencoder")])
    assert (
        parser["train#handlers#3#_target_"] == "custom_modules.training.handlers.AfterStep"
    )  # moving_average.yaml adds to it
    assert parser["train#trainer#train_handlers"] == "@train#handlers"  # equal_time.yaml adds to them
    parser.read_config(
        [str(ROOT / "configs" / f"{f}.yaml") for f in ("train", "train_autoencoder", "multi_gpu_train", "equal_time")]
    )
    first, *others = parser["initialize"]
    assert "check" in first and ["init_process_group" in text for text in others] == [True, False, False]


def test_inconsistency_is_1_for_the_ct_itself_more_for_flicker_and_0_for_a_smear():
    ct = np.random.default_rng(0).normal(0, 100, (6, 6, 8))
    mask = np.ones(ct.shape, bool)
    assert slice_inconsistency(ct, ct, mask) == pytest.approx(1)
    assert slice_inconsistency(3 * ct, ct, mask) == pytest.approx(3)
    assert slice_inconsistency(np.repeat(ct[..., :1], 8, -1), ct, mask) == 0
    swapped = [np.moveaxis(x, -1, 0) for x in (3 * ct, ct, mask)]
    assert slice_inconsistency(*swapped, axis=0) == pytest.approx(3)
    ct[..., 4:], mask[..., 4:] = 1e4, False  # beyond the mask nothing counts, nor the step to it
    assert slice_inconsistency(np.where(mask, 2 * ct, 0), ct, mask) == pytest.approx(2)
    assert np.isnan(slice_inconsistency(ct, np.zeros_like(ct), mask))

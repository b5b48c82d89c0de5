"""Scoring a split: rows, summary, config and command, and patients that cannot be scored."""

from __future__ import annotations

import csv
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY, files_in, save, small_torso
from monai.bundle import ConfigWorkflow

from bundle.calibrate import calibrate, guard
from bundle.evaluate import evaluate
from bundle.workflow import inference_workflow
from custom_modules.data.body import ct_body_mask
from custom_modules.data.hu import TISSUES
from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError
from custom_modules.evaluation.metrics import PROTOCOLS
from custom_modules.evaluation.organs import SEGMENTER
from custom_modules.evaluation.split import Evaluation, fit_lookup, near_border, score_patient, summarize, write_csv
from custom_modules.files import sha256
from custom_modules.inference.calibration import Calibration, calibrate_bone_

SHAPE, SPACING = (44, 36, 40), 4.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """MS-SSIM pads every volume to 97 a side; it has its own tests."""
    for metrics in PROTOCOLS.values():
        monkeypatch.setitem(metrics, "ms_ssim", lambda pred, ct, mask: float("nan"))


@pytest.fixture
def cohort(tmp_path) -> Path:
    """A datalist of three phantoms, one to train on and two to score, and in ``pred`` their CTs 10 HU off."""
    entries = []
    for number in range(3):
        mr, ct, affine = small_torso(SHAPE, seed=number)
        entries.append({"image": f"p{number}/mr.nii.gz", "label": f"p{number}/ct.nii.gz"})
        save(tmp_path / entries[-1]["image"], mr + 1, affine)
        save(tmp_path / entries[-1]["label"], ct, affine)
        save(tmp_path / "pred" / f"p{number}_sct.nii.gz", ct + 10, affine)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": entries[:1], "test": entries[1:]}))
    return tmp_path


def evaluation(folder: Path, **settings) -> Evaluation:
    own = {"pred_dir": str(folder / "pred"), "datalist": None, "split": "test", "output_dir": str(folder / "out")}
    return Evaluation(str(folder), **{**own, **settings})


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def ending(folder: Path, **settings) -> str:
    with pytest.raises(SystemExit) as end:
        evaluation(folder, **settings).run()
    assert end.value.code.startswith("error: ")
    return end.value.code


def test_rows_and_summary_are_those_of_the_patients(cohort, capsys):
    evaluation(cohort).run()
    rows = rows_of(cohort)
    assert [(row["patient"], row["system"]) for row in rows] == [
        (patient, system) for patient in ("p1", "p2") for system in ("3D-WLDM", "0 HU", "MR lookup")
    ]
    assert all(float(row["synthrad2025_mae"]) == pytest.approx(10) for row in rows if row["system"] == "3D-WLDM")
    summary = json.loads((cohort / "out" / "metrics.json").read_text())
    own = summary["systems"]["3D-WLDM"]
    assert own["synthrad2025_bias"] == {
        "mean": pytest.approx(10), "sd": pytest.approx(0, abs=1e-6), "median": pytest.approx(10),
        "ci95": pytest.approx([10, 10]), "n": 2, "not_defined": [],
    }  # fmt: skip
    for protocol in PROTOCOLS:
        assert all(f"{protocol}_{tissue}_mae" in own for tissue in TISSUES)
    assert summary["uncertainty"] is None and "mean" in capsys.readouterr().out


def test_the_bootstrap_interval_holds_the_mean_and_is_the_same_each_time():
    values = np.random.default_rng(0).normal(50, 10, 12)
    rows = [{"patient": str(n), "mae": float(v)} for n, v in enumerate(values)]
    (first, again) = (summarize(rows)["mae"] for _ in range(2))
    assert first == again
    half = 1.96 * values.std(ddof=1) / 12**0.5
    assert first["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.3 * half)


def test_what_is_not_defined_is_named_and_averaged_nowhere(tmp_path):
    rows = [{"patient": p, "system": "s", "problem": "", "dice": v} for p, v in zip("abc", (0.4, float("nan"), 0.8))]
    summary = summarize(rows)["dice"]
    assert summary["mean"] == pytest.approx(0.6) and summary["n"] == 2 and summary["not_defined"] == ["b"]
    write_csv(rows, tmp_path / "a.csv")
    assert [row["dice"] for row in csv.DictReader((tmp_path / "a.csv").open())] == ["0.4", "nan", "0.8"]
    assert summarize(rows[1:2])["dice"] == {
        "mean": None, "sd": None, "median": None, "ci95": None, "n": 0, "not_defined": ["b"]
    }  # fmt: skip


def test_one_patient_has_no_interval_and_an_infinite_score_stays_infinite():
    assert summarize([{"patient": "a", "mae": 3.0}])["mae"]["ci95"] is None
    infinite = summarize([{"patient": p, "psnr": float("inf")} for p in "ab"])["psnr"]
    assert infinite["mean"] == float("inf") and infinite["ci95"] is None


def test_the_sd_beside_a_prediction_is_assessed(cohort):
    for number in (1, 2):
        _, ct, affine = small_torso(SHAPE, seed=number)
        sd = np.random.default_rng(number).uniform(4, 30, ct.shape)
        noise = np.random.default_rng(9).normal(0, sd)
        save(cohort / "pred" / f"p{number}_sct.nii.gz", (ct + noise).astype(np.float32), affine)
        save(cohort / "pred" / f"p{number}_sct_sd.nii.gz", sd.astype(np.float32), affine)
    evaluation(cohort).run()
    row = rows_of(cohort)[0]
    assert float(row["sd_coverage_95"]) == pytest.approx(0.95, abs=0.01) and float(row["sd_ence"]) < 0.1
    uncertainty = json.loads((cohort / "out" / "metrics.json").read_text())["uncertainty"]
    curve = uncertainty["sparsification"]
    assert np.diff(uncertainty["oracle"]).max() <= 0 and curve[-1] < curve[0]


# what cannot be scored


def broken(cohort: Path, kind: str) -> str:
    """Spoil the data of p1; what the message must name."""
    mr, ct, affine = small_torso(SHAPE, seed=1)
    sct, label = cohort / "pred" / "p1_sct.nii.gz", cohort / "p1" / "ct.nii.gz"
    if kind == "missing prediction":
        sct.unlink()
    elif kind == "prediction of another shape":
        save(sct, ct[1:], affine)
    elif kind == "prediction elsewhere":
        save(sct, ct, affine + np.eye(4)[:, [3, 0, 1, 2]] * 3)
    elif kind == "prediction in [-1, 1]":
        save(sct, ct / 1000, affine)
    elif kind == "missing CT":
        label.unlink()
    elif kind == "CT from 0 on":
        save(label, ct + 1024, affine)
    elif kind == "empty mask":
        save(cohort / "p1" / "mr.nii.gz", np.where(ct > -999, 0, 5.0), affine)
    elif kind == "damaged prediction":
        sct.write_bytes(sct.read_bytes()[:500])
    return str(label if kind in ("missing CT", "CT from 0 on", "empty mask") else sct)


KINDS = [
    "missing prediction", "prediction of another shape", "prediction elsewhere", "prediction in [-1, 1]", "missing CT",
    "CT from 0 on", "empty mask", "damaged prediction",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_who_cannot_be_scored_is_named_and_in_no_mean(cohort, kind):
    name = broken(cohort, kind)
    message = ending(cohort)
    assert "1 of 2 patients" in message and "p1: " in message and name in message
    row = next(row for row in rows_of(cohort) if row["patient"] == "p1")
    assert name in row["problem"] and row.get("synthrad2025_mae") in ("", "nan")
    summary = json.loads((cohort / "out" / "metrics.json").read_text())
    own = summary["systems"]["3D-WLDM"]["synthrad2025_mae"]
    assert own["n"] == 1 and own["not_defined"] == ["p1"] and own["mean"] == pytest.approx(10)
    assert name in summary["patients"]["p1"]["problem"]


def renamed(folder: Path, name: str) -> None:
    """Call the first test patient ``name``."""
    content = json.loads((folder / "datalist.json").read_text())
    content["test"][0]["patient"] = name
    (folder / "datalist.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../p1", "x/../../p1", "/p1"])
@pytest.mark.parametrize("pred_dir", ["pred", None])
def test_a_patient_whose_name_leads_out_is_refused_before_anything_is_touched(cohort, name, pred_dir):
    renamed(cohort, name)
    (cohort / "out").mkdir()
    (cohort / "p1_sct.nii.gz").write_text("precious")
    assert "leads out of" in ending(cohort, pred_dir=pred_dir and str(cohort / pred_dir))
    assert (cohort / "p1_sct.nii.gz").read_text() == "precious" and not list((cohort / "out").iterdir())


def test_a_patient_of_a_site_has_a_name_of_two_parts(cohort, checkpoint):
    renamed(cohort, "site/001")
    settings = {"checkpoint": str(checkpoint), "device": "$torch.device('cpu')", "guard_statistics": None}
    (cohort / "tiny.yaml").write_text(json.dumps(TINY))
    evaluation(cohort, pred_dir=None, config=str(cohort / "tiny.yaml"), settings=settings).run()
    assert {row["patient"] for row in rows_of(cohort)} == {"site/001", "p2"}
    assert (cohort / "out" / "site" / "001_sct.nii.gz").is_file()


def test_all_patients_failing_still_leaves_the_reasons(cohort):
    for number in (1, 2):
        (cohort / "pred" / f"p{number}_sct.nii.gz").unlink()
    assert "2 of 2 patients" in ending(cohort)
    assert [row["patient"] for row in rows_of(cohort)] == ["p1", "p2"]


@pytest.mark.parametrize(
    "settings", [{"split": "holiday"}, {"datalist": "none.json"}, {"pred_dir": "none"}, {"labels": "none"}]
)
def test_what_is_not_there_is_refused_in_one_line(cohort, settings):
    message = ending(cohort, **settings)
    assert next(iter(settings.values())) in message and len(message.splitlines()) == 1


def test_a_patient_twice_is_refused(cohort):
    datalist = json.loads((cohort / "datalist.json").read_text())
    datalist["test"] *= 2
    (cohort / "datalist.json").write_text(json.dumps(datalist))
    assert "p1, p2 more than once" in ending(cohort)


# organs


@pytest.fixture
def labels(cohort) -> Path:
    for number in (1, 2):
        for kind in ("ct", "sct"):
            volume = np.zeros((44, 36, 40))
            volume[:10], volume[10:20] = 1, 2
            save(cohort / "labels" / f"p{number}_{kind}.nii.gz", volume)
    return cohort / "labels"


def relabel(labels: Path, change) -> None:
    volume = np.zeros((44, 36, 40))
    volume[:10], volume[10:20] = 1, 2
    change(volume)
    save(labels / "p1_sct.nii.gz", volume)


def test_organ_dice_of_given_labels(cohort, labels):
    relabel(labels, lambda v: v.__setitem__(slice(15, 20), 0))
    evaluation(cohort, labels=str(labels)).run()
    row = rows_of(cohort)[0]
    assert float(row["dice_1"]) == 1 and float(row["dice_2"]) == pytest.approx(2 / 3)
    assert float(row["organ_dice"]) == pytest.approx(5 / 6) and row["organs"] == "2 classes"


def test_a_class_in_one_of_them_only_is_named(cohort, labels):
    relabel(labels, lambda v: v.__setitem__(slice(30, 32), 3))
    evaluation(cohort, labels=str(labels)).run()
    row = rows_of(cohort)[0]
    assert row["organs"] == "2 classes; only in the synthetic CT: 3" and float(row["organ_dice"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.__iadd__(7), "classes 7, 8, 9 differ"),
        (lambda v: v.__imul__(0.3), "not a label volume"),
        (lambda v: v.__isub__(1), "not a label volume"),
    ],
)
def test_labels_of_other_classes_are_refused_by_patient(cohort, labels, change, words):
    relabel(labels, change)
    message = ending(cohort, labels=str(labels))
    assert words in message and "p1: " in message and "p1_sct.nii.gz" in message
    row = rows_of(cohort)[0]
    assert row["organs"] == "not computed" and float(row["synthrad2025_mae"]) == pytest.approx(10)


def test_missing_labels_and_labels_on_another_grid_are_said(cohort, labels):
    (labels / "p1_ct.nii.gz").unlink()
    save(labels / "p2_sct.nii.gz", np.ones((44, 36, 39)) * np.arange(39))
    message = ending(cohort, labels=str(labels))
    assert "no such label volume" in message and "its grid is not that of" in message


def test_without_labels_and_segmenter_the_rows_say_so(cohort, monkeypatch):
    monkeypatch.setattr("custom_modules.evaluation.organs.shutil.which", lambda name: None)
    evaluation(cohort).run()
    assert all("not computed" in row["organs"] for row in rows_of(cohort) if row["system"] == "3D-WLDM")


@pytest.mark.integration
@pytest.mark.parametrize("works", [True, False])
def test_the_segmenter_is_called_where_it_is_installed(cohort, tmp_path, monkeypatch, works):
    """A stand-in that writes what is above 200 HU, or fails."""
    script = tmp_path / "bin" / SEGMENTER
    script.parent.mkdir()
    write = "i=nib.load(a[2]); nib.save(nib.Nifti1Image((i.get_fdata() > 200) * 5.0, i.affine), a[4])"
    body = write if works else "sys.exit('no weights')"
    script.write_text(f"#!{sys.executable}\nimport sys, nibabel as nib\na = sys.argv\n{body}")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    if works:
        evaluation(cohort).run()
        assert 0 < float(rows_of(cohort)[0]["dice_5"]) <= 1
    else:
        assert f"{SEGMENTER} failed (no weights)" in ending(cohort)


# parts


def test_lookup_learns_a_function_of_intensity(tmp_path):
    mr = np.random.default_rng(0).integers(20, 1000, (16, 16, 16)).astype(np.float32)
    paths = {"image": tmp_path / "p/mr.nii.gz", "label": tmp_path / "p/ct.nii.gz"}
    save(paths["image"], mr)
    save(paths["label"], mr * 0.2 - 100)
    lookup = fit_lookup([{key: str(path) for key, path in paths.items()}])
    np.testing.assert_allclose(lookup[10:90], (np.arange(10, 90) + 0.45) * 10 * 0.2 - 100, atol=1.5)


def test_near_border_is_six_millimetres_from_a_face():
    shape, spacing = (10, 9, 8), np.array([1.0, 2.0, 4.0])
    centre = (np.stack(np.indices(shape), axis=-1) + 0.5) * spacing
    to_face = np.minimum(centre, np.array(shape) * spacing - centre).min(axis=-1)
    np.testing.assert_array_equal(near_border(shape, spacing), to_face < 6)


def test_scores_of_a_perfect_prediction_and_its_baselines(cohort):
    pair = {"patient": "p1", "image": str(cohort / "p1/mr.nii.gz"), "label": str(cohort / "p1/ct.nii.gz")}
    rows = score_patient(pair, Path(pair["label"]), fit_lookup([pair]))
    maes = [row["synthrad2025_mae"] for row in rows]
    assert maes[0] == 0 and rows[0]["paper_bone_dice"] == 1 and rows[0]["border_bias"] == 0
    assert 0 < maes[2] < maes[1]


def test_a_prediction_on_another_grid_is_refused_by_name(cohort):
    pair = {"patient": "p1", "image": str(cohort / "p1/mr.nii.gz"), "label": str(cohort / "p1/ct.nii.gz")}
    save(cohort / "sct.nii.gz", small_torso(SHAPE, seed=0)[1][1:])
    with pytest.raises(InputError, match="sct.nii.gz"):
        score_patient(pair, cohort / "sct.nii.gz", None)


# the config and the command


@pytest.mark.integration
def test_the_config_synthesises_and_scores_after_train_yaml_too(cohort, checkpoint):
    (cohort / "tiny.yaml").write_text(json.dumps(TINY))
    for files in (["evaluate"], ["train", "evaluate"]):
        workflow = ConfigWorkflow(
            config_file=[str(ROOT / "configs" / f"{name}.yaml") for name in files], workflow_type="infer",
            logging_file=False, dataset_dir=str(cohort), output_dir=str(cohort / "out"), checkpoint=str(checkpoint),
            network_config=str(cohort / "tiny.yaml"), num_samples=2, device="$torch.device('cpu')",
        )  # fmt: skip
        workflow.initialize()
        workflow.run()
        rows = rows_of(cohort)
        assert np.isfinite(float(rows[0]["synthrad2025_mae"])) and np.isfinite(float(rows[0]["sd_coverage_95"]))
        sidecar = json.loads((cohort / "out" / "p1_sct.json").read_text())
        assert sidecar["settings"]["num_samples"] == 2


@pytest.mark.integration
def test_the_command_takes_finished_predictions_from_another_working_directory(cohort):
    (cohort / "elsewhere").mkdir()
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(ROOT / "configs" / "evaluate.yaml")]
    command += ["--dataset_dir", str(cohort), "--datalist", str(cohort / "datalist.json"), "--split", "test"]
    command += ["--pred_dir", str(cohort / "pred"), "--output_dir", str(cohort / "out")]
    environment, elsewhere = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, cohort / "elsewhere"
    run = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert len(rows_of(cohort)) == 6 and "synthrad2025" in run.stdout


# what is stored with the weights


@pytest.mark.integration
def test_calibrate_fits_the_scale_that_is_then_used(cohort, checkpoint):
    own = {"checkpoint": str(checkpoint), "device": "$torch.device('cpu')", **TINY}
    target, folder = cohort / "calibration.json", cohort / "samples"
    calibrate(str(cohort), split="test", path=str(target), pred_dir=str(folder), num_samples=3, **own)
    stored = json.loads(target.read_text())
    assert stored["patients"] == ["p1", "p2"] and stored["model_sha256"] == sha256(checkpoint)
    assert stored["settings"] == {
        "num_inference_steps": 1,
        "num_samples": 3,
        "sample_steps": 8,
        "sample_timestep": None,
        "output": "mean",
    }
    ratios = []
    for number in (1, 2):
        mr, ct, pred, sd = (
            np.asarray(read_volume(path)[0])
            for path in (*(cohort / f"p{number}" / f"{n}.nii.gz" for n in ("mr", "ct")),
                         *(folder / f"p{number}_{n}.nii.gz" for n in ("sct", "sct_sd")))
        )  # fmt: skip
        mask = ct_body_mask(ct, mr)
        error = calibrate_bone_(pred[mask], stored["bone_curve"]) - ct[mask]
        ratios.append(np.mean((error / np.maximum(sd[mask], 1)) ** 2))
    assert stored["sd_scale"] == pytest.approx(np.sqrt(np.mean(ratios)), rel=1e-4)
    assert Calibration(target, checkpoint, stored["settings"]).scale == stored["sd_scale"]


def test_calibrate_fits_bone_on_the_training_split_too_and_sd_to_what_is_left(cohort, checkpoint, monkeypatch):
    """In place of the networks, CTs whose dense bone has lost a third of what it has above 500 HU."""
    splits = {}
    for split, patient in (("training", "p1"), ("test", "p2")):
        ct = nib.load(cohort / patient / "ct.nii.gz")
        hu = ct.get_fdata()
        hu[5:15, 5:15, 5:15] = np.linspace(400, 1400, 1000).reshape(10, 10, 10)
        save(cohort / patient / "ct.nii.gz", hu.astype(np.float32), ct.affine)
        splits[split] = [{"image": f"{patient}/mr.nii.gz", "label": f"{patient}/ct.nii.gz", "patient": patient}]
    (cohort / "datalist.json").write_text(json.dumps(splits))
    made = []

    def synthesise(pairs, folder, **settings):
        for pair in pairs:
            ct = nib.load(pair["label"])
            hu = ct.get_fdata()
            soft = np.where(hu > 500, 500 + (hu - 500) / 1.5, hu) + 20
            sd = 9.5 + np.indices(hu.shape).sum(axis=0) % 2
            for name, values in (("sct", soft), ("sct_sd", sd)):
                save(folder / f"{pair['patient']}_{name}.nii.gz", values.astype(np.float32), ct.affine)
        made.append(([pair["patient"] for pair in pairs], settings.get("num_samples", 1)))
        return inference_workflow(checkpoint=str(checkpoint), **TINY).parser

    monkeypatch.setattr("bundle.calibrate._synthesise", synthesise)
    calibrate(str(cohort), split="test", path=str(cohort / "calibration.json"), num_samples=3)
    stored = json.loads((cohort / "calibration.json").read_text())
    assert made == [(["p2"], 3), (["p1"], 1)] and stored["patients_of_bone_curve"] == ["p1", "p2"]
    x, y = np.transpose(stored["bone_curve"][1:-1])
    np.testing.assert_allclose(y, 500 + 1.5 * (x - 520), atol=15)
    assert stored["sd_scale"] == pytest.approx(2, rel=0.05)  # an error of 20 HU, SD 10


@pytest.mark.integration
def test_guard_measures_the_training_split_and_then_takes_it_for_usual(cohort, checkpoint):
    own = {"checkpoint": str(checkpoint), "device": "$torch.device('cpu')", **TINY}
    guard(str(cohort), split="test", path=str(cohort / "guard.json"), **own)
    stored = json.loads((cohort / "guard.json").read_text())
    assert stored["patients"] == 2 and stored["model_sha256"] == sha256(checkpoint)
    assert stored["measures"]["coarsest spacing"]["low"] == pytest.approx(SPACING)


def test_pictures_go_to_the_output_and_one_that_cannot_be_drawn_stops_nothing(cohort, caplog):
    """The folder of the predictions may be read-only; here a folder stands where a picture would be written."""
    before = files_in(cohort / "pred")
    (cohort / "out" / "p1_sct.png").mkdir(parents=True)
    evaluate(str(cohort), output_dir=str(cohort / "out"), pred_dir=str(cohort / "pred"))
    assert files_in(cohort / "pred") == before and (cohort / "out" / "p2_sct.png").is_file()
    assert [row["patient"] for row in rows_of(cohort) if row["system"] == "3D-WLDM"] == ["p1", "p2"]
    assert any("p1: no picture" in record.message for record in caplog.records)

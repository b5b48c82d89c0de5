"""The record beside a synthetic CT, and the small files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from conftest import files_in, full_disk, ramp, save

from custom_modules.files import sha256, write_json

SMALL_WINDOWS = {"window_size": [16, 16, 16]}


def test_the_record_says_of_what_by_what_and_how(tmp_path, infer, checkpoint):
    path = save(tmp_path / "in" / "x" / "mr.nii.gz", ramp((12, 11, 10), np.diag([2.0, 2, 2, 1])))
    infer(tmp_path / "in", tmp_path / "out", seed=5, num_inference_steps=2, **SMALL_WINDOWS)
    record = json.loads((tmp_path / "out" / "x" / "mr_sct.json").read_text())
    assert record["input"] == str(path) and record["output"] == "mr_sct.nii.gz"
    assert record["input_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["model_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    settings = record["settings"]
    assert (settings["seed"], settings["num_inference_steps"]) == (5, 2)
    assert settings["hu_window"] == [-1000, 1600] and record["sd_scale"] is None
    assert record["version"].count(".") == 2 and 0 < record["time_s"] < 300 and 0 < record["peak_memory_gib"] < 64


def test_a_volume_that_fails_has_no_record(tmp_path, infer):
    (tmp_path / "mr.nii.gz").write_bytes(b"")
    with pytest.raises(SystemExit):
        infer(tmp_path / "mr.nii.gz", tmp_path / "out")
    assert files_in(tmp_path / "out") == []


def test_the_hash_of_a_series_is_that_of_its_files_by_name(tmp_path):
    for name, content in (("b", b"2"), ("a", b"1")):
        (tmp_path / name).write_bytes(content)
    assert sha256(tmp_path) == hashlib.sha256(b"12").hexdigest()


def test_what_is_not_defined_is_null_and_the_file_is_strict_json(tmp_path):
    write_json({"a": math.nan, "b": [math.inf, 1.5], 3: (True, None)}, tmp_path / "new" / "a.json")
    text = (tmp_path / "new" / "a.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None, "b": ["inf", 1.5], "3": [True, None]
    }  # fmt: skip


def test_a_full_disk_leaves_what_was_there(tmp_path):
    write_json({"a": 1}, tmp_path / "a.json")
    with pytest.raises(OSError), full_disk():
        write_json({"a": "x" * 5000}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and files_in(tmp_path) == ["a.json"]

"""Files are written whole or not at all, and folders are tried before they are needed."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys

import pytest

from custom_modules.files import PARTIAL, atomic_write, sha256, writable_or_stop, write_json, write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "scores.txt"
    write_text("whole", path)
    with pytest.raises(OSError, match="disk full"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["scores.txt"]


def test_the_temporary_file_keeps_the_extension_and_is_hidden(tmp_path):
    for name in ("a.nii.gz", "b.mha", "c.with.dots.nrrd", "no_extension"):
        with atomic_write(tmp_path / name) as temporary:
            assert temporary.parent == tmp_path and temporary.name.startswith(".")
            assert temporary.name.endswith(name[name.rindex(".nii") :] if ".nii" in name else temporary.suffix)
            temporary.write_bytes(b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def test_what_dead_processes_left_is_removed_and_what_runs_is_kept(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
        tail = temporary.name.split("-")[-1]
    left = tmp_path / f"{PARTIAL}{dead.stdout.strip()}-{tail}"
    running = tmp_path / f"{PARTIAL}1-{tail}"
    left.touch(), running.touch()
    write_json({}, tmp_path / "a.json")
    assert not left.exists() and running.exists()


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("x" * 248 + ".nii.gz")
    write_text("x", path)
    assert path.read_text() == "x"


def test_json_has_no_nan_and_no_infinity(tmp_path):
    write_json({"nan": math.nan, "low": -math.inf, 3: [1.5, (None, True)], "path": tmp_path}, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content == {"nan": None, "low": "-inf", "3": [1.5, [None, True]], "path": str(tmp_path)}


def test_the_hash_of_a_folder_is_that_of_its_files_in_order(tmp_path):
    (tmp_path / "b").write_bytes(b"2"), (tmp_path / "a").write_bytes(b"1")
    assert sha256(tmp_path) == hashlib.sha256(b"12").hexdigest()
    assert sha256(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file.*: cannot write there"):
        writable_or_stop(tmp_path / "file" / "out")
    assert writable_or_stop(tmp_path / "new" / "out") and not list((tmp_path / "new" / "out").iterdir())

"""The tutorials run from the first cell to the last, and leave what they say."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import nibabel as nib
import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel (requirements-dev.txt)")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel (requirements-dev.txt)")
TUTORIALS = ROOT / "docs" / "tutorials"


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """Run a notebook in a folder, and return its code cells with their output."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.integration
def test_use_goes_from_an_mr_to_the_viewer_in_five_cells(tmp_path, monkeypatch):
    cells = executed("use", tmp_path, monkeypatch)
    assert len(cells) == 5 and "image/png" in cells[3].outputs[0].data and "int16" in str(cells[1].outputs)
    assert "training" in str(cells[1].outputs)  # the warnings
    assert nib.load(tmp_path / "mr_sct.nii.gz").shape == nib.load(tmp_path / "mr.nii.gz").shape
    assert 'data-layers="' in (tmp_path / "mr_sct.html").read_text()


@pytest.mark.slow
def test_train_goes_from_two_scanners_to_a_report(tmp_path, monkeypatch):
    executed("train", tmp_path, monkeypatch)
    systems = {row["system"] for row in csv.DictReader((tmp_path / "eval" / "metrics.csv").open())}
    assert systems >= {"3D-WLDM", "0 HU", "MR lookup"} and (tmp_path / "eval" / "report.html").is_file()
    assert (tmp_path / "pairs" / "report.html").is_file()


@pytest.mark.slow
def test_a_baseline_is_scored_by_its_own_name(tmp_path, monkeypatch):
    executed("baseline", tmp_path, monkeypatch)
    systems = {row["system"] for row in csv.DictReader((tmp_path / "eval" / "metrics.csv").open())}
    assert "small_unet" in systems and (tmp_path / "runs" / "small_unet" / "model.pt").is_file()


def test_no_notebook_holds_output():
    for path in TUTORIALS.glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert all(not cell.get("outputs") for cell in cells), os.fspath(path)

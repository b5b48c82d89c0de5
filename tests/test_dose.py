"""Dose error: what is computed here against known values, and, where `make dose` was run, a plan on a phantom."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import save

from bundle.clinical import dose as module
from bundle.clinical.dose import PYTHON, compare, dose, target_mask, wepl
from bundle.clinical.further import Further
from bundle.clinical.pair import read_pair
from custom_modules.clinical.attenuation import Grid
from custom_modules.errors import InputError
from custom_modules.evaluation.clinical import clinical_figures

live = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-dose; make dose makes it")
GRID = Grid((24, 22, 16), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [-46, -42, -30]))


def phantom(bone: int = 800) -> np.ndarray:
    """A cylinder of water with a bone beside its axis, HU."""
    x, y, _ = np.indices(GRID.shape)
    hu = np.where(np.hypot(x - 11.5, y - 10.5) < 9, 0, -1000)
    return np.where(np.hypot(x - 7, y - 10.5) < 2.5, bone, hu).astype(np.int16)


def written(folder: Path, bone: int = 800) -> Path:
    return save(folder / f"a{bone}_sct.nii.gz", phantom(bone), GRID.affine)


def test_path_lengths_differ_by_the_density_of_the_bone():
    body = phantom() > -500
    volumes = {"ct": phantom().astype(float), "sct": phantom(400).astype(float), "body": body}
    through = wepl(volumes, GRID, 1)
    # matRad's table: 1.4210 at 800 HU and 1.2236 at 400, in 4 pixels of 4 mm
    step = (1.199 + 450 * 1.306 / 2650) - (1.199 + 50 * 1.306 / 2650)
    assert through["p95"] == pytest.approx(step * 4 * 4, rel=0.02) and through["mean"] < 0
    assert wepl({**volumes, "sct": volumes["ct"]}, GRID, 0) == {"mean": 0, "mean_abs": 0, "p95": 0}


def test_the_same_dose_has_no_difference():
    values = np.random.default_rng(0).random(GRID.shape)
    volumes = {"body": phantom() > -500, "target": phantom() == 800}
    made = {"photons_ct": values, "photons_sct": values}
    made |= {f"photons_gamma_{name}": np.where(values > 0.1, 0.0, np.nan) for name in ("2_2", "1_1")}
    found = compare(made, volumes, "photons")
    assert found["difference"] == {"mean": 0, "mean_abs": 0} and found["gamma 2 %/2 mm"] == 100
    assert found["target ct"] == found["target sct"]
    assert found["target ct"]["D95"] == pytest.approx(np.percentile(values[volumes["target"]], 5))
    other = compare({**made, "photons_sct": values + 0.02}, volumes, "photons")
    assert other["difference"]["mean"] == pytest.approx(1)  # percent of 2 Gy


def test_the_default_target_is_a_ball_in_the_middle_and_one_outside_is_refused(tmp_path):
    body = phantom() > -500
    ball = target_mask(None, body, GRID)
    assert body[ball].all() and ball.sum() * 0.064 == pytest.approx(4 / 3 * np.pi * 8, rel=0.1)  # mL
    beside = np.zeros(GRID.shape, dtype=np.uint8)
    beside[:2, :2] = 1
    path = save(tmp_path / "beside.nii.gz", beside, GRID.affine)
    with pytest.raises(InputError, match="beside.nii.gz.*not in the body"):
        target_mask(str(path), body, GRID)
    with pytest.raises(InputError, match="do not overlap"):
        target_mask(
            str(save(tmp_path / "far.nii.gz", beside, np.diag([1, 1, 1, 1]) + 900 * np.eye(4, k=3))), body, GRID
        )


def test_beyond_the_body_of_the_ct_and_outside_the_mr_nothing_counts(tmp_path):
    wider = phantom()
    wider[2, 8:12] = 0
    ct, sct = written(tmp_path), save(tmp_path / "b.nii.gz", wider, GRID.affine)
    mr = save(tmp_path / "mr.nii.gz", (np.indices(GRID.shape)[2] < 8).astype(np.int16), GRID.affine)
    pair = read_pair(str(ct), str(sct), str(mr))
    np.testing.assert_array_equal(pair.ct, pair.sct)
    assert (pair.ct[..., 8:] == -1000).all() and pair.body[..., :8].any()


def test_bad_input_is_refused_before_any_plan(tmp_path, monkeypatch):
    ct = written(tmp_path)
    far = save(tmp_path / "far.nii.gz", phantom(), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [900, 0, 0]))
    cases = [({"modes": "electrons"}, "--modes"), ({"spacing": 0.1}, "--spacing")]
    for kwargs, reason in cases:
        with pytest.raises(InputError, match=reason):
            dose(str(ct), str(ct), **kwargs)
    monkeypatch.setattr(module, "PYTHON", tmp_path / "none" / "bin" / "python")
    with pytest.raises(InputError, match="make dose"):
        dose(str(ct), str(ct))
    monkeypatch.setattr(module, "PYTHON", ct)  # is there, and not reached
    with pytest.raises(InputError, match="do not overlap"):
        dose(str(ct), str(far))
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("further", "volumes", "reason"),
    [
        (Further(structures="HEART"), 1, "no structure 'HEART'"), (Further(attenuation=90), 1, "--kvp 90"),
        (Further(density="proton"), 1, "--density proton"), (Further(pet="ct.nii"), 2, "one MR"),
        (Further(dose="/nowhere.nii"), 1, "no such CT"),
    ],
)  # fmt: skip
def test_what_synthesize_cannot_do_afterwards_is_refused_before(further, volumes, reason):
    with pytest.raises(InputError, match=reason):
        further.check(volumes)


def test_figures_are_found_beside_the_synthetic_ct(tmp_path):
    assert clinical_figures(tmp_path / "a_sct.nii.gz") == {}
    (tmp_path / "a_sct_pet.json").write_text(json.dumps({"acf": {"mean": 1.5}, "suv": {"bone": {}}}))
    (tmp_path / "a_sct_dose.json").write_text(json.dumps({"photons": {"gamma 2 %/2 mm": 98.5}}))
    assert clinical_figures(tmp_path / "a_sct.nii.gz") == {"pet_acf": 1.5, "dose_photons_gamma": 98.5}


@live
@pytest.mark.integration
def test_a_plan_on_the_same_ct_has_no_error_and_on_a_softer_bone_it_has(tmp_path):
    ct, sct = written(tmp_path), written(tmp_path, 200)
    for path in (ct, sct):
        dose(str(ct), str(path), spacing=4.0, bixel=10.0)
    same, softer = (json.loads((tmp_path / f"a{bone}_sct_dose.json").read_text()) for bone in (800, 200))
    for mode in ("photons", "protons"):
        assert same[mode]["difference"] == {"mean": 0, "mean_abs": 0} and same[mode]["gamma 1 %/1 mm"] == 100
        assert softer[mode]["difference"]["mean_abs"] > 0
        assert same[mode]["target ct"]["D50"] == pytest.approx(2, rel=0.05)
    assert (tmp_path / "a200_sct_dose_protons.png").is_file() and (tmp_path / "a200_sct_dose_photons_dvh.png").is_file()

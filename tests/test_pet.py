"""PET error: zero for the same CT, and the known value for a cylinder."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import save

from bundle.clinical.pet import pet
from custom_modules.clinical.pet import Field, Ring, pet_error, place_lesions
from custom_modules.errors import InputError

RING = Ring(diameter=300.0, pitch=4.0, angles=60)
AFFINE = np.diag([4.0, 4, 4, 1])


def cylinder(mu: float, radius: float = 12.5, size: int = 41, slices: int = 3) -> np.ndarray:
    """A disc of ``radius`` pixels in every slice."""
    rows, columns = np.mgrid[:size, :size] - size // 2
    return np.repeat((mu * (np.hypot(rows, columns) <= radius))[..., None], slices, axis=2)


def test_factors_of_a_cylinder_are_the_exponential_of_its_chord():
    field = Field.around(cylinder(1) > 0, RING)
    lines = RING.project(field.cut(cylinder(0.096))[0])
    middle = lines[len(lines) // 2]
    np.testing.assert_allclose(middle, 0.096 * 2 * 12.5 * 0.4, rtol=0.05)  # 10 cm of water, by direction
    assert middle.mean() == pytest.approx(0.96, rel=0.01)


def test_the_same_map_gives_no_error():
    body = cylinder(1) > 0
    figures, volumes = pet_error(cylinder(0.096), cylinder(0.096), {"body": body}, RING)
    assert (
        figures["acf"]["max_abs"] == 0
        and figures["suv"]["body"]["max_abs"] == 0
        and np.abs(volumes["relative"]).max() == 0
    )
    assert np.median(volumes["reference"][body & (volumes["lesions"] == 0)]) == pytest.approx(1, abs=0.05)


def test_a_larger_attenuation_gives_larger_factors_and_activity():
    body = cylinder(1) > 0
    figures, volumes = pet_error(cylinder(0.096), cylinder(0.106), {"body": body, "none": body & False}, RING)
    longest = 100 * np.expm1(0.01 * 2 * 12.5 * 0.4)
    assert figures["acf"]["max_abs"] == pytest.approx(longest, rel=0.05)
    assert figures["suv"]["none"] == {}
    # in the middle, Abel's inverse of L (exp(dL) - 1) with the chord L, d = 0.01 / cm and R = 5 cm: 8 dR/pi + 3 d²R²
    expected = 8 * 0.01 * 5 / np.pi + 3 * 0.01**2 * 5**2
    assert volumes["relative"][20, 20, 1] == pytest.approx(expected, rel=0.03)


def test_what_is_cut_out_is_put_back_and_a_body_wider_than_the_ring_is_refused():
    volume = np.random.default_rng(0).random((30, 22, 4))
    mask = np.zeros(volume.shape, dtype=bool)
    mask[2:12, 3:20] = True
    field = Field.around(mask, RING)
    back = field.put(field.cut(volume), volume.shape)
    np.testing.assert_array_equal(back[mask], volume[mask])
    with pytest.raises(InputError, match="--diameter"):
        Field.around(mask, Ring(diameter=60.0))


def test_lesions_are_inside_and_apart():
    body = cylinder(1, slices=30) > 0
    labels = place_lesions(body, 2.5, 0)
    assert labels.max() == 5 and body[labels > 0].all()
    assert np.array_equal(labels, place_lesions(body, 2.5, 0)) and not np.array_equal(
        labels, place_lesions(body, 2.5, 1)
    )


def hu(bone: int) -> np.ndarray:
    values = np.where(cylinder(1, slices=12) > 0, 20, -1000)
    values[cylinder(1, radius=4, slices=12) > 0] = bone
    return values.astype(np.int16)


def test_the_command_writes_figures_and_pictures(tmp_path, capsys):
    ct, sct = save(tmp_path / "ct.nii.gz", hu(900), AFFINE), save(tmp_path / "a_sct.nii.gz", hu(400), AFFINE)
    pet(str(ct), str(sct), angles=30, diameter=300.0)
    record = json.loads((tmp_path / "a_sct_pet.json").read_text())
    assert record["acf"]["mean"] < 0 and record["suv"]["bone"]["mean"] < record["suv"]["soft"]["mean"] < 0
    assert "not for clinical use" in record["note"] and (tmp_path / "a_sct_pet.png").is_file()
    assert nib.load(tmp_path / "a_sct_pet.nii.gz").get_fdata().min() < 0
    assert "activity, bone" in capsys.readouterr().out
    pet(str(ct), str(ct), angles=30, diameter=300.0, output=str(tmp_path / "same.json"))
    same = json.loads((tmp_path / "same.json").read_text())
    assert same["acf"]["max_abs"] == 0 and all(row["max_abs"] == 0 for row in same["suv"].values() if row)


def test_bad_input_is_refused(tmp_path):
    ct = save(tmp_path / "ct.nii.gz", hu(900), AFFINE)
    far = save(tmp_path / "far.nii.gz", hu(900), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [900, 0, 0]))
    cases = (
        ({"sct": str(far)}, "do not overlap"), ({"kvp": 90}, "--kvp 90"), ({"pitch": 0.0}, "--pitch"),
        ({"diameter": 100.0, "pitch": 4.0}, "--diameter"),
    )  # fmt: skip
    for kwargs, reason in cases:
        with pytest.raises(InputError, match=reason):
            pet(str(ct), kwargs.pop("sct", str(ct)), angles=16, **kwargs)
    assert not list(tmp_path.glob("*.json"))

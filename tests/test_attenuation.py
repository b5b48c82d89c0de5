"""HU to attenuation at 511 keV and to densities, against values computed by hand from the published lines; grids,
Interfile and tables."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import files_in, save
from scipy import ndimage

from bundle.clinical.maps import attenuation, density
from custom_modules.clinical.attenuation import (
    CARNEY,
    Grid,
    attenuation_of,
    on_grid,
    smooth,
    upright_grid,
    write_interfile,
)
from custom_modules.clinical.density import ELECTRON, MASS, read_hlut
from custom_modules.data.inputs import find_volumes
from custom_modules.errors import InputError

TWO_MM = np.diag([2.0, 2, 2, 1])


def ct(shape: tuple[int, int, int] = (20, 22, 18)) -> np.ndarray:
    """Air, a body of water, and a bone of 1000 HU in it."""
    hu = np.full(shape, -1000, dtype=np.int16)
    hu[4:16, 4:18, 3:15] = 0
    hu[8:12, 9:13, 3:15] = 1000
    return hu


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# attenuation


@pytest.mark.parametrize(
    ("hu", "kvp", "model", "expected"),
    [
        (0, 120, "carney", 0.096), (-1000, 120, "carney", 0), (-1024, 120, "carney", 0), (-500, 80, "carney", 0.048),
        (1000, 120, "carney", 0.1491),  # 5.10e-5 * 2000 + 0.0471
        (1000, 80, "carney", 0.1354),  # 3.64e-5 * 2000 + 0.0626
        (1000, 140, "carney", 0.1536),  # 5.64e-5 * 2000 + 0.0408
        (1600, 100, "carney", 0.16958),  # 4.43e-5 * 2600 + 0.0544
        (1000, 130, "carney", 0.1526), (1000, 110, "carney", 0.1472),
        (1000, 120, "burger", 0.153311),  # 0.096 + 0.184 * 0.076 / 0.244
        (0, 120, "burger", 0.096), (-200, 80, "burger", 0.0768),
        (1000, 120, "stir", 0.1533), (1000, 120, "ge", 0.1493), (1000, 140, "ge", 0.154), (0, 100, "ge", 0.096),
    ],
)  # fmt: skip
def test_attenuation_is_that_of_the_published_lines(hu, kvp, model, expected):
    assert float(attenuation_of(np.array(hu), kvp, model)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kvp", list(CARNEY))
def test_the_two_lines_meet_and_rise(kvp):
    hu = np.arange(-1000, 2000)
    steps = np.diff(attenuation_of(hu, kvp))
    assert steps.min() > 0 and steps.max() < 4e-4


def test_an_unknown_voltage_or_model_is_refused_by_name():
    assert "--kvp 90: carney has coefficients for 80, 100" in refusal(attenuation_of, np.zeros(1), 90)
    assert "--kvp 130: ge" in refusal(attenuation_of, np.zeros(1), 130, "ge")
    assert "--model hounsfield" in refusal(attenuation_of, np.zeros(1), 120, "hounsfield")


# grids


def test_on_a_grid_of_a_pet_the_values_are_those_of_simpleitk():
    rng = np.random.default_rng(0)
    source = Grid((15, 17, 13), nib.affines.from_matvec(np.diag([1.5, 1.2, 2.0]), [3, -4, 5]))
    angle = 0.2
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    target = Grid((8, 7, 6), nib.affines.from_matvec(turn @ np.diag([2.0, 2.5, 3]), [6, 0, 8]))
    values = rng.random(source.shape).astype(np.float32)

    def image(array: np.ndarray, grid: Grid) -> SimpleITK.Image:
        made = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
        made.SetSpacing(grid.spacing.tolist())
        made.SetDirection((grid.affine[:3, :3] / grid.spacing).ravel().tolist())
        made.SetOrigin(grid.affine[:3, 3].tolist())
        return made

    expected = SimpleITK.Resample(
        image(values, source), image(np.zeros(target.shape, np.float32), target), SimpleITK.Transform(),
        SimpleITK.sitkLinear, 0.0,
    )  # fmt: skip
    expected = SimpleITK.GetArrayFromImage(expected).transpose(2, 1, 0)
    found = on_grid(values, source, target)
    inner = ndimage.binary_erosion(expected > 0)
    assert inner.sum() > 20
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-5)


def test_a_gaussian_of_a_resolution_has_that_width():
    line = np.zeros((1, 1, 201))
    line[0, 0, 100] = 1
    blurred = smooth(line, np.array([1.0, 1, 0.5]), 8.0)[0, 0]
    assert np.interp(4.0, np.arange(101) * 0.5, blurred[100:]) == pytest.approx(blurred[100] / 2, rel=1e-2)
    assert blurred.sum() == pytest.approx(1)


def test_an_upright_grid_holds_an_oblique_one():
    turn = nib.eulerangles.euler2mat(0.3, 0.1, -0.2)
    grid = Grid((10, 12, 8), nib.affines.from_matvec(turn @ np.diag([1, 2, 3]), [5, 6, 7]))
    upright = upright_grid(grid, (2.0, 2.0, 2.0))
    corners = nib.affines.apply_affine(np.linalg.inv(upright.affine) @ grid.affine, [[0, 0, 0], [9, 11, 7], [9, 0, 7]])
    assert (corners >= -0.5).all() and (corners <= np.array(upright.shape) - 0.5).all()
    assert np.array_equal(upright.affine[:3, :3], 2 * np.eye(3))


# the commands


def test_the_map_has_the_grid_of_the_ct_or_of_the_pet(tmp_path, capsys):
    path = save(tmp_path / "a_sct.nii.gz", ct(), TWO_MM)
    attenuation(str(path))
    made = nib.load(tmp_path / "a_sct_mu.nii.gz")
    np.testing.assert_allclose(made.get_fdata(), attenuation_of(ct()), atol=1e-6)
    np.testing.assert_array_equal(made.affine, TWO_MM)
    assert b"not for clinical use" in made.header["descrip"].tobytes()
    pet = save(tmp_path / "pet.nii.gz", np.random.default_rng(0).random((8, 8, 8)), np.diag([4.0, 4, 4, 1]))
    attenuation(str(path), like=str(pet), fwhm=6.0, output=str(tmp_path / "b.nii.gz"))
    like = nib.load(tmp_path / "b.nii.gz")
    assert like.shape == (8, 8, 8) and np.array_equal(like.affine, np.diag([4.0, 4, 4, 1]))
    assert like.get_fdata()[5, 5, 4] == pytest.approx(0.1491, abs=0.02)
    assert "covered" in capsys.readouterr().out


def test_a_template_is_added_where_it_lies(tmp_path):
    path = save(tmp_path / "a.nii.gz", ct(), TWO_MM)
    couch = np.zeros((10, 5, 9), dtype=np.float32)
    couch[:, :2] = 0.12
    template = save(tmp_path / "couch.nii.gz", couch, nib.affines.from_matvec(np.diag([4.0, 2, 4]), [1, 0, 1]))
    attenuation(str(path), template=str(template), output=str(tmp_path / "mu.nii.gz"))
    difference = nib.load(tmp_path / "mu.nii.gz").get_fdata() - attenuation_of(ct())
    np.testing.assert_allclose(difference[2:18, :2, 2:16], 0.12, atol=1e-5)
    np.testing.assert_allclose(difference[:, 3:], 0, atol=1e-5)
    assert "in cm-1" in refusal(attenuation, str(path), template=str(path))


def test_bad_input_is_refused_and_nothing_is_written(tmp_path):
    path = save(tmp_path / "a.nii.gz", ct(), TWO_MM)
    far = save(tmp_path / "far.nii.gz", ct(), nib.affines.from_matvec(np.diag([2.0, 2, 2]), [500, 0, 0]))
    mr = save(tmp_path / "mr.nii.gz", np.abs(ct()) + 7, TWO_MM)
    message = refusal(attenuation, str(path), like=str(far))
    assert "do not overlap" in message and "far.nii.gz" in message and "a.nii.gz" in message
    assert "--kvp 90" in refusal(attenuation, str(path), kvp=90)
    assert "not Hounsfield units" in refusal(attenuation, str(mr))
    assert "--fwhm" in refusal(attenuation, str(path), fwhm=-1.0)
    assert files_in(tmp_path) == ["a.nii.gz", "far.nii.gz", "mr.nii.gz"]


def read_interfile(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (x, y, z), spacing and first offset in mm."""
    pairs = [line.split(":=") for line in path.read_text().splitlines() if ":=" in line]
    keys = {key.strip().lstrip("!"): value.strip() for key, value in pairs}

    def of_axes(name: str) -> list[float]:
        return [float(keys[f"{name} [{n}]"]) for n in (1, 2, 3)]

    assert keys["number format"] == "float" and keys["imagedata byte order"] == "LITTLEENDIAN"
    values = np.fromfile(path.with_name(keys["name of data file"]), dtype="<f4")
    shape = [int(size) for size in of_axes("matrix size")]
    return (
        values.reshape(shape[::-1]).T,
        np.array(of_axes("scaling factor (mm/pixel)")),
        np.array(of_axes("first pixel offset (mm)")),
    )


def test_interfile_holds_the_map_left_back_up(tmp_path):
    values = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    affine = nib.affines.from_matvec(np.diag([2.0, 3, 4]), [-10, 20, 30])  # RAS
    values_read, spacing, offset = read_interfile(write_interfile(values, affine, tmp_path / "mu.hv"))
    np.testing.assert_array_equal(values_read, values[::-1, ::-1])
    np.testing.assert_allclose(spacing, [2, 3, 4])
    np.testing.assert_allclose(offset, [-(-10 + 3 * 2), -(20 + 4 * 3), 30])
    oblique = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1), [0, 0, 0])
    assert "oblique" in refusal(write_interfile, values, oblique, tmp_path / "b.hv")
    assert files_in(tmp_path) == ["mu.hv", "mu.v"]


def test_what_was_made_of_a_synthetic_ct_is_not_taken_for_an_mr(tmp_path):
    path = save(tmp_path / "a_sct.nii.gz", ct(), TWO_MM)
    path.with_name("a_sct.json").write_text('{"input": "/x/a.nii.gz", "output": "a_sct.nii.gz", "settings": {}}')
    attenuation(str(path))
    density(str(path))
    save(tmp_path / "b.nii.gz", ct(), TWO_MM)
    assert [Path(item["image"]).name for item in find_volumes(tmp_path)] == ["b.nii.gz"]


# densities


def test_the_default_tables_are_the_published_ones_at_their_nodes_and_between():
    for hu, value in {-1000: 0.001, -90: 0.95, 0: 1.0, 100: 1.095, 350: 1.199, 3000: 2.505, 50: 1.0475}.items():
        assert float(ELECTRON(np.array([hu]))[0]) == pytest.approx(value, abs=1e-6)
    for hu, value in {
        -1000: 0.00121,
        -98: 0.93,
        14: 1.03,
        100: 1.1199,
        101: 1.0762,
        1600: 1.9642,
        -549: 0.465605,
    }.items():
        assert float(MASS(np.array([hu]))[0]) == pytest.approx(value, abs=1e-6)
    assert ELECTRON(np.array([-1024.0])) == ELECTRON(np.array([-1000.0]))


@pytest.mark.parametrize(
    "text",
    [
        "-1000,0.001\n0,1\n1000,1.5\n3000,2.6\n",
        "HU;density\n-1000;0.001\n0;1\n1000;1.5\n3000;2.6\n",
        "# matRad\n# HU rED\n-1000 0.001\n0\t1\n1000 1.5\n3000 2.6\n",
    ],
)
def test_a_round_trip_through_a_users_table(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    table = read_hlut(tmp_path / "table.csv")
    hu = np.linspace(-1000, 3000, 77)
    values = table(hu)
    assert float(table(np.array([500.0]))[0]) == pytest.approx(1.25)
    np.testing.assert_allclose(np.interp(values, table.values, table.hu), hu, atol=1e-3)
    path = save(tmp_path / "a.nii.gz", ct(), TWO_MM)
    density(str(path), "electron", str(tmp_path / "table.csv"))
    made = nib.load(tmp_path / "a_red.nii.gz").get_fdata()
    assert {round(float(v), 4) for v in np.unique(made)} == {0.001, 1.0, 1.5}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-1000,0\n500,1\n0,1\n", "0 follows 500"), ("-1000,0\n0,1\n0,1.1\n", "must increase"),
        ("-1000,0\n800,1.2\n", "extend the table"), ("-200,0.8\n3000,2\n", "extend the table"),
        ("1,2,3\n4,5,6\n", "two columns"), ("HU,x\n1,a\n2,b\n", "two columns"), ("", "two columns"),
        ("-1000,-0.1\n3000,2\n", "negative"), ("-1000,nan\n3000,2\n", "not finite"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_refused_with_the_reason(tmp_path, text, reason):
    path = save(tmp_path / "a.nii.gz", ct(), TWO_MM)
    (tmp_path / "table.csv").write_text(text)
    message = refusal(density, str(path), "mass", str(tmp_path / "table.csv"))
    assert reason in message and "table.csv" in message
    assert not (tmp_path / "a_density.nii.gz").exists()


def test_a_table_needs_its_quantity_and_a_file(tmp_path):
    path = save(tmp_path / "a.nii.gz", ct(), TWO_MM)
    assert "electron or mass" in refusal(density, str(path), hlut="x.csv")
    assert "x.csv" in refusal(density, str(path), "mass", str(tmp_path / "x.csv"))
    assert "--quantity proton" in refusal(density, str(path), "proton")

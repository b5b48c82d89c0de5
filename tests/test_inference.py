"""The inference config from files to files: geometry, surfaces, air, bad input, the command line."""

from __future__ import annotations

from contextlib import suppress
from itertools import permutations, product
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import AIR, ellipsoid, files_in, full_disk, head_and_shoulders, linear_hu, ramp, save, stub, tiny_network
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat
from scipy import ndimage
from test_volumes import BAD, GAP, OBLIQUE, PIXEL, dicom_world, save_itk, save_series

from custom_modules.data.inputs import find_volumes
from custom_modules.data.volumes import read_volume
from custom_modules.networks.weights import save_weights

TWO_MM = np.diag([2.0, 2, 2, 1])
ROTATION = euler2mat(0.2, -0.15, 0.3)
SHEAR = np.array([[1.0, 0.2, 0.0], [0.0, 1.0, 0.1], [0.0, 0.0, 1.0]])
SMALL_WINDOWS = {"window_size": [16, 16, 16]}
ORIENTATIONS = [
    np.column_stack([axes, flips]) for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)
]
GRIDS = {
    "2 mm": ((20, 18, 16), TWO_MM),
    "odd sizes": ((33, 27, 21), np.diag([1.3, 1.3, 1.3, 1])),
    "smaller than a window": ((5, 7, 6), TWO_MM),
    "coarse": ((8, 7, 9), np.diag([4.1, 4.1, 4.1, 1])),
    "0.7 x 0.7 x 8 mm": ((60, 61, 6), np.diag([0.7, 0.7, 8, 1])),
    "two slices": ((33, 35, 2), np.diag([1.3, 1.3, 3, 1])),
    "two sagittal slices": ((2, 20, 20), np.diag([4.0, 2, 2, 1])),
    "long and thin": ((4, 5, 70), np.diag([2.2, 2.2, 1, 1])),
    "oblique": ((20, 19, 17), from_matvec(ROTATION @ np.diag([1.5, 2.5, 3]), [10, -200, 1300])),
    "oblique, left-handed": ((14, 19, 17), from_matvec(ROTATION @ np.diag([-1.5, 2.5, 3]), [10, -200, 30])),
    "sheared": ((20, 19, 17), from_matvec(SHEAR @ ROTATION @ np.diag([1.5, 2.5, 3]), [10, -200, 30])),
}
CUBE = ((30, 28, 26), np.diag([1.3, 1.7, 3.0, 1]))


def assert_linear(hu: np.ndarray, mr: np.ndarray, affine: np.ndarray, sign: float = 1.0, atol: float = 2.0) -> None:
    """``hu`` is the stub's output for ``mr``: inside exact but for what splines make of the ends of a ramp; at the
    border at most half a 2 mm sample off."""
    expected, spacing = linear_hu(mr, sign), np.linalg.norm(affine[:3, :3], axis=0)
    error = np.abs(hu - expected)
    margins = [max(1, int(np.ceil(2 / s))) for s in spacing]
    core = error[tuple(slice(m, n - m) for m, n in zip(margins, error.shape))]
    slopes = [np.abs(np.diff(expected, axis=axis)).max() / spacing[axis] for axis in range(3)]
    assert core.size == 0 or core.max() <= atol
    assert error.max() <= atol + sum(slopes)


# geometry


@pytest.fixture(scope="module")
def reoriented(tmp_path_factory, infer) -> tuple[Path, Path]:
    """Folders of one volume in all its orientations and of what inference makes of it."""
    folder = tmp_path_factory.mktemp("orientations")
    affine = from_matvec(np.diag([1.5, 2.5, 3.0]), [5, -7, 40])
    image = nib.Nifti1Image(ramp((14, 11, 9), affine), affine)
    for number, orientation in enumerate(ORIENTATIONS):
        (folder / "in").mkdir(exist_ok=True)
        nib.save(image.as_reoriented(orientation), folder / "in" / f"{number}.nii")
    with suppress(SystemExit):  # of a volume that failed; its own test shows it
        infer(folder / "in", folder / "out", **stub())
    return folder / "in", folder / "out"


def test_the_orientations_are_all_48(reoriented):
    codes = {nib.aff2axcodes(nib.load(path).affine) for path in reoriented[0].iterdir()}
    assert len(codes) == len(ORIENTATIONS) == len(list(reoriented[1].glob("*.nii"))) == 48


@pytest.mark.parametrize("number", range(48), ids=lambda n: str(ORIENTATIONS[n].tolist()))
def test_every_axis_orientation_comes_back_as_it_was(reoriented, number):
    mr, ct = nib.load(reoriented[0] / f"{number}.nii"), nib.load(reoriented[1] / f"{number}_sct.nii")
    assert ct.shape == mr.shape and ct.get_data_dtype() == np.int16
    np.testing.assert_allclose(ct.affine, mr.affine, atol=1e-4)
    assert_linear(ct.get_fdata(), mr.get_fdata(), mr.affine)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("grid", list(GRIDS))
def test_every_grid_comes_back_as_it_was(tmp_path, infer, grid, sign):
    shape, affine = GRIDS[grid]
    mr = ramp(shape, affine)
    infer(save(tmp_path / "a.nii.gz", mr, affine), tmp_path / "out", **stub(sign))
    ct = nib.load(tmp_path / "out" / "a_sct.nii.gz")
    assert ct.shape == shape and ct.get_data_dtype() == np.int16
    np.testing.assert_allclose(ct.affine, affine, atol=1e-4)
    assert_linear(ct.get_fdata(), mr, affine, sign)


@pytest.mark.parametrize("grid", ["smaller than a window", "two slices", "oblique", "odd sizes"])
@pytest.mark.parametrize("sampling", ["whole", "windows"])
def test_the_sampler_answers_on_the_same_grid(tmp_path, infer, grid, sampling):
    shape, affine = GRIDS[grid]
    path = save(tmp_path / "a.nii.gz", ramp(shape, affine), affine)
    infer(path, tmp_path / "out", sampling=sampling, **SMALL_WINDOWS)
    ct = nib.load(tmp_path / "out" / "a_sct.nii.gz")
    assert ct.shape == shape and ct.get_data_dtype() == np.int16
    np.testing.assert_allclose(ct.affine, affine, atol=1e-4)
    assert AIR <= ct.get_fdata().min() < ct.get_fdata().max() <= 1600


@pytest.mark.parametrize("output", ["sample", "mean"])
def test_the_seed_alone_decides_the_sample_and_nothing_of_the_estimate(tmp_path, infer, output):
    path = save(tmp_path / "a.nii.gz", ramp((12, 11, 10), TWO_MM))
    settings = {"output": output, **SMALL_WINDOWS}
    runs = [infer(path, tmp_path / str(k), seed=seed, **settings) for k, seed in enumerate((3, 3, 4))]
    first, again, other = (nib.load(run / "a_sct.nii.gz").get_fdata() for run in runs)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() == (output == "sample")


@pytest.mark.parametrize("extension", [".nrrd", ".mha"])
def test_itk_formats_come_back_in_their_format_and_geometry(tmp_path, infer, extension):
    mr = ramp((14, 11, 9), OBLIQUE)
    path = save_itk(tmp_path / f"a{extension}", mr)
    infer(path, tmp_path / "out", **stub())
    source, result = itk.imread(str(path)), itk.imread(str(tmp_path / "out" / f"a_sct{extension}"))
    assert files_in(tmp_path / "out") == sorted(["a_sct.json", f"a_sct{extension}"])
    assert itk.array_view_from_image(result).dtype == np.int16
    for get in ("GetSpacing", "GetOrigin"):
        np.testing.assert_allclose(getattr(result, get)(), getattr(source, get)(), atol=1e-4)
    directions = (itk.array_from_matrix(image.GetDirection()) for image in (result, source))
    np.testing.assert_allclose(*directions, atol=1e-6)
    assert_linear(itk.array_view_from_image(result).swapaxes(0, 2), mr, OBLIQUE)


def test_a_dicom_series_becomes_one_and_a_nifti_on_request_at_its_place(tmp_path, infer):
    affine = np.column_stack([dicom_world(*step) - dicom_world(0, 0, 0) for step in np.eye(3, dtype=int)[::-1]])
    stack = ramp((6, 12, 14), np.diag([GAP, *PIXEL, 1])).round()
    mr = save_series(tmp_path / "in" / "t1", stack.astype(np.int16))
    infer(mr, tmp_path / "out", **stub())
    assert {path.split("/")[0] for path in files_in(tmp_path / "out")} == {"t1_sct", "t1_sct.json"}
    series = read_volume(tmp_path / "out" / "t1_sct")
    infer(mr, tmp_path / "out", output_format="both", **stub())
    ct = nib.load(tmp_path / "out" / "t1_sct.nii.gz")
    np.testing.assert_array_equal(ct.get_fdata(), np.asarray(series[0]))
    np.testing.assert_allclose(ct.affine, series.affine, atol=1e-3)
    expected = nib.Nifti1Image(np.ascontiguousarray(stack.T), from_matvec(affine, dicom_world(0, 0, 0)))
    there = np.linalg.inv(ct.affine) @ expected.affine
    orientation = nib.io_orientation(there)
    np.testing.assert_allclose(there, nib.orientations.inv_ornt_aff(orientation, ct.shape).round(), atol=1e-3)
    back = nib.orientations.apply_orientation(ct.get_fdata(), nib.orientations.ornt_transform(
        np.array([[0, 1], [1, 1], [2, 1]]), orientation))  # fmt: skip
    assert_linear(back, expected.get_fdata(), expected.affine, atol=3)  # integers in


# surfaces and air


def border_of(shape: tuple[int, ...]) -> np.ndarray:
    border = np.ones(shape, dtype=bool)
    border[1:-1, 1:-1, 1:-1] = False
    return border


@pytest.mark.parametrize("sign", [1, -1])
def test_a_body_that_fills_the_field_of_view_ends_in_tissue(tmp_path, infer, sign):
    shape, affine = CUBE
    noise = np.random.default_rng(0).normal(size=shape)
    mr = (1000 + 200 * ndimage.gaussian_filter(noise, 5 / np.diag(affine)[:3])).astype(np.float32)
    infer(save(tmp_path / "a.nii", mr, affine), tmp_path / "out", **stub(sign))
    error = nib.load(tmp_path / "out" / "a_sct.nii").get_fdata() - linear_hu(mr, sign)
    border = border_of(shape)
    assert abs(error[border].mean()) < 1 and abs(error[~border].mean()) < 1
    assert np.abs(error[border]).max() < 15


def test_a_limb_is_cut_off_without_a_trace(tmp_path, infer):
    points = np.indices((40, 40, 15)) * 2.0 - 40
    inside = np.hypot(points[0], points[1]) < 28
    mr = np.where(inside, 1000, 0).astype(np.float32)
    infer(save(tmp_path / "a.nii", mr, np.diag([2, 2, 2.7, 1])), tmp_path / "out", **stub(-1))
    ct = nib.load(tmp_path / "out" / "a_sct.nii").get_fdata()
    for end in (0, -1):
        np.testing.assert_allclose(ct[..., end], ct[..., 7], atol=1)
    assert (ct[inside] != AIR).all()


@pytest.mark.parametrize(
    ("shape", "affine", "radii", "shift"),
    [
        ((60, 56, 50), TWO_MM, (40, 30, 20), (8, -6, 4)),
        ((80, 70, 36), np.diag([1.3, 1.7, 3, 1]), (30, 34, 28), (5, 0, 0)),
        ((56, 60, 30), from_matvec(ROTATION @ np.diag([1.5, 1.5, 3]), [10, -200, 30]), (25, 20, 22), (0, 0, 0)),
        ((60, 56, 40), TWO_MM, (40, 30, 200), (0, 0, 0)),
    ],
    ids=["2 mm", "not isotropic", "oblique", "cut at both ends"],
)
def test_outside_the_body_is_air_and_inside_is_not(tmp_path, infer, shape, affine, radii, shift):
    mr, inside = ellipsoid(shape, affine, radii, shift)
    infer(save(tmp_path / "a.nii", mr, affine), tmp_path / "out", **stub(-1))
    ct = nib.load(tmp_path / "out" / "a_sct.nii").get_fdata()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    outside = ndimage.distance_transform_edt(~inside, sampling=spacing) > 12
    deep = ndimage.distance_transform_edt(inside, sampling=spacing) > 10  # nearer to skin splines overshoot a little
    assert outside.sum() > 1000 and deep.sum() > 1000
    np.testing.assert_allclose(ct[deep], linear_hu(mr, -1)[deep], atol=4)
    assert (ct[inside] != AIR).all()
    assert (ct[outside] == AIR).all(), f"{(ct[outside] != AIR).mean():.1%} of the air is not air"


def test_what_is_cropped_above_the_shoulders_is_air(tmp_path, infer):
    mr = head_and_shoulders()
    infer(save(tmp_path / "a.nii", mr), tmp_path / "out", crop_above_shoulders=True, **stub(-1))
    ct = nib.load(tmp_path / "out" / "a_sct.nii").get_fdata()
    assert ct.shape == mr.shape
    np.testing.assert_allclose(ct[8:36, 8:16, 4:16], linear_hu(mr, -1)[8:36, 8:16, 4:16], atol=1)
    assert (ct[..., 26:] == AIR).all()


def test_the_scale_of_the_mr_does_not_matter(tmp_path, infer):
    mr, _ = ellipsoid((40, 36, 30), TWO_MM, (30, 24, 20))
    for name, scale in (("a", 1000.0), ("b", 0.003)):
        save(tmp_path / f"{name}.nii", (mr * scale).astype(np.float32))
        infer(tmp_path / f"{name}.nii", tmp_path / "out", **stub())
    a, b = (nib.load(tmp_path / "out" / f"{name}_sct.nii").get_fdata() for name in "ab")
    np.testing.assert_allclose(a, b, atol=1)
    assert np.ptp(a) > 1000


def test_real_volumes_keep_their_grid_and_their_image(tmp_path, infer, real_data):
    infer(real_data / "torso_mr", tmp_path, **stub())
    for name in ("abdomen_t2", "upper_abdomen"):
        mr, ct = nib.load(real_data / "torso_mr" / f"{name}.nii.gz"), nib.load(tmp_path / f"{name}_sct.nii.gz")
        assert ct.shape == mr.shape and ct.get_data_dtype() == np.int16
        np.testing.assert_allclose(ct.affine, mr.affine, atol=1e-4)
        body = ct.get_fdata() != AIR
        assert np.corrcoef(mr.get_fdata()[body], ct.get_fdata()[body])[0, 1] > 0.9


# bad input


@pytest.fixture
def good(tmp_path) -> Path:
    return save(tmp_path / "in" / "sub" / "good.nii.gz", ramp((12, 11, 10), TWO_MM))


def ending(infer, *args, **overrides) -> str:
    """The message with which inference ends the program."""
    with pytest.raises(SystemExit) as end:
        infer(*args, **overrides)
    assert isinstance(end.value.code, str) and end.value.code.startswith("error: ")
    return end.value.code


def lines_with(message: str, *parts: object) -> list[str]:
    return [line for line in message.splitlines() if any(str(part) in line for part in parts)]


@pytest.mark.parametrize("bad", list(BAD))
def test_bad_input_ends_with_one_line_that_names_it_and_writes_nothing(tmp_path, infer, bad):
    name, make = BAD[bad]
    make(tmp_path / name)
    message = ending(infer, tmp_path / name, tmp_path / "out", **stub())
    assert len(lines_with(message, tmp_path / name)) == 1
    assert len(message.splitlines()) <= 2 and "Traceback" not in message
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["missing", "empty", "notes.txt", "missing.nii.gz"])
def test_nothing_to_read_ends_with_one_line_that_names_the_path(tmp_path, infer, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no volume")
    message = ending(infer, tmp_path / name, tmp_path / "out")
    assert str(tmp_path / name) in message and len(message.splitlines()) == 1
    assert files_in(tmp_path) == ["notes.txt"]


def test_bad_files_in_a_folder_do_not_stop_the_good_one(tmp_path, infer, good):
    bad = {name: tmp_path / "in" / str(number) / BAD[name][0] for number, name in enumerate(BAD) if name != "missing"}
    for name, path in bad.items():
        path.parent.mkdir()
        BAD[name][1](path)
    message = ending(infer, tmp_path / "in", tmp_path / "out", **stub())
    assert files_in(tmp_path / "out") == ["sub/good_sct.json", "sub/good_sct.nii.gz"]
    assert f"{len(bad)} of {len(bad) + 1} volumes failed" in message.splitlines()[0]
    assert len(message.splitlines()) == len(bad) + 1
    for path in bad.values():
        assert len(lines_with(message, f"{path}:")) == 1


def test_a_volume_without_a_body_is_refused(tmp_path, infer):
    mr = np.zeros((12, 12, 12), dtype=np.float32)
    mr[6, 6, 6] = 1000
    message = ending(infer, save(tmp_path / "a.nii", mr), tmp_path / "out", **stub())
    assert len(lines_with(message, tmp_path / "a.nii")) == 1 and len(message.splitlines()) == 2
    assert files_in(tmp_path / "out") == []


def test_an_error_in_the_sampler_names_the_volume(tmp_path, infer, good):
    message = ending(infer, good, tmp_path / "out", **stub(None))
    assert len(lines_with(message, good)) == 1 and len(message.splitlines()) == 2
    assert files_in(tmp_path / "out") == []


def test_a_full_disk_leaves_no_file(tmp_path, infer, good):
    with full_disk():
        message = ending(infer, good, tmp_path / "out", **stub())
    assert len(lines_with(message, good)) == 1 and len(message.splitlines()) == 2
    assert files_in(tmp_path / "out") == []


def damaged(path: Path, content: bytes | None = None) -> None:
    save_weights(tiny_network(), path)
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)


WEIGHTS = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "truncated": damaged,
    "text": lambda path: damaged(path, b"I am no weights"),
    "of another size": lambda path: save_weights(tiny_network(channels=[8, 24, 24]), path),
    "of another depth": lambda path: save_weights(tiny_network(num_blocks=2), path),
    "not a state dict": lambda path: torch.save([1, 2, 3], path),
    "a pickled object": lambda path: torch.save(tiny_network(), path),
}


@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_bad_weights_end_with_one_line_that_names_them_and_write_nothing(tmp_path, infer, good, weights):
    path = tmp_path / "model.pt"
    WEIGHTS[weights](path)
    message = ending(infer, good, tmp_path / "out", checkpoint=str(path))
    assert str(path) in message and len(message.splitlines()) == 1
    assert files_in(tmp_path / "out") == []


def test_weights_of_another_hu_window_are_refused(tmp_path, infer, good, checkpoint):
    message = ending(infer, good, tmp_path / "out", hu_window=[-800.0, 800.0])
    assert str(checkpoint) in message and len(message.splitlines()) == 1
    assert files_in(tmp_path / "out") == []


# the command line


def assert_ends_in_one_line(run, path: Path) -> None:
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert len(lines_with(run.stderr, path)) == 1, run.stderr


def test_the_command_works_from_another_working_directory(tmp_path, infer_command, good):
    (tmp_path / "elsewhere").mkdir()
    run = infer_command(good, tmp_path / "out", cwd=tmp_path / "elsewhere")
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    ct = nib.load(tmp_path / "out" / "good_sct.nii.gz")
    assert ct.shape == (12, 11, 10) and ct.get_data_dtype() == np.int16
    assert files_in(tmp_path / "elsewhere") == [] and files_in(tmp_path / "out") == ["good_sct.json", "good_sct.nii.gz"]


def test_the_command_lists_bad_files_and_writes_the_good_one(tmp_path, infer_command, good):
    bad = [tmp_path / "in" / "bad.nii.gz", tmp_path / "in" / "worse.nii"]
    BAD["text as nii.gz"][1](bad[0])
    BAD["NaN"][1](bad[1])
    run = infer_command(tmp_path / "in", tmp_path / "out")
    for path in bad:
        assert_ends_in_one_line(run, path)
    assert files_in(tmp_path / "out") == ["sub/good_sct.json", "sub/good_sct.nii.gz"]


@pytest.mark.parametrize("what", ["dataset_dir", "output_dir", "checkpoint"])
def test_the_command_ends_in_one_line_for_what_cannot_be_used(tmp_path, infer_command, good, what):
    (tmp_path / "file").touch()
    paths = {"dataset_dir": good, "output_dir": tmp_path / "out", what: tmp_path / "file" / "below"}
    run = infer_command(**paths)
    assert_ends_in_one_line(run, paths[what])
    assert files_in(tmp_path / "out") == [] and (tmp_path / "file").read_bytes() == b""


# a DICOM series in, a DICOM series out


def test_a_finished_series_is_kept_and_one_without_its_nifti_or_a_slice_is_made_again(tmp_path, infer):
    mr = save_series(tmp_path / "in" / "t1", ramp((6, 12, 14), np.diag([GAP, *PIXEL, 1])).astype(np.int16))
    out = tmp_path / "out"

    def made(**settings) -> int:
        infer(mr, out, resume=True, **stub(), **settings)
        return (out / "t1_sct" / "ct_0001.dcm").stat().st_mtime_ns

    first = made()
    assert made() == first
    again = made(output_format="both")
    assert again != first and (out / "t1_sct.nii.gz").is_file() and made(output_format="both") == again
    (out / "t1_sct" / "ct_0003.dcm").unlink()
    assert made() != again and len(list((out / "t1_sct").iterdir())) == 6


def test_an_output_folder_among_the_inputs_is_not_taken_for_mrs(tmp_path, infer):
    save_series(tmp_path / "in" / "t1", ramp((6, 12, 14), np.diag([GAP, *PIXEL, 1])).astype(np.int16))
    infer(tmp_path / "in", tmp_path / "in" / "out", **stub())
    assert (tmp_path / "in" / "out" / "t1_sct" / "ct_0001.dcm").is_file()
    assert [Path(item["image"]).name for item in find_volumes(tmp_path / "in")] == ["t1"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("mr", ["a_sct.nii", "t1_sct"]), ("nifti", ["a_sct.nii.gz", "t1_sct.nii.gz"]), ("dicom", ["a_sct", "t1_sct"])],
)
def test_the_format_of_the_output_can_be_chosen(tmp_path, infer, wanted, expected):
    save(tmp_path / "in" / "a.nii", ramp((12, 11, 10), np.diag([2.0, 2, 2, 1])))
    save_series(tmp_path / "in" / "t1", ramp((6, 12, 14), np.diag([GAP, *PIXEL, 1])).astype(np.int16))
    infer(tmp_path / "in", tmp_path / "out", output_format=wanted, **stub())
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".json") == expected
    assert all(read_volume(tmp_path / "out" / name).shape[0] == 1 for name in expected)


def test_the_standard_deviation_of_a_series_is_a_nifti(tmp_path, infer):
    mr = save_series(tmp_path / "in" / "t1", ramp((8, 12, 14), np.diag([GAP, *PIXEL, 1])).astype(np.int16))
    infer(mr, tmp_path / "out", num_samples=2, calibration=None)
    assert nib.load(tmp_path / "out" / "t1_sct_sd.nii.gz").shape == (14, 12, 8)
    assert len(list((tmp_path / "out" / "t1_sct").iterdir())) == 8

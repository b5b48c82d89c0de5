"""Body, shoulders, intensity standard, common grid and augmentation, on shapes with known results."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import head_and_shoulders, linear_hu, ramp, save, world
from monai.data import MetaTensor
from monai.transforms import RandAffined, RandBiasFieldd, RandFlipd, RandScaleIntensityd, Spacingd
from scipy import ndimage

from custom_modules.data.body import (
    BodyMaskd,
    CropAboveShouldersd,
    body_mask,
    ct_body_mask,
    fill_cavities,
    fill_holes_by_slice,
    keep_parts,
    open_mask,
    shoulder_slice,
)
from custom_modules.data.grid import SameGridd, ToSpacingd, resample
from custom_modules.data.mr import CorrectBiasFieldd, SubtractBackgroundd, background_offset
from custom_modules.data.transforms import Augment, Preprocess, StandardizeMRd
from custom_modules.errors import InputError


def tensor(array: np.ndarray, spacing: float | tuple = 2.0, name: str = "mr.nii") -> MetaTensor:
    affine = np.diag([*np.broadcast_to(np.asarray(spacing, dtype=float), 3), 1])
    return MetaTensor(torch.from_numpy(np.array(array, dtype=np.float32))[None], affine=affine, meta={
        "filename_or_obj": name})  # fmt: skip


def trunk(shape: tuple[int, int, int] = (44, 40, 20), radii: tuple[float, float] = (18, 15)) -> np.ndarray:
    """The mask of an elliptic cylinder along the last axis."""
    x, y, _ = np.indices(shape) - np.reshape([(n - 1) / 2 for n in shape], (3, 1, 1, 1))
    return (x / radii[0]) ** 2 + (y / radii[1]) ** 2 <= 1


def noisy(body: np.ndarray, seed: int = 0) -> np.ndarray:
    """An MR with signal in ``body`` and noise of a fiftieth of it in air."""
    rng = np.random.default_rng(seed)
    return np.where(body, rng.uniform(600, 1000, body.shape), rng.uniform(0, 20, body.shape)).astype(np.float32)


def agree(a: np.ndarray, b: np.ndarray, voxels: int = 1) -> bool:
    """Whether two masks differ by no more than ``voxels`` at their surface."""
    ball = ndimage.generate_binary_structure(3, 3)
    grown = ndimage.binary_dilation(b, ball, voxels)
    shrunk = ndimage.binary_erosion(b, ball, voxels, border_value=1)
    return not (a & ~grown).any() and not (shrunk & ~a).any()


# body


def test_a_dark_hole_inside_belongs_to_the_body():
    body = trunk()
    mr = noisy(body)
    mr[16:28, 14:26, 4:16] = 0  # a lung
    assert agree(body_mask(mr), body)
    assert body_mask(mr)[16:28, 14:26, 4:16].all()


def test_a_hole_that_is_open_at_the_end_slices_is_filled_too():
    body = trunk()
    mr = noisy(body)
    mr[18:26, 16:24, :] = 0  # an airway through the whole field of view
    assert body_mask(mr)[18:26, 16:24, :].all()


@pytest.mark.parametrize("cut", [np.s_[:, :, :], np.s_[12:, :, :], np.s_[:, :22, :], np.s_[10:30, 10:30, :]])
def test_a_body_that_is_cut_by_the_field_of_view_reaches_its_edge(cut):
    body = trunk()
    mask = body_mask(noisy(body)[cut])
    assert agree(mask, body[cut])
    for axis in range(3):
        for end in (0, -1):
            face, expected = np.take(mask, end, axis), np.take(body[cut], end, axis)
            inner = ndimage.binary_erosion(expected, border_value=1)
            assert (face & inner).sum() == inner.sum()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_unit_of_the_mr_does_not_matter(scale):
    mr = noisy(trunk())
    np.testing.assert_array_equal(body_mask(mr * scale), body_mask(mr))


def two_legs() -> np.ndarray:
    """Two thighs of different size with a gap of 12 mm, at 2 mm."""
    return np.concatenate([trunk(), np.zeros((6, 40, 20), bool), trunk(radii=(12, 10))])


def arms_beside_the_trunk(depth: int = 40) -> np.ndarray:
    """Trunk and two arms that do not touch it."""
    x, y, _ = np.indices((100, depth, 20)) - np.reshape([49.5, (depth - 1) / 2, 0], (3, 1, 1, 1))
    arms = (abs(x) - 42) ** 2 + y**2 <= 5**2
    return ((x / 30) ** 2 + (y / 17) ** 2 <= 1) | arms


@pytest.mark.parametrize("parts", [two_legs, arms_beside_the_trunk])
def test_parts_that_do_not_touch_are_all_body_and_the_gap_between_them_is_not(parts):
    body = parts()
    mask = body_mask(noisy(body))
    assert agree(mask, body)
    assert ndimage.label(mask)[1] == ndimage.label(body)[1]
    ct = np.where(body, 40.0, -1000.0)
    assert agree(ct_body_mask(ct, np.ones_like(ct)), body)


@pytest.mark.parametrize("parts", [two_legs, arms_beside_the_trunk])
def test_the_gap_stays_open_in_a_coronal_slab_whose_faces_cut_all_parts(parts):
    body = parts()[:, 17:23]
    assert agree(body_mask(noisy(body)), body)


def test_crumbs_are_not_body():
    body = trunk()
    mr = noisy(body)
    mr[:3, :3] = 1000
    assert agree(body_mask(mr), body)


def test_a_part_of_a_fiftieth_is_kept_and_a_smaller_one_is_not():
    mask = np.zeros((40, 10, 10), bool)
    mask[:10], mask[15, :4, :5], mask[20, :4, :4] = True, True, True
    np.testing.assert_array_equal(keep_parts(mask), mask & (np.arange(40) < 18)[:, None, None])
    assert not keep_parts(np.zeros((4, 4, 4), bool)).any()


def chest(depth: int = 24) -> np.ndarray:
    """A coronal slab of a chest, tissue with two lungs that end above the field of view, dark in the last four rows."""
    x, _, z = np.indices((90, depth, 70)) - np.reshape([44.5, 0, 0], (3, 1, 1, 1))
    wall = abs(x) <= 38
    lungs = (abs(abs(x) - 18) <= 12) & (z > 30)
    return wall & ~lungs & (z < 66)


@pytest.mark.parametrize("slab", [np.s_[:], np.s_[:, :5], np.s_[..., :60]])
def test_lungs_that_are_cut_by_the_faces_and_the_upper_edge_belong_to_the_body(slab):
    tissue = chest()[slab]
    mask = body_mask(noisy(tissue))
    x = abs(np.arange(90) - 44.5)
    assert mask[x <= 37][..., :64].all() and not mask[x >= 40].any()


def test_a_gap_that_is_open_below_is_not_closed_from_above():
    legs = chest()[..., ::-1].copy()  # two gaps between three parts, joined above
    np.testing.assert_array_equal(fill_cavities(legs, upright=True)[..., :20], legs[..., :20])


def shaded(body: np.ndarray, factor: float = 30.0) -> np.ndarray:
    """An MR that a coil at the first plane of the second axis brightens by ``factor``, in noise of one level."""
    y = np.linspace(1, 0, body.shape[1])[:, None]
    rng = np.random.default_rng(0)
    return np.where(body, rng.uniform(60, 100, body.shape) * factor**y, 0) + rng.uniform(0, 8, body.shape)


def test_a_surface_coil_does_not_lose_the_far_side():
    body = trunk()
    assert agree(body_mask(shaded(body)), body)


def test_where_all_is_body_all_is_kept():
    fat_and_muscle = np.where(trunk(radii=(8, 8)), 1000.0, 300.0)
    assert body_mask(fat_and_muscle).all()


def test_a_body_of_two_slices_is_found():
    body = trunk((44, 40, 2))
    assert agree(body_mask(noisy(body)), body)


def test_a_thread_that_sticks_out_is_opened_away():
    mask = np.zeros((12, 12, 12), bool)
    mask[2:8, 2:8, 2:8] = True
    mask[8:11, 4, 4] = True
    opened = open_mask(mask)
    assert not opened[9:].any() and opened[3:7, 3:7, 3:7].all()


def test_holes_are_filled_slice_by_slice_along_the_last_axis():
    mask = np.zeros((7, 7, 4), bool)
    mask[1:6, 1:6] = True
    mask[3, 3] = False
    mask[3:, 3, 3] = False  # this slice's hole is open to the side
    filled = fill_holes_by_slice(mask)
    assert filled[3, 3, :3].all() and not filled[3, 3, 3]
    assert filled.sum() == mask.sum() + 3


@pytest.mark.parametrize("spacing", [(1.0, 2.0, 4.0), (2.0, 2.0, 2.0)])
def test_the_margin_of_the_body_is_in_millimetres(spacing):
    mr = np.zeros((30, 30, 30), np.float32)
    mr[12:18, 12:18, 12:18] = 1000
    narrow, wide = (BodyMaskd("image", margin=m)({"image": tensor(mr, spacing)})["body"][0] for m in (0, 6))
    for axis in range(3):
        line = [15, 15, 15]
        line[axis] = slice(None)
        grown = (wide[tuple(line)].sum() - narrow[tuple(line)].sum()) / 2
        assert grown == int(6 / spacing[axis])


def test_the_body_is_a_mask_on_the_grid_of_the_mr():
    data = BodyMaskd("image")({"image": tensor(noisy(trunk()), (1, 2, 3))})
    assert data["body"].shape == data["image"].shape and set(np.unique(data["body"])) == {0, 1}
    assert torch.equal(data["body"].affine, data["image"].affine)


def test_an_image_without_a_body_is_an_error():
    mr = np.zeros((20, 20, 20), np.float32)
    mr[10, 10, 10] = -1
    with pytest.raises(InputError, match="no body"):
        BodyMaskd("image")({"image": tensor(mr)})


# shoulders


def test_the_shoulders_are_found_below_head_and_neck():
    assert shoulder_slice(head_and_shoulders() > 0) == 19


def test_air_above_the_head_does_not_matter():
    assert shoulder_slice(np.pad(head_and_shoulders() > 0, ((3, 9), (0, 0), (0, 12)))) == 19


LIMBS = {
    "cylinder": trunk(),
    "two legs": np.concatenate([trunk(), np.zeros((6, 40, 20), bool), trunk()]),
    "wide above, narrow below": np.stack([trunk((44, 40, 1), (5 + k / 2, 10))[..., 0] for k in range(26)], axis=-1),
    "trunk below the neck": head_and_shoulders()[..., :20] > 0,
    "head alone": head_and_shoulders()[..., 21:] > 0,
    "nothing": np.zeros((8, 8, 8), bool),
}


@pytest.mark.parametrize("limb", list(LIMBS))
def test_where_there_are_no_shoulders_the_answer_is_none(limb):
    assert shoulder_slice(LIMBS[limb]) is None


def test_above_the_shoulders_is_no_body_and_below_nothing_changes():
    mr = head_and_shoulders()
    data = {"image": tensor(mr), "label": tensor(mr + 5), "body": tensor(mr > 0)}
    cropped = CropAboveShouldersd(["image", "label", "body"])(data)
    assert cropped["image"].shape == cropped["label"].shape == cropped["body"].shape
    assert not cropped["body"][..., 20:].any()
    for key, expected in (("image", mr), ("label", mr + 5), ("body", mr > 0)):
        np.testing.assert_array_equal(cropped[key][0, ..., :20], expected[..., :20])
    assert torch.equal(cropped["image"].affine, data["image"].affine)


def test_a_limb_is_left_whole_and_the_log_says_so(caplog):
    body = tensor(trunk())
    with caplog.at_level(logging.WARNING, "custom_modules.data.transforms"):
        assert CropAboveShouldersd("image")({"image": body, "body": body})["image"].shape == body.shape
    assert "no shoulders" in caplog.text


# background and shading


def test_a_constant_background_is_subtracted_and_the_log_says_so(caplog):
    mr = noisy(trunk())
    for offset in (1000, 250, -1000):
        shifted = SubtractBackgroundd("image")({"image": tensor(mr + offset)})["image"][0]
        np.testing.assert_allclose(shifted, mr, atol=1)
    assert caplog.text.count("is subtracted everywhere") == 3 and "mr.nii: air is at 1000" in caplog.text


def test_padding_beside_a_constant_background_stays_zero():
    mr = noisy(trunk()) + 1000
    mr[:5] = 0
    found = SubtractBackgroundd("image")({"image": tensor(mr)})["image"][0]
    assert not found[:5].any() and found[5:].min() < 1 and agree(body_mask(np.asarray(found))[5:], trunk()[5:])


PLAIN = {
    "air and noise": noisy(trunk()),
    "air cleared to zero": noisy(trunk()) * trunk(),
    "muscle and fat without air": np.where(trunk(radii=(8, 8)), 900, 350)
    + np.random.default_rng(0).normal(0, 30, (44, 40, 20)),
    "phase": np.random.default_rng(0).uniform(-4096, 4095, (44, 40, 20)),
    "ringing below zero": noisy(trunk()) - 15,
}


@pytest.mark.parametrize("name", list(PLAIN))
def test_an_mr_without_a_constant_background_is_left_alone(name):
    assert background_offset(PLAIN[name]) == 0


def test_preprocessing_of_a_shifted_mr_finds_the_same_body(tmp_path):
    mr = noisy(np.pad(trunk(), ((6, 6), (6, 6), (0, 0))))
    paths = [str(save(tmp_path / f"{offset}.nii", mr + offset)) for offset in (0, 1000)]
    plain, shifted = (Preprocess((2, 2, 2), correct_bias=False)({"image": path}) for path in paths)
    assert plain["body"].shape == shifted["body"].shape
    assert (plain["body"] != shifted["body"]).float().mean() < 0.01
    np.testing.assert_allclose(plain["image"], shifted["image"], atol=5)


@pytest.mark.integration
def test_shading_is_found_and_an_even_mr_stays_nearly_even():
    body = trunk((88, 80, 60), (36, 32))
    even = np.where(body, 600.0, 0.0) + np.random.default_rng(0).uniform(0, 20, body.shape)
    y = np.linspace(-1, 1, 80)[:, None]
    for factor, limits in ((np.exp(0.7 * y), (0.02, 0.12)), (1.0, (0, 0.02))):
        log = np.log(np.asarray(CorrectBiasFieldd("image")({"image": tensor(even * factor)})["image"][0])[body])
        assert np.std(log) < limits[1]
        assert np.median(log) == pytest.approx(np.log(np.median((even * factor)[body])), abs=0.05)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["abdomen_t1_gre_ge", "abdomen_t1_opposed_ge"])
def test_real_shading_does_not_cut_the_thorax_away(real_data, name):
    """Lungs, chest wall and arms are body: of the upper third all but the armpits and the dark upper edge."""
    data = {"image": str(real_data / f"torso_mr/{name}.nii.gz")}
    for transform in Preprocess((2, 2, 2)).transform.transforms:
        data = transform(data)
        if "body" in data:
            break
    body = np.asarray(data["body"][0]) > 0.5
    assert 0.75 < body.mean() < 0.95
    assert body[50:150, :, 140:190].mean() > 0.95


# intensity standard


@pytest.mark.parametrize("percentile", [905.0, 1050.0, 1245.0])
def test_a_standardised_mr_is_left_alone(percentile):
    mr = noisy(trunk())
    image = tensor(mr * percentile / np.percentile(mr, 99))
    assert torch.equal(StandardizeMRd("image")({"image": image})["image"], image)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 2.0, 1e3])
def test_any_other_mr_is_scaled_to_the_reference(scale, caplog):
    mr = noisy(trunk()) * scale
    with caplog.at_level(logging.INFO, "custom_modules.data.mr"):
        result = StandardizeMRd("image")({"image": tensor(mr)})["image"][0]
    assert np.percentile(result, 99) == pytest.approx(1050, rel=1e-4)
    np.testing.assert_allclose(result, mr * (1050 / np.percentile(mr, 99)), rtol=1e-5)
    assert "rescaled" in caplog.text


def test_the_scale_of_an_mr_that_is_not_standardised_does_not_matter():
    mr = noisy(trunk())
    small, large = (StandardizeMRd("image")({"image": tensor(mr * scale)})["image"] for scale in (0.01, 70))
    np.testing.assert_allclose(small, large, rtol=1e-5)


def test_an_mr_without_signal_is_an_error():
    with pytest.raises(InputError, match="no signal"):
        StandardizeMRd("image")({"image": tensor(-np.ones((4, 4, 4)))})


# common grid


def moved(image: MetaTensor, millimetres: float) -> MetaTensor:
    affine = image.affine.clone()
    affine[2, 3] += millimetres
    return MetaTensor(image.as_tensor(), affine=affine, meta={"filename_or_obj": "ct.nii"})


OTHER_GRIDS = {
    "another shape": lambda image: tensor(np.zeros((4, 5, 7)), name="ct.nii"),
    "another origin": lambda image: moved(image, 0.5),
    "another spacing": lambda image: tensor(np.zeros((4, 5, 6)), (2, 2, 2.1), name="ct.nii"),
    "a flipped axis": lambda image: tensor(np.zeros((4, 5, 6)), (2, 2, -2), name="ct.nii"),
}


@pytest.mark.parametrize("other", list(OTHER_GRIDS))
def test_another_grid_is_refused_and_both_files_are_named(other):
    image = tensor(np.zeros((4, 5, 6)))
    with pytest.raises(InputError, match=r"^ct\.nii: .* mr\.nii") as error:
        SameGridd(["image", "label"])({"image": image, "label": OTHER_GRIDS[other](image)})
    assert "\n" not in str(error.value)


def test_a_grid_that_differs_by_a_micrometre_passes():
    image = tensor(np.zeros((4, 5, 6)))
    data = {"image": image, "label": moved(image, 1e-3)}
    assert SameGridd(["image", "label"])(data).keys() == data.keys()


def test_one_key_alone_has_one_grid():
    data = {"image": tensor(np.zeros((4, 5, 6)))}
    assert SameGridd("image")(data)["image"] is data["image"]


# resampling in slabs


@pytest.mark.parametrize("spacing", [(2, 2, 2), (0.7, 3.1, 1.3), (5, 0.4, 9)])
def test_resampling_is_that_of_monai(spacing):
    rotated = np.array([[1.2, 0.3, 0, 4], [-0.2, 2.4, 0.5, 5], [0, -0.4, 3.1, 6], [0, 0, 0, 1]])
    image = MetaTensor(torch.rand(1, 17, 12, 9), affine=rotated, meta={"filename_or_obj": "mr.nii"})
    ours = ToSpacingd("image", spacing)({"image": image})["image"]
    monai = Spacingd("image", pixdim=spacing, mode="bilinear", padding_mode="border")({"image": image})["image"]
    assert ours.shape == monai.shape and ours.meta["filename_or_obj"] == "mr.nii"
    np.testing.assert_allclose(ours.affine, monai.affine, atol=1e-6)
    np.testing.assert_allclose(ours, monai, atol=1e-4)
    slabs = resample(image, ours.affine, ours.shape[1:], slab_voxels=1)
    np.testing.assert_allclose(slabs, ours, atol=1e-4)


# from files to what the networks see


@pytest.fixture
def pair(tmp_path) -> dict[str, str]:
    """An MR in LPS order, 1.5 x 2.5 x 3 mm, with air around the body, and a CT that is linear in it."""
    affine = np.array([[-1.5, 0, 0, 50], [0, -2.5, 0, 60], [0, 0, 3, -20], [0, 0, 0, 1]])
    shape = (48, 30, 20)
    mr = np.where(np.abs(world(shape, affine)).max(axis=0) < 24, ramp(shape, affine), 0).astype(np.float32)
    paths = {"image": save(tmp_path / "mr.nii", mr, affine), "label": save(tmp_path / "ct.nii", linear_hu(mr), affine)}
    return {key: str(path) for key, path in paths.items()}


def test_preprocessing_gives_mr_ct_and_body_on_one_ras_grid_around_the_body(pair):
    data = Preprocess((2, 2, 2), label=True)(pair)
    assert not [key for key in data if key.startswith(("image_", "label_", "body_"))]  # Spacingd trips over them
    assert data["image"].shape == data["label"].shape == data["body"].shape
    np.testing.assert_allclose(data["image"].affine[:3, :3], 2 * np.eye(3), atol=1e-5)
    assert all(np.take(data["body"][0], ends, axis).any() for axis in range(3) for ends in ([0, 1], [-2, -1]))
    beyond = np.array(data["body"].shape[1:]) * 2 - (48 + 2 * 6)  # the cube and its margin
    assert (beyond >= 0).all() and (beyond <= 14).all()


def test_preprocessing_keeps_mr_and_ct_together_and_in_place(pair):
    data = Preprocess((2, 2, 2), label=True, correct_bias=False)(pair)
    np.testing.assert_allclose(data["label"], linear_hu(np.asarray(data["image"])), atol=0.1)
    source = nib.load(pair["image"])
    to_voxels = np.linalg.inv(source.affine) @ data["image"].affine.numpy()
    voxels = nib.affines.apply_affine(to_voxels, np.moveaxis(np.indices(data["image"].shape[1:]), 0, -1))
    voxels = np.moveaxis(voxels, -1, 0)
    expected = ndimage.map_coordinates(source.get_fdata(), voxels, order=1, mode="nearest")
    np.testing.assert_allclose(data["image"][0], expected, atol=0.1)


def test_preprocessing_remembers_the_grid_of_the_file(pair):
    image = Preprocess((2, 2, 2))({"image": pair["image"]})["image"]
    np.testing.assert_allclose(image.meta["source_affine"], nib.load(pair["image"]).affine, atol=1e-6)
    assert image.meta["source_shape"].tolist() == [48, 30, 20]


def test_preprocessing_cuts_head_and_neck_away_where_asked(tmp_path):
    """The shoulders end at 40 mm, the head at 80; the margin of the body and one slice may stay."""
    path = str(save(tmp_path / "a.nii", head_and_shoulders()))
    whole, cropped = (Preprocess((2, 2, 2), crop_above_shoulders=c)({"image": path})["image"] for c in (False, True))
    assert whole.shape[3] >= 40 and 20 <= cropped.shape[3] <= 25
    np.testing.assert_array_equal(cropped.affine[2], whole.affine[2])


def test_preprocessing_refuses_a_ct_on_another_grid(tmp_path, pair):
    pair["label"] = str(save(tmp_path / "other.nii", np.random.default_rng(0).normal(size=(9, 9, 9))))
    with pytest.raises(RuntimeError) as error:
        Preprocess((2, 2, 2), label=True)(pair)
    cause = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert isinstance(cause, InputError) and "other.nii" in str(cause)


# augmentation


def textured(shape: tuple[int, int, int]) -> dict[str, MetaTensor]:
    """An image without symmetry, and as its label twice the image plus three."""
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 2) * 5
    return {"image": tensor(values), "label": tensor(2 * values + 3)}


def geometric(roi_size=(16, 16, 16), seed: int = 0) -> Augment:
    """The augmentation without what changes the MR's intensity."""
    augment = Augment(roi_size)
    for transform in augment.transforms:
        if isinstance(transform, (RandBiasFieldd, RandScaleIntensityd)):
            transform.prob = 0.0
    return augment.set_random_state(seed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(30, 26, 20), (10, 20, 5)])
def test_image_and_label_get_the_same_geometry(seed, shape):
    result = geometric(seed=seed)(textured(shape))
    np.testing.assert_allclose(result["label"], 2 * result["image"] + 3, atol=1e-4)
    assert np.ptp(result["image"]) > 0.1


def test_the_geometry_changes_from_call_to_call():
    augment, data = geometric(), textured((20, 20, 20))
    results = [augment(data)["image"] for _ in range(4)]
    assert all(not torch.equal(a, b) for k, a in enumerate(results) for b in results[k + 1 :])


def test_the_seed_decides_the_augmentation():
    data = textured((20, 20, 20))
    first, again, other = (Augment((16, 16, 16)).set_random_state(seed)(data)["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_kind_of_geometry_happens():
    kinds = {type(transform) for transform in Augment((16, 16, 16)).transforms}
    assert {RandFlipd, RandAffined, RandBiasFieldd, RandScaleIntensityd} <= kinds


@pytest.mark.parametrize("shape", [(16, 16, 16), (40, 17, 16), (5, 7, 2), (40, 4, 20)])
def test_the_crop_has_the_size_asked_for(shape):
    result = Augment((16, 16, 16))(textured(shape))
    assert result["image"].shape == result["label"].shape == (1, 16, 16, 16)
    assert set(result) == {"image", "label"}


@pytest.mark.parametrize("seed", range(4))
def test_no_value_appears_that_was_not_there(seed):
    data = textured((10, 20, 5))
    label = geometric(seed=seed)(data)["label"]
    assert data["label"].min() - 1e-4 <= label.min() and label.max() <= data["label"].max() + 1e-4


def test_brightness_and_bias_field_leave_the_label_alone():
    changed = 0
    for seed in range(6):
        plain = geometric(seed=seed)(textured((20, 20, 20)))
        augmented = Augment((16, 16, 16)).set_random_state(seed)(textured((20, 20, 20)))
        assert torch.equal(plain["label"], augmented["label"])
        changed += not torch.equal(plain["image"], augmented["image"])
    assert changed >= 3


def test_whole_volumes_keep_their_size_without_a_crop():
    result = Augment()(textured((20, 14, 9)))
    assert result["image"].shape == result["label"].shape == (1, 20, 14, 9)

"""Contrast medium that is taken out of a CT: organs, heart and vessels."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bundle.prepare.cleaning import ct_body
from bundle.prepare.contrast import BLOOD, NATIVE, enhanced_blood, remove_contrast

SPACING = np.array([2.0, 2, 2])


def ball(shape, centre, radius):
    """Voxels within ``radius`` of ``centre``, both in voxels; of an infinite cylinder if ``centre`` is of a plane."""
    grid = np.indices(shape[: len(centre)]) - np.reshape(centre, (-1, *[1] * len(centre)))
    inside = (grid**2).sum(0) <= radius**2
    return inside if len(centre) == 3 else np.repeat(inside[..., None], shape[2], axis=2)


def chest(medium: float, rng: np.random.Generator):
    """A chest (x, y, z) with ``medium`` in its blood: HU with noise, the body, and where its parts are."""
    shape = (162, 100, 60)
    grid = np.indices(shape)
    body = (((grid[0] - 65) / 60) ** 2 + ((grid[1] - 50) / 46) ** 2 < 1) | ball(shape, (142, 40), 17)
    ct = np.where(body, -100.0, -1000.0)
    parts = {"lungs": ball(shape, (30, 50), 26) | ball(shape, (100, 50), 26)}
    ct[parts["lungs"]] = -850
    parts["vessels"] = ball(shape, (30, 45), 1.5) | ball(shape, (99, 60), 1.5)
    parts["heart"] = ball(shape, (68, 54), 10)
    parts["aorta"] = ball(shape, (77, 32), 7) & ~parts["lungs"]
    parts["cava"] = ball(shape, (56, 67.5), 2.5)  # medium and blood have not mixed here
    rim, inside = ball(shape, (65, 22), 9), ball(shape, (65, 22), 8)
    parts["spine"], parts["sternum"] = rim, (abs(grid[0] - 65) < 10) & (abs(grid[1] - 91) < 3)
    parts["head"] = ball(shape, (142, 40, 30), 14)  # of a humerus: dense and even inside
    for name in ("vessels", "heart", "aorta", "cava"):
        ct[parts[name]] = BLOOD + medium
    ct[parts["cava"]] += rng.uniform(0, 1.5 * medium, parts["cava"].sum())
    ct[rim], ct[inside], ct[parts["sternum"]] = 600, 210, 500
    ct[parts["head"]], ct[ball(shape, (142, 40, 30), 12)] = 700, 350
    return (ct + np.where(body, rng.normal(0, 15, shape), 0)).astype(np.float32), body, parts


def test_blood_full_of_contrast_medium_becomes_blood_and_bones_stay():
    ct, body, parts = chest(360.0, np.random.default_rng(0))
    native = remove_contrast(ct, body, SPACING)
    for name in ("heart", "aorta", "cava", "vessels"):
        assert np.median(native[parts[name]]) == pytest.approx(BLOOD, abs=15), name
        assert (native[parts[name]] > 150).mean() < 0.03, name
    assert native[parts["heart"]].std() == pytest.approx(13, rel=0.2)  # most of the noise stays
    for name, share in (("spine", 0.94), ("sternum", 1.0), ("head", 1.0)):  # the aorta touches the spine
        assert (native[parts[name]] == ct[parts[name]]).mean() >= share, name
    np.testing.assert_array_equal(native[parts["lungs"] & (ct < -500)], ct[parts["lungs"] & (ct < -500)])


def test_there_is_no_enhanced_blood_without_contrast_medium_or_without_lungs():
    ct, body, _ = chest(0.0, np.random.default_rng(0))
    assert not enhanced_blood(ct, body, SPACING).any()
    ct, body, parts = chest(360.0, np.random.default_rng(0))
    ct[parts["lungs"]] = 40  # in a limb, what is dense and even is a bone
    assert not enhanced_blood(ct, body, SPACING).any()


def test_as_much_blood_is_found_on_a_coarser_grid():
    ct, body, _ = chest(360.0, np.random.default_rng(0))
    coarse = [ndimage.zoom(volume.astype(np.float32), 2 / 3, order=1) for volume in (ct, body)]
    found = enhanced_blood(coarse[0], coarse[1] > 0.5, np.full(3, 3.0)).sum() * 27
    assert found == pytest.approx(enhanced_blood(ct, body, SPACING).sum() * 8, rel=0.15)


@pytest.mark.slow
def test_of_real_cts_the_chest_in_the_arterial_phase_alone_has_enhanced_blood(real_data):
    paths = [*(real_data / "torso_ct").glob("*.nii.gz"), *(real_data / "sts").glob("*/ct.nii.gz")]
    for path in sorted(path for path in paths if "labels" not in path.name):
        image = nib.as_closest_canonical(nib.load(path))
        ct, spacing = image.get_fdata(dtype=np.float32), np.array(image.header.get_zooms(), float)
        found = enhanced_blood(ct, ct_body(ct, spacing), spacing).sum() * spacing.prod()
        assert found > 5e5 if path.name == "chest_contrast.nii.gz" else found == 0, path  # mm3


def test_contrast_medium_goes_and_noise_bone_fat_and_air_stay():
    rng = np.random.default_rng(0)
    ct = np.full((70, 60, 30), -1000, np.float32)
    body = np.zeros(ct.shape, bool)
    body[5:65, 5:55] = True
    ct[body] = -100
    ct[10:60, 10:50], ct[12:30, 12:30], ct[12:30, 34:48] = 45, 110, 180  # muscle, liver, kidney
    ct[40:56, 20:40], ct[43:53, 23:37] = 900, 200  # a bone with its marrow
    ct[50:58, 44:48] = -1000  # gas
    noisy = ct + np.where(body, rng.normal(0, 8, ct.shape), 0).astype(np.float32)
    native = remove_contrast(noisy, body, SPACING)
    for organ in (np.s_[15:27, 15:27, 5:25], np.s_[15:27, 37:45, 5:25]):
        assert np.median(native[organ]) == pytest.approx(NATIVE, abs=3)
        assert native[organ].std() == pytest.approx(8, rel=0.2)
    assert np.median(native[32:38, 13:17, 5:25]) == pytest.approx(45, abs=4)  # muscle far from all of it
    kept = (ct == -1000) | (ct == -100) | (ct >= 900)
    kept[43:53, 23:37] = True
    np.testing.assert_array_equal(native[kept], noisy[kept])

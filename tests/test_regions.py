"""Regions of a CT: bones with their marrow, and what is as dense but no bone."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor

from custom_modules.data.regions import FIRST_REGION, MARROW, SURFACE, CTBodyd, tissue_regions

SPACING = (2.0, 2.0, 2.0)
MUSCLE, BONE = 50.0, 1300.0


def test_regions_part_bone_from_soft_tissue_and_leave_bright_vessels():
    ct = np.full((60, 60, 40), MUSCLE, np.float32)
    ct[10:20, 10:20] = BONE
    ct[40:50, 40:50] = 300.0  # blood with contrast medium
    body = np.ones(ct.shape, bool)
    body[:3] = False
    regions = tissue_regions(ct, body, SPACING)
    assert (regions[:3] == 0).all() and (regions[12:18, 12:18] == 1).all()
    assert (regions[42:48, 42:48] > 1).all()
    assert len(np.unique(regions)) > 4  # organs in the muscle


def test_discs_between_vertebrae_are_no_bone():
    ct = np.full((40, 40, 62), MUSCLE, np.float32)
    for start in (1, 21, 41):  # vertebrae of 32 mm with a shell, discs of 8 mm between them
        ct[10:30, 10:30, start : start + 16] = 700.0
        ct[11:29, 11:29, start + 1 : start + 15] = 200.0
    ct[10:30, 10:30, 17:21] = ct[10:30, 10:30, 37:41] = 90.0
    regions = tissue_regions(ct, np.ones(ct.shape, bool), SPACING)
    assert (regions[14:26, 14:26, [9, 29, 49]] == MARROW).all()
    assert (regions[14:26, 14:26, [18, 19, 38, 39]] >= FIRST_REGION).all()


def test_kidneys_full_of_contrast_medium_are_no_bone():
    ball = np.linalg.norm(np.indices((40, 40, 40)) - 19.5, axis=0)
    kidney = np.select([ball < 5, ball < 13], [600.0, 220.0], MUSCLE).astype(np.float32)
    bone = np.select([ball < 11, ball < 13], [220.0, 600.0], MUSCLE).astype(np.float32)
    body = np.ones(ball.shape, bool)
    assert not np.isin(tissue_regions(kidney, body, SPACING), (MARROW, SURFACE)).any()
    assert (tissue_regions(bone, body, SPACING)[ball < 9] == MARROW).all()


def test_a_table_apart_from_the_body_is_air_in_training_and_an_arm_is_not():
    ct = np.full((80, 60, 12), -1000, np.float32)
    ct[10:60, 20:50], ct[64:76, 25:45], ct[10:60, 4:14] = 40, 30, 250
    volume = MetaTensor(torch.from_numpy(ct)[None], affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    cleared = np.asarray(CTBodyd("label")({"label": volume})["label"][0])
    assert (cleared[10:60, 4:14] == -1000).all()
    assert (cleared[12:58, 22:48] == 40).all() and (cleared[66:74, 27:43] == 30).all()  # opening rounds the corners

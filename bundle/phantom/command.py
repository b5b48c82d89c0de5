"""``python -m bundle phantom OUT``: synthetic patients with known anatomy, for tests, tutorials and trials of the whole
pipeline without data; and a small torso with known HU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from bundle.phantom.anatomy import HEIGHT, Build, paint_body
from custom_modules.errors import InputError
from custom_modules.files import writable_or_stop

# T1-weighted in-phase MR signal with fat at 1000, and HU, of anatomy.TISSUES in turn
MR_SIGNAL = np.array([0, 1000, 380, 470, 180, 60, 70, 760, 430], dtype=np.float32)
HU = np.array([-1000, -100, 50, 60, 8, -780, 950, 180, 36], dtype=np.float32)
BLUR = 0.5  # voxels; partial volume
MR_NOISE, CT_NOISE = 12.0, 15.0

# tissue: MR signal on the training set's scale, HU
TISSUES = {
    "air": (0.0, -1000.0),
    "fat": (1000.0, -100.0),
    "muscle": (350.0, 50.0),
    "lung": (60.0, -800.0),
    "liver": (450.0, 60.0),
    "bone": (80.0, 900.0),
    "marrow": (700.0, 200.0),
}


def torso_phantom(
    shape: tuple[int, int, int] = (96, 72, 80), spacing: float = 4.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make a torso of ellipsoids: body, lungs, liver, spine, ribs.

    Returns:
        MR, CT in HU, both (D, H, W) in RAS order, and their affine.
    """
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[(np.arange(n) - n / 2 + 0.5) * spacing for n in shape], indexing="ij"))
    x, y, z = grid
    labels = np.full(shape, "air", dtype="<U6")

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2

    width, depth = 160 + rng.uniform(-10, 10), 105 + rng.uniform(-10, 10)
    labels[ellipse(0, 0, width, depth) < 1] = "fat"
    labels[ellipse(0, 0, width - 18, depth - 18) < 1] = "muscle"
    wall = (ellipse(0, 0, width - 26, depth - 24) < 1) & (ellipse(0, 0, width - 34, depth - 32) > 1)
    rib = wall & (z % 24 < 9) & (z > -40)
    labels[rib] = "bone"
    for side in (-1, 1):
        lung = ellipse(side * 68, 8, 44, 58) + ((z - 60) / 95) ** 2
        labels[lung < 1] = "lung"
    labels[ellipse(60, 15, 62, 55) + ((z + 70) / 50) ** 2 < 1] = "liver"
    labels[ellipse(0, -60, 22, 20) < 1] = "bone"
    labels[ellipse(0, -60, 17, 15) < 1] = "marrow"
    mr = np.vectorize(lambda t: TISSUES[t][0])(labels)
    ct = np.vectorize(lambda t: TISSUES[t][1])(labels)
    bias = 1 + 0.08 * x / np.abs(x).max()
    mr = np.clip(mr * bias + rng.normal(0, 12, shape), 0, None)
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = [-(n - 1) / 2 * spacing for n in shape]
    return mr.astype(np.float32), ct.astype(np.float32), affine


def whole_body_phantom(
    height: float = 600.0, spacing: float = 2.0, seed: int | Sequence[int] = 0
) -> tuple[MetaTensor, MetaTensor, MetaTensor]:
    """Make a whole body whose build, organs, pose, contrast, bias field and noise are drawn from ``seed``.

    Args:
        height: in mm; everything scales with it except the spacing and the noise.
        spacing: in mm.

    Returns:
        MR (fat near 1000), CT in HU and body mask (0 and 1), each (1, D, H, W) float32 in RAS order.
    """
    rng = np.random.default_rng(seed)
    build, scale = Build.sample(rng), height / HEIGHT
    extent = np.array([860, 420, 1760]) * scale
    axes = [np.arange(low, low + length, spacing) for low, length in zip(extent * [-0.5, -0.45, -0.01], extent)]
    labels = paint_body(tuple(axis / scale for axis in axes), build)
    mr = _contrast(labels, MR_SIGNAL * rng.uniform(0.9, 1.1, MR_SIGNAL.shape), rng) * _coils(axes, rng)
    noise = rng.normal(0, MR_NOISE, (2, *labels.shape)).astype(np.float32)
    mr = np.hypot(mr + noise[0], noise[1])  # Rician, as magnitude images are
    ct = _contrast(labels, HU + np.where(HU > -1000, rng.normal(0, 6, HU.shape), 0), rng)
    ct = ct + rng.normal(0, CT_NOISE, labels.shape)
    body = ndimage.binary_fill_holes(labels > 0)
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    volumes = (mr, np.maximum(ct, -1024), body)
    return tuple(MetaTensor(torch.from_numpy(np.float32(v))[None], affine=torch.from_numpy(affine)) for v in volumes)


def _contrast(labels: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return ``values`` of the tissues with 3 % of texture, blurred by partial volume; (D, H, W) float32."""
    image = values.astype(np.float32)[labels]
    texture = ndimage.gaussian_filter(rng.normal(0, 1, labels.shape).astype(np.float32), 2)
    image = image + np.abs(image) * 0.03 * texture / texture.std() * (labels > 0)
    return ndimage.gaussian_filter(image, BLUR)


def _coils(axes: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return a smooth bias field around 1 that changes by about a tenth along each axis."""
    field = np.ones([len(axis) for axis in axes], dtype=np.float32)
    for n, axis in enumerate(axes):
        phase = np.pi * rng.uniform(0.7, 1.5) * (axis - axis[0]) / np.ptp(axis) + rng.uniform(0, 6)
        wave = 1 + rng.uniform(0.04, 0.1) * np.cos(phase)
        field *= wave.astype(np.float32).reshape([-1 if a == n else 1 for a in range(3)])
    return field


def phantom(
    output: str,
    patients: int = 8,
    seed: int = 0,
    height: float = 600.0,
    spacing: float = 2.0,
    test: float = 0.2,
    validation: float = 0.2,
) -> None:
    """Write synthetic whole-body pairs to OUTPUT in the layout of ``prepare``: ``<patient>/image.nii.gz`` (MR),
    ``label.nii.gz`` (CT in HU), ``body.nii.gz``, and ``datalist.json``.

    Args:
        patients: number of patients; each has its own build, organs, pose and contrast.
        seed: of all patients; the same seed gives the same patients.
        height: mean height in mm; small by default, so that the whole pipeline takes minutes.
        spacing: in mm.
        test, validation: fractions of the patients.
    """
    from bundle.prepare.command import Settings, finish, write_pair
    from bundle.prepare.datalist import split_patients, write_datalist

    if int(patients) < 1:
        raise InputError(f"--patients {patients}: give at least one")
    out, settings = Path(writable_or_stop(str(output))), Settings(spacing=float(spacing))
    names = [f"phantom_{n:03d}" for n in range(int(patients))]
    for n, name in enumerate(names):
        tall = height * float(np.random.default_rng((seed, n)).uniform(0.92, 1.08))
        mr, ct, body = whole_body_phantom(tall, float(spacing), seed=(seed, n))
        write_pair(finish({"image": mr, "label": ct, "before": ct, "body": body}, settings), out / name, name)
    splits = split_patients(names, test, validation, seed)
    write_datalist([{"patient": name, "split": splits[name]} for name in names], out / "datalist.json", seed)
    print(f"{len(names)} patients in {out / 'datalist.json'}")

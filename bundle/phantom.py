"""A small torso phantom with known HU, for the demo without a network and for tests."""

from __future__ import annotations

import numpy as np

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
    """A torso of ellipsoids: body, lungs, liver, spine, ribs.

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
    rib = (ellipse(0, 0, width - 26, depth - 24) < 1) & (ellipse(0, 0, width - 34, depth - 32) > 1) & (z % 24 < 9) & (z > -40)
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

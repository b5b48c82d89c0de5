"""Cutting volumes: tiles that share no voxel, which the autoencoder computes with a halo around each, and overlapping
windows, which the denoiser blends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor

Box = tuple[slice, ...]


def pad_to_windows(x: Tensor, roi_size: Sequence[int], unit: int, margin: int = 0) -> tuple[Tensor, tuple]:
    """Pad (N, C, D, H, W) on both sides by at least ``margin``, to at least ``roi_size`` and to multiples of ``unit``,
    replicating the edge.

    Returns:
        The padded tensor and the index that crops it back.
    """
    sizes = x.shape[2:]
    extra = [max(roi, -(-(size + 2 * margin) // unit) * unit) - size for roi, size in zip(roi_size, sizes)]
    margins = [(e // 2, e - e // 2) for e in extra]
    padded = F.pad(x, [m for pair in reversed(margins) for m in pair], mode="replicate")
    return padded, (..., *(slice(before, before + size) for (before, _), size in zip(margins, sizes)))


def tile_size(size: Sequence[int], voxels: int, halo: int, unit: int) -> list[int]:
    """Of the tiles that hold at most ``voxels`` with a ``halo`` on each side, that which computes least in all; edges are
    multiples of ``unit``. Where none fits, of those that hold the least."""

    def parts(n: int, edge: int) -> list[int]:
        return [min(start + edge + halo, n) - max(start - halo, 0) for start in range(0, n, edge)]

    choices = []  # along each axis: edges, the longest part with its halos, and all parts together
    for n in size:
        edges = range(unit, -(-n // unit) * unit + 1, unit)
        choices.append([(edge, max(parts(n, edge)), sum(parts(n, edge))) for edge in edges])
    every = [list(zip(*choice)) for choice in product(*choices)]
    most = max(voxels, min(math.prod(held) for _, held, _ in every))
    return list(min((math.prod(computed), edges) for edges, held, computed in every if math.prod(held) <= most)[1])


def tiles(size: Sequence[int], tile: Sequence[int], halo: int) -> Iterator[tuple[Box, Box, Box]]:
    """Cut ``size`` into tiles that share no voxel.

    Yields:
        For each the box widened by ``halo`` as far as there is volume, the box, and where it lies in the widened one.
    """
    for start in product(*(range(0, s, t) for s, t in zip(size, tile))):
        box = tuple(slice(a, min(a + t, s)) for a, t, s in zip(start, tile, size))
        wide = tuple(slice(max(b.start - halo, 0), min(b.stop + halo, s)) for b, s in zip(box, size))
        yield wide, box, tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide))


def times(box: Box, factor: int) -> Box:
    """``box`` on a grid that is ``factor`` times finer."""
    return tuple(slice(b.start * factor, b.stop * factor) for b in box)


class Windows:
    """The overlapping windows of a latent, weighted by a Gaussian as in MONAI's ``sliding_window_inference``.

    Those that hold no body are not listed; their share of each voxel's answer goes to ``rest``.

    Args:
        body: (d, h, w) bool, where the latent stands for body.
        roi_size: of a window, at most the size of ``body``.
        overlap: share of a window that neighbours have in common.

    Attributes:
        boxes: of the windows that hold body.
        shares: of each of them in the answer, (d, h, w) of the window.
        rest: (d, h, w), 1 where no listed window has a say.
        needed: (d, h, w) bool, what lies in a listed window.
    """

    def __init__(self, body: Tensor, roi_size: Sequence[int], overlap: float) -> None:
        size = body.shape
        interval = [r if r == s else max(int(r * (1 - overlap)), 1) for r, s in zip(roi_size, size)]
        every = dense_patch_slices(size, roi_size, interval)
        gaussian = compute_importance_map(tuple(roi_size), mode="gaussian", device=body.device).clamp_min(1e-3)
        total = torch.zeros(size, device=body.device)
        for box in every:
            total[box] += gaussian
        self.boxes: list[Box] = [box for box in every if body[box].any()]
        self.shares = [gaussian / total[box] for box in self.boxes]
        self.rest, self.needed = torch.ones_like(total), torch.zeros_like(body)
        for box, share in zip(self.boxes, self.shares):
            self.rest[box] -= share
            self.needed[box] = True

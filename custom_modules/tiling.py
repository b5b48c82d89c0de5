"""Cutting volumes into tiles that share no voxel and are computed with a halo."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch.nn.functional as F
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
    """Choose the size of tiles with at most ``voxels`` voxels, a ``halo`` on each side included, so that the fewest
    voxels are computed in all; of equal sizes the largest. Edges are multiples of ``unit``. If no tile is small enough,
    choose among the smallest."""

    def parts(n: int, edge: int) -> list[int]:
        return [min(start + edge + halo, n) - max(start - halo, 0) for start in range(0, n, edge)]

    choices = []  # along each axis: edges, the longest part with its halos, and the sum of all parts
    for n in size:
        edges = range(unit, -(-n // unit) * unit + 1, unit)
        choices.append([(edge, max(parts(n, edge)), sum(parts(n, edge))) for edge in edges])
    every = [list(zip(*choice)) for choice in product(*choices)]
    most = max(voxels, min(math.prod(held) for _, held, _ in every))
    fitting = [(edges, computed) for edges, held, computed in every if math.prod(held) <= most]
    return list(min(fitting, key=lambda found: (math.prod(found[1]), -math.prod(found[0])))[0])


def tiles(size: Sequence[int], tile: Sequence[int], halo: int) -> Iterator[tuple[Box, Box, Box]]:
    """Cut ``size`` into tiles that share no voxel.

    Yields:
        For each the box widened by ``halo`` within the volume, the box, and the box relative to the widened one.
    """
    for start in product(*(range(0, s, t) for s, t in zip(size, tile))):
        box = tuple(slice(a, min(a + t, s)) for a, t, s in zip(start, tile, size))
        wide = widen(box, halo, size)
        yield wide, box, tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide))


def widen(box: Box, by: int, size: Sequence[int]) -> Box:
    """Widen ``box`` by ``by`` voxels on each side, within a volume of ``size``."""
    return tuple(slice(max(b.start - by, 0), min(b.stop + by, s)) for b, s in zip(box, size))


def scale_box(box: Box, factor: int) -> Box:
    """Convert ``box`` to a grid that is ``factor`` times finer."""
    return tuple(slice(b.start * factor, b.stop * factor) for b in box)

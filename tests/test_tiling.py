"""Tiles share no voxel and leave none out; the cheapest that fits is taken."""

import itertools

import numpy as np
import pytest

from custom_modules.tiling import scale_box, tile_size, tiles

SIZES = ((24, 16, 40), (16, 16, 16), (5, 40, 9), (4, 4, 4))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("halo", (0, 8))
@pytest.mark.parametrize("voxels", (1, 3000, 10**9))
def test_tiles_cover_every_voxel_once_with_what_is_around_them(size, halo, voxels):
    tile = tile_size(size, voxels, halo, 4)
    seen, places = np.zeros(size, dtype=int), np.indices(size)
    for wide, box, inner in tiles(size, tile, halo):
        seen[box] += 1
        assert np.array_equal(places[:, *wide][:, *inner], places[:, *box])
        assert all(w.start == max(b.start - halo, 0) for w, b in zip(wide, box))
        assert all(w.stop == min(b.stop + halo, n) for w, b, n in zip(wide, box, size))
        assert all(b.start % 4 == 0 for b in box)
        volume = np.prod([w.stop - w.start for w in wide])
        assert volume <= max(voxels, np.prod([min(4 + 2 * halo, n) for n in size]))
    assert (seen == 1).all()


@pytest.mark.parametrize("size, halo, voxels", (((24, 16, 40), 4, 6000), ((8, 8, 64), 8, 2000)))
def test_no_other_tile_that_fits_computes_less(size, halo, voxels):
    def cost(tile):
        parts = [np.prod([w.stop - w.start for w in wide]) for wide, _, _ in tiles(size, tile, halo)]
        return sum(parts), max(parts)

    best, _ = cost(tile_size(size, voxels, halo, 4))
    for tile in itertools.product(*(range(4, n + 1, 4) for n in size)):
        total, largest = cost(tile)
        assert largest > voxels or total >= best


def test_a_box_on_a_finer_grid():
    assert scale_box((slice(1, 3), slice(0, 2)), 4) == (slice(4, 12), slice(0, 8))

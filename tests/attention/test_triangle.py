"""Tiles of a band as windows of one triangle, against positions compared one by one."""

from __future__ import annotations

import random

import torch

from torchwrap.attention.triangle import EDGE, band_tile

CPU = torch.device("cpu")


def test_every_tile_of_a_band_is_a_window_of_the_triangle() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        rows, columns = draw.randint(0, EDGE), draw.randint(0, EDGE)
        delta, right = draw.randint(-300, 300), draw.choice((None, 0, draw.randint(0, 200)))
        left = draw.choice((None, draw.randint(0, 200)))
        tile = band_tile(delta, rows, columns, right=right, left=left, device=CPU)
        ahead = delta + torch.arange(columns) - torch.arange(rows)[:, None]  # key position less query position
        expected = torch.ones(rows, columns, dtype=torch.bool)
        if right is not None:
            expected &= ahead <= right
        if left is not None:
            expected &= ahead >= -left
        assert torch.equal(tile, expected), (delta, rows, columns, right, left)


def test_causal_tiles_are_views_of_64_kib() -> None:
    tiles = [band_tile(delta, 64, 128, right=0, left=None, device=CPU) for delta in (-500, -64, 0, 17, 500)]
    assert {tile.untyped_storage().data_ptr() for tile in tiles} == {tiles[0].untyped_storage().data_ptr()}
    assert tiles[0].untyped_storage().nbytes() == 64 * 1024

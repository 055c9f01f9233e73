"""Classes of tiles against the dense mask, looked at tile by tile."""

from __future__ import annotations

import random

import pytest
import torch

from tests.attention.masks import Largest, random_mask, whole
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.errors import ConfigError


def by_looking(mask: TileMask, bm: int, bn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, nq, nk] twice: tiles with a visible key, complete (in keys) tiles without a hidden one."""
    dense = whole(mask)
    batch, _, q_length, kv_length = dense.shape
    some = torch.zeros(batch, -(-q_length // bm), -(-kv_length // bn), dtype=torch.bool)
    every = torch.zeros_like(some)
    for i in range(some.shape[1]):
        for j in range(some.shape[2]):
            tile = dense[:, :, i * bm : (i + 1) * bm, j * bn : (j + 1) * bn].flatten(1)
            some[:, i, j], every[:, i, j] = tile.any(1), tile.all(1) & ((j + 1) * bn <= kv_length)
    return some, every


def named(mask: TileMask, bm: int, bn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two from `tiles`: not empty, full."""
    classes, index = mask.tiles(bm, bn), torch.arange(-(-mask.shape[3] // bn))
    lo, hi, full_lo, full_hi = (
        part[..., None].expand(mask.shape[0], -1, -1) for part in (classes.lo, classes.hi, classes.full_lo, classes.full_hi)
    )
    assert ((lo <= full_lo) & (full_lo <= full_hi) & (full_hi <= hi)).all()
    assert all(part.dtype == torch.int32 for part in (lo, hi, full_lo, full_hi))
    return (index >= lo) & (index < hi), (index >= full_lo) & (index < full_hi)


@pytest.mark.parametrize("seed", range(4))
def test_no_visible_key_is_in_an_empty_tile_and_no_hidden_one_in_a_full_tile(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    full = 0
    for _ in range(250):
        mask, bm, bn = random_mask(draw), draw.choice((1, 4, 7, 16, 64)), draw.choice((1, 4, 5, 16, 64))
        some, every = by_looking(mask, bm, bn)
        kept, complete = named(mask, bm, bn)
        assert not (some & ~kept).any(), (mask, bm, bn)
        assert not (complete & ~every).any(), (mask, bm, bn)
        full += int(complete.sum())
    assert full > 1000  # a classification that calls nothing full would pass


@pytest.mark.parametrize("seed", range(2))
def test_intervals_are_classified_exactly(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        offset = draw.choice((None, 0, 7))
        mask = TileMask(
            1, draw.randint(1, 40), draw.randint(1, 40), q_offset=offset, right=draw.choice((None, 0, 3)),
            left=draw.choice((None, 0, 2, 9)), chunk=draw.choice((None, None, 8)),
        )  # fmt: skip
        bm, bn = draw.choice((1, 4, 7, 16)), draw.choice((1, 4, 5, 16))
        some, every = by_looking(mask, bm, bn)
        kept, complete = named(mask, bm, bn)
        assert torch.equal(complete, every), (mask, bm, bn)
        # The range is the hull: chunks may leave empty tiles between two chunks of one row of tiles.
        hull = (some.cumsum(-1) > 0) & (some.flip(-1).cumsum(-1).flip(-1) > 0)
        assert torch.equal(kept, hull), (mask, bm, bn)


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_see_a_key_are_found(seed: int) -> None:
    draw = random.Random(seed + 10)
    torch.manual_seed(seed)
    dead = 0
    for _ in range(200):
        mask = random_mask(draw)
        live = whole(mask).any(-1).any(1)
        assert torch.equal(mask.live_rows().expand_as(live), live), mask
        dead += int((~live).sum())
    assert dead > 100


def test_the_longest_run_without_holes_is_called_full() -> None:
    valid = torch.ones(1, 80, dtype=torch.bool)
    valid[0, 20] = False
    classes = TileMask(1, 8, 80, key_mask=valid).tiles(8, 8)
    assert [int(part) for part in (classes.lo, classes.hi, classes.full_lo, classes.full_hi)] == [0, 10, 3, 10]


def test_padding_is_never_loaded() -> None:
    classes = TileMask.padded([40, 8], 64, 64).tiles(16, 16)
    assert classes.lo.tolist() == [[0, 1, 1, 1], [0, 0, 0, 3]] and classes.hi.tolist() == [[0, 2, 3, 4], [0, 0, 0, 4]]


def test_packed_sequences_do_not_load_each_other() -> None:
    mask = TileMask.from_cu_seqlens(torch.tensor([0, 32, 64]))
    assert mask.tiles(16, 16).lo.tolist() == [[0, 0, 2, 2]]
    assert mask.tiles(16, 16).full_lo.tolist() == [[1, 0, 3, 2]] and mask.tiles(16, 16).full_hi.tolist() == [[1, 1, 3, 3]]


def test_classes_are_worked_out_once() -> None:
    mask = TileMask.causal(1, 64, 64)
    assert mask.tiles(16, 16) is mask.tiles(16, 16) and mask.detach().tiles(16, 16) is mask.tiles(16, 16)  # type: ignore[attr-defined]
    assert mask.tiles(16, 16) is not mask.tiles(8, 16)


@pytest.mark.parametrize("lengths", [(2, 0, 4), (2, 4, 0), (0, 4, 4)], ids=["no queries", "no keys", "no batch"])
def test_empty_masks_have_no_tiles(lengths: tuple[int, int, int]) -> None:
    mask = TileMask.causal(*lengths, key_mask=torch.ones(lengths[0], lengths[2], dtype=torch.bool))
    classes = mask.tiles(4, 4)
    assert classes.lo.shape == (lengths[0], -(-lengths[1] // 4))
    assert not classes.hi.any() and not mask.live_rows().any()


def test_a_long_mask_is_classified_without_anything_of_its_size() -> None:
    length, batch = 4096, 2
    valid = torch.rand(batch, length) < 0.99
    numbers = (torch.arange(length, dtype=torch.int32) // 1000).expand(batch, -1)
    with Largest() as seen:
        for mask in (
            TileMask.window(batch, length, length, 300, key_mask=valid), TileMask.padded([4000, 100], length, length),
            TileMask.causal(batch, length, length, q_segments=numbers, k_segments=numbers, chunk=512),
        ):  # fmt: skip
            mask.tiles(64, 64)
            mask.live_rows()
            mask.key_range(1)
    assert 0 < seen.elements <= 16 * batch * length < length * length // 64


@pytest.mark.parametrize("seed", range(2))
def test_parts_of_random_masks_stay_in_place(seed: int) -> None:
    draw = random.Random(seed + 20)
    for _ in range(300):
        mask = random_mask(draw)
        (b0, b1), (r0, r1), (c0, c1) = (sorted(draw.choices(range(mask.shape[dim] + 1), k=2)) for dim in (0, 2, 3))
        part = mask.sub(rows=(r0, r1), columns=(c0, c1), batch=(b0, b1))
        assert torch.equal(whole(part), whole(mask)[b0:b1, :, r0:r1, c0:c1]), mask


def test_tiles_of_no_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 x 16"):
        TileMask.causal(1, 4, 4).tiles(0, 16)

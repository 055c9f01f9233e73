"""Plans cover what each row sees, once, and nothing else; and they are as small as they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention.cases import MASKS, make
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu.parts import SMALL, TILE, Block, Strip, plan
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import visible


def covered(call: Call) -> Tensor:
    """How often each pair of row and column is attended to by the plan, int `[B, Sq, Sk]`."""
    seen = visible(call)
    one = torch.ones(call.batch, call.q_length, call.kv_length, dtype=torch.int64)
    rule = one if seen is None else seen[:, 0].expand(call.batch, -1, -1).long()
    count = torch.zeros_like(one)
    for block in plan(call):
        batch = slice(*block.batch)
        if isinstance(block, Strip):
            for tile in range(block.tiles):
                top, left = block.rows[0] + tile * block.height, block.column + tile * block.height
                index = batch, slice(top, top + block.height), slice(left, left + block.reach)
                count[index] += rule[batch, slice(*block.rows)][:, : block.height, block.column : block.column + block.reach]
            continue
        for part in block.parts:
            index = batch, slice(*block.rows), slice(*part.columns)
            square = one[index].tril() if part.form == "causal" else one[index] if part.form == "full" else rule[index]
            count[index] += square
    return count


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seed", range(6))
def test_a_plan_covers_each_visible_pair_once_and_no_other(name: str, seed: int) -> None:
    call, _ = make(seed, mask=name, extra="plain", width=16)
    seen = visible(call)
    expected = torch.ones(call.batch, call.q_length, call.kv_length, dtype=torch.int64) if seen is None else seen[:, 0].long()
    assert torch.equal(covered(call), expected.expand(call.batch, -1, -1))


def of(mask: TileMask, batch: int = 1) -> list[Block | Strip]:
    q, k = torch.zeros(batch, 1, mask.shape[2], 8), torch.zeros(batch, 1, mask.shape[3], 8)
    return plan(checked(q, k, k, mask=mask))


def test_a_chunk_of_a_prompt_is_a_rectangle_and_a_square() -> None:
    (block,) = of(TileMask.causal(1, 64, 1000))
    assert isinstance(block, Block)
    assert [(part.columns, part.form) for part in block.parts] == [((0, 936), "full"), ((936, 1000), "causal")]


def test_a_long_window_is_a_triangle_and_a_strip() -> None:
    blocks = of(TileMask.window(1, 4096, 4096, 512))
    assert [type(block) for block in blocks[:2]] == [Block, Strip] and len(blocks) <= 3
    pairs = sum(block.tiles * block.height * block.reach if isinstance(block, Strip) else 0 for block in blocks)
    assert pairs <= 4096 * (512 + TILE)


def test_padding_is_in_no_part() -> None:
    blocks = of(TileMask.padded([2048, 256, 512, 1024], 2048, 2048), batch=4)
    pairs = sum((block.rows[1] - block.rows[0]) * (part.columns[1] - part.columns[0]) for block in blocks for part in block.parts)  # type: ignore[union-attr]
    assert pairs == sum(length**2 for length in (2048, 256, 512, 1024))


def test_batch_rows_of_one_length_are_one_block() -> None:
    assert len(of(TileMask.padded([300, 300, 300], 300, 300), batch=3)) == 1


def test_a_small_batch_is_one_tile() -> None:
    (block,) = of(TileMask.padded([9, 5, 64], 64, 64), batch=3)
    assert isinstance(block, Block) and block.parts[0].form == "each" and SMALL >= 64 * 64


def test_a_plan_is_made_once_for_each_mask() -> None:
    mask = TileMask.window(1, 1000, 1000, 50)
    assert of(mask) is of(mask) or of(mask)[0] is of(mask)[0]

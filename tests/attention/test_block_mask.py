"""Masks for FlexAttention: the same visibility index by index, and blocks that cover it."""

from __future__ import annotations

import random

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from tests.attention.masks import random_mask, whole
from torchwrap.attention.masks.block_mask import index_function
from torchwrap.attention.masks.mask import TileMask


def test_the_function_of_indices_is_the_mask() -> None:
    draw = random.Random(3)
    for _ in range(300):
        mask = random_mask(draw)
        batch, heads, q_length, kv_length = mask.shape
        indices = (torch.arange(size).view(-1, *(1,) * (3 - dim)) for dim, size in enumerate(mask.shape))
        seen = index_function(mask)(*indices)
        assert torch.equal(seen.expand(batch, heads, q_length, kv_length), whole(mask)), mask


def test_blocks_cover_the_mask_and_full_ones_hold_nothing_hidden() -> None:
    draw = random.Random(4)
    for _ in range(60):
        mask = random_mask(draw)
        block = draw.choice((8, 16))
        made = mask.to_block_mask(block)
        dense = whole(mask).any(1)
        for b in range(made.shape[0]):
            for i in range(made.kv_num_blocks.shape[2]):
                partial = made.kv_indices[b, 0, i, : made.kv_num_blocks[b, 0, i]].tolist()
                full = made.full_kv_indices[b, 0, i, : made.full_kv_num_blocks[b, 0, i]].tolist()
                assert not set(partial) & set(full)
                rows = whole(mask)[b if len(dense) > 1 else 0, :, i * block : (i + 1) * block]
                assert all(rows[..., j * block : (j + 1) * block].all() for j in full)
                rest = set(range(-(-mask.shape[3] // block))) - set(partial) - set(full)
                assert not any(rows[..., j * block : (j + 1) * block].any() for j in rest)


def test_flex_attention_reads_it() -> None:
    mask = TileMask.padded([5, 12], 12, 12).to_block_mask(8)
    assert isinstance(mask, BlockMask)
    dense = create_mask(mask.mask_mod, 2, 1, 12, 12, device="cpu")
    assert torch.equal(dense, whole(TileMask.padded([5, 12], 12, 12)))

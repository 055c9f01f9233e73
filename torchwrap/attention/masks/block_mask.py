"""A mask in the form that FlexAttention takes: lists of full and partial blocks, and a function of indices for the partial ones.

Letters: B batch, H heads, nq and nk blocks along queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from torchwrap.attention.masks.mask import TileMask

__all__ = ["block_mask", "index_function"]


def index_function(mask: TileMask) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as a function of batch row, head, query row and key column, integer tensors that broadcast; no positions.

    Numbers are tensors in it, so that one compiled kernel serves masks that differ in them: offsets grow with every token.

    Cost: one copy of each number to the device; the function reads the tensors of the mask.
    """
    q_offset, kv_offset = (torch.as_tensor(value, device=mask.device) for value in (mask.q_offset, mask.kv_offset))
    right, left, chunk = (
        None if value is None else torch.as_tensor(value, device=mask.device) for value in (mask.right, mask.left, mask.chunk)
    )
    shift, kv_start, kv_end, key_mask = mask.shift, mask.kv_start, mask.kv_end, mask.key_mask
    q_segments, k_segments = mask.q_segments, mask.k_segments
    if mask.dictionary is not None:
        codes, tiles, (bm, bn) = mask.dictionary.codes, mask.dictionary.tiles, mask.dictionary.block
        r0, c0 = (torch.as_tensor(first, device=mask.device) for first in mask.dictionary.start)
    else:
        codes = None

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = q + q_offset, k + kv_offset
        seen = (q >= 0) & (k >= 0)
        if right is not None:
            seen = seen & (key <= query + right)
        if left is not None:
            seen = seen & (key >= query - left)
        if chunk is not None:
            start = 0 if shift is None else shift[_row(b, shift)]
            seen = seen & ((key - start) // chunk == (query - start) // chunk)
        if kv_start is not None:
            seen = seen & (k >= kv_start[_row(b, kv_start)])
        if kv_end is not None:
            seen = seen & (k < kv_end[_row(b, kv_end)])
        if key_mask is not None:
            seen = seen & key_mask[_row(b, key_mask), k]
        if q_segments is not None and k_segments is not None:
            seen = seen & (q_segments[_row(b, q_segments), q] == k_segments[_row(b, k_segments), k])
        if codes is not None:
            row, column = q + r0, k + c0
            code = codes[_row(b, codes), h if codes.shape[1] > 1 else 0 * h, row // bm, column // bn].long()
            packed = tiles[code, row % bm, column % bn // 8].int()
            seen = seen & ((packed >> column % 8) % 2 == 1)
        return seen

    return visible


def _row(b: Tensor, field: Tensor) -> Tensor:
    return b if field.shape[0] > 1 else 0 * b


def block_mask(mask: TileMask, block: int) -> BlockMask:
    """The mask as `torch.nn.attention.flex_attention.BlockMask`, with blocks of `block` x `block`.

    Raises:
        ConfigError: `block` is below 1.

    Cost: B * nq * nk entries of 4 bytes, four times over: what a `BlockMask` consists of.
    """
    from torch.nn.attention.flex_attention import BlockMask  # slow import, for one back end

    classes = mask.tiles(block, block)
    index = torch.arange(-(-mask.shape[3] // block), device=mask.device)
    lo, hi, full_lo, full_hi = (part[:, None, :, None] for part in (classes.lo, classes.hi, classes.full_lo, classes.full_hi))
    full = (index >= full_lo) & (index < full_hi)
    partial = (index >= lo) & (index < hi) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=block, mask_mod=index_function(mask), seq_lengths=(mask.shape[2], mask.shape[3])
    )


def _listed(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks of each row of blocks, and their indices first: int32 [B, 1, nq] and [B, 1, nq, nk]."""
    return flags.sum(-1, dtype=torch.int32), flags.int().argsort(dim=-1, descending=True, stable=True).int()

"""Forward and backward of a call, block by block.

Forward: the parts of a block are computed by themselves and merged by their lse. Backward: given out and lse of the whole call, each part
yields its own share of the gradients, and shares are added up in float32; no part needs another (FlashAttention-2, Dao 2023, section 3.1).
Memory beyond inputs and results: float32 sums of the gradients, one block's partial results, one tile's additive mask, and, in the
backward of windows, the gradients of `SLAB` tiles.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cpu import kernel
from torchwrap.attention.cpu.parts import Block, Part, Span, Strip, plan
from torchwrap.attention.merge import grad_of_sinks, merge, with_sinks

__all__ = ["backward", "forward", "refuses"]

SLAB = 8
"""Tiles of a window whose gradients of keys are in memory at once."""


def refuses(call: Call) -> str | None:
    """Why the fused kernel cannot compute any part of this call, or None."""
    if call.softcap is not None:
        return f"softcap={call.softcap}: torch's kernel has none"
    if call.dropout:
        return f"dropout={call.dropout}: torch's kernel has none"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out and lse, as in `contract`."""
    dtype = call.q.dtype
    if dtype == torch.float16:
        # torch's kernel takes 1.5 to 2.5 times as long in float16 as with copies in float32 (torch 2.13, AVX-512, 16 to 2048 queries).
        call = _widened(call)
    blocks = plan(call)
    if len(blocks) == 1 and isinstance(blocks[0], Block) and _is_whole(blocks[0], call):
        out, lse = _block(call, blocks[0])
    else:
        out, lse = _nothing(call)
        for block in blocks:
            batch, rows = slice(*block.batch), slice(*block.rows)
            part, part_lse = _strip(call, block) if isinstance(block, Strip) else _block(call, block)
            out[batch, :, rows] = part
            lse[batch, :, rows] = part_lse
    out, lse = with_sinks(out, lse, call.sinks)
    return out.to(dtype), lse


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients:
    """Gradients of q, k, v and the sinks; that of the bias is not computed here.

    Args:
        call: as given to `forward`.
        out: the result of `forward`.
        lse: the result of `forward`.
        grad_out: gradient of out.
    """
    dtype = call.q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        # In halves, torch's kernel adds gradients of keys up in them, over heads of a group and blocks of rows: errors of 2 to 6 times
        # those of the definition in bfloat16 (1 and 8 heads in a group, 512 and 1024 keys). The copies take 1.6 times as long as it
        # does in bfloat16, and a tenth of its time in float16 (torch 2.13, AVX-512).
        call = _widened(call)
        out, grad_out = out.float(), grad_out.float()
    finite = torch.where(lse == -math.inf, 0.0, lse)
    blocks = plan(call)
    if len(blocks) == 1 and isinstance(blocks[0], Block) and _is_whole(blocks[0], call) and len(blocks[0].parts) == 1:
        added, _ = _added(call, blocks[0], blocks[0].parts[0])
        columns = slice(*blocks[0].parts[0].columns)
        if call.kv_length == columns.stop - columns.start:
            causal = blocks[0].parts[0].form == "causal"
            dq, dk, dv = kernel.backward(grad_out, call.q, call.k, call.v, out, finite, call.scale, causal=causal, added=added)
            return dq.to(dtype), dk.to(dtype), dv.to(dtype), _sinks(call, out, lse, grad_out), None
    sums = tuple(torch.zeros_like(tensor, dtype=call.accumulate) for tensor in (call.q, call.k, call.v))
    for block in blocks:
        if isinstance(block, Strip):
            _strip_backward(call, block, out, finite, grad_out, sums)
        else:
            _block_backward(call, block, out, finite, grad_out, sums)
    dq, dk, dv = (total.to(dtype) for total in sums)
    return dq, dk, dv, _sinks(call, out, lse, grad_out), None


def _sinks(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Tensor | None:
    if call.sinks is None:
        return None
    return grad_of_sinks(call.sinks, lse, (grad_out.to(lse.dtype) * out).sum(-1))


def _widened(call: Call) -> Call:
    """The call with float32 copies of q, k and v."""
    return replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())


def _nothing(call: Call) -> tuple[Tensor, Tensor]:
    """Out and lse of no key, out laid out as q is: models that keep heads innermost get their output so as well."""
    empty = torch.empty_like(call.q) if call.value_width == call.width else call.q.new_empty(*call.q.shape[:3], call.value_width)
    return empty.zero_(), call.q.new_full(call.q.shape[:3], -math.inf, dtype=call.accumulate)


def _is_whole(block: Block, call: Call) -> bool:
    return block.batch == (0, call.batch) and block.rows == (0, call.q_length)


def _block(call: Call, block: Block) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] | None = None
    batch = slice(*block.batch)
    q = call.q[batch, :, slice(*block.rows)]
    for part in block.parts:
        columns = slice(*part.columns)
        added, live = _added(call, block, part)
        k, v = call.k[batch, :, columns], call.v[batch, :, columns]
        found = kernel.forward(q, k, v, call.scale, causal=part.form == "causal", added=added, live=live)
        result = found if result is None else merge(*result, *found)
    assert result is not None
    return result


def _block_backward(call: Call, block: Block, out: Tensor, lse: Tensor, grad_out: Tensor, sums: tuple[Tensor, ...]) -> None:
    batch, rows = slice(*block.batch), slice(*block.rows)
    q, o, g, ell = (tensor[batch, :, rows] for tensor in (call.q, out, grad_out, lse))
    for part in block.parts:
        columns = slice(*part.columns)
        added, _ = _added(call, block, part)
        k, v = call.k[batch, :, columns], call.v[batch, :, columns]
        shares = kernel.backward(g, q, k, v, o, ell, call.scale, causal=part.form == "causal", added=added)
        for total, share, span in zip(sums, shares, (rows, columns, columns), strict=True):
            total[batch, :, span] += share


def _added(call: Call, block: Block, part: Part) -> tuple[Tensor | None, Tensor | None]:
    """What to add to the scores of a part, and which rows see a key in it (None: all)."""
    if part.form in ("full", "causal") and call.bias is None:
        return None, None
    seen = _seen(call, block, part)
    if call.bias is not None:
        added = _bias(call.bias, block.batch, block.rows, part.columns)
        added = added.to(_added_dtype(call)) if seen is None else torch.where(seen, added, -math.inf).to(_added_dtype(call))
        live = added.amax(-1) != -math.inf
    else:
        assert seen is not None
        added, live = _additive(seen, call.q.dtype), seen.any(-1)
    shape = block.batch[1] - block.batch[0], call.heads, block.rows[1] - block.rows[0], part.columns[1] - part.columns[0]
    return added.expand(shape), None if bool(live.all()) else live


def _seen(call: Call, block: Block, part: Part) -> Tensor | None:
    mask = call.mask
    if mask is None or part.form in ("full", "causal"):
        return None
    if part.form == "masked":
        return mask.rectangle(block.batch[0], block.rows, part.columns)
    return mask.rectangles(block.rows, part.columns)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(seen.shape, -math.inf, dtype=dtype, device=seen.device).masked_fill_(seen, 0.0)


def _added_dtype(call: Call) -> torch.dtype:
    """The kernel takes masks of the dtype of q, or float32 beside halves."""
    assert call.bias is not None
    return call.bias.dtype if call.bias.dtype in (call.q.dtype, call.accumulate) else call.q.dtype


def _bias(bias: Tensor, batch: Span, rows: Span, columns: Span) -> Tensor:
    for dim, span in ((0, batch), (2, rows), (3, columns)):
        if bias.shape[dim] > 1:
            bias = bias.narrow(dim, span[0], span[1] - span[0])
    return bias.detach()


def _strip(call: Call, strip: Strip) -> tuple[Tensor, Tensor]:
    """One call of the kernel for all tiles of a batch row."""
    added = _strip_mask(call, strip)
    outs, lses = [], []
    for b in range(*strip.batch):
        q, k, v = _strip_views(call, strip, b, (0, strip.tiles))
        out, lse = kernel.forward(q, k, v, call.scale, added=added)
        outs.append(_joined(out))
        lses.append(_joined(lse))
    return (outs[0][None], lses[0][None]) if len(outs) == 1 else (torch.stack(outs), torch.stack(lses))


def _strip_backward(call: Call, strip: Strip, out: Tensor, lse: Tensor, grad_out: Tensor, sums: tuple[Tensor, ...]) -> None:
    added = _strip_mask(call, strip)
    height, reach = strip.height, strip.reach
    for b in range(*strip.batch):
        for first in range(0, strip.tiles, SLAB):
            some = first, min(first + SLAB, strip.tiles)
            rows = slice(strip.rows[0] + some[0] * height, strip.rows[0] + some[1] * height)
            q, k, v = _strip_views(call, strip, b, some)
            o, g, ell = (_cut(tensor[b, :, rows], height) for tensor in (out, grad_out, lse))
            dq, dk, dv = kernel.backward(g, q, k, v, o, ell, call.scale, added=added)
            sums[0][b, :, rows] += _joined(dq)
            for tile in range(some[1] - some[0]):
                column = strip.column + (first + tile) * height
                sums[1][b, :, column : column + reach] += dk[tile]
                sums[2][b, :, column : column + reach] += dv[tile]


def _strip_mask(call: Call, strip: Strip) -> Tensor:
    assert call.mask is not None
    rows = strip.rows[0], strip.rows[0] + strip.height
    seen = call.mask.rectangle(strip.batch[0], rows, (strip.column, strip.column + strip.reach))
    added: Tensor = _additive(seen, call.q.dtype)[0]
    return added


def _strip_views(call: Call, strip: Strip, b: int, tiles: Span) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles as a batch: q `[tiles, Hq, height, D]`; k and v `[tiles, Hkv, reach, D]`, overlapping."""
    first, count = tiles[0] * strip.height, tiles[1] - tiles[0]
    rows = slice(strip.rows[0] + first, strip.rows[0] + first + count * strip.height)
    column = strip.column + first

    def windows(tensor: Tensor) -> Tensor:
        part = tensor[b, :, column : column + (count - 1) * strip.height + strip.reach]
        return part.unfold(1, strip.reach, strip.height).permute(1, 0, 3, 2)

    return _cut(call.q[b, :, rows], strip.height), windows(call.k), windows(call.v)


def _cut(tensor: Tensor, height: int) -> Tensor:
    """`[H, tiles * height, ...]` as `[tiles, H, height, ...]`."""
    tiles: Tensor = tensor.unflatten(1, (-1, height)).transpose(0, 1)
    return tiles


def _joined(tensor: Tensor) -> Tensor:
    """`[tiles, H, height, ...]` as `[H, tiles * height, ...]`."""
    return tensor.transpose(0, 1).flatten(1, 2)

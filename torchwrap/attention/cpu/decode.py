"""A few queries over many keys: every key is read once for all query heads that share it.

The query heads of a group (times the query tokens) become the rows of one small matrix for each key head. Then either the native kernel
reads keys and values once (`torchwrap.native.decode`), or torch's fused kernel does, over pieces of the keys: one query has only B * Hkv
tasks, too few for the cores, and pieces make more of them; their results are merged (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.cpu import kernel
from torchwrap.attention.cpu.parts import Block, plan
from torchwrap.attention.merge import merge, merge_stack, with_sinks

__all__ = ["PIECE", "forward", "native_refuses", "refuses"]

PIECE = 2048
"""Keys of one piece. Measured on two cores: 1024 to 4096 are within noise of each other, see docs/results."""
MOST_ROWS, MOST_WIDTH = 64, 512
_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def refuses(call: Call) -> str | None:
    """Why this is no work for `forward`, or None."""
    if native_refuses(call) is None:
        return None
    if call.q_length != 1:
        return f"{call.q_length} queries"
    mask = call.mask
    if call.bias is not None or call.softcap is not None or call.dropout:
        return "bias, softcap or dropout"
    if mask is not None and (mask.dictionary is not None or mask.key_mask is not None or mask.q_segments is not None):
        return "the mask is not one range of keys"
    return None


def native_refuses(call: Call) -> str | None:
    """Why the native kernel cannot compute this call, or None."""
    if not _native_is_there():
        return "the native kernels were not built"
    mask = call.mask
    if call.bias is not None or call.dropout:
        return "bias or dropout"
    if mask is not None and (mask.dictionary is not None or mask.key_mask is not None or mask.q_segments is not None):
        return "the mask is not one range of keys for each row"
    if call.group * call.q_length > MOST_ROWS:
        return f"{call.group} heads of a group times {call.q_length} queries are more than {MOST_ROWS} rows"
    if call.q.dtype not in _NATIVE or max(call.width, call.value_width) > MOST_WIDTH:
        return f"{call.q.dtype} of width {call.width}"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out and lse, as in `contract`."""
    out, lse = _native(call) if native_refuses(call) is None else _fused(call)
    shape = call.batch, call.heads, call.q_length
    out, lse = with_sinks(out.reshape(*shape, call.value_width), lse.reshape(shape), call.sinks)
    return out.to(call.q.dtype), lse


def _folded(call: Call) -> Tensor:
    """q as `[B, Hkv, G * Sq, D]`; a view for one query."""
    return call.q.reshape(call.batch, call.kv_heads, call.group * call.q_length, call.width)


def _native_room() -> Any:
    try:
        return importlib.import_module("torchwrap.native")  # on first use: looks for a library file
    except ModuleNotFoundError:
        return None


@functools.cache
def _native_is_there() -> bool:
    native = _native_room()
    return native is not None and bool(native.available())


def _native(call: Call) -> tuple[Tensor, Tensor]:
    native = _native_room()
    first, end, limits = _limits(call)
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (_folded(call), call.k, call.v))
    out, lse = native.decode(q, k, v, first, end, limits, scale=call.scale, softcap=call.softcap)
    return out, lse


def _limits(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """First and last column of each batch row, and of each row of `_folded`, as far as the mask has such."""
    mask = call.mask
    if mask is None:
        return None, None, None
    first, end = (None if bound is None else bound.expand(call.batch).contiguous() for bound in (mask.kv_start, mask.kv_end))
    place = mask.first_query() - mask.kv_offset
    if mask.chunk is None and (mask.right is None or place + mask.right >= call.kv_length - 1) and mask.left is None:
        return first, end, None
    rows = torch.arange(place, place + call.q_length).expand(call.batch, -1)
    low, high = torch.zeros_like(rows), torch.full_like(rows, call.kv_length)
    if mask.right is not None:
        high = torch.minimum(high, rows + (mask.right + 1))
    if mask.left is not None:
        low = torch.maximum(low, rows - mask.left)
    if mask.chunk is not None:
        shift = -mask.kv_offset if mask.shift is None else mask.shift.to(torch.int64)[:, None] - mask.kv_offset
        start = torch.div(rows - shift, mask.chunk, rounding_mode="floor") * mask.chunk + shift
        low, high = torch.maximum(low, start), torch.minimum(high, start + mask.chunk)
    both = torch.stack([low.clamp(min=0), torch.maximum(high, low).clamp(0, call.kv_length)], -1).to(torch.int32)
    return first, end, both[:, None].expand(-1, call.group, -1, -1).reshape(call.batch, -1, 2)


def _fused(call: Call) -> tuple[Tensor, Tensor]:
    """By torch's kernel, for one query: a block of the plan is some batch rows and a range of columns."""
    q = _folded(call)
    blocks = plan(call)
    if len(blocks) == 1 and blocks[0].batch == (0, call.batch):
        return _range(call, q, blocks[0])
    out = q.new_zeros(*q.shape[:3], call.value_width, dtype=call.accumulate)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=call.accumulate)
    for block in blocks:
        batch = slice(*block.batch)
        out[batch], lse[batch] = _range(call, q[batch], block)
    return out, lse


def _range(call: Call, q: Tensor, block: object) -> tuple[Tensor, Tensor]:
    assert isinstance(block, Block) and len(block.parts) == 1
    first, end = block.parts[0].columns
    k, v = (tensor[slice(*block.batch), :, first:end] for tensor in (call.k, call.v))
    pieces = (end - first) // PIECE
    if pieces < 2 or call.width != call.value_width:
        return _rows(q, k, v, call.scale)
    inner = pieces * PIECE
    found = []
    for b in range(q.shape[0]):
        keys, values = (tensor[b, :, :inner].unflatten(1, (pieces, PIECE)) for tensor in (k, v))
        found.append(_rows(q[b, :, None].expand(-1, pieces, -1, -1), keys, values, call.scale))
    out, lse = merge_stack(torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found]), 2)
    if inner == end - first:
        return out, lse
    return merge(out, lse, *_rows(q, k[:, :, inner:], v[:, :, inner:], call.scale))


def _rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.dtype != torch.float16:
        return kernel.forward(q, k, v, scale)
    return kernel.forward(q.float(), k.float(), v.float(), scale)  # torch's kernel is slow in float16, see compose

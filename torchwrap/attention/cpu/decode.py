"""A few queries over many keys: every key is read once for all query heads that share it.

The query heads of a group (times the query tokens) become the rows of one small matrix for each key head. Then either the native kernel
reads keys and values once (`torchwrap.native.decode`), or torch's fused kernel does, over pieces of the keys: one query has only B * Hkv
tasks, too few for the cores, and pieces make more of them; their results are merged (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.cpu import kernel
from torchwrap.attention.cpu.parts import Block, plan
from torchwrap.attention.merge import merge, merge_stack, with_sinks
from torchwrap.attention.transforms import makes_others

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = [
    "MOST_WIDTH", "PIECE", "Form", "adds_holes", "by_group", "form", "forward", "is_ranges", "limits", "native_library", "native_refuses",
    "one_bias", "partial", "without_memory",
]  # fmt: skip

PIECE = 2048
"""Keys of one piece: chosen; half as many or twice as many take as long."""
MOST_ROWS, MOST_WIDTH = 64, 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Form = Literal["native", "pieces"]


def form(call: Call) -> Form | None:
    """How to compute a call as a few queries: "native", "pieces", or None: not so.

    Measured on one core of the machine in docs/results, 16 to 16384 keys, 9/3, 8/8 and 32/8 heads: the native kernel is faster than pieces
    and than torch's own in all dtypes, from 256 keys on in float32 (16 microseconds of Python are the difference) and from 64 in halves.
    """
    mask, one = call.mask, call.q_length == 1
    if not one and call.group * call.q_length > MOST_ROWS:
        return None
    if call.dropout or (not one and ((call.bias is not None and call.group > 1) or (mask is not None and not is_ranges(mask)))):
        return None
    if native_refuses(call) is None:
        return "native"
    if call.bias is not None or (mask is not None and not is_ranges(mask)):
        return None
    return "pieces" if one and call.softcap is None and not _is_one_tile(call) else None


def _is_one_tile(call: Call) -> bool:
    """Batch rows see different keys, and so few that one call with a mask is better than one call for each."""
    return any(isinstance(block, Block) and block.parts[0].form == "each" for block in plan(call))


def native_refuses(call: Call) -> str | None:
    """Why the native kernel cannot compute a call whose mask is a range of keys for each row, or None."""
    missing = native_library() or without_memory(call)
    if missing is not None:
        return missing
    if call.group * call.q_length > MOST_ROWS:
        return f"{call.group} heads of a group times {call.q_length} queries are more than {MOST_ROWS} rows"
    if call.q.dtype not in _DTYPES or call.width > MOST_WIDTH or call.value_width > MOST_WIDTH:
        return f"{call.q.dtype} of width {call.width}"
    return None


def native_library() -> str | None:
    """Why there is no native kernel at all, or None."""
    native = _native()
    return native if isinstance(native, str) else None


def without_memory(call: Call) -> str | None:
    """Why native code may not be given the addresses of the tensors, or None: those of torch's fake tensors are 0."""
    if makes_others(call.q):
        return "a mode is at work whose new tensors have no memory"
    if type(call.q) is type(call.k) is type(call.v) is Tensor and call.bias is None:
        return None
    kinds = {type(tensor) for tensor in (call.q, call.k, call.v, call.bias) if tensor is not None} - {Tensor, torch.nn.Parameter}
    return f"{kinds.pop().__name__} has operators, and perhaps no memory, of its own" if kinds else None


def is_ranges(mask: TileMask) -> bool:
    """Each query sees all keys from a first to a last one."""
    if mask.dictionary is not None or mask.key_mask is not None:
        return False
    return mask.q_segments is None or mask.spans().exact


def adds_holes(call: Call) -> bool:
    """Whether `one_bias` adds -inf to the scores of hidden keys: those that are no numbers stay so."""
    return call.bias is not None and call.mask is not None and not is_ranges(call.mask)


def forward(call: Call, form: Form) -> tuple[Tensor, Tensor]:
    """Out and lse, as in `contract`, by the form of that name."""
    out, lse = partial(call, form)
    return out.to(call.q.dtype), lse


def partial(call: Call, form: Form, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """As `forward`, with out not yet rounded to a half type where the form has it wider: to be merged with attention over other keys.

    Args:
        call: the call.
        form: of that name.
        threads: of the native kernel; None: as torch.get_num_threads().
    """
    out, lse = _by_native(call, threads) if form == "native" else _by_pieces(call)
    shape = call.batch, call.heads, call.q_length
    return with_sinks(out.reshape(*shape, call.value_width), lse.reshape(shape), call.sinks)


def _folded(call: Call) -> Tensor:
    """q as `[B, Hkv, G * Sq, D]`; a view for one query."""
    return call.q.reshape(call.batch, call.kv_heads, call.group * call.q_length, call.width)


@functools.cache
def _native() -> Callable[..., tuple[Tensor, Tensor]] | str:
    """The native kernel behind its checks, which the contract has made already; or why there is none."""
    from torchwrap import native  # on first use: looks for a library file
    from torchwrap.native.decode import run

    return run if native.available() else native.reason()


def _by_native(call: Call, threads: int | None) -> tuple[Tensor, Tensor]:
    native = _native()
    assert not isinstance(native, str)
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (_folded(call), call.k, call.v))
    bias = one_bias(call)
    bias = None if bias is None else by_group(bias, call)
    return native(q, k, v, None, None, limits(call), call.scale, call.softcap or 0.0, threads=threads, bias=bias)


def one_bias(call: Call) -> Tensor | None:
    """What is added to the scores, and of one query hides keys that are no range, `readable`; bool where it only hides. None: nothing."""
    from torchwrap.native.prefill import readable  # here: loads the library

    mask, bias = call.mask, call.bias
    if mask is None or is_ranges(mask):
        return None if bias is None else readable(bias)
    seen = mask.rectangles((0, 1), (0, call.kv_length))
    if bias is None:
        return seen
    both: Tensor = torch.where(seen, readable(bias), -math.inf)
    return both


def by_group(bias: Tensor, call: Call) -> Tensor:
    """A bias of one query, or of heads that share no keys, as `[B, Hkv, G * Sq, S]`, without a copy."""
    whole = bias.expand(call.batch, call.heads, call.q_length, call.kv_length)
    found: Tensor = whole if call.group == 1 else whole[:, :, 0].unflatten(1, (call.kv_heads, call.group))
    return found


def limits(call: Call) -> Tensor | None:
    """First and last column of each row of `_folded`, int32 `[B, G * Sq, 2]`; None: all, or `one_bias` says which."""
    mask = call.mask
    if mask is None or mask.plain == "full" or not is_ranges(mask) or (call.q_length == 1 and mask.plain == "causal" and _at_end(mask)):
        return None
    spans = mask.spans()
    both = torch.stack([spans.first, torch.maximum(spans.first, spans.end)], -1)
    both = both[:, None].expand(call.batch, call.group, call.q_length, 2)
    return both.reshape(call.batch, call.group * call.q_length, 2)


def _at_end(mask: TileMask) -> bool:
    """The last query is at the last key, or after it."""
    return mask.first_query() + mask.shape[2] >= mask.kv_offset + mask.shape[3]


def _by_pieces(call: Call) -> tuple[Tensor, Tensor]:
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
    if pieces < 2 or call.width != call.value_width or q.shape[0] * q.shape[1] >= 2 * torch.get_num_threads():
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
    if q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and q.shape[2] == 1):
        # Copies in float32 and their computation take half as long as torch's kernel (torch 2.13, AVX-512, 4096 keys).
        q, k, v = q.float(), k.float(), v.float()
    return kernel.forward(q, k, v, scale)

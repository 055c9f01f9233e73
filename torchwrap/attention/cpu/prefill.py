"""Many queries, forward and backward, by the native kernel (`torchwrap.native.prefill`).

A mask is handed over as the interval of columns that each query sees, so causal, window, padding, packed sequences and chunks are one case:
hidden tiles cost nothing, and nothing is merged. Holes, segments that return and dictionaries are handed over as they are, for the kernel
to make bits of, and a bias as it lies in memory. In float32 that takes 0.3 to 0.75 of the time of torch's kernel; in bfloat16 a third, and
torch's backward adds gradients up in it, over heads of a group and blocks of rows and keys, with 2 to 6 times the errors of the definition
(docs/tried.md). float16 is widened to float32 block by block. Dropout is the hash of
`torchwrap.attention.dropout`, worked out again for the gradients.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cpu.decode import MOST_WIDTH, adds_holes, is_ranges, native_library, one_bias, without_memory
from torchwrap.attention.merge import grad_of_sinks

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask
    from torchwrap.native.prefill import Hidden

__all__ = ["backward", "describe", "forward", "hidden", "is_few", "is_narrow", "limits", "refuses"]

MOST_FEW = 16
"""Rows that share a key/value head up to which their gradients take less time by the kernel for few: 16 over 64 and 1024 keys take 0.46 to
1.03 of it (one thread, AVX-512)."""
NARROW = 8
"""Widths up to which bfloat16 is widened: as it is, 4 of 100 random calls of width 1 break the law of errors, and 1 of 100 of more."""
_WORDS = {
    torch.float32: "measured faster than torch's",
    torch.bfloat16: "sums are in float32",
    torch.float16: "products and sums are in float32",
}


def refuses(call: Call) -> str | None:
    """Why the native kernel cannot compute a call of many queries, or None."""
    if call.q.dtype not in _WORDS:
        return f"{call.q.dtype}, the native kernel for many queries is for float32 and halves"
    if call.is_empty:
        return "an empty call, which the native kernel does not have"
    if max(call.width, call.value_width) > MOST_WIDTH:
        return f"widths {call.width} and {call.value_width} are beyond {MOST_WIDTH}"
    return native_library() or without_memory(call)


def describe(call: Call) -> str:
    """By what a call that is not refused is computed and why, for people."""
    return f"many queries, by the native kernel: {_WORDS[call.q.dtype]}"


def is_few(call: Call) -> bool:
    """Whether gradients come from the kernel for few rows, which works the softmax out again: out and lse of the forward are not read."""
    if call.sinks is not None or call.softcap is not None or call.dropout or call.some_keys:
        return False
    if call.group * call.q_length > MOST_FEW or (call.bias is not None and call.bias.requires_grad):
        return False
    return call.mask is None or is_ranges(call.mask) or (call.q_length == 1 and not adds_holes(call))


def is_narrow(call: Call) -> bool:
    """Whether a call is computed on float32 copies: sums of so few products do not average the rounding of weights to bfloat16 out."""
    return call.q.dtype == torch.bfloat16 and min(call.width, call.value_width) <= NARROW


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out and lse, as in `contract`."""
    from torchwrap.native.prefill import prefill

    if is_narrow(call):
        out, lse = forward(_widened(call))
        return out.to(call.q.dtype), lse
    return prefill(call.q, call.k, call.v, limits(call.mask), call.sinks, **_more(call))


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Gradients of everything; that of the bias only where it requires one.

    Args:
        call: as given to `forward`.
        out: the result of `forward`.
        lse: the result of `forward`.
        grad_out: gradient of out.
        grad_lse: gradient of lse; None: zeros.
    """
    from torchwrap.native.prefill import gradients

    if is_narrow(call):
        wide = _widened(call)
        # As delta is taken from out, which was rounded; that of all keys is not known here.
        out, lse = (out.float(), lse) if call.some_keys else forward(wide)
        *grads, dsinks, dbias = backward(wide, out, lse, grad_out.float(), grad_lse)
        dq, dk, dv = (grad.to(call.q.dtype) for grad in grads)
        return dq, dk, dv, dsinks, dbias
    if is_few(call):
        ranges = call.mask is None or is_ranges(call.mask)
        bias, seen = one_bias(call) if call.q_length == 1 else call.bias, limits(call.mask) if ranges else None
        found = gradients(call.q, call.k, call.v, out, lse, grad_out, grad_lse, seen, bias=bias, scale=call.scale, few=True)
        return *found[:3], None, None
    q, k, v, seen = call.q, call.k, call.v, limits(call.mask)
    wants_bias = call.bias is not None and call.bias.requires_grad
    shifts = wants_bias and call.bias is not None and call.bias.shape[3] == 1 and call.sinks is None and not call.some_keys
    more = {"wants_bias": wants_bias and not shifts, "some_keys": call.some_keys, **_more(call)}
    dq, dk, dv, delta, dbias = gradients(q, k, v, out, lse, grad_out, grad_lse, seen, **more)
    dsinks = None if call.sinks is None else grad_of_sinks(call.sinks, lse, delta)
    if shifts and call.bias is not None:
        dbias = _of_shift(call.bias, lse, grad_lse)
    return dq, dk, dv, dsinks, None if dbias is None or call.bias is None else dbias.to(call.bias.dtype)


def _widened(call: Call) -> Call:
    return replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())


def _of_shift(bias: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Gradient of a bias that is the same for all keys: it moves lse by itself and no weight. Summing the gradients of scores, whose sum is
    zero, would leave their rounding errors."""
    of_rows = 0.0 * lse if grad_lse is None else grad_lse + 0.0 * lse  # NaN where the row is
    return of_rows.masked_fill(lse == -math.inf, 0.0).double()[..., None].sum_to_size(bias.shape)


def _more(call: Call) -> dict[str, Any]:
    seed = 0 if call.seed is None else int(call.seed)
    numbers = {"scale": call.scale, "softcap": call.softcap, "dropout": call.dropout, "seed": seed}
    return {"bias": call.bias, "hidden": hidden(call), **numbers}


def limits(mask: TileMask | None) -> Tensor | None:
    """First and last column of each query, int32 `[B | 1, Sq, 2]`; None: all."""
    if mask is None or mask.plain == "full":
        return None

    def work() -> Tensor:
        spans = mask.spans()
        return torch.stack([spans.first, torch.maximum(spans.first, spans.end)], -1)

    found: Tensor = mask._once("limits", work)
    return found


def hidden(call: Call) -> Hidden | None:
    """What hides keys inside the intervals of `limits`; None: nothing. No tensor is made of the mask's size."""
    from torchwrap.native.prefill import Hidden

    mask = call.mask
    if mask is None or mask.plain is not None:
        return None

    def work() -> Hidden | None:
        fields: dict[str, Any] = {}
        if mask.key_mask is not None:
            fields["shown"] = mask.key_mask[:, None, None].expand(call.batch, call.heads, call.q_length, -1)
        if mask.q_segments is not None and mask.k_segments is not None and not mask.spans().exact:
            fields |= {name: getattr(mask, name).contiguous().expand(call.batch, -1) for name in ("q_segments", "k_segments")}
        if (tiles := mask.dictionary) is not None:
            codes = tiles.codes.int().contiguous().expand(call.batch, call.heads, -1, -1)
            fields |= {"codes": codes, "tiles": tiles.tiles.contiguous(), "start": tiles.start}
        return Hidden(**fields) if fields else None

    found: Hidden | None = mask._once(("hidden", call.batch, call.heads, call.q_length), work)
    return found

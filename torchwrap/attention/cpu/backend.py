"""The back end "cpu": which of the compositions computes a call."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients, Prepared
from torchwrap.attention.cpu import compose, decode, prefill, tiled
from torchwrap.attention.cpu.parts import Block, Part, Strip, plan

__all__ = ["Composed"]

_WORDS = {
    "strip": "strips of a window",
    "full": "rectangles",
    "causal": "causal squares",
    "masked": "rectangles with masks of one tile",
    "each": "whole batches in one tile",
}


class Composed:
    """The native kernels, compositions of torch's fused kernel for what they lack, and tiles of our own for the rest."""

    name = "cpu"

    def refuses(self, call: Call) -> str | None:
        """Whether the tensors are on a CPU, in a dtype that is computed here."""
        if call.q.device.type != "cpu":
            return f"tensors are on {call.q.device}, this back end computes on CPUs"
        if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return f"dtype {call.q.dtype} is none of float32, bfloat16, float16, float64"
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out and lse."""
        if call.is_empty:
            return call.empty_result()
        way = _way(call)
        if way == "many":
            return prefill.forward(call)
        if way is not None:
            out, lse = decode.forward(call, way)
            # A hidden key that holds no numbers, perhaps. The other kernel knows what is hidden, and takes 1.5 to 2.4 times as long.
            hides = decode.adds_holes(call) and bool(lse.isnan().any())
            return prefill.forward(call) if hides else (out, lse)
        if compose.refuses(call) is not None:
            return tiled.forward(call)
        out, lse = compose.forward(call)
        return tiled.forward(call) if _shows_hidden(call, lse) else (out, lse)

    def prepare(self, call: Call, trains: bool, mask: Tensor | None) -> Prepared | None:
        """A kernel, ready for calls of this layout, or for any mask laid out as `mask`; None: there is more to do than to call one."""
        if call.is_empty or call.sinks is not None or not all(tensor.stride(3) == 1 for tensor in (call.q, call.k, call.v)):
            return None
        way = _way(call)
        # Of a mask that is a tensor the kernel for few queries reads numbers, and of one query bits.
        few = way == "native" and (mask is None or call.q_length == 1 or mask.dtype != torch.bool)
        if not few and way != "many":
            return None
        from torchwrap.attention.cpu import prepared  # here: loads the library

        if prefill.is_narrow(call) and (trains or not few):
            return None
        return prepared.Few(call, trains, mask) if few else prepared.Many(call, trains, mask)

    def describe(self, call: Call) -> str:
        """By which of the compositions, for people."""
        if call.is_empty:
            return "nothing to compute"
        way = _way(call)
        if way == "native":
            return "a few queries, by the native kernel: keys and values are read once"
        missing = decode.native_refuses(call) if call.q_length == 1 else None
        if way == "pieces":
            return f"one query over pieces of the keys, by torch's kernel; not the native one: {missing}"
        if way == "many":
            return prefill.describe(call)
        not_native = f"; not the native kernel: {prefill.refuses(call)}"
        if (lacking := compose.refuses(call)) is not None:
            return f"tiles of our own: {lacking}{not_native}"
        blocks = plan(call)
        forms = Counter("strip" if isinstance(block, Strip) else part.form for block in blocks for part in _parts(block))
        return "torch's kernel on " + ", ".join(f"{count} {_WORDS[form]}" for form, count in forms.items()) + not_native

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """Gradients of everything."""
        if prefill.refuses(call) is None:
            if _way(call) != "many" and not prefill.is_few(call) and not call.some_keys:
                # `decode` sums scores in another order: gradients would lose in accuracy what the two differ by. Those of all keys cannot
                # be computed here.
                out, lse = prefill.forward(call)
            return prefill.backward(call, out, lse, grad_out, grad_lse)
        tile = compose.refuses(call) is not None or call.is_empty or (call.bias is not None and call.bias.requires_grad)
        if tile or (grad_lse is not None and bool(grad_lse.any())):
            return tiled.backward(call, out, lse, grad_out, grad_lse)
        found = compose.backward(call, out, lse, grad_out)
        return tiled.backward(call, out, lse, grad_out, grad_lse) if _shows_hidden(call, *found[:3]) else found


def _shows_hidden(call: Call, *results: Tensor) -> bool:
    """Whether hidden keys of no numbers may be in results of torch's kernel, which hides by adding -inf. Fake tensors are not looked at."""
    looks = call.mask is not None and decode.without_memory(call) is None
    return looks and not all(bool((result < math.inf).all()) for result in results)


def _way(call: Call) -> decode.Form | Literal["many"] | None:
    """What computes the call, if it is no composition."""
    few = decode.form(call)
    if few is not None and (call.q_length == 1 or call.group * call.q_length <= _most_few(call)):
        return few
    return "many" if prefill.refuses(call) is None else few


def _most_few(call: Call) -> int:
    """Rows that share a key/value head up to which reading keys once for all of them, where they lie, takes less time than packing them.

    In halves packing takes 1.1 to 2.6 times as long up to 12 rows, and as long for 16. In float32 it takes 1.1 to 1.4 times as long for 8
    rows and 0.9 to 1.3 times for 12, with a bias 0.9 to 1.15 times for 8 and 0.8 to 1.1 times for 12 (17 to 200 keys, Intel with AVX-512).
    Where bfloat16 is multiplied as it is (AMD), that holds for as many keys as queries without a bias. Whether gradients are wanted does
    not count: a block that is computed again has the same bits.
    """
    wide = call.q.dtype == torch.float32
    if call.bias is not None:
        return 8 if wide else 12
    if call.mode == "chunked" and _multiplies_halves():
        return decode.MOST_ROWS
    return 12 if wide else prefill.MOST_FEW


@functools.cache
def _multiplies_halves() -> bool:
    from torchwrap.native.library import instruction_sets  # here, so that nothing is loaded where there is no library

    return next(iter(instruction_sets())) == "avx512_bf16"


def _parts(block: Block | Strip) -> tuple[Part, ...]:
    return block.parts if isinstance(block, Block) else (Part(block.rows, "full"),)

"""Short calls in float32 by torch's fused kernel as it is, on processors where that takes less time than ours.

On Intel's with AVX-512 the library that torch takes for products (MKL) is at its best where their sizes are multiples of 16; ours pack keys
first, which pays for larger ones. 16 to 48 queries over 16 to 64 keys take 1.15 to 1.35 times as long by ours, other sizes 0.65 to 1.05
times, two threads; gradients 1.15 to 1.3 times where keys are even in number, and calls with a bias 0.9 to 1.4 times. Nothing is measured
at run time, so the same call has the same bits in every process; `tune` compares whole back ends, "sdpa" among them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.cpu import kernel, prefill
from torchwrap.native.prefill import in_memory

__all__ = ["Borrowed", "backward", "forward", "takes"]

MOST_QUERIES, MOST_KEYS = 48, 64
_flash: Any = torch._scaled_dot_product_flash_attention_for_cpu  # torch 2.13: less around it than `kernel.flash`


def takes(call: Call) -> bool:
    """Whether torch's kernel computes the call in less time here, and by its definition: `kernel` says what it leaves to its caller."""
    if call.q.dtype != torch.float32 or not _is_faster_here():
        return False
    rows, keys = call.q_length, call.kv_length
    if not (16 <= rows <= MOST_QUERIES and kernel.FEWEST <= keys <= MOST_KEYS):
        return False
    if keys % (16 if call.bias is None and not call.wants_lse else 2):
        return False
    if call.softcap is not None or call.sinks is not None or call.dropout or call.some_keys:
        return False
    if call.bias is not None and not _is_plain_bias(call, call.bias):
        return False
    if call.is_empty or call.width != call.value_width or call.scale <= 0 or prefill.refuses(call) is not None:
        return False
    if call.wants_lse and prefill.is_few(call):
        return False  # gradients by the kernel for few rows, which is as fast
    if not all(tensor.stride(3) == 1 for tensor in (call.q, call.k, call.v)):
        return False
    return call.mask is None or call.mask.plain == "full" or _is_causal_square(call)


def _is_plain_bias(call: Call, bias: Tensor) -> bool:
    """A bias as torch's kernel takes it, in a call without gradients and mask: no lse is kept of which rows see nothing."""
    if call.wants_lse or call.mask is not None or type(bias) is not Tensor or bias.requires_grad:
        return False
    return bias.dtype == torch.float32 and bias.shape[2:] == (call.q_length, call.kv_length)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out and lse of a call that is taken."""
    bias = None if call.bias is None else in_memory(call.bias)
    return Borrowed(call, False).forward(call.q, call.k, call.v, bias, call.wants_lse)


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, where that of lse is zero."""
    return Borrowed(call, True).backward(call.q, call.k, call.v, out, lse, grad_out, None)


@functools.cache
def _is_faster_here() -> bool:
    from torchwrap.native.library import instruction_sets  # here, so that nothing is loaded where there is no library

    return next(iter(instruction_sets()), None) == "avx512" and torch.backends.mkl.is_available()


def _is_causal_square(call: Call) -> bool:
    mask = call.mask
    if mask is None or mask.plain != "causal" or call.q_length != call.kv_length:
        return False
    return bool(mask.first_query() == mask.kv_offset)


class Borrowed:
    """`forward` and `backward` for tensors of one layout.

    Args:
        call: one that `takes` names.
        trains: as in `Prepared`.
    """

    name, again = "cpu", False
    __slots__ = ("_causal", "_mask", "_scale", "kind", "trains")

    def __init__(self, call: Call, trains: bool) -> None:
        self._causal, self._mask, self._scale, self.trains, self.kind = _is_causal_square(call), call.mask, call.scale, trains, ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor]:
        """Out and lse."""
        found: tuple[Tensor, Tensor]
        if type(mask) is not Tensor:
            found = _flash(q, k, v, 0.0, self._causal, scale=self._scale)
            return found
        found = out, lse = _flash(q, k, v, 0.0, False, attn_mask=mask.expand(*q.shape[:3], k.shape[2]), scale=self._scale)
        return (out, lse.masked_fill((mask == -math.inf).all(-1), -math.inf)) if wants_lse else found

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v; by our kernel where lse has one."""
        assert out is not None and lse is not None
        if grad_lse is not None:
            call = Call(q=q, k=k, v=v, mask=self._mask, scale=self._scale)
            return prefill.backward(call, out, lse, grad_out, grad_lse)[:3]
        grad_out = in_memory(grad_out)
        grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
        found: tuple[Tensor, Tensor, Tensor] = kernel.flash_backward(grad_out, q, k, v, out, lse, 0.0, self._causal, scale=self._scale)
        return found

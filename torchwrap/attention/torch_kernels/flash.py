"""The back end "sdpa-flash": torch's FlashAttention kernel, with the windows that `F.scaled_dot_product_attention` has no argument for.

Bands (causal, windows) lie at the last query and the last key, as FlashAttention has them since 2.1; query heads share key heads without
copies. fp16 and bf16, one width for keys and values, a multiple of 8.
Source: T. Dao, "FlashAttention-2", 2023; PyTorch 2.13, `torch.nn.attention.bias.CausalBias`, which calls the same function so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.torch_kernels.card import CardKernel, filled, outline, permits
from torchwrap.attention.torch_kernels.masks import corner, is_full

__all__ = ["Flash", "band", "laid_out", "no_band"]

_aten = torch.ops.aten


class Flash(CardKernel):
    """`aten::_flash_attention_forward` and its backward.

    Cost: nothing beyond the results; keys and values are filled up where widths differ or are no multiple of 8.
    """

    name = "sdpa-flash"

    def cannot(self, call: Call) -> str | None:
        """Masks other than bands at the last corner, a bias, and what torch refuses."""
        if call.bias is not None:
            return "a bias, which torch's flash kernel does not have"
        if (other := no_band(call)) is not None:
            return other
        width = _width(call)
        return permits("flash", outline(call.q, width), outline(call.k, width), outline(call.v, width), None, False)

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """One call of the kernel."""
        q, k, v = laid_out(call)
        causal, options = band(call)
        out, lse, *_ = _aten._flash_attention_forward(q, k, v, None, None, call.q_length, call.kv_length, 0.0, causal, False, **options)
        return out.narrow(-1, 0, call.value_width).transpose(1, 2), lse

    def run_backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One call of the kernel's backward."""
        q, k, v = laid_out(call)
        out, grad_out = (filled(tensor, q.shape[3]).transpose(1, 2) for tensor in (out, grad_out))
        # State of the random numbers of dropout, of which there is none.
        seed, offset = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), dtype=torch.uint64, device=q.device)
        causal, options = band(call)
        dq, dk, dv = _aten._flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), None, None, call.q_length, call.kv_length, 0.0, causal, seed, offset, **options
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in (dq, dk, dv))
        return dq.narrow(-1, 0, call.width), dk.narrow(-1, 0, call.width), dv.narrow(-1, 0, call.value_width)


def no_band(call: Call) -> str | None:
    """Why FlashAttention has no word for the mask, or None."""
    if is_full(call):
        return None
    if call.mask is None or call.mask.plain is None or corner(call) not in ("last", "both"):
        return "a mask that is not a band from the last query at the last key, the only ones that FlashAttention has"
    reach = call.mask.right
    if reach is not None and reach >= call.kv_length < call.q_length:
        # flash_api.cpp takes such a reach for an endless one, and queries before the first key may not see the last
        return f"a mask that reaches {reach} keys to the right of queries that begin before the first of {call.kv_length} keys"
    return None


def _width(call: Call) -> int:
    return -(-max(call.width, call.value_width) // 8) * 8


def laid_out(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as `[B, S, H, D]`, of one width."""
    q, k, v = (filled(tensor, _width(call)).transpose(1, 2) for tensor in (call.q, call.k, call.v))
    return q, k, v


def band(call: Call) -> tuple[bool, dict[str, Any]]:
    """Whether the mask is causal, and scale and window: keys that a query sees before and after its own."""
    mask, options = call.mask, {"scale": call.scale, "window_size_left": None, "window_size_right": None}
    if mask is None or mask.plain in ("full", "causal"):
        return mask is not None and mask.plain == "causal", options
    for side, reach in (("window_size_left", mask.left), ("window_size_right", mask.right)):
        options[side] = -1 if reach is None else min(reach, call.q_length + call.kv_length)
    return False, options

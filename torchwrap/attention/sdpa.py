"""Torch's own attention as a back end: what `F.scaled_dot_product_attention` runs, with the lse it does not return.

Its meaning differs from the contract in three places, which are checked or mended here: `is_causal` puts the first query at the first key
(so it is used only where that is what the mask says), rows without a key get lse 0, and a mask must be a tensor. A mask that torch has no
word for is therefore made: B * Sq * Sk elements, which no other back end but "eager" has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cpu import kernel, tiled
from torchwrap.attention.merge import grad_of_sinks, with_sinks

__all__ = ["TorchSdpa", "is_causal"]


def is_causal(call: Call) -> bool:
    """The mask is what torch calls causal: query i sees keys 0 to i, and no other condition."""
    mask = call.mask
    return mask is not None and mask.plain == "causal" and mask.first_query() == mask.kv_offset


class TorchSdpa:
    """`F.scaled_dot_product_attention` of torch, on CPUs.

    Memory: with a mask that is neither absent nor causal, B * Sq * Sk elements of the dtype of q.
    """

    name = "sdpa"

    def refuses(self, call: Call) -> str | None:
        """Whether torch's kernel has all that the call needs."""
        if call.q.device.type != "cpu":
            return f"tensors are on {call.q.device}, and only the CPU form returns what the contract asks for"
        if call.softcap is not None:
            return f"softcap={call.softcap}, which torch's kernel does not have"
        if call.dropout:
            return f"dropout={call.dropout}: torch would draw other weights than the contract's"
        if call.bias is not None and call.bias.requires_grad:
            return "the bias needs a gradient, which torch's kernel does not give"
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out and lse from one call of the kernel."""
        if call.is_empty:
            return call.empty_result()
        added, live = _mask(call)
        out, lse = kernel.forward(call.q, call.k, call.v, call.scale, causal=_uses_causal(call), added=added, live=live)
        return with_sinks(out, lse, call.sinks)

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """Gradients from one call of the kernel's backward; by tiles of our own if lse has a gradient, which it does not know."""
        if grad_lse is not None and bool(grad_lse.any()):
            return tiled.backward(call, out, lse, grad_out, grad_lse)
        added, _ = _mask(call)
        finite = torch.where(lse == -math.inf, 0.0, lse)
        dq, dk, dv = kernel.backward(grad_out, call.q, call.k, call.v, out, finite, call.scale, causal=_uses_causal(call), added=added)
        delta = (grad_out.to(lse.dtype) * out).sum(-1)
        return dq, dk, dv, None if call.sinks is None else grad_of_sinks(call.sinks, lse, delta), None


def _uses_causal(call: Call) -> bool:
    return call.bias is None and is_causal(call)


def _mask(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """What to add to the scores, and which rows see a key."""
    shape = call.batch, call.heads, call.q_length, call.kv_length
    if call.mask is None or call.mask.plain == "full" or _uses_causal(call):
        if call.bias is None:
            return None, None
        added = call.bias.detach().to(call.q.dtype)
    else:
        seen = call.mask.rectangles((0, call.q_length), (0, call.kv_length))
        bias = 0.0 if call.bias is None else call.bias.detach()
        added = torch.where(seen, bias, -math.inf).to(call.q.dtype)
    return added.expand(shape), (added.amax(-1) != -math.inf).expand(shape[:3])

"""Attention as the textbook has it: all scores at once. What the other ways are compared with, and the back end "eager".

`scores = cap(scale * q @ k^T) + bias`; hidden keys -inf; a column for the sink; softmax; dropout; `@ v` (Vaswani et al. 2017, 3.2.1;
softcap: Gemma 2, 2024, section 2; sinks: Miller, "Attention is off by one", 2023, as in gpt-oss). Gradients are autograd's own.

Memory: several tensors of B * Hq * Sq * Sk elements.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.dropout import factors

__all__ = ["Eager", "attention", "visible"]


def visible(call: Call) -> Tensor | None:
    """What each query sees, as bool `[B | 1, Hq | 1, Sq, Sk]`; None: everything."""
    if call.mask is None:
        return None
    return call.mask.rectangles((0, call.q_length), (0, call.kv_length))


def attention(call: Call, dtype: torch.dtype | None = None, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Out and lse by the definition.

    Args:
        call: the call. Gradients flow to its tensors.
        dtype: of the computation; None: that of q for the products, with sums as in the contract.
        first_row: number of the call's first query among those for which dropout was drawn.

    Returns:
        out `[B, Hq, Sq, Dv]` in `dtype` (that of q for None), and lse `[B, Hq, Sq]`.
    """
    dtype = dtype or call.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype)
    k, v = k.repeat_interleave(call.group, 1), v.repeat_interleave(call.group, 1)
    scores = (q @ k.transpose(-1, -2)).to(wide) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias.to(wide)
    seen = visible(call)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if call.sinks is not None:
        sink = call.sinks.to(wide)[:, None, None].expand(call.batch, -1, call.q_length, 1)
        scores = torch.cat([scores, sink], -1)
    dead = (scores.detach() == -math.inf).all(-1, keepdim=True)
    # The logarithm of no sum at all has a gradient that is no number.
    scores = scores.masked_fill(dead, 0.0)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
    lse = lse.masked_fill(dead[..., 0], -math.inf)
    # Not exp(scores - lse): beside -3e38, which hides keys in many models, lse has no room for the logarithm of their number.
    weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)[..., : call.kv_length]
    if call.seed is not None:
        heads = torch.arange(call.batch * call.heads, device=call.q.device).view(call.batch, call.heads)
        rows = first_row, first_row + call.q_length
        weights = weights * factors(call.seed, call.dropout, heads, rows, (0, call.kv_length), call.q.device)
    return weights.to(dtype) @ v, lse


class Eager:
    """The definition as a back end, for anything."""

    name = "eager"

    def refuses(self, call: Call) -> str | None:
        """Nothing is refused."""
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """As `attention`, in the dtype of q."""
        with torch.no_grad():
            return attention(call)

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """By autograd, from a second forward."""
        names = [name for name in ("q", "k", "v", "sinks", "bias") if getattr(call, name) is not None]
        leaves = {name: getattr(call, name).detach().requires_grad_() for name in names}
        with torch.enable_grad():
            again = attention(replace(call, **leaves))
        # autograd takes None for the gradient of a scalar only, and lse over no key at all depends on nothing
        with_lse = grad_lse is not None and again[1].requires_grad
        outputs, given = (again, (grad_out, grad_lse)) if with_lse else (again[:1], (grad_out,))
        grads = dict(zip(names, torch.autograd.grad(outputs, list(leaves.values()), given), strict=True))
        return grads["q"], grads["k"], grads["v"], grads.get("sinks"), grads.get("bias")

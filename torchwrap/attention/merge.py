"""Partial attention over disjoint keys, put together again without loss.

Attention over some of the keys is a weighted mean `out` and the logarithm of its weights' sum, `lse`. Two of those make one: the weights
are `exp(lse - max)`, the new lse is `max + log(sum)`. It is associative and commutative, a partial over no keys (`lse = -inf`) changes
nothing, and nothing but rounding is lost (FlashAttention, Dao et al. 2022, algorithm 1; FlashDecoding, Dao et al. 2023). Outputs stay in
the dtype of lse until the last merge.

A sink is a partial as well: `out = 0`, `lse = sink`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["grad_of_sinks", "logits_of", "merge", "merge_all", "merge_into", "merge_stack", "with_sinks"]


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each.

    Args:
        out1: `[..., Dv]`.
        lse1: `[...]`, natural logarithm; -inf: no key.
        out2: `[..., Dv]`.
        lse2: `[...]`.

    Returns:
        out in the dtype of lse (never less than float32), and lse.

    Exactness: rounding of the dtype of lse. Rows without a key in either give 0 and -inf; NaN stays NaN.
    """
    top = torch.maximum(lse1, lse2)
    top = torch.where(top == -math.inf, 0.0, top)  # exp(-inf - -inf) would be NaN
    weight1, weight2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = weight1 + weight2
    share = torch.where(total == 0, 0.0, 1.0 / total)
    out = out1 * (weight1 * share)[..., None] + out2 * (weight2 * share)[..., None]
    return out, top + torch.log(total)


def merge_into(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> None:
    """As `merge`, and the result is written to `out1` and `lse1`, which must be of the dtype of lse."""
    out, lse = merge(out1, lse1, out2, lse2)
    out1.copy_(out)
    lse1.copy_(lse)


def merge_stack(outs: Tensor, lses: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Many partials at once.

    Args:
        outs: partials along `dim`, `[..., n, ..., Dv]`.
        lses: `[..., n, ...]`.
        dim: the dimension of partials, counted in `lses`.

    Returns:
        out in the dtype of lse, and lse, without that dimension.
    """
    dim = dim % lses.dim()
    lse = torch.logsumexp(lses, dim=dim, keepdim=True)
    weights = torch.exp(lses - torch.where(lse == -math.inf, 0.0, lse))
    return (outs * weights[..., None]).sum(dim=dim), lse.squeeze(dim)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add one logit for each head that takes probability and gives nothing.

    Args:
        out: `[B, Hq, Sq, Dv]`.
        lse: `[B, Hq, Sq]`.
        sinks: `[Hq]`, or None: nothing is changed.
    """
    if sinks is None:
        return out, lse
    sink = logits_of(sinks.detach()).to(lse.dtype)[:, None].expand_as(lse)
    total = torch.logaddexp(lse, sink)
    return out * torch.exp(lse - torch.where(total == -math.inf, 0.0, total))[..., None].to(out.dtype), total


def logits_of(sinks: Tensor) -> Tensor:
    """The sinks, with NaN for infinity, as the softmax of a row with an infinite score is: as `exp(score - lse)` it would hide the keys.

    Args:
        sinks: `[Hq]`; -inf is a sink that takes nothing.
    """
    return sinks + 0.0 * sinks.clamp_min(0.0)


def grad_of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks: `-sum(exp(sink - lse) * delta)` over rows.

    Args:
        sinks: `[Hq]`.
        lse: `[B, Hq, Sq]`, sinks included.
        delta: `[B, Hq, Sq]`: `sum(grad_out * out)` of each row, less the gradient of lse.
    """
    weight = torch.exp(sinks.detach().to(lse.dtype)[:, None] - torch.where(lse == -math.inf, math.inf, lse))
    return -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)


def merge_all(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several partials of equal shape, from the first to the last."""
    out, lse = partials[0]
    for other in partials[1:]:
        out, lse = merge(out, lse, *other)
    return out, lse

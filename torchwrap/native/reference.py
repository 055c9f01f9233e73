"""What the kernels compute, in plain torch: for tests, gradients, and readers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_reference", "prefill_reference"]


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None = None,
    end: Tensor | None = None,
    limits: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `decode`, with all scores in memory.

    Shapes: as `decode`; floating inputs of any type, computed and returned in float32, or in float64 when q is float64.

    Cost: `B * Hkv * R * S` numbers for the scores, several times.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(k.shape[2], device=q.device)
    seen = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if first is not None:
        seen = seen & (columns >= first[:, None, None, None])
    if end is not None:
        seen = seen & (columns < end[:, None, None, None])
    if limits is not None:
        seen = seen & (columns >= limits[:, None, :, :1]) & (columns < limits[:, None, :, 1:])
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    live = seen.any(-1)
    weights = torch.exp(scores - lse.masked_fill(~live, 0)[..., None])
    # Values that no row sees may hold anything, also what is not a number.
    used = seen.any(2)[..., None]
    return weights @ v.to(wide).masked_fill(~used, 0), lse.masked_fill(~live, float("-inf"))


def prefill_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `prefill`, with all scores in memory; what autograd makes of it is the reference of `gradients`.

    Shapes: as `prefill`; results in float32, or in float64 when q is float64.

    Cost: `B * Hq * Sq * Sk` numbers for the scores, several times.
    """
    (batch, heads, queries, width), kv_heads = q.shape, k.shape[1]
    rows = q.reshape(batch, kv_heads, -1, width)
    each = None if limits is None else limits.expand(batch, -1, -1).repeat(1, heads // kv_heads, 1)
    out, lse = decode_reference(rows, k, v, limits=each, scale=scale, softcap=softcap)
    out, lse = out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.to(lse)[:, None])
    return out * torch.exp(lse - total)[..., None], total

"""What the kernels compute, in plain torch: for tests, gradients, and readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchwrap.native.prefill import Hidden

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
    bias: Tensor | None = None,
    hidden: Hidden | None = None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `prefill`, with all scores in memory; what autograd makes of it is the reference of `gradients`.

    Shapes: as `prefill`; results in float32, or in float64 when q is float64.

    Cost: `B * Hq * Sq * Sk` numbers for the scores, several times.
    """
    wide, group = torch.float64 if q.dtype == torch.float64 else torch.float32, q.shape[1] // k.shape[1]
    keys, values = (tensor.to(wide).repeat_interleave(group, 1) for tensor in (k, v))
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    seen = _seen(scores, limits, hidden)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(*q.shape[:3], 1)], -1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0, lse)[..., None])[..., : k.shape[2]]
    # Values that no row sees may hold anything, also what is not a number.
    return weights @ values.masked_fill(~seen.any(2)[..., None], 0), lse


def _seen(scores: Tensor, limits: Tensor | None, hidden: Hidden | None) -> Tensor:
    """Which keys each query sees, (B, Hq, Sq, Sk)."""
    columns = torch.arange(scores.shape[3], device=scores.device)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if limits is not None:
        seen = seen & (columns >= limits[:, None, :, :1]) & (columns < limits[:, None, :, 1:])
    if hidden is not None and hidden.shown is not None:
        seen = seen & hidden.shown
    if hidden is not None and hidden.q_segments is not None and hidden.k_segments is not None:
        seen = seen & (hidden.q_segments[:, None, :, None] == hidden.k_segments[:, None, None])
    if hidden is not None and hidden.codes is not None and hidden.tiles is not None:
        (_, height, width), (row, column) = hidden.tiles.shape, hidden.start
        line, place = torch.arange(scores.shape[2], device=scores.device) + row, columns + column
        number = hidden.codes[:, :, (line // height)[:, None], place // (8 * width)].long()
        byte = hidden.tiles[number, (line % height)[:, None], place % (8 * width) // 8]
        seen = seen & (byte >> (place % 8).to(torch.uint8) & 1).bool()
    return seen

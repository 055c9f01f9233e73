"""Attention tile by tile in plain torch: what the fused kernel lacks, in memory that grows with the length and not with its square.

For softcap, dropout, gradients of a bias, and gradients of lse. A tile of scores is computed, capped, biased and masked; the running
maximum and sum of each row rescale what was added up before (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018).
Backward computes each tile again: `P = exp(S - lse)`, `dS = P * (dO V^T - delta)`, with `delta = sum(dO * O) - dlse`; the derivative of
the cap is `1 - (S / cap)^2` (FlashAttention-2, Dao 2023, algorithm 2). All products are in float32, or float64 for float64 inputs.

Memory beyond inputs and results: a few tensors of at most `SCORES` elements, and float32 sums of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cpu.parts import Block, Span, Strip, plan
from torchwrap.attention.dropout import factors
from torchwrap.attention.merge import grad_of_sinks, with_sinks

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["backward", "forward"]

SCORES = 1 << 19
"""Elements of one tile over all heads: two megabytes, so that its passes stay in the caches of a core or two."""
WIDTH = 512
"""Columns of one tile."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of some batch rows, and the columns they see with their masks: `[1 | Hq, rows, columns]`, or one such for each batch row, or
    None where everything is visible."""

    batch: Span
    rows: Span
    columns: tuple[tuple[Span, Tensor | None], ...]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out and lse, as in `contract`."""
    out = call.q.new_zeros(*call.q.shape[:3], call.value_width)
    lse = call.q.new_full(call.q.shape[:3], -math.inf, dtype=call.accumulate)
    for tile in _tiles(call):
        q = _rows(call, call.q, tile) * call.scale
        top = q.new_full(q.shape[:-1], -math.inf)
        total, weighted = torch.zeros_like(top), q.new_zeros(*q.shape[:-1], call.value_width)
        for columns, seen in tile.columns:
            k, v = _columns(call, call.k, tile, columns), _columns(call, call.v, tile, columns)
            scores, _ = _scores(call, tile, columns, seen, q, k)
            higher = torch.maximum(top, scores.amax(-1))
            base = torch.where(higher == -math.inf, 0.0, higher)
            weights = scores.sub_(base[..., None]).exp_()
            fade = torch.exp(top - base)
            total = total * fade + weights.sum(-1)
            if call.seed is not None:
                weights *= _kept(call, tile, columns, weights)
            weighted = weighted * fade[..., None] + weights @ v
            top = higher
        place = slice(*tile.batch), slice(None), slice(*tile.rows)
        out[place] = _heads(call, weighted / torch.where(total == 0, 1.0, total)[..., None], tile).to(out.dtype)
        lse[place] = _heads(call, (top + torch.log(total))[..., None], tile)[..., 0]
    return with_sinks(out, lse, call.sinks)


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Gradients of everything.

    Args:
        call: as given to `forward`.
        out: the result of `forward`.
        lse: the result of `forward`.
        grad_out: gradient of out.
        grad_lse: gradient of lse; None: zeros.
    """
    dq, dk, dv = (torch.zeros_like(tensor, dtype=call.accumulate) for tensor in (call.q, call.k, call.v))
    dbias = None if call.bias is None else torch.zeros_like(call.bias, dtype=call.accumulate)
    delta = (grad_out.to(call.accumulate) * out).sum(-1)
    if grad_lse is not None:
        # A row that sees nothing has lse -inf whatever the inputs are.
        delta = delta - torch.where(lse == -math.inf, 0.0, grad_lse)
    base = torch.where(lse == -math.inf, 0.0, lse)
    for tile in _tiles(call):
        place = slice(*tile.batch), slice(None), slice(*tile.rows)
        q, grad = _rows(call, call.q, tile), _rows(call, grad_out, tile)
        row_delta, row_base = (_rows(call, tensor[..., None], tile) for tensor in (delta, base))
        for columns, seen in tile.columns:
            k, v = _columns(call, call.k, tile, columns), _columns(call, call.v, tile, columns)
            scores, capped = _scores(call, tile, columns, seen, q * call.scale, k)
            weights = scores.sub_(row_base).exp_()
            grad_weights = grad @ v.transpose(-1, -2)
            used = weights
            if call.seed is not None:
                kept = _kept(call, tile, columns, weights)
                grad_weights, used = grad_weights * kept, weights * kept
            grad_scores = grad_weights.sub_(row_delta).mul_(weights)
            if seen is not None:  # 0 times what is no number is none
                _by_head(call, tile, grad_scores).masked_fill_(~seen, 0.0)
            span = slice(*tile.batch), slice(None), slice(*columns)
            dv[span] += (used.transpose(-1, -2) @ grad).unflatten(0, (-1, call.kv_heads))
            if dbias is not None:
                _add_to_bias(call, dbias, _heads(call, grad_scores, tile), tile, columns)
            if capped is not None and call.softcap is not None:
                grad_scores = grad_scores * (1.0 - (capped / call.softcap).square_())
            dq[place] += _heads(call, grad_scores @ k, tile) * call.scale
            dk[span] += (grad_scores.transpose(-1, -2) @ q).unflatten(0, (-1, call.kv_heads)) * call.scale
    dsinks = None if call.sinks is None else grad_of_sinks(call.sinks, lse, delta)
    dtype = call.q.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks, None if dbias is None or call.bias is None else dbias.to(call.bias.dtype)


def _scores(call: Call, tile: _Tile, columns: Span, seen: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores of one tile, `[b * Hkv, G * rows, columns]`, and what they were between cap and bias."""
    scores, capped = q @ k.transpose(-1, -2), None
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
        capped = scores.clone()
    by_head = _by_head(call, tile, scores)
    if call.bias is not None:
        by_head += _part_of_bias(call.bias.detach(), tile, columns)
    if seen is not None:
        by_head.masked_fill_(~seen, -math.inf)
    return scores, capped


def _by_head(call: Call, tile: _Tile, scores: Tensor) -> Tensor:
    """`[b * Hkv, G * rows, columns]` as `[b, Hq, rows, columns]`, a view."""
    return scores.view(-1, call.heads, tile.rows[1] - tile.rows[0], scores.shape[-1])


def _part_of_bias(bias: Tensor, tile: _Tile, columns: Span) -> Tensor:
    for dim, (first, end) in ((0, tile.batch), (2, tile.rows), (3, columns)):
        bias = bias.narrow(dim, first, end - first) if bias.shape[dim] > 1 else bias
    return bias


def _add_to_bias(call: Call, total: Tensor, share: Tensor, tile: _Tile, columns: Span) -> None:
    place = _part_of_bias(total, tile, columns)
    place += share.sum_to_size(place.shape)


def _kept(call: Call, tile: _Tile, columns: Span, like: Tensor) -> Tensor:
    assert call.seed is not None
    heads = torch.arange(tile.batch[0] * call.heads, tile.batch[1] * call.heads, device=call.q.device)
    return factors(call.seed, call.dropout, heads, tile.rows, columns, like.device).to(like.dtype).view_as(like)


def _rows(call: Call, tensor: Tensor, tile: _Tile) -> Tensor:
    """Of `[B, Hq, Sq, X]`, the tile's rows as `[b * Hkv, G * rows, X]`: those that share keys are one matrix."""
    part = tensor[slice(*tile.batch), :, slice(*tile.rows)].to(call.accumulate)
    return part.reshape(-1, call.group * part.shape[2], part.shape[3])


def _columns(call: Call, tensor: Tensor, tile: _Tile, columns: Span) -> Tensor:
    """Of `[B, Hkv, Sk, X]`, some columns as `[b * Hkv, columns, X]`."""
    return tensor[slice(*tile.batch), :, slice(*columns)].to(call.accumulate).flatten(0, 1)


def _heads(call: Call, tensor: Tensor, tile: _Tile) -> Tensor:
    """`[b * Hkv, G * rows, X]` as `[b, Hq, rows, X]`."""
    return tensor.reshape(-1, call.heads, tile.rows[1] - tile.rows[0], tensor.shape[-1])


def _tiles(call: Call) -> Iterator[_Tile]:
    """The plan of the call, cut until a tile of all its heads has at most `SCORES` elements."""
    together = max(1, SCORES // (16 * WIDTH * call.heads)) if call.heads else 1
    for block in plan(replace(call, bias=None)):
        for first in range(*block.batch, together):
            batch = first, min(first + together, block.batch[1])
            height = max(16, SCORES // (WIDTH * call.heads * (batch[1] - batch[0])))
            yield from _of_strip(call, block, batch, height) if isinstance(block, Strip) else _of_block(call, block, batch, height)


def _of_strip(call: Call, strip: Strip, batch: Span, height: int) -> Iterator[_Tile]:
    assert call.mask is not None
    for top in range(*strip.rows, height):
        rows = top, min(top + height, strip.rows[1])
        left = strip.column + top - strip.rows[0]
        parts = _cut((left, left + rows[1] - top + strip.band - 1))
        yield _Tile(batch, rows, tuple((part, call.mask.rectangle(batch[0], rows, part)) for part in parts))


def _of_block(call: Call, block: Block, batch: Span, height: int) -> Iterator[_Tile]:
    for top in range(*block.rows, height):
        rows = top, min(top + height, block.rows[1])
        columns: list[tuple[Span, Tensor | None]] = []
        for part in block.parts:
            first, end = part.columns
            if part.form in ("masked", "each"):
                assert call.mask is not None
                columns += [(span, _seen(call.mask, part.form, batch, rows, span)) for span in _cut(part.columns)]
                continue
            if part.form == "causal":
                corner = first + top - block.rows[0]
                square = torch.ones(rows[1] - top, rows[1] - top, dtype=torch.bool, device=call.q.device).tril_()
                columns.append(((corner, corner + rows[1] - top), square))
                end = corner
            columns += [(span, None) for span in _cut((first, end))]
        yield _Tile(batch, rows, tuple(columns))


def _seen(mask: TileMask, form: str, batch: Span, rows: Span, columns: Span) -> Tensor:
    if form == "masked" or mask.shape[0] == 1:
        return mask.rectangle(batch[0], rows, columns)
    return mask.rectangles(rows, columns, batch=batch)


def _cut(columns: Span) -> Iterator[Span]:
    for left in range(*columns, WIDTH):
        yield left, min(left + WIDTH, columns[1])

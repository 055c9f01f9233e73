"""Which tiles of a mask are empty, full or partial, from two numbers per query row.

Every condition but holes, unordered segments and dictionaries leaves each query an interval of columns, so a tile is classified by the
least and greatest ends of its rows' intervals: outside all of them it is never loaded, inside all of them it needs no mask arithmetic.
Holes, segments that come back and dictionaries are judged tile by tile beside that, and a row of tiles keeps its longest full run.
Source: H. Lin et al., "FastAttention", 2024, tiling-mask (rule for causal masks); intervals, holes and runs are ours.
Letters: B batch, H heads, Sq queries, Sk keys, BM x BN a tile, nq = ceil(Sq / BM), nk = ceil(Sk / BN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchwrap.core.errors import ConfigError

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["Spans", "Tiles", "live_rows", "spans", "tiles"]

_FAR = 2**31 - 1
_STRIPE = 1 << 18  # elements of a mask looked at together: 256 KiB, about a core's L2 cache with its temporaries


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spans:
    """The columns each query row may see, as intervals.

    Attributes:
        first: int32 [B or 1, Sq].
        end: int32 [B or 1, Sq]; `first >= end`: the row sees nothing.
        exact: all columns inside are visible, but for `key_mask` and `dictionary`.
    """

    first: Tensor
    end: Tensor
    exact: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tiles:
    """Classes of the tiles of one size, for each row of tiles.

    `lo <= full_lo <= full_hi <= hi`: tiles `[lo, full_lo)` and `[full_hi, hi)` are partial, `[full_lo, full_hi)` full, all others
    empty. Full means that every key of every row and head is visible; the last column of tiles is partial unless it is complete, so full
    tiles need no check of bounds on keys. Without a full tile `full_lo = full_hi = hi`.

    Attributes:
        block: (BM, BN).
        lo: first tile that is not empty, int32 [B or 1, nq].
        hi: one more than the last that is not empty; `lo = hi = 0` if all are.
        full_lo: first tile of the full run.
        full_hi: one more than its last.
    """

    block: tuple[int, int]
    lo: Tensor
    hi: Tensor
    full_lo: Tensor
    full_hi: Tensor


def spans(mask: TileMask) -> Spans:
    """The interval of columns of each row.

    Cost: 8 bytes per batch row and query, 1 if rows do not differ; reads from the device only for segments.
    """
    kv_length = mask.shape[3]
    positions = torch.arange(mask.shape[2], device=mask.device) + mask.q_offset
    queries = positions[None] - mask.kv_offset  # counted in columns
    first, end = torch.zeros_like(queries), torch.full_like(queries, kv_length)
    if mask.left is not None:
        first = torch.maximum(first, queries - mask.left)
    if mask.right is not None:
        end = torch.minimum(end, queries + mask.right + 1)
    if mask.chunk is not None:
        shift = 0 if mask.shift is None else mask.shift[:, None]
        begin = torch.div(positions[None] - shift, mask.chunk, rounding_mode="floor") * mask.chunk + shift - mask.kv_offset
        first, end = torch.maximum(first, begin), torch.minimum(end, begin + mask.chunk)
    if mask.kv_start is not None:
        first = torch.maximum(first, mask.kv_start[:, None])
    if mask.kv_end is not None:
        end = torch.minimum(end, mask.kv_end[:, None])
    exact = True
    if mask.q_segments is not None and mask.k_segments is not None:
        begin, stop, exact = _segment_spans(mask.q_segments, mask.k_segments)
        first, end = torch.maximum(first, begin), torch.minimum(end, stop)
    first, end = torch.broadcast_tensors(first.clamp(0, kv_length), end.clamp(0, kv_length))
    return Spans(first=first.int(), end=end.int(), exact=exact)


def _segment_spans(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, bool]:
    """First and last column of each query's segment, and whether no segment comes back after another one."""
    rows = max(len(queries), len(keys))
    order = torch.sort(keys, dim=-1, stable=True)
    values, columns = (part.expand(rows, -1) for part in order)
    asked = queries.expand(rows, -1).contiguous()
    begin = torch.searchsorted(values.contiguous(), asked)
    stop = torch.searchsorted(values.contiguous(), asked, right=True)
    if keys.shape[1] == 0:
        return torch.zeros_like(begin), torch.zeros_like(stop), True
    some = begin < stop
    first = columns.gather(1, begin.clamp(max=keys.shape[1] - 1)) * some
    end = (columns.gather(1, (stop - 1).clamp(min=0)) + 1) * some
    return first, end, bool((end - first == stop - begin).all())


def tiles(mask: TileMask, bm: int, bn: int) -> Tiles:
    """Classes of the tiles of `bm` query rows by `bn` key columns.

    Raises:
        ConfigError: a size below 1.

    Cost: 16 bytes per row of tiles; B * nq * nk bytes for a moment where holes, segments that come back or a dictionary are judged.
    """
    if bm < 1 or bn < 1:
        raise ConfigError(f"Tiles of {bm} x {bn}", where="TileMask.tiles", fix="Give at least one row and one column.")
    rows = mask.spans()
    dead = rows.first >= rows.end
    low = _over(rows.first.masked_fill(dead, _FAR), bm, _FAR).amin(-1)
    high = _over(rows.end.masked_fill(dead, 0), bm, 0).amax(-1)
    inner_low = _over(rows.first.masked_fill(dead, _FAR), bm, 0).amax(-1)
    inner_high = _over(rows.end.masked_fill(dead, 0), bm, _FAR).amin(-1)
    lo, hi = low.div(bn, rounding_mode="floor"), _ceil(high, bn)
    full_lo, full_hi = _ceil(inner_low, bn), inner_high.div(bn, rounding_mode="floor")
    judged = _judged(mask, rows, bm, bn)
    if judged is not None:
        lo, hi, full_lo, full_hi = _runs(*judged, lo, hi, full_lo, full_hi)
    none = lo >= hi
    lo, hi = lo.masked_fill(none, 0), hi.masked_fill(none, 0)
    without = (full_lo >= full_hi) | none
    full_lo, full_hi = torch.where(without, hi, full_lo), torch.where(without, hi, full_hi)
    return Tiles(block=(bm, bn), lo=lo.int(), hi=hi.int(), full_lo=full_lo.int(), full_hi=full_hi.int())


def _over(values: Tensor, bm: int, fill: int) -> Tensor:
    """Values of rows as [B, nq, BM], the missing rows of the last tile filled."""
    count = -(-values.shape[1] // bm)
    return pad(values, (0, count * bm - values.shape[1]), value=fill).view(len(values), count, bm)


def _ceil(values: Tensor, by: int) -> Tensor:
    # Written so that _FAR, the mark of rows without keys, does not overflow.
    return values.div(by, rounding_mode="floor") + (values.remainder(by) > 0)


def _judged(mask: TileMask, rows: Spans, bm: int, bn: int) -> tuple[Tensor, Tensor] | None:
    """For conditions that are no interval: bool [B or 1, nq or 1, nk], tiles that may hold a visible key, tiles of visible keys only."""
    length = mask.shape[3]
    found: list[tuple[Tensor, Tensor]] = []
    if mask.key_mask is not None:
        some, every = _over(mask.key_mask, bn, False).any(-1), _over(mask.key_mask, bn, False).all(-1)
        found.append((some[:, None], every[:, None]))
    if not rows.exact and mask.q_segments is not None and mask.k_segments is not None:
        (least, most), (key_least, key_most) = _extremes(mask.q_segments, bm), _extremes(mask.k_segments, bn)
        one = (least == most)[:, :, None] & (key_least == key_most)[:, None] & (least[:, :, None] == key_least[:, None])
        found.append(((least[:, :, None] <= key_most[:, None]) & (key_least[:, None] <= most[:, :, None]), one))
    if mask.dictionary is not None:
        found.append(mask.dictionary.classes(mask.shape[2], length, bm, bn))
    if not found:
        return None
    some, every = found[0]
    for other_some, other_every in found[1:]:
        some, every = some & other_some, every & other_every
    return some, every


def _extremes(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    last = segments[:, -1:].expand(-1, -segments.shape[1] % size)
    padded = torch.cat((segments, last), dim=1).view(len(segments), -1, size)
    return padded.amin(-1), padded.amax(-1)


def _runs(some: Tensor, every: Tensor, lo: Tensor, hi: Tensor, full_lo: Tensor, full_hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Narrows [lo, hi) to tiles with a key, and [full_lo, full_hi) to the longest run of tiles without a hole."""
    index = torch.arange(some.shape[-1], device=some.device, dtype=torch.int32)
    kept = some & (index >= lo[..., None]) & (index < hi[..., None])
    if kept.numel() == 0:
        empty = torch.zeros(kept.shape[:2], dtype=torch.int32, device=some.device)
        return empty, empty, empty, empty
    lo = torch.where(kept, index, _FAR).amin(-1)
    hi = torch.where(kept, index + 1, 0).amax(-1)
    inside = every & (index >= full_lo[..., None]) & (index < full_hi[..., None])
    # Length of the run that ends here: distance to the last tile that breaks it.
    broken = torch.where(inside, -1, index).cummax(-1).values
    run, last = (index - broken).max(-1)
    return lo, hi, (last + 1 - run).int(), (last + 1).int()


def live_rows(mask: TileMask) -> Tensor:
    """bool [B or 1, Sq]: rows that see at least one key, in any head.

    Cost: O(B * (Sq + Sk)) if the mask is intervals and holes; else rows without a full tile are looked at, a stripe at a time.
    """
    rows = mask.spans()
    live = rows.first < rows.end
    if mask.key_mask is not None and rows.exact:
        counted = pad(mask.key_mask.cumsum(-1), (1, 0)).expand(mask.shape[0], -1)
        first, end = (part.long().expand(len(counted), -1) for part in (rows.first, rows.end))
        live = live & (counted.gather(1, end) > counted.gather(1, first))
    if rows.exact and mask.dictionary is None:
        return live
    return _looked_at(mask)


def _looked_at(mask: TileMask) -> Tensor:
    batch, _, q_length, kv_length = mask.shape
    live = torch.zeros((batch, q_length), dtype=torch.bool, device=mask.device)
    bm = bn = 128
    classes = mask.tiles(bm, bn)
    sure = (classes.full_lo < classes.full_hi).expand(batch, -1).tolist()
    low, high = (part.expand(batch, -1).tolist() for part in (classes.lo, classes.hi))
    for b in range(batch):
        for i in range(len(sure[b])):
            rows = (i * bm, min((i + 1) * bm, q_length))
            if sure[b][i]:
                live[b, rows[0] : rows[1]] = True
                continue
            width = max(bn, _STRIPE // (mask.shape[1] * bm))
            for begin in range(low[b][i] * bn, min(high[b][i] * bn, kv_length), width):
                columns = (begin, min(begin + width, high[b][i] * bn, kv_length))
                live[b, rows[0] : rows[1]] |= mask.rectangle(b, rows, columns).any(-1).any(0)
    return live

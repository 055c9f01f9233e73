"""From a mask to rectangles: which rows attend to which columns, and how little of that needs a mask.

A plan is a list of blocks. A block is some rows of some batch rows, and its parts are the columns they see, each part a rectangle that is
wholly visible, or a causal square (row i sees columns 0 to i), or carries additive masks of one tile. Blocks share no rows, so that each
is computed, merged over its parts and written once; columns that no row of a block sees are in none of its parts.

* Causal over a past (chunked prefill, assisted decoding): the past as one visible rectangle, and the square on its diagonal.
* Window: the rows before the window fills are causal; all others go in tiles of `TILE` rows that see `TILE + W - 1` columns each, a
  `Strip`: all its tiles have the same mask, and one call of the kernel takes them as a batch of overlapping views.
* Padding: columns of each batch row from its first key to its last. Packed sequences and chunks: each is a block by itself.
* Anything else (dictionaries, padding with holes, segments that return, a bias): rows by tiles, and the classification of
  `TileMask.tiles` says which columns to leave out and which need the mask (FastAttention, Lin et al. 2024, the tiling-mask strategy).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from torchwrap.attention.contract import Call

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["Block", "Part", "Strip", "plan"]

TILE = 128
"""Rows of one tile of a window: the work is (TILE + W) / W of the least, and fewer rows make the kernel's products small."""
GENERIC = (128, 128)
"""Rows and columns of the tiles by which other masks are classified."""
WIDEST = 2048
"""Columns of one additive mask, so that its memory does not grow with the length."""

SMALL = 1 << 14
"""Pairs of rows and columns up to which everything is one tile, with a mask for each batch row: calls of the kernel would cost more."""

Span = tuple[int, int]
Form = Literal["full", "causal", "masked", "each"]


@dataclass(frozen=True, slots=True)
class Part:
    """Columns that a block's rows attend to.

    Attributes:
        columns: first and end.
        form: every row sees every column ("full"), row i the columns 0 to i ("causal"), what the mask says of the first batch row of the
            block ("masked"), or what it says of each ("each").
    """

    columns: Span
    form: Form


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that are computed together: batch rows, query rows, and the parts of the columns they see."""

    batch: Span
    rows: Span
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Strip:
    """Tiles of a window in a row: tile t has rows `rows[0] + t * height` and on, and sees `reach` columns from `column + t * height` on.

    Attributes:
        band: row r of a tile sees its columns r to r + band - 1.
    """

    batch: Span
    rows: Span
    height: int
    column: int
    band: int

    @property
    def reach(self) -> int:
        """Columns of one tile."""
        return self.height + self.band - 1

    @property
    def tiles(self) -> int:
        """How many."""
        return (self.rows[1] - self.rows[0]) // self.height


def plan(call: Call) -> list[Block | Strip]:
    """The blocks of a call. Rows that see no key are in none.

    Cost: worked out once for each mask, then looked up: the layers of a model share their masks.
    """
    if call.is_empty:
        return []
    mask, has_bias = call.mask, call.bias is not None
    if mask is None:
        return [Block((0, call.batch), (0, call.q_length), (Part((0, call.kv_length), "full"),))]
    return mask._once(("parts", call.batch, has_bias), lambda: _plan(mask, call.batch, has_bias))


def _plan(mask: TileMask, batch: int, has_bias: bool) -> list[Block | Strip]:
    if has_bias or mask.dictionary is not None or mask.key_mask is not None:
        return list(_by_tiles(mask, (0, batch) if mask.shape[0] == 1 else None))
    found: list[Block | Strip] = []
    for span, columns in _alike(mask, batch):
        boxes = _boxes(mask, span[0], columns)
        if boxes is None:
            found.extend(_by_tiles(mask, span))
        else:
            found.extend(piece for box in boxes for piece in _band(mask, span, *box))
    if len(found) > 1 and mask.shape[2] * mask.shape[3] <= SMALL:
        return [Block((0, batch), (0, mask.shape[2]), (Part((0, mask.shape[3]), "each"),))]
    return found


def _alike(mask: TileMask, batch: int) -> Iterator[tuple[Span, Span]]:
    """Neighbouring batch rows with one range of keys, and that range; rows with segments or shifts each by itself."""
    if mask.shape[0] == 1:
        yield (0, batch), mask.key_range(0)
        return
    apart = mask.q_segments is not None or mask.shift is not None
    first = 0
    for row in range(1, batch + 1):
        if row == batch or apart or mask.key_range(row) != mask.key_range(first):
            yield (first, row), mask.key_range(first)
            first = row


def _boxes(mask: TileMask, b: int, columns: Span) -> list[tuple[Span, Span]] | None:
    """Rows and columns of each sequence or chunk of one batch row; None where a sequence is not in one piece."""
    boxes = [((0, mask.shape[2]), columns)]
    if mask.q_segments is not None and mask.k_segments is not None:
        boxes = []
        row = b if mask.q_segments.shape[0] > 1 else 0
        keys = _runs(mask.k_segments[b if mask.k_segments.shape[0] > 1 else 0])
        places = {number: (max(first, columns[0]), min(end, columns[1])) for number, first, end in keys}
        if len(places) < len(keys):
            return None
        for number, first, end in _runs(mask.q_segments[row]):
            if number in places:
                boxes.append(((first, end), places[number]))
    if mask.chunk is None:
        return boxes
    shift = 0 if mask.shift is None else int(mask.shift[b if mask.shift.shape[0] > 1 else 0])
    return [part for box in boxes for part in _chunks(box, mask.chunk, mask.first_query() - shift, mask.kv_offset - shift)]


def _runs(numbers: Tensor) -> list[tuple[int, int, int]]:
    values, counts = torch.unique_consecutive(numbers, return_counts=True)
    ends = torch.cumsum(counts, 0)
    return list(zip(values.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))


def _chunks(box: tuple[Span, Span], chunk: int, q_shift: int, k_shift: int) -> Iterator[tuple[Span, Span]]:
    """A box cut where positions, `q_shift + row` and `k_shift + column`, pass a multiple of `chunk`."""
    (r0, r1), (c0, c1) = box
    for number in range((r0 + q_shift) // chunk, (r1 - 1 + q_shift) // chunk + 1):
        rows = max(r0, number * chunk - q_shift), min(r1, (number + 1) * chunk - q_shift)
        columns = max(c0, number * chunk - k_shift), min(c1, (number + 1) * chunk - k_shift)
        if rows[0] < rows[1] and columns[0] < columns[1]:
            yield rows, columns


def _band(mask: TileMask, batch: Span, rows: Span, columns: Span) -> Iterator[Block | Strip]:
    """Blocks of a box in which only `right` and `left` act."""
    first, end = columns
    shift = mask.first_query() - mask.kv_offset
    # Row i sees the columns from max(first, i - below) to min(end, i + above).
    above = end - rows[0] if mask.right is None else shift + mask.right + 1
    below = rows[1] - first if mask.left is None else mask.left - shift
    r0, r1 = max(rows[0], first - above + 1), min(rows[1], end + below)
    if r0 >= r1 or first >= end:
        return
    filled = min(r1, first + below + 1)  # the first row whose window begins after `first`
    if r0 < filled:
        yield from _triangle(batch, (r0, filled), columns, above)
        r0 = filled
    emptying = max(r0, end - above + 1)  # the first row whose window would reach past `end`
    height = min(TILE, max(emptying - r0, 1))
    tiles = (min(emptying, r1) - r0) // height
    if tiles > 1:
        yield Strip(batch, (r0, r0 + tiles * height), height, r0 - below, above + below)
        r0 += tiles * height
    for top in range(r0, r1, TILE):
        bottom = min(top + TILE, r1)
        part = (top - below, min(end, bottom - 1 + above))
        whole = bottom - 1 - below <= part[0] and top + above >= part[1]
        yield Block(batch, (top, bottom), tuple(_narrow(part, "full" if whole else "masked")))


def _triangle(batch: Span, rows: Span, columns: Span, above: int) -> Iterator[Block]:
    """Rows that see the columns from the first on: a rectangle, then the square on the diagonal, then rows that see everything."""
    (r0, r1), (first, end) = rows, columns
    corner = r0 + above - 1  # the last column of row r0
    diagonal = min(r1, end - above + 1) - r0
    if diagonal <= 1:
        diagonal = 0
    else:
        past = (Part((first, corner), "full"),) if corner > first else ()
        yield Block(batch, (r0, r0 + diagonal), (*past, Part((corner, corner + diagonal), "causal")))
    if r0 + diagonal < r1:
        whole = min(end, corner + 1) if r1 - r0 == 1 else end
        yield Block(batch, (r0 + diagonal, r1), (Part((first, whole), "full"),))


def _narrow(columns: Span, form: Form) -> Iterator[Part]:
    step = WIDEST if form == "masked" else columns[1] - columns[0]
    for left in range(*columns, max(step, 1)):
        yield Part((left, min(left + step, columns[1])), form)


def _by_tiles(mask: TileMask, batch: Span | None) -> Iterator[Block]:
    """Any mask: by the classification of its tiles."""
    height, width = GENERIC
    tiles = mask.tiles(height, width)
    bounds = torch.stack([tiles.lo, tiles.hi, tiles.full_lo, tiles.full_hi], -1).tolist()
    for b in [batch[0]] if batch is not None else range(mask.shape[0]):
        for tile, (lo, hi, full_lo, full_hi) in enumerate(bounds[b if len(bounds) > 1 else 0]):
            if full_lo >= full_hi:
                full_lo = full_hi = hi
            spans: list[tuple[Span, Form]] = [((lo, full_lo), "masked"), ((full_lo, full_hi), "full"), ((full_hi, hi), "masked")]
            parts = [
                part
                for (left, right), form in spans
                if left < right
                for part in _narrow((left * width, min(right * width, mask.shape[3])), form)
            ]
            if parts:
                rows = tile * height, min((tile + 1) * height, mask.shape[2])
                yield Block(batch or (b, b + 1), rows, tuple(parts))

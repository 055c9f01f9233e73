"""Whether this processor's matrix products copy their weight, for predictions of memory.

Some libraries keep a reordered copy of the weight while a product runs, as large as the weight; which do depends on the processor, the type
and the number of rows. A plan leaves room for it in any case. A prediction counts it for a wide weight only where it is made: that is
tried once on a small one, by the pages that the process takes meanwhile. Whatever else takes pages at that moment, and whatever keeps them
from being seen, gives the answer "it copies", which predicts too much and never too little.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from torchwrap.storage.heap import refusal
from torchwrap.stream.planner import ResidencyPlan, region_bytes
from torchwrap.stream.tiles import parts
from torchwrap.stream.touched import together_bytes
from torchwrap.stream.units import Piece, Unit

__all__ = ["Copies", "copies_weight", "slot_bytes"]

WIDE = 64 << 20
"""Bytes of a weight from which on it is tried whether it is copied (chosen: what matters beside a process of 250 MiB and more)."""

_TRIED = 34 << 20  # bytes: the C library takes blocks of more than 32 MiB from the system every time, so that a copy takes pages
_WIDTH = 2048
_SEEN = 500  # pages that a copy takes at least, to be told from what else a product takes; with huge pages (2 MiB) it takes fewer
_MOST_ROWS = 128  # tried; more are taken for so many, because products of that many are computed in blocks of rows


@dataclass(frozen=True, slots=True)
class Copies:
    """Bytes of the largest weight that a product may copy.

    Attributes:
        room: left to it beside everything else.
        narrow: of the largest weight below `WIDE`, or that is no matrix.
        wide: of the largest other weight, by type.
    """

    room: int
    narrow: int
    wide: Mapping[torch.dtype, int]

    @classmethod
    def of(cls, pieces: Iterable[Piece], room: int) -> Copies:
        """Of these weights, where `room` is left."""
        narrow, wide = 0, dict[torch.dtype, int]()
        for piece in parts(list(pieces)):
            if len(piece.shape) == 2 and piece.nbytes >= WIDE and piece.dtype.is_floating_point:
                wide[piece.dtype] = max(piece.nbytes, wide.get(piece.dtype, 0))
            else:
                narrow = max(piece.nbytes, narrow)
        return cls(room, narrow, wide)

    def at(self, rows: int) -> int:
        """Bytes that a product with so many rows copies, as far as room was left for them."""
        if rows <= 1:
            return 0
        copied = (nbytes for dtype, nbytes in self.wide.items() if min(nbytes, self.room) > self.narrow and copies_weight(dtype, rows))
        return min(self.room, max(copied, default=self.narrow))


def slot_bytes(units: Iterable[Unit], plan: ResidencyPlan, away: Callable[[Piece], bool], rows: int) -> int:
    """Memory that the slots take, and in place of those not in use the copy of a wide weight outside of blocks.

    Args:
        away: whether a piece is streamed.
        rows: of a matrix product with such a weight.
    """
    units = list(units)
    most = together_bytes(units, plan, away)
    idle = max(0, plan.slots - 1) * plan.slot_bytes
    for unit in units:
        widest = max(unit.pieces, key=lambda piece: piece.nbytes, default=None) if unit.kind == "leaf" else None
        if widest is None or rows <= 1 or (len(widest.shape) == 2 and widest.nbytes >= WIDE and not copies_weight(widest.dtype, rows)):
            continue
        inside = region_bytes(piece.nbytes for piece in unit.pieces if away(piece))
        most = max(most, min(inside + min(widest.nbytes, idle), plan.slots * plan.slot_bytes))
    return most


def copies_weight(dtype: torch.dtype, rows: int) -> bool:
    """Whether a product of so many rows with a weight of this type keeps a copy of the weight, in forward or backward.

    Cost: once in a process for each type and power of two of rows, a tenth of a second or two, and 110 MiB.
    """
    key = (dtype, min(_MOST_ROWS, 1 << max(1, rows - 1).bit_length()))
    if key not in _known:
        if (found := _try(*key)) is None:
            return True
        _known[key] = found
    return _known[key]


_known: dict[tuple[torch.dtype, int], bool] = {}


@torch.inference_mode(False)
@torch.no_grad()
def _try(dtype: torch.dtype, rows: int) -> bool | None:
    """Make such a product and count the pages that the process takes; None if a copy would not be seen by that."""
    if refusal():  # blocks may come from somewhere that keeps them
        return None
    out = _TRIED // dtype.itemsize // _WIDTH
    x, y = torch.ones(rows, _WIDTH, dtype=dtype), torch.ones(rows, out, dtype=dtype)
    weight = torch.ones(out, _WIDTH, dtype=dtype)
    few, fewer = x[:, :64].contiguous(), weight[:, :64].contiguous()
    torch.mm(few, fewer.t(), out=y)  # wakes the library up
    torch.mm(y, fewer, out=few)
    began = _faults()
    torch.ones(out + 1, _WIDTH, dtype=dtype)  # what a copy takes; of another size, so that nobody keeps its memory for one
    before = _faults()
    torch.mm(x, weight.t(), out=y)
    torch.mm(y, weight, out=x)
    taken = _faults() - before
    whole = before - began
    return None if whole < _SEEN else taken >= whole // 3  # a third: a copy may be of a type half as wide


def _faults() -> int:
    """Pages that the process took so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

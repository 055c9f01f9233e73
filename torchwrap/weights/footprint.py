"""What an optimizer that streams its state adds to a training step: chunks under way, gradients that wait, bytes moved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchwrap.storage.heap import refusal
from torchwrap.stream.settings import state_bytes
from torchwrap.stream.tiles import parts
from torchwrap.stream.units import Piece, Unit

__all__ = [
    "CHUNK",
    "IN_FLIGHT",
    "Footprint",
    "Waiting",
    "elements_of",
    "expected_footprint",
    "is_left",
    "kept_bytes",
    "left_behind",
    "room_for",
    "scratch_bytes",
    "staying_bytes",
    "table_bytes",
    "waiting",
]

CHUNK = 16 << 20
"""Bytes of a parameter that an optimizer updates at a time unless it is told otherwise."""

IN_FLIGHT = 3
"""Chunks under way: one read, one updated, one written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What an optimizer adds to a training step. Bytes.

    Attributes:
        ring: of the chunks under way.
        gradients: of gradients present at once, those of the block whose backward runs included; and in the other parts of a backward,
        outside, tables: see `Waiting`.
        kept: of freed tensors at most, whose memory is used again (see storage/heap.py), while as many gradients wait as may.
        freed: of them while none waits.
        read, written: by the optimizer in a step, gradients that wait on the disk included.
        overlaps: whether updates run during backward.
        backwards: per step.
        grows: whether a backward begins without gradients and leaves some in memory.
    """

    ring: int
    gradients: int
    kept: int
    read: int
    written: int
    overlaps: bool
    grows: bool = True
    backwards: int = 1
    outside: int = 0
    tables: int = 0
    freed: int = 0

    @property
    def held(self) -> int:
        """Gradients, and freed tensors, in the part of the backward that has most of them."""
        return max(self.gradients + self.kept, self.tables)

    def peak(self, working: int, copied: int, inside: int) -> int:
        """All that a step takes beside weights, in the part of the backward that takes most.

        Args:
            working: of activations, and of the copies that matrix products make of weights.
            copied: of these copies, as far as there is no other room for them.
            inside: of the largest inside of a block, see `scratch_bytes`.
        """
        outside, blocks = self.outside + self.kept + copied, self.gradients + self.kept + min(copied, inside)
        return self.ring + max(0, working - copied) + max(outside, blocks, self.tables)


def is_left(unit: Unit, resident: Collection[int]) -> bool:
    """Whether a backward is heard to leave a unit, so that it has done with what of it is in memory (`resident`, indices of pieces).

    That is a block which is streamed in part: find_units puts nothing there that is used elsewhere. A block that stays as a whole is called
    as it always was, and nobody hears of its backward.
    """
    return unit.kind == "block" and any(piece.index not in resident for piece in unit.pieces)


def left_behind(units: Iterable[Unit], resident: Collection[int]) -> set[int]:
    """Indices of weights in memory that a backward has done with when it leaves their block."""
    return {piece.index for unit in units if is_left(unit, resident) for piece in unit.pieces if piece.index in resident}


def staying_bytes(units: Iterable[Unit], pieces: Iterable[Piece], resident: Collection[int]) -> int:
    """Gradients and new values of weights in memory that a backward may read until its end, so that they wait for that."""
    return sum(piece.nbytes for piece in _staying(units, pieces, resident))


def table_bytes(units: Iterable[Unit], table: Piece) -> int:
    """What the gradient of a table takes while it is made: itself, and where the table is a head's weight too, the sum with that one's."""
    return table.nbytes * (2 if _uses(units, table) > 1 else 1)


class Waiting(NamedTuple):
    """Bytes of gradients present at once in the three parts of a backward, which come one after the other.

    Attributes:
        outside: while a head computes: its own; none waits yet, but freed tensors may be kept in the place of those that may.
        blocks: while a block does.
        tables: while that of a table is made, freed tensors that are kept included; 0 where none is.
    """

    outside: int
    blocks: int
    tables: int


def waiting(units: Iterable[Unit], pieces: Sequence[Piece], room: int, kept: int, resident: Collection[int]) -> Waiting:
    """Gradients present at once while updates run during backward: `room` that may wait, the next ones, and those that have to.

    The next is that of one weight of a block; those of a unit with others inside are handed over together. Those of weights in memory have
    to wait until the backward leaves their block, or for its end, and while one of the former is updated its new values are there too.
    Where a table is a head's weight too, the head's gradient waits in autograd for that of the table, which comes when no block computes
    any more; what waits for the worker makes room for it, and so do the `kept` bytes of freed tensors.
    """
    units, pieces = list(units), [piece for piece in pieces if piece.parameter.requires_grad]
    staying = _staying(units, pieces, resident)
    stay = {piece.index for piece in staying}
    tables = [unit.pieces[0] for unit in units if unit.kind == "rows" and unit.pieces and unit.pieces[0].parameter.requires_grad]
    shared = {table.index: table.nbytes for table in tables if _uses(units, table) > 1}
    left = left_behind(units, resident)
    having = [[p.nbytes for p in unit.pieces if p.index in left and p.parameter.requires_grad] for unit in units]
    around = {unit.parent for unit in units}
    singly = [unit for unit in units if unit.kind == "block" and unit.index not in around]
    others = [unit for unit in units if unit.kind not in ("block", "rows") or unit.index in around]
    together = max((sum(p.nbytes for p in _trained(unit) if p.index not in stay and p.index not in shared) for unit in others), default=0)
    following = max(together, max((p.nbytes for unit in singly for p in _trained(unit) if p.index not in stay), default=0))
    stays = sum(shared.values()) + max(map(sum, having), default=0) + max((size for sizes in having for size in sizes), default=0)
    stays += sum(piece.nbytes for piece in staying)
    moving = sum(piece.nbytes for piece in pieces if piece.index not in stay) + _both(staying, room)
    table = max((table_bytes(units, table) - table.nbytes * (table.index in stay) for table in tables), default=0)
    queue = min(room, moving)
    heads = max((sum(piece.nbytes for piece in _trained(unit)) for unit in units if unit.kind == "leaf"), default=0)
    outside = min(queue + heads, moving + stays)  # what is kept in place of gradients was gradients too
    return Waiting(outside, min(room + following, moving) + stays, max(queue + kept, table) + stays if tables else 0)


def room_for(units: Iterable[Unit], chunk: int) -> int:
    """Bytes of gradients that may wait for the optimizer while the next are computed: one unit's, so that it always has work."""
    return max(chunk, _largest(units))


def kept_bytes(units: Iterable[Unit], chunk: int) -> int:
    """Bytes of freed tensors that are kept for the next ones beside gradients that wait; 0 where that cannot be.

    What gradients may take and do not is kept as well. As these are at their most when a unit's worth of them waits, this much is for the
    next one, and for what is computed on the way there: half a unit, or the largest of its gradients (chosen).
    """
    sizes = [piece.nbytes for unit in units if unit.kind == "block" for piece in unit.pieces if piece.parameter.requires_grad]
    return 0 if refusal() else max(room_for(units, chunk) // 2, max(sizes, default=0))


def scratch_bytes(units: Sequence[Unit], pieces: Iterable[Piece]) -> tuple[int, int]:
    """Bytes of the largest parameter inside a block (or anywhere but in a leaf outside the blocks), and of the largest such leaf."""
    alone = {piece.index for unit in units if unit.kind == "leaf" for piece in unit.pieces}
    tables = {piece.index for unit in units if unit.kind == "rows" for piece in unit.pieces}
    every = list(pieces)
    inside = [piece.nbytes for piece in parts(every) if piece.index not in alone | tables]
    return max(inside, default=0), max((piece.nbytes for piece in every if piece.index in alone), default=0)


def elements_of(chunk: int, element: int, state: int) -> int:
    """Elements of a weight updated at a time: `chunk` bytes of it, fewer if they and their state were more than three times that.

    So with float32 copies of weights in bfloat16, which have six times their bytes of state, no more memory is under way than with Adam.

    Args:
        element, state: bytes of one element, and of what the optimizer keeps for it.
    """
    return min(chunk // element, 3 * chunk // (element + state))


def expected_footprint(
    units: Sequence[Unit], pieces: Sequence[Piece], resident: frozenset[int] | set[int], optimizer: int | str
) -> Footprint:
    """Of an optimizer with usual settings, before there is one.

    Args:
        optimizer: the setting of that name.
    """
    trained = [piece for piece in pieces if piece.parameter.requires_grad]
    away = sum(piece.nbytes for piece in trained if piece.index not in resident)
    largest = max((piece.nbytes for piece in trained), default=0)
    state = ring = 0
    for piece in trained:
        size = piece.dtype.itemsize
        per_element = state_bytes(optimizer, piece.dtype)
        state += piece.nbytes // size * per_element
        ring = max(ring, min(piece.nbytes // size, elements_of(CHUNK, size, per_element)) * (size + per_element))
    kept = kept_bytes(units, min(CHUNK, largest))
    waits = waiting(units, trained, room_for(units, CHUNK), kept, resident) if trained else Waiting(0, 0, 0)
    return Footprint(
        ring=IN_FLIGHT * ring,
        gradients=waits.blocks,
        kept=kept,
        read=state + away,
        written=state + away,
        overlaps=True,
        outside=waits.outside,
        tables=waits.tables,
    )


def _staying(units: Iterable[Unit], pieces: Iterable[Piece], resident: Collection[int]) -> list[Piece]:
    units = list(units)
    left = left_behind(units, resident)
    away = {piece.index for unit in units for piece in unit.pieces} - set(resident)
    return [p for p in pieces if p.parameter.requires_grad and p.index not in away and p.index not in left]


def _both(staying: Sequence[Piece], room: int) -> int:
    """What gradients of weights that stay take while their new values are made, beyond the new values of all.

    They come in reverse order, and one that is larger than `room` waits as a whole. While the last is updated, the others are over.
    """
    there = most = 0
    for piece in reversed(staying[1:]):
        there += piece.nbytes
        most = max(most, there + (piece.nbytes if piece.nbytes <= room else 0))
    return max(0, most - sum(piece.nbytes for piece in staying))


def _uses(units: Iterable[Unit], piece: Piece) -> int:
    return sum(1 for unit in units if any(other is piece for other in unit.pieces))


def _trained(unit: Unit) -> list[Piece]:
    return [piece for piece in unit.pieces if piece.parameter.requires_grad]


def _largest(units: Iterable[Unit]) -> int:
    return max((sum(piece.nbytes for piece in _trained(unit)) for unit in units), default=0)

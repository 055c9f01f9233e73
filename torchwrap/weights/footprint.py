"""What an optimizer that streams its state adds to a training step: chunks under way, gradients that wait, bytes moved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torchwrap.storage.heap import refusal
from torchwrap.stream.settings import state_bytes
from torchwrap.stream.units import Piece, Unit

__all__ = [
    "CHUNK",
    "IN_FLIGHT",
    "Footprint",
    "elements_of",
    "expected_footprint",
    "is_left",
    "kept_bytes",
    "left_behind",
    "room_for",
    "staying_bytes",
    "table_bytes",
    "waiting_bytes",
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
        gradients: of gradients present at once, those of the block whose backward runs included.
        kept: of freed tensors at most, whose memory is used again (see storage/heap.py).
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
    units = list(units)
    left = left_behind(units, resident)
    away = {piece.index for unit in units for piece in unit.pieces} - set(resident)
    return sum(p.nbytes for p in pieces if p.parameter.requires_grad and p.index not in away and p.index not in left)


def table_bytes(units: Iterable[Unit], table: Piece) -> int:
    """What the gradient of a table takes while it is made: itself, and where the table is a head's weight too, the sum with that one's."""
    return table.nbytes * (2 if _uses(units, table) > 1 else 1)


def waiting_bytes(units: Iterable[Unit], pieces: Sequence[Piece], room: int, resident: Collection[int]) -> int:
    """Gradients present at once while updates run during backward: `room` that may wait, the next ones, and those that have to.

    The next is that of one weight of a block; those of a unit with others inside are handed over together. Those of weights in memory have
    to wait until the backward leaves their block, or for its end, and while one of the former is updated its new values are there too.
    For that of a table others make room; where the table is a head's weight too, the head's gradient waits for it in autograd.
    """
    units = list(units)
    tables = [unit.pieces[0] for unit in units if unit.kind == "rows" and unit.pieces and unit.pieces[0].parameter.requires_grad]
    shared = {table.index: table.nbytes for table in tables if _uses(units, table) > 1}
    table = max((table_bytes(units, table) - room for table in tables), default=0)
    left = left_behind(units, resident)
    kept = [[p.nbytes for p in unit.pieces if p.index in left and p.parameter.requires_grad] for unit in units]
    having = max(map(sum, kept), default=0) + max((size for sizes in kept for size in sizes), default=0)
    around = {unit.parent for unit in units}
    singly = [unit for unit in units if unit.kind == "block" and unit.index not in around]
    others = [unit for unit in units if not any(piece.index in shared for piece in unit.pieces)]
    together = [unit for unit in others if unit.kind not in ("block", "rows") or unit.index in around]
    following = max(_largest(together), max((p.nbytes for unit in singly for p in unit.pieces if p.parameter.requires_grad), default=0))
    return room + max(following, table) + sum(shared.values()) + having + staying_bytes(units, pieces, resident)


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
    return Footprint(
        ring=IN_FLIGHT * ring,
        gradients=waiting_bytes(units, trained, room_for(units, CHUNK), resident) if trained else 0,
        kept=kept_bytes(units, min(CHUNK, largest)),
        read=state + away,
        written=state + away,
        overlaps=True,
    )


def _uses(units: Iterable[Unit], piece: Piece) -> int:
    return sum(1 for unit in units if any(other is piece for other in unit.pieces))


def _largest(units: Iterable[Unit]) -> int:
    return max((sum(p.nbytes for p in unit.pieces if p.parameter.requires_grad) for unit in units), default=0)

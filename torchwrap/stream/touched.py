"""How much of the slots is memory in fact, where units are of different sizes.

All slots are as large as the largest unit, and the system gives memory for what was written only. One unit that is much larger than the
others (a wide head) would in time have written to every slot, so that all of them took its size. So the slots together are kept at what
the largest units take that can be present at once: a smaller unit gives back what an earlier one left beyond it, as far as that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torchwrap.stream.arena import Slot
from torchwrap.stream.planner import ResidencyPlan, region_bytes
from torchwrap.stream.units import Piece, Unit

__all__ = ["Touched", "together_bytes"]

_SLACK = 32
"""A part in so many more is let be, so that units of nearly one size do not give pages back and take them again (chosen)."""


def together_bytes(units: Iterable[Unit], plan: ResidencyPlan, away: Callable[[Piece], bool]) -> int:
    """Most bytes of slots that hold different units: those of the largest ones.

    Args:
        away: whether a piece is streamed.
    """
    sizes = (
        min(plan.slot_bytes, region_bytes(piece.nbytes for piece in unit.pieces if away(piece))) for unit in units if unit.kind != "rows"
    )
    return sum(sorted(sizes, reverse=True)[: plan.slots])


class Touched:
    """Bytes from the beginning of each slot that were written since its memory was given back. Callers hold the engine's `state`."""

    def __init__(self) -> None:
        self._slots: dict[int, Slot] = {}
        self._needed: dict[int, int] = {}  # by the unit that went into it last
        self._bytes: dict[int, int] = {}
        self._plan: ResidencyPlan | None = None
        self._most = 0

    def fill(self, slot: Slot, needed: int, free: Sequence[Slot], units: Sequence[Unit], plan: ResidencyPlan) -> None:
        """A unit of `needed` bytes goes into `slot`; where all are too much now, what no unit of theirs needs is given back.

        Args:
            free: slots that hold nothing.
        """
        if self._plan is not plan:
            self._plan = plan
            self._most = together_bytes(units, plan, lambda piece: not piece.resident)
            self._most += self._most // _SLACK
        index = slot.index
        self._slots[index], self._needed[index] = slot, needed
        self._bytes[index] = max(needed, self._bytes.get(index, 0))
        if sum(self._bytes.values()) <= self._most:
            return
        for empty in free:
            self._needed[empty.index] = 0
        for other in sorted(self._slots, key=lambda each: self._bytes[each] - self._needed[each], reverse=True):
            if sum(self._bytes.values()) <= self._most:
                return
            self._slots[other].host.release_pages(self._needed[other])
            self._bytes[other] = self._needed[other]

    def gone(self, slot: Slot) -> None:
        """The slot's memory is somebody else's, or the system's."""
        for each in (self._slots, self._needed, self._bytes):
            each.pop(slot.index, None)

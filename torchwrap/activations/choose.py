"""Which blocks keep their activations, which swap them out, and which compute them again.

Computing a block's activations again costs its forward time; keeping them costs their bytes; moving them costs nothing as long as the
link has time left over. So memory goes first to the blocks that save most time for each byte, then the link's idle time to the next
ones, and the rest is recomputed.

Source: Fuyou (Liao et al., "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU", 2024), which ranks the
activations of a fixed block by recomputation time per byte. Where we differ: measured times and bytes of any block, memory as a third
choice, and the peak counted over the whole pass instead of a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Choice", "Cost", "choose", "idle_bytes", "peak_bytes"]

Choice = Literal["keep", "swap", "recompute"]


@dataclass(frozen=True, slots=True)
class Cost:
    """One use of one unit in a forward.

    Attributes:
        unit: index of the unit; one used several times has several costs and one choice.
        nbytes: what its backward needs.
        input_bytes: the part of that which recomputing needs as well.
        seconds: to compute it again.
        rows: tokens (of all sequences together) that it was measured with; 0 if that is not known.
    """

    unit: int
    nbytes: int
    input_bytes: int
    seconds: float
    rows: int = 0

    def at(self, rows: int) -> Cost:
        """The same with other inputs: bytes are taken to grow with the tokens."""
        scale = rows / self.rows if self.rows else 1.0
        return Cost(self.unit, int(self.nbytes * scale), int(self.input_bytes * scale), self.seconds * scale, rows)


def choose(uses: Sequence[Cost], *, allowed: int, swappable: int) -> dict[int, Choice]:
    """A choice for each unit.

    Args:
        uses: in the order of the forward.
        allowed: bytes of activations that may be present at once.
        swappable: bytes that may be moved out in a forward and back in its backward; see `idle_bytes`.

    Returns:
        Choices whose peak is at most `allowed`, or that of recomputing everything if that is more already.

    Cost: quadratic in the number of uses.
    """
    allowed = max(allowed, peak_bytes(uses, {use.unit: "recompute" for use in uses}))
    # Memory that keeps a block could be where many others come and go, and the other way round.
    orders: tuple[tuple[Choice, Choice], ...] = (("keep", "swap"), ("swap", "keep"))
    return min((_fill(uses, allowed, swappable, order) for order in orders), key=lambda choices: _price(uses, choices))


def _fill(uses: Sequence[Cost], allowed: int, swappable: int, order: Sequence[Choice]) -> dict[int, Choice]:
    """Spend memory and the link, in this order, on the blocks that save most for each byte."""
    choices: dict[int, Choice] = {use.unit: "recompute" for use in uses}
    ranked = sorted(choices, key=lambda unit: _saved_per_byte(unit, uses), reverse=True)
    for choice in order:
        for unit in ranked:
            moved = sum(use.nbytes for use in uses if use.unit == unit) if choice == "swap" else 0
            if choices[unit] == "recompute" and moved <= swappable and peak_bytes(uses, {**choices, unit: choice}) <= allowed:
                choices[unit] = choice
                swappable -= moved
    return choices


def _price(uses: Sequence[Cost], choices: Mapping[int, Choice]) -> tuple[float, int]:
    """Seconds of computing again, then bytes moved."""
    again = sum(use.seconds for use in uses if choices[use.unit] == "recompute")
    return again, sum(use.nbytes for use in uses if choices[use.unit] == "swap")


def peak_bytes(uses: Sequence[Cost], choices: Mapping[int, Choice], gradients: Mapping[int, int] | None = None) -> int:
    """Most bytes of activations, and of `gradients` that stay from the backward of a unit on, present at once.

    When the backward is at one use, its own activations are there however they came, those of the swapped use before it are on their way,
    and earlier uses hold what they hold. What later ones held is gone. The forward has the same at the same place: the swapped use before
    it may still be being written.
    """
    held = moving = peak = 0
    arrived = dict(gradients or {})
    last = {use.unit: position for position, use in enumerate(uses)}
    for position, use in enumerate(uses):
        peak = max(peak, held + moving + use.nbytes + sum(arrived.values()))
        if last[use.unit] == position:
            arrived.pop(use.unit, None)
        if choices[use.unit] == "swap":
            moving = use.nbytes
        else:
            held += use.nbytes if choices[use.unit] == "keep" else use.input_bytes
    return peak


def idle_bytes(
    compute_s: float, streamed_bytes: int, *, read: float, write: float, update_read: int = 0, update_written: int = 0
) -> int:
    """Bytes that a disk can write during a forward and read during its backward in the time that weights and their updates leave it.

    Args:
        compute_s: of the forward; the backward is taken for twice that.
        streamed_bytes: weights read in each direction.
        read: bytes per second.
        write: bytes per second.
        update_read, update_written: bytes that an optimizer moves during the backward; both are the work of one disk, so their times add.
    """
    busy = streamed_bytes / read
    updating = update_read / read + update_written / write
    return int(min(max(0.0, compute_s - busy) * write, max(0.0, 2 * compute_s - busy - updating) * read))


def _saved_per_byte(unit: int, uses: Sequence[Cost]) -> float:
    mine = [use for use in uses if use.unit == unit]
    return sum(use.seconds for use in mine) / max(1, sum(use.nbytes - use.input_bytes for use in mine))

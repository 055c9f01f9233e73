"""How many blocks memory holds: while only forwards run, and in training, where a backward and an optimizer want memory too.

The room of a training step is the one `offload(goal="train")` leaves: working memory of a step with its `activations`, and what
an Adam takes until there is an optimizer (torchwrap/weights/training.py). From then on the open one counts with what it really takes. That
is host memory, so beside a separate device it limits where blocks lie, not how many are present.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchwrap.core.config import format_bytes
from torchwrap.weights.budget import Budget
from torchwrap.weights.footprint import Footprint

__all__ = ["Room"]


@dataclass(slots=True, kw_only=True)
class Room:
    """What numbers of blocks take, and what there is. Bytes.

    Attributes:
        units: number of blocks.
        fixed_bytes: always present.
        slot_bytes: of one slot.
        block_bytes: of all blocks together.
        gradient_bytes: of the gradients of all blocks together, present until a step if all blocks stay.
        forward: budget while only forwards run.
        step: budget in training.
        optimizer: what `step` leaves to an optimizer and gradients.
        shared: the optimizer's memory is that in which the model computes.
    """

    units: int
    fixed_bytes: int
    slot_bytes: int
    block_bytes: int
    gradient_bytes: int
    forward: Budget
    step: Budget
    optimizer: int
    shared: bool

    def held(self, k: int) -> int:
        """Weights present at most with k blocks."""
        return self.fixed_bytes + (self.block_bytes if k == self.units else k * self.slot_bytes)

    def needed(self, k: int, *, trains: bool) -> int:
        """The same, with the gradients that stay with them."""
        return self.held(k) + (self.gradient_bytes if trains and k == self.units else 0)

    def limit(self, *, trains: bool, opened: Footprint | None = None) -> int:
        """Weights that may be present.

        Args:
            opened: what the optimizer takes that drives the model now; None if none does.
        """
        budget = self.step if trains else self.forward
        more = 0
        if opened is not None and self.shared:
            more = _bytes(opened) - (self.optimizer if trains else 0)
        return max(0, min([*budget.asked.values(), budget.left - more]))

    def allowed(self, *, trains: bool, opened: Footprint | None = None) -> tuple[int, ...]:
        """Numbers of blocks that memory holds, smallest first."""
        limit = self.limit(trains=trains, opened=opened)
        return tuple(k for k in range(1, self.units + 1) if self.needed(k, trains=trains) <= limit)

    def optimizer_bytes(self, opened: Footprint | None = None) -> int:
        """What an optimizer takes of the memory in which the model computes."""
        return 0 if not self.shared else self.optimizer if opened is None else _bytes(opened)

    def reserved(self, opened: Footprint | None = None) -> str:
        """What is left to a training step, in words."""
        optimizer = self.optimizer if opened is None else _bytes(opened)
        return f"{format_bytes(self.step.reserve)} for a backward, {format_bytes(optimizer)} for an optimizer and gradients"


def _bytes(opened: Footprint) -> int:
    return opened.ring + opened.held

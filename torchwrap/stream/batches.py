"""When slots change hands: after each unit, or after a batch of consecutive units.

The schedule says which units come next; this says at which moments the slots of units that have been used may go to them. With batches
of one, a slot goes on as soon as its unit has been used. With batches of k' the slots of k' consecutive units are given up together and
the next k' units are requested together: Superpipeline's second knob ("Superpipeline: A Universal Approach for Reducing GPU Memory Usage
in Large Models", 2024; the exact rule is ours, for want of one there). The engine and the simulator share this object's code.
"""

from __future__ import annotations

__all__ = ["Batches"]


class Batches:
    """Counts uses of units in batches of `size`."""

    def __init__(self, size: int = 1) -> None:
        self.size: int = size
        self._done = 0

    def begun(self, present: bool) -> bool:
        """A use began; whether units may be requested now. One that was not present was not foreseen: a batch begins with it."""
        if not present:
            self._done = 0
        return not present or self.size == 1

    def ended(self) -> bool:
        """A use ended; whether it was the last of its batch, so that slots may change hands."""
        self._done = (self._done + 1) % self.size
        return self._done == 0

"""Giving up whatever an interrupt left of the uses of a model.

Python raises Ctrl-C, and what other signals raise, between any two calls of the main thread: when a use has been counted and its weights
are not shown yet, when they are shown and no longer counted, when a slot was taken and its read not noted. No order of these steps is
right at each of those moments. So whoever began the outermost use ends all of them, by what parameters show and where slots are.
"""

from __future__ import annotations

from torchwrap.core.tensors import bind, references
from torchwrap.stream.batches import Batches
from torchwrap.stream.units import Unit
from torchwrap.stream.updated import UpdatedWindow

__all__ = ["AbandonedWindow"]


class AbandonedWindow(UpdatedWindow):
    """Slots of a model whose calls may be interrupted."""

    def abandon(self) -> None:
        """Give up all uses, all holds and what is in the slots: an interrupt may have come in the middle of beginning or ending any.

        The caller has the lock, and no use of its own. Cost: what was read ahead is read again.
        """
        with self.state:
            for unit in self.units:
                self._hide_cut(unit)
            for fetch in list(self._fetches.values()):
                if fetch.bound:
                    self.arena.after_compute(fetch.slot)
                alive = fetch.lent and references(fetch.slot.device) > fetch.references
                fetch.users, fetch.held = 0, False
                if alive:
                    self._give_away(fetch)
                else:
                    self._discard(fetch)
            # A slot that is nowhere was taken for a read that may be under way: it is not used again.
            self._slots = [slot for slot in self._slots if any(slot is free for free in self._free)]
            for layout in self._layouts.values():
                layout.views.clear()
            self._finished.clear()
            self.batches = Batches(self.batches.size)
            self._making_room = False
            self.state.notify_all()

    def _hide_cut(self, unit: Unit) -> None:
        """Put the placeholder back where a parameter shows a slot, whatever the tables say; what a user put there is refused later."""
        for piece in unit.pieces:
            address = piece.parameter.data_ptr()
            if not piece.resident and any(0 <= address - slot.device.data_ptr() < slot.device.numel() for slot in self._slots):
                bind(piece.parameter, piece.absent)

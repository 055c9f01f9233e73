"""When an update may begin: as soon as nothing of the running backward can miss what it changes.

- A weight in memory stays as it is until the backward is over, because autograd compares its version and may still read it. Its state is
  updated at once, and its new values wait beside it; they take the place of the gradient, which is free then. For a moment there are both:
  a weight for which that would be more than gradients have room waits as a whole.
- A weight in memory of a block that is streamed but for it waits until the backward has left the block, and is new as soon as its state is:
  nothing of it stays until the end. So a byte that stays costs one byte of memory, not two.
- A weight of a block that the backward holds in a slot is updated at once as well: the block goes on with the slot and its old values.
- Any other streamed weight waits until its unit is done: a private copy of it may be read before that.

Source: updating each weight in the backward that brings its gradient is from Lv et al., "Full Parameter Fine-tuning for Large Language
Models with Limited Resources", 2023 (LOMO). Where we differ: any elementwise class, and no backward ever sees a new weight.
"""

from __future__ import annotations

from torchwrap.optimizer.chunks import Update
from torchwrap.optimizer.targets import Target
from torchwrap.optimizer.updates import Job, Updater
from torchwrap.stream.engine import Engine
from torchwrap.stream.units import Piece, Unit
from torchwrap.weights.footprint import is_left

__all__ = ["Handover", "streamed_of"]

_IN_MEMORY = -1  # in place of a unit's index


class Handover:
    """Updates on their way from the backward to the worker.

    Args:
        updater: the worker.
        engine: holds units for the backward; `None` where no weight is streamed.
    """

    def __init__(self, updater: Updater, engine: Engine | None) -> None:
        self._updater, self._engine = updater, engine
        self._waiting: dict[int, list[Update]] = {}  # by the unit that is not done yet
        self._units: dict[int, Unit] = {}
        self._left: dict[int, list[Update]] = {}  # of weights in memory, by the block that the backward has not left yet
        self._beside: list[Update] = []  # of all weights in memory that are updated while it runs

    def give(self, update: Update, room: int) -> None:
        """An update whose gradient is complete; `room` is how many bytes of gradients may wait for the worker."""
        target = update.target
        if not target.away and target.parameter.device.type == "cpu" and update.gradient_nbytes <= room:
            block = _left_behind(target)
            update.beside, update.held = True, block is None
            self._beside.append(update)
            if block is None:
                self._updater.submit(Job((), [update]))
            else:
                self._left.setdefault(block, []).append(update)
        elif target.unit is None or target.piece is None or not target.away:
            self._waiting.setdefault(_IN_MEMORY, []).append(update)
        elif self._engine is not None and self._engine.outlasts_updates(target.unit):
            self._updater.submit(Job((target.piece,), [update]))
        else:
            self._units[target.unit.index] = target.unit
            self._waiting.setdefault(target.unit.index, []).append(update)

    def unit_done(self, index: int) -> None:
        """Nothing of this backward reads the unit's weights any more."""
        for update in self._left.pop(index, ()):
            self._updater.submit(Job((), [update]))
        updates = self._waiting.pop(index, None)
        if updates:
            self._updater.submit(Job(streamed_of(self._units.get(index)), updates))

    def backward_over(self) -> None:
        """Begin what still waits, and return when everything is done or has failed."""
        for index in [*self._waiting, *self._left]:
            self.unit_done(index)
        self.land()  # most of it, while the worker does the rest
        self._updater.wait()
        self.land()

    def land(self) -> None:
        """Give weights in memory their new values, as far as those are complete. No backward runs.

        Raises:
            ConflictError: somebody wrote to one of them; see `Update.land`.
        """
        for update in [update for update in self._beside if update.done]:
            update.land()
            self._beside.remove(update)

    def take_back(self) -> list[Update]:
        """What was not handed over: the backward did not come to its end."""
        found = [update for updates in self._waiting.values() for update in updates]
        for update in (update for updates in self._left.values() for update in updates):
            self._beside.remove(update)
            found.append(update.again())
        self._waiting.clear()
        self._left.clear()
        return found

    def clear(self) -> None:
        """The step is over, or its gradients are given up."""
        self._waiting.clear()
        self._left.clear()
        self._beside.clear()


def _left_behind(target: Target) -> int | None:
    """The block after which a backward has done with a weight in memory, if it is heard to leave one."""
    unit = target.unit
    return unit.index if unit is not None and is_left(unit, {piece.index for piece in unit.pieces if piece.resident}) else None


def streamed_of(unit: Unit | None) -> list[Piece]:
    """What an update of a whole unit withholds from its readers."""
    return [] if unit is None else [piece for piece in unit.pieces if not piece.resident]

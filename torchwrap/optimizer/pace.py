"""How fast an offloaded optimizer's steps are and what they take, for predictions (training.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchwrap.optimizer.arguments import Timing
from torchwrap.optimizer.chunks import Chunks
from torchwrap.optimizer.targets import Target, records_needed
from torchwrap.optimizer.updates import Updater
from torchwrap.storage.generations import GenerationStore
from torchwrap.weights.footprint import IN_FLIGHT, Footprint, Waiting, waiting

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["Pace", "footprint_of"]


class Pace:
    """Measures the last whole step.

    Attributes:
        computing_s: seconds of forward, backward and update without what was spent waiting for a disk; None before the first step.
        reused: bytes of weights that its updates had from where the backward held them, see `Chunks`; 0 before the first step.
    """

    def __init__(self, handle: WeightsHandle | None, updater: Updater, chunks: Chunks) -> None:
        self._handle, self._updater, self._chunks = handle, updater, chunks
        self._before: tuple[float, float, float, float, int] | None = None
        self.computing_s: float | None = None
        self.reused: int = 0

    def begin(self) -> None:
        """Gradients were cleared: forward and backward follow."""
        self._before = self._now()

    def end(self) -> None:
        """A step is done."""
        if self._before is None:
            return
        wall, stalled, waited, updated, reused = (now - before for now, before in zip(self._now(), self._before, strict=True))
        self._before = None
        self.reused = int(reused)
        # As long as a wait is no longer than the updates took, it may have been them that were waited for, not the disk.
        self.computing_s = max(0.0, wall - stalled - max(0.0, waited - updated))

    def _now(self) -> tuple[float, float, float, float, int]:
        stalled = float(self._handle.engine.counters["stall_s"]) if self._handle is not None and self._handle.engine is not None else 0.0
        return time.monotonic(), stalled, self._updater.waited_s, self._chunks.seconds, self._chunks.reused


def footprint_of(
    targets: Sequence[Target], store: GenerationStore, chunk: int, timing: Timing, handle: WeightsHandle, kept: int, reused: int
) -> Footprint:
    """What the streamed `targets` of an optimizer, and `kept` bytes of freed tensors, add to a step of the model of `handle`.

    Args:
        reused: bytes of weights that updates beside the last backward did not have to read.
    """
    trained = [target for target in targets if target.parameter.requires_grad and target.numel]
    ring = state = away = total = largest = 0
    for target in trained:
        size = target.parameter.element_size()
        per_element = sum(dtype.itemsize for dtype in target.layout.values())
        elements = records_needed(target, chunk, store)[0][4]
        ring = max(ring, elements * ((2 if timing.park else 1) * size + per_element))
        state += target.numel * per_element
        away += target.numel * size if target.away and target.piece is not None and target.piece.host is None else 0
        total += target.numel * size
        largest = max(largest, target.numel * size)
    if timing.take and timing.backwards == 1:
        resident = {piece.index for piece in handle.pieces if piece.resident}
        waits = waiting(handle.units, handle.pieces, timing.room, kept, resident)
    else:
        # One being computed while the one before is written, or all of them until the step.
        together = 2 * largest if timing.park else total
        waits = Waiting(together, together, 0)
    parked = total if timing.park else 0
    return Footprint(
        ring=IN_FLIGHT * ring,
        gradients=waits.blocks,
        kept=kept,
        read=state + away + parked - (min(reused, away) if timing.take else 0),
        written=state + away + parked,
        overlaps=timing.take,
        grows=timing.backwards == 1 and not timing.park,
        backwards=timing.backwards,
        outside=waits.outside,
        tables=waits.tables,
    )

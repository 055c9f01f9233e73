"""One forward pass taken apart: seconds to bring each block in, to compute it, and of everything else.

In the measured pass nothing is read ahead: each block is brought in when it is wanted, so that neither time contains a part of the other,
and on a CPU the two do not share cores. That pass is as slow as one without any overlap; there is one of them. On a separate device the
host waits for the device before it looks at the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from torchwrap.stream.engine import Engine
from torchwrap.stream.schedule import Schedule
from torchwrap.superpipeline.policy import Profile

__all__ = ["Meter"]

_PREPARED_BY = 1
"""Passes before the measured one: the first is watched for misplaced weights and fills caches."""


class Meter:
    """Measures one pass of one model.

    Args:
        engine: of the model.
        device: that computes.
        armed: measure the second pass; otherwise none until `arm`.

    Attributes:
        clock: seconds.
        settle: waits until the device has done what it was given.
        profile: the result.
    """

    def __init__(self, engine: Engine, device: torch.device, *, armed: bool) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.settle: Callable[[], None] = _nothing if device.type == "cpu" else lambda: torch.cuda.synchronize(device)
        self.profile: Profile | None = None
        self.running: bool = False
        self._engine = engine
        self._wait: int | None = _PREPARED_BY if armed else None
        self._depth = 0
        self._schedule: Schedule | None = None

    def arm(self) -> None:
        """Measure the next pass."""
        self._wait = 0

    def pass_begun(self) -> None:
        """The root's forward began; the caller holds the model's lock until `pass_ended`."""
        self._depth += 1
        if self._depth > 1 or self._wait is None:
            return
        if self._wait:
            self._wait -= 1
            return
        self.running = True
        self._compute: dict[int, float] = {}
        self._transfer: dict[int, float] = {}
        self._inside = 0.0
        self._schedule, self._engine.schedule = self._engine.schedule, Schedule()  # knows no order, so nothing is read ahead
        self._began = self._now()

    def fetching(self) -> None:
        """A block is about to be brought in."""
        self._mark, self._hits = self._now(), self._engine.counters["unit_hits"]

    def computing(self, unit: int) -> None:
        """It is present; what follows is its computation."""
        now = self._now()
        self._inside += now - self._mark
        if self._engine.counters["unit_hits"] == self._hits:  # not left over from before
            self._transfer[unit] = max(self._transfer.get(unit, 0.0), now - self._mark)
        self._mark = now

    def computed(self, unit: int) -> None:
        """It is done."""
        now = self._now()
        self._inside += now - self._mark
        self._compute[unit] = self._compute.get(unit, 0.0) + now - self._mark

    def pass_ended(self, *, whole: bool) -> bool:
        """The root's forward ended, `whole` if without an error; whether `profile` has just been made."""
        self._depth -= 1
        if self._depth or not self.running:
            return False
        self.running = False
        self._wait = None if whole else 0
        assert self._schedule is not None
        self._engine.schedule, self._schedule = self._schedule, None
        units = [unit for unit in self._engine.units if unit.index in self._compute]
        if not whole or not units or not self._transfer:
            return False
        rate = median(seconds / self._engine.units[unit].nbytes for unit, seconds in self._transfer.items())
        self.profile = Profile(
            compute_s=tuple(self._compute[unit.index] for unit in units),
            transfer_s=tuple(self._transfer.get(unit.index, rate * unit.nbytes) for unit in units),
            rest_s=max(0.0, self._now() - self._began - self._inside),
        )
        return True

    def _now(self) -> float:
        self.settle()
        return self.clock()


def _nothing() -> None:
    pass

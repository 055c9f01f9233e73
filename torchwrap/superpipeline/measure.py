"""One pass taken apart: seconds to bring each block in, to compute it forward and, in training, backward, and of everything else.

In the measured pass nothing is read ahead: each block is brought in when it is wanted, so that neither time contains a part of the other,
and on a CPU the two do not share cores. That pass is as slow as one without any overlap; there is one of them. On a separate device the
host waits for the device before it looks at the clock. A backward is timed by the hooks that the engine has in it anyway (see
stream/backward.py): what blocks compute again is a part of it, and so is what an optimizer computes beside it on the same cores.
"""

from __future__ import annotations

import dataclasses
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
    """Measures one pass of one model; a `BackwardClock`.

    Args:
        engine: of the model.
        device: that computes.
        armed: measure the second pass; otherwise none until `arm`.

    Attributes:
        clock: seconds.
        settle: waits until the device has done what it was given.
        profile: the result; that of the forward alone until the backward is over.
        running: a forward is being measured.
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
        self._order: list[int] = []  # blocks of the measured forward whose backward is to be measured too
        self._most = 0  # uses of blocks in it
        self._back = False  # that backward runs
        self._unit: int | None = None  # computing now

    @property
    def inside(self) -> bool:
        """Whether the root's forward runs."""
        return self._depth > 0

    def arm(self) -> None:
        """Measure the next pass."""
        self._wait = 0

    # -- forward -------------------------------------------------------------------------------------------------------------------

    def pass_begun(self, *, wanted: bool = True) -> None:
        """The root's forward began; the caller holds the model's lock until `pass_ended`. `wanted`: it is one to measure."""
        self._depth += 1
        if self._depth == 1 and not self._back:
            self._order = []  # a backward that comes now is not that of the measured forward alone
        if self._depth > 1 or self._wait is None or not wanted:
            return
        if self._wait:
            self._wait -= 1
            return
        self._engine.give_up_guesses()  # else the first block would wait for them
        self.running = True
        self._begin()

    def fetching(self) -> None:
        """A block is about to be brought in."""
        if not self.running and not self._back:
            return
        if self._unit is not None:  # the backward comes to it a second time
            self.computed(self._unit)
        self._mark, self._hits = self._now(), self._engine.counters["unit_hits"]

    def computing(self, unit: int) -> None:
        """It is present; what follows is its computation."""
        if not self.running and not self._back:
            return
        now = self._now()
        self._inside += now - self._mark
        if self._engine.counters["unit_hits"] == self._hits:  # not left over from before
            self._transfer[unit] = max(self._transfer.get(unit, 0.0), now - self._mark)
        self._mark, self._unit = now, unit
        self._uses += 1

    def computed(self, unit: int) -> None:
        """It is done."""
        if unit != self._unit:
            return
        now = self._now()
        self._inside += now - self._mark
        self._compute[unit] = self._compute.get(unit, 0.0) + now - self._mark
        self._unit = None

    def pass_ended(self, *, whole: bool, backward: bool = False) -> bool:
        """The root's forward ended, `whole` if without an error; whether `profile` has just been made.

        Args:
            backward: if one follows, it is measured too.
        """
        self._depth -= 1
        if self._depth or not self.running:
            return False
        self.running = False
        self._wait = None if whole else 0
        rest_s = self._end()
        units = [unit for unit in self._engine.units if unit.index in self._compute]
        if not whole or not units or not self._transfer:
            return False
        rate = median(seconds / self._engine.units[unit].nbytes for unit, seconds in self._transfer.items())
        self.profile = Profile(
            compute_s=tuple(self._compute[unit.index] for unit in units),
            transfer_s=tuple(self._transfer.get(unit.index, rate * unit.nbytes) for unit in units),
            rest_s=rest_s,
        )
        self._order, self._most = [unit.index for unit in units] if backward else [], self._uses
        return True

    # -- backward ------------------------------------------------------------------------------------------------------------------

    def backward_begun(self) -> None:
        """The backward of the measured pass begins, if that is what it is."""
        if self._order and not self.inside:
            self._back = True
            self._begin()

    def backward_ended(self, error: BaseException | None) -> None:
        """It is over, and `profile` that of both."""
        if not self._back:
            return
        self._back = False
        rest_s = self._end()
        order, self._order = self._order, []
        if error is None and 0 < self._uses <= self._most and self.profile is not None:  # more are those of several forwards
            backward_s = tuple(self._compute.get(unit, 0.0) for unit in order)
            self.profile = dataclasses.replace(self.profile, backward_s=backward_s, rest_backward_s=rest_s)

    # -- both ----------------------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._compute: dict[int, float] = {}
        self._transfer: dict[int, float] = {}
        self._inside, self._uses, self._unit = 0.0, 0, None
        with self._engine.state:
            self._schedule, self._engine.schedule = self._engine.schedule, Schedule()  # knows no order, so nothing is read ahead
        self._began = self._now()

    def _end(self) -> float:
        """Seconds spent outside the blocks."""
        assert self._schedule is not None
        with self._engine.state:
            self._engine.schedule, self._schedule = self._schedule, None
        self._unit = None
        return max(0.0, self._now() - self._began - self._inside)

    def _now(self) -> float:
        self.settle()
        return self.clock()


def _nothing() -> None:
    pass

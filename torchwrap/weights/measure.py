"""One pass taken apart: seconds that each unit computes, forward and in training backward, to bring it in, and of everything else.

Where the model computes in the memory that units are read into, every pass is measured as it runs: from the moment a unit is asked for to
the moment it is left, less what was spent waiting for it. So what reading costs the same cores is in it.

Beside a separate device, and where knobs are to be chosen, one pass is measured *apart*: nothing is read ahead, each unit is brought in
when it is wanted, so that neither time contains a part of the other, and the host waits for the device before it looks at the clock. That
pass is as slow as one without any overlap. A backward is timed by the hooks that the engine has in it anyway (see stream/backward.py): what
blocks compute again is a part of it, and so is what an optimizer computes beside it on the same cores.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from torchwrap.stream.engine import Engine
from torchwrap.stream.passes import Times, Used
from torchwrap.stream.schedule import Schedule

__all__ = ["Meter"]

_PREPARED_BY = 1
"""Passes before the one measured apart: the first is watched for misplaced weights and fills caches."""


class Meter:
    """Measures passes of one model; a `BackwardClock`.

    Args:
        engine: of the model; None where every weight is resident: then only whole passes are timed.
        device: that computes.
        apart: measure one pass by itself, when armed; otherwise every pass.
        armed: with `apart`, measure the second pass; otherwise none until `arm`.

    Attributes:
        clock: seconds.
        settle: waits until the device has done what it was given.
        times: of the last pass that was measured; those of the forward alone until its backward is over.
        trained: of the last one with a backward.
        running: a forward is being measured.
    """

    def __init__(self, engine: Engine | None, device: torch.device, *, apart: bool, armed: bool = False) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.settle: Callable[[], None] = _nothing if device.type == "cpu" else lambda: torch.cuda.synchronize(device)
        self.times: Times | None = None
        self.trained: Times | None = None
        self.running: bool = False
        self.apart: bool = apart
        self._engine = engine
        self._wait: int | None = (_PREPARED_BY if armed else None) if apart else 0
        self._depth = 0
        self._schedule: Schedule | None = None
        self._most = 0  # uses of units in a measured forward whose backward is to be measured too; 0: in none
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
            self._most = 0  # a backward that comes now is not that of the measured forward alone
        if self._depth > 1 or self._wait is None or not wanted or self._back:
            return
        if self._wait:
            self._wait -= 1
            return
        if self.apart and self._engine is not None:
            self._engine.give_up_guesses()  # else the first unit would wait for them
        self.running = True
        self._begin()

    def fetching(self, unit: int) -> None:
        """A unit is about to be brought in."""
        if not (self.running or self._back) or self._inner(unit):
            return
        assert self._engine is not None
        if self._unit is not None:  # the backward comes to it a second time
            self.computed(self._unit)
        self._asked, counters = self._now(), self._engine.counters
        self._hits, self._stalled = counters["unit_hits"], counters["stall_s"]

    def computing(self, unit: int, *, alone: bool = False) -> None:
        """It is present; what follows is its computation. `alone`: nothing is read ahead during it."""
        if not (self.running or self._back) or self._inner(unit):
            return
        assert self._engine is not None
        self._alone, self._unit, self._mark = alone, unit, self._asked
        if self.apart:
            self._mark = self._now()
            if self._engine.counters["unit_hits"] == self._hits:  # not left over from before
                self._transfer[unit] = max(self._transfer.get(unit, 0.0), self._mark - self._asked)
        self._waited = 0.0 if self.apart else self._engine.counters["stall_s"] - self._stalled

    def computed(self, unit: int) -> None:
        """It is done."""
        if unit != self._unit:
            return
        now = self._now()
        self._inside += now - self._asked
        self._uses.append(Used(unit, max(0.0, now - self._mark - self._waited), self._alone))
        self._unit = None

    def pass_ended(self, *, whole: bool, backward: bool = False) -> bool:
        """The root's forward ended, `whole` if without an error; whether `times` has just been made.

        Args:
            backward: if one follows, it is measured too.
        """
        self._depth -= 1
        if self._depth or not self.running:
            return False
        self.running = False
        if self.apart:
            self._wait = None if whole else 0
        rest_s = self._end()
        if not whole or (self.apart and not self._transfer):
            return False
        self.times = Times(forward=tuple(self._uses), rest_s=rest_s, transfer_s=dict(self._transfer))
        self._most = max(1, len(self._uses)) if backward else 0
        return True

    def pass_cut(self) -> None:
        """An error ended the outermost pass, perhaps before it had begun here."""
        if self._depth:
            self._depth = 1
            self.pass_ended(whole=False)

    # -- backward ------------------------------------------------------------------------------------------------------------------

    def backward_begun(self) -> None:
        """The backward of the measured pass begins, if that is what it is."""
        if self._most and not self.inside:
            self._back = True
            self._begin()

    def backward_ended(self, error: BaseException | None) -> None:
        """It is over, and `times` that of both."""
        if not self._back:
            return
        self._back = False
        rest_s = self._end()
        most, self._most = self._most, 0
        whole = self.times is not None and bool(self._uses) == bool(self.times.forward) and len(self._uses) <= most
        if error is None and self.times is not None and whole:  # more uses are those of several forwards
            self.times = self.trained = dataclasses.replace(self.times, backward=tuple(self._uses), rest_backward_s=rest_s)

    # -- both ----------------------------------------------------------------------------------------------------------------------

    def _inner(self, unit: int) -> bool:
        """Whether the unit lies in the one that computes now, and so belongs to its time."""
        return self._unit is not None and self._engine is not None and self._engine.units[unit].parent == self._unit

    def _begin(self) -> None:
        self._uses: list[Used] = []
        self._transfer: dict[int, float] = {}
        self._inside, self._unit = 0.0, None
        if self.apart and self._engine is not None:
            with self._engine.state:
                self._schedule, self._engine.schedule = self._engine.schedule, Schedule()  # knows no order, so nothing is read ahead
        self._began = self._now()

    def _end(self) -> float:
        """Seconds spent outside the units."""
        self._unit = None
        if self._schedule is not None and self._engine is not None:
            with self._engine.state:
                self._engine.schedule, self._schedule = self._schedule, None
        return max(0.0, self._now() - self._began - self._inside)

    def _now(self) -> float:
        self.settle()
        return self.clock()


def _nothing() -> None:
    pass

"""What passes take, by what was measured of them: the way through the units, run on the simulator's clock (stream/passes.py).

Before a pass was measured its units take no time, so that what comes out is the time of moving bytes alone: the least a pass can take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.stream.backward import Backward
from torchwrap.stream.passes import Passes, Times, Used
from torchwrap.weights.many import ManyCalls
from torchwrap.weights.measure import Meter

if TYPE_CHECKING:
    from torchwrap.stream.planner import ResidencyPlan
    from torchwrap.stream.units import Piece, Unit

__all__ = ["Route", "TimedPasses", "Update", "check_inputs", "route_of"]

_FORWARD = 1 / 3  # of a training step's computing, where only the whole is known (a backward computes two products for each of a forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an optimizer does in a step. Seconds.

    Attributes:
        read_s, written_s: of what it moves.
        computing_s: of the whole step; None for not known.
        backwards: per step.
        overlaps: it moves during backward, else after it.
    """

    read_s: float
    written_s: float
    computing_s: float | None
    backwards: int = 1
    overlaps: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way of a pass through the units.

    Attributes:
        order: units as they are used, unless a pass was measured.
        streamed: bytes that come in with each unit; one that is not named is always there.
        weights: bytes of each unit, by which an optimizer's traffic is shared out.
        slots, batch: see simulator.py.
        forward, step: the last forward, and the last forward with a backward, that were measured.
    """

    order: Sequence[int]
    streamed: Mapping[int, int]
    weights: Mapping[int, int]
    slots: int
    batch: int = 1
    forward: Times | None = None
    step: Times | None = None

    def moves(self, rate: float) -> bool:
        """Whether it is known how long units take to come in: nothing comes, or there is a rate (bytes per second), or it was measured."""
        return bool(rate) or all(unit in self._known.transfer_s for unit in self.streamed)

    def pass_seconds(self, rate: float, *, computing: bool = True) -> float:
        """Of a forward in the long run. `computing`: with the measured seconds of computing, else what moving takes."""
        times = self.forward or Times(forward=tuple(map(Used, self.order)))
        times = Times(forward=times.forward, rest_s=times.rest_s)
        return self._passes(times if computing else _without_seconds(times), rate).seconds

    def step_seconds(self, rate: float, update: Update | None, *, computing: bool = True) -> float:
        """The same of a training step: forward, backward, and what an optimizer does."""
        times = self.step or Times(forward=tuple(map(Used, self.order)), backward=tuple(map(Used, reversed(self.order))))
        closing = 0.0
        if update is not None and update.computing_s is not None:
            if self.step is None:
                times = self._spread(times, update.computing_s / update.backwards)
            else:
                # What the backward spent outside of units may be waiting for the optimizer, whose seconds do not contain waiting.
                times = replace(times, rest_backward_s=0.0)
                closing = max(0.0, update.computing_s - update.backwards * times.computing_s)
        if not computing:
            times, closing = _without_seconds(times), 0.0
        passes = self._passes(times, rate)
        if update is None:
            return passes.seconds
        return replace(
            passes,
            repeats=update.backwards,
            read_s=self._shares(times, update.read_s, update.overlaps),
            written_s=self._shares(times, update.written_s, update.overlaps),
            closing_s=closing,
            renewed=True,
        ).seconds

    @property
    def _known(self) -> Times:
        return self.forward or self.step or Times()

    def _passes(self, times: Times, rate: float) -> Passes:
        measured = self._known.transfer_s
        transfer_s = {unit: measured.get(unit, nbytes / rate if rate else 0.0) for unit, nbytes in self.streamed.items()}
        return Passes(times=times, slots=self.slots, batch=self.batch, transfer_s=transfer_s)

    def _spread(self, times: Times, seconds: float) -> Times:
        if not times.forward:
            return Times(rest_s=seconds)
        whole = max(1, sum(self.weights.get(use.unit, 0) for use in times.forward))

        def shared(uses: Sequence[Used], part: float) -> tuple[Used, ...]:
            return tuple(replace(use, seconds=seconds * part * self.weights.get(use.unit, 0) / whole) for use in uses)

        return replace(times, forward=shared(times.forward, _FORWARD), backward=shared(times.backward, 1 - _FORWARD))

    def _shares(self, times: Times, seconds: float, overlaps: bool) -> dict[int, float]:
        used = dict.fromkeys(use.unit for use in times.backward)
        if not overlaps or not used:
            return {next(reversed(used), -1): seconds}
        whole = max(1, sum(self.weights.get(unit, 0) for unit in used))
        return {unit: seconds * self.weights.get(unit, 0) / whole for unit in used}


def _without_seconds(times: Times) -> Times:
    def empty(uses: Iterable[Used]) -> tuple[Used, ...]:
        return tuple(replace(use, seconds=0.0) for use in uses)

    return Times(forward=empty(times.forward), backward=empty(times.backward))


def route_of(units: Sequence[Unit], slots: int, away: Callable[[Piece], bool], meter: Meter | None = None) -> Route:
    """The way through a model's units.

    Args:
        away: whether a piece is streamed.
    """
    scheduled = [unit for unit in units if unit.kind in ("block", "leaf", "tile")]
    streamed = {unit.index: sum(piece.nbytes for piece in unit.pieces if away(piece)) for unit in scheduled}
    forward = meter.times if meter is not None else None
    inner = [unit for unit in units if unit.parent is not None and any(map(away, unit.pieces))]
    for unit in inner if forward is None else ():  # measured, their reading is part of the unit they lie in
        if unit.kind == "expert" and unit.parent in streamed:
            streamed[unit.parent] += sum(piece.nbytes for piece in unit.pieces if away(piece))
    return Route(
        order=[unit.index for unit in scheduled if streamed[unit.index]],
        streamed={unit: nbytes for unit, nbytes in streamed.items() if nbytes},
        weights={unit.index: unit.nbytes for unit in scheduled},
        slots=max(1, slots - 1) if inner and slots else slots,
        forward=forward,
        step=meter.trained if meter is not None else None,
    )


def check_inputs(name: str, batch: object, tokens: object) -> None:
    """Raise `ConfigError` unless both are integers of at least 1."""
    for field, value in (("batch", batch), ("tokens", tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise errors.ConfigError(f"{name}: {field}={value!r}", where=field, fix="Use an integer of at least 1.")


class TimedPasses(ManyCalls):
    """The part of a handle that times passes.

    Attributes:
        meter: takes the times; None in a copy whose weights are all present.
    """

    units: list[Unit]
    plan: ResidencyPlan
    backward: Backward
    meter: Meter | None = None

    def route(self) -> Route:
        """The way of a pass, with what was measured of it."""
        route = route_of(self.units, self.plan.slots, lambda piece: not piece.resident, self.meter)
        if self.engine is None:
            return route
        with self.engine.state:  # whole pages are read, which counts where weights are small
            reads = {unit: sum(region.nbytes for region in self.engine.layout(self.engine.units[unit]).regions) for unit in route.streamed}
        streamed = {unit: max(nbytes, reads[unit]) for unit, nbytes in route.streamed.items()}
        return replace(route, streamed=streamed, batch=self.engine.batches.size)

    def time_passes(self) -> None:
        """From now on, on the device and with the engine that there are now; what was measured before is forgotten."""
        self.meter = self.backward.clock = self._new_meter()

    def _new_meter(self) -> Meter | None:
        return Meter(self.engine, self.device, apart=self.engine is not None and self.engine.arena.separate)

    def pass_begun(self, module: nn.Module) -> None:
        """Called by the root's layer, with the model's lock."""
        if self.meter is not None and not self._in_turns():
            self.meter.pass_begun(wanted=not self.backward.running)

    def pass_ended(self, module: nn.Module, *, whole: bool) -> None:
        """Called by the root's layer, with the model's lock, when nothing of the pass is in use any more."""
        if self.meter is not None and not self._in_turns():
            self.meter.pass_ended(whole=whole, backward=torch.is_grad_enabled())

    def tune(self) -> None:
        """Measure the next pass. Beside a separate device that makes it slower; elsewhere every pass is measured anyway."""
        if self.meter is not None:
            self.meter.arm()

    def _in_turns(self) -> bool:
        """Whether this pass is one of several that go through the units together; what such a pass takes says nothing."""
        return self.engine is not None and self.engine.turns is not None

"""What passes through the units take in the long run: the uses of one pass, repeated on the simulator's clock until they are steady.

A pass is what was measured of one (see weights/measure.py), or its units with no time at all: then the answer is what moving them takes
at least. In training it goes forward and back, and behind the backward an optimizer reads and writes what belongs to each unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchwrap.stream.simulator import simulate

__all__ = ["Passes", "Times", "Used"]

_WARM = 3
"""Passes before those that count (chosen: the schedule knows the order after two)."""


@dataclass(frozen=True, slots=True)
class Used:
    """One use of a unit: its seconds without waiting, and whether nothing is read ahead meanwhile."""

    unit: int
    seconds: float = 0.0
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Times:
    """One pass, measured.

    Attributes:
        forward: uses in their order.
        rest_s: seconds of the forward outside of them.
        backward: uses in the order of the backward; () for a forward alone.
        rest_backward_s: seconds of the backward outside of them.
        transfer_s: seconds to bring a unit in, by unit, where that was measured.
    """

    forward: tuple[Used, ...] = ()
    rest_s: float = 0.0
    backward: tuple[Used, ...] = ()
    rest_backward_s: float = 0.0
    transfer_s: Mapping[int, float] = field(default_factory=dict)

    @property
    def forward_s(self) -> float:
        """Seconds of a forward that never waits."""
        return self.rest_s + sum(use.seconds for use in self.forward)

    @property
    def computing_s(self) -> float:
        """Seconds of the pass if it never waits."""
        return self.forward_s + self.rest_backward_s + sum(use.seconds for use in self.backward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """A pass again and again.

    Attributes:
        times: one pass.
        slots, batch: see simulator.py.
        transfer_s: seconds to bring a unit in, by unit; one that is not named is always there.
        overhead_s: seconds of the link for each request.
        repeats: passes for each update of the weights.
        read_s, written_s: seconds that an optimizer reads and writes behind the backward of a unit, by unit.
        closing_s: seconds of computing between the last backward and the next forward.
        renewed: weights are other ones after each update.
    """

    times: Times
    slots: int
    transfer_s: Mapping[int, float]
    batch: int = 1
    overhead_s: float = 0.0
    repeats: int = 1
    read_s: Mapping[int, float] = field(default_factory=dict)
    written_s: Mapping[int, float] = field(default_factory=dict)
    closing_s: float = 0.0
    renewed: bool = False

    @property
    def seconds(self) -> float:
        """From one update to the next, or of one pass, in the long run. Cost: a simulation of a few passes."""
        times, there, back = self.times, self.times.forward, self.times.backward
        one = [*there, *back]
        if not one or not self.slots:
            computing = times.computing_s * self.repeats + self.closing_s
            return max(computing, sum(self.read_s.values()), sum(self.written_s.values()))
        length = len(one) * self.repeats
        counted = self.batch // math.gcd(length, self.batch)  # so many are a whole number of batches
        uses = one * (self.repeats * (_WARM + counted))
        starts = range(0, len(uses), len(one))
        ends = range(length, len(uses) + 1, length)
        behind = [(end, {use.unit: place for place, use in enumerate(back, -len(back))}) for end in ends]
        last = {end + place: unit for end, places in behind for unit, place in places.items()}
        run = simulate(
            [use.unit for use in uses],
            slots=self.slots,
            batch=self.batch,
            transfer_s=_by_number(self.transfer_s),
            overhead_s=self.overhead_s,
            gaps_s=dict.fromkeys(starts, times.rest_s) | ({start + len(there): times.rest_backward_s for start in starts} if back else {}),
            longer_s={position: use.seconds for position, use in enumerate(uses)},
            link_s={position: self.read_s.get(unit, 0.0) for position, unit in last.items()},
            written_s={position: self.written_s.get(unit, 0.0) for position, unit in last.items()},
            renewed=ends[:-1] if self.renewed else (),
            closing_s=self.closing_s,
            alone={position for position, use in enumerate(uses) if use.alone},
            present={use.unit for use in one if use.unit not in self.transfer_s},
        )
        ended = [run.uses[end - 1].end for end in ends]
        return (ended[-1] - ended[_WARM - 1]) / counted


def _by_number(seconds: Mapping[int, float]) -> list[float]:
    return [seconds.get(unit, 0.0) for unit in range(max(seconds, default=-1) + 1)]

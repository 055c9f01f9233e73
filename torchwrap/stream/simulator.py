"""What the engine's slots would hold, and when, without weights: its schedule and its batches run on a virtual clock.

The simulator takes a sequence of uses and two times per unit and answers who is present at each use, how many transfers there are, and
when each use begins and ends. It runs the engine's own `Schedule` and `Batches`; what is written again here is only what slots and clocks
do: one link that brings in one unit after another in the order of requests, one processor, and a unit that can be used as soon as it is
present (or, for comparison with textbook formulas, only together with its whole batch). Tests hold it against the engine's own slots.

Sources: Rajbhandari et al., "ZeRO-Infinity", 2021, section 6 (overlap-centric schedule); the discrete-event form is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torchwrap.stream.batches import Batches
from torchwrap.stream.schedule import Schedule

__all__ = ["Run", "Use", "simulate"]


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a unit.

    Attributes:
        start, end: seconds.
        stall_s: seconds waited for the unit.
        present: units that occupy slots while it runs, those on their way included.
        fetched: True if it was not there and had not been asked for.
    """

    unit: int
    start: float
    end: float
    stall_s: float
    present: frozenset[int]
    fetched: bool


@dataclass(slots=True)
class Run:
    """What happened.

    Attributes:
        uses: in order.
        transfers: number of units brought in, those still under way at the end included.
    """

    uses: list[Use] = field(default_factory=list)
    transfers: int = 0

    @property
    def seconds(self) -> float:
        """End of the last use."""
        return self.uses[-1].end if self.uses else 0.0

    @property
    def stall_s(self) -> float:
        """Seconds in which the processor waited."""
        return sum(use.stall_s for use in self.uses)

    @property
    def peak_units(self) -> int:
        """Most units that occupied slots at once."""
        return max((len(use.present) for use in self.uses), default=0)


def simulate(
    uses: Sequence[int],
    *,
    slots: int,
    batch: int = 1,
    compute_s: Sequence[float] | None = None,
    transfer_s: Sequence[float] | None = None,
    overhead_s: float = 0.0,
    gaps_s: Mapping[int, float] | None = None,
    longer_s: Mapping[int, float] | None = None,
    link_s: Mapping[int, float] | None = None,
    written_s: Mapping[int, float] | None = None,
    renewed: Collection[int] = (),
    closing_s: float = 0.0,
    alone: Collection[int] = (),
    present: Collection[int] = (),
    order: Sequence[int] | None = None,
    arrival: Literal["unit", "batch"] = "unit",
) -> Run:
    """Run a sequence of uses.

    Args:
        uses: units in the order they are used.
        slots: units that fit at once.
        batch: uses after which slots change hands.
        compute_s: seconds of a use, by unit; None: 0.
        transfer_s: seconds to bring a unit in, by unit; None: 0.
        overhead_s: seconds of the link for each request of one or several units.
        gaps_s: seconds of other work before a use, by its position in `uses`.
        longer_s: seconds that a use takes beyond `compute_s` (a backward's, say), by position.
        link_s: seconds in which the link brings in something else, asked for at the end of a use, by position.
        written_s: seconds in which something goes the other way, beside what comes in, asked for at the end of a use, by position.
        renewed: positions before which units were rewritten: that traffic is waited for, and whatever is present is out of date.
        closing_s: seconds of other work before that wait.
        alone: positions of uses during which nothing is read ahead, and before which what was is given up.
        present: units that are always there, and take no slot.
        order: first order the schedule assumes; None: units by number.
        arrival: whether a unit can be used when it is present itself, or when all units requested together with it are.

    Cost: about `slots` steps per use.
    """
    first = [unit for unit in (sorted(set(uses)) if order is None else order) if unit not in present]
    works = _Works(compute_s, gaps_s or {}, longer_s or {}, link_s or {}, written_s or {}, renewed, closing_s, alone)
    return _Simulation(first, slots, batch, transfer_s, overhead_s, arrival, present).run(uses, works)


@dataclass(frozen=True, slots=True)
class _Works:
    """What happens besides units coming in; see `simulate`."""

    compute_s: Sequence[float] | None
    gaps_s: Mapping[int, float]
    longer_s: Mapping[int, float]
    link_s: Mapping[int, float]
    written_s: Mapping[int, float]
    renewed: Collection[int]
    closing_s: float
    alone: Collection[int]


class _Simulation:
    def __init__(
        self,
        order: Sequence[int],
        slots: int,
        batch: int,
        transfer_s: Sequence[float] | None,
        overhead_s: float,
        arrival: Literal["unit", "batch"],
        present: Collection[int],
    ) -> None:
        self.schedule = Schedule()
        self.schedule.seed(list(order))
        self.batches = Batches(batch)
        self.present = present
        self.slots, self.transfer_s, self.overhead_s, self.arrival = slots, transfer_s, overhead_s, arrival
        self.ready: dict[int, float] = {}  # unit -> when it can be used; in the order of requests, as the engine keeps its fetches
        self.finished: list[int] = []  # used in this batch
        self.link_free = 0.0
        self.others_end = self.written_end = 0.0  # of what else the link moves, and of what goes the other way
        self.transfers = 0

    def run(self, uses: Sequence[int], works: _Works) -> Run:
        result, now = Run(), 0.0
        for position, unit in enumerate(uses):
            if position in works.renewed:
                now = self._renew(now + works.closing_s)
            now += works.gaps_s.get(position, 0.0)
            if position in works.alone:
                self._give_up(unit)
            self.schedule.advance(unit)
            there, fetched = unit in self.ready, unit not in self.ready and unit not in self.present
            if not there:
                self._hand_over(self.slots - 1)
            if fetched:
                self._make_place({unit})
                self._request([unit], now)
            requests = self.batches.begun(present=there)
            start = max(now, self.ready.get(unit, 0.0))
            if requests and position not in works.alone:
                self._prefetch(start, in_use=unit)
            present = frozenset(self.ready)
            end = start + (works.compute_s[unit] if works.compute_s is not None else 0.0) + works.longer_s.get(position, 0.0)
            result.uses.append(Use(unit, start, end, start - now, present, fetched))
            now = end
            self._move_others(now, works.link_s.get(position, 0.0), works.written_s.get(position, 0.0))
            if position in works.alone:
                self._prefetch(now, in_use=unit)
            if unit in self.present:
                continue
            self.finished.append(unit)
            if self.batches.ended():
                self._hand_over(self.slots)
                self._prefetch(now)
        result.transfers = self.transfers
        return result

    def _move_others(self, now: float, link_s: float, written_s: float) -> None:
        if link_s:
            self.others_end = self.link_free = max(now, self.link_free) + link_s
        if written_s:
            self.written_end = max(now, self.written_end) + written_s

    def _give_up(self, spare: int) -> None:
        """Free the slots of what was read ahead."""
        self.ready = {unit: at for unit, at in self.ready.items() if unit == spare}
        self.finished = [unit for unit in self.finished if unit in self.ready]

    def _renew(self, now: float) -> float:
        now = max(now, self.others_end, self.written_end)
        self.ready.clear()
        self.finished.clear()
        self._prefetch(now)
        return now

    def _hand_over(self, kept: int) -> None:
        expected = self.schedule.predict(kept)
        for done in self.finished:
            if done not in expected:
                self.ready.pop(done, None)
        self.finished.clear()

    def _prefetch(self, now: float, in_use: int | None = None) -> None:
        wanted = self.schedule.predict(self.slots)
        request: list[int] = []
        for unit in wanted:
            if unit in self.ready or unit in request or unit in self.present:
                continue
            held = sum(1 for other in self.ready if other == in_use or other in wanted) + len(request)
            if held >= self.slots or not self._make_place({*wanted, in_use}, len(request)):
                break
            request.append(unit)
        self._request(request, now)

    def _make_place(self, spare: set[int | None], promised: int = 0) -> bool:
        """Whether there is a free slot, after giving up the oldest unit outside `spare` if need be."""
        if len(self.ready) + promised < self.slots:
            return True
        victim = next((unit for unit in self.ready if unit not in spare), None)
        if victim is None:
            return False
        del self.ready[victim]
        return True

    def _request(self, units: Sequence[int], now: float) -> None:
        if not units:
            return
        at = max(now, self.link_free) + self.overhead_s
        for unit in units:
            at += self.transfer_s[unit] if self.transfer_s is not None else 0.0
            self.ready[unit] = at
        if self.arrival == "batch":
            self.ready.update(dict.fromkeys(units, at))
        self.link_free = at
        self.transfers += len(units)

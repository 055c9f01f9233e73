"""What happened when: intervals of moving bytes, computing, updating and waiting, and the bytes of weights present, for pictures.

Times are `time.monotonic()` seconds relative to the timeline's own zero. Recording is off unless asked for: it grows by a few entries per
unit and pass, and by three per chunk of an `OffloadedOptimizer`'s step. Any thread may add to it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torchwrap.core.errors import ConfigError
from torchwrap.stream.picture import draw

if TYPE_CHECKING:
    from torchwrap.stream.planner import ResidencyPlan
    from torchwrap.stream.settings import Streaming

__all__ = ["Event", "Lane", "Timeline", "timeline_of"]

Lane = Literal["read", "compute", "backward", "stall", "save", "load", "state", "update", "write"]


@dataclass(frozen=True, slots=True)
class Event:
    """One interval: seconds since the timeline began, which lane, which unit or parameter, bytes moved (0 where none are).

    | lane | what |
    |---|---|
    | read | weights of a unit come for a forward or a backward |
    | compute | a forward of a unit; where a backward computes it again, that lies within the interval of its backward |
    | backward | a backward of a unit, from its outputs' gradient on |
    | stall | the thread that computes waits for one of the others |
    | save, load | activations leave and come back |
    | state | an optimizer reads a chunk: its state, with weight and gradient where those are on the disk |
    | update | the optimizer class runs on a chunk, or on all that stays in memory |
    | write | an optimizer writes a chunk of weight and state, a gradient that waits, or a commit |
    """

    start: float
    end: float
    lane: Lane
    unit: str
    nbytes: int


@dataclass(slots=True)
class Timeline:
    """Recorded events and samples.

    Attributes:
        events: intervals, in the order in which threads noted them.
        samples: (seconds, bytes of weights present from then on).
        marks: (seconds, label) of moments that the user named.
        zero: `time.monotonic()` at the timeline's own zero.
    """

    base_bytes: int = 0
    events: list[Event] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    zero: float = field(default_factory=time.monotonic)
    _open: dict[tuple[int, str, str], list[float]] = field(default_factory=dict)
    _present: int = 0

    def add(self, lane: Lane, unit: str, start: float, end: float, nbytes: int) -> None:
        """Record an interval given in `time.monotonic()` seconds."""
        self.events.append(Event(start - self.zero, end - self.zero, lane, unit, nbytes))

    def begin(self, lane: Lane, unit: str) -> None:
        """Start an interval of this thread; one within another of the same lane and unit is part of that."""
        self._open.setdefault((threading.get_ident(), lane, unit), []).append(time.monotonic())

    def end(self, lane: Lane, unit: str) -> None:
        """End the interval that this thread began; nothing if it began none."""
        key = (threading.get_ident(), lane, unit)
        starts = self._open.get(key)
        if starts:
            start = starts.pop()
            if not starts:
                del self._open[key]
                self.add(lane, unit, start, time.monotonic(), 0)

    def present(self, change: int) -> None:
        """Bytes of weights came (positive) or went (negative)."""
        self._present += change
        self.samples.append((time.monotonic() - self.zero, self.base_bytes + self._present))

    def mark(self, label: str) -> None:
        """Name this moment: pictures have a line there, and its seconds can be where one begins or ends."""
        self.marks.append((time.monotonic() - self.zero, label))

    def picture(self, *, since: float | None = None, until: float | None = None, title: str = "") -> bytes:
        """Bytes of weights present, and lanes of what was moved, computed, updated and waited for, as a PNG file.

        Args:
            since, until: seconds on the timeline's clock, as in `events` and `marks`; `None`: the first and the last event.
            title: first line of the picture.

        Raises:
            ConfigError: `until` is not after `since`.
            ModuleNotFoundError: matplotlib is not installed (`pip install 'torchwrap[demo]'`).
        """
        first = since if since is not None else min((event.start for event in self.events), default=0.0)
        last = until if until is not None else max((event.end for event in self.events), default=first + 1.0)
        if not first < last:
            raise ConfigError(f"a picture from {first:g} s to {last:g} s has no length", where="until", fix="Take seconds from `marks`.")
        return draw(self, first, last, title)


def timeline_of(config: Streaming, plan: ResidencyPlan) -> Timeline | None:
    """A new timeline for a model with these settings, if they ask for one."""
    return Timeline(plan.fixed_bytes + plan.resident_bytes) if config.record else None

"""What happened when: intervals of reading, computing and waiting, and the bytes of weights present, for pictures and explanations.

Times are `time.monotonic()` seconds relative to the first event. Recording is off unless asked for: it grows by a few entries per unit.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Event", "Timeline"]

Lane = Literal["read", "compute", "stall", "save", "load"]


@dataclass(frozen=True, slots=True)
class Event:
    """One interval: seconds since the timeline began, which lane, which unit, bytes moved (0 where none are).

    "save" and "load" are activations leaving and coming back, "read" is weights.
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
        events: intervals, in order of their ends.
        samples: (seconds, bytes of weights present from then on).
        zero: `time.monotonic()` at the timeline's own zero.
    """

    base_bytes: int = 0
    events: list[Event] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)
    zero: float = field(default_factory=time.monotonic)
    _open: dict[tuple[int, str], float] = field(default_factory=dict)
    _present: int = 0

    def add(self, lane: Lane, unit: str, start: float, end: float, nbytes: int) -> None:
        """Record an interval given in `time.monotonic()` seconds."""
        self.events.append(Event(start - self.zero, end - self.zero, lane, unit, nbytes))

    def begin(self, lane: Lane, unit: str) -> None:
        """Start an interval of this thread."""
        self._open[(threading.get_ident(), unit)] = time.monotonic()

    def end(self, lane: Lane, unit: str) -> None:
        """End the interval that this thread began; nothing if it began none."""
        start = self._open.pop((threading.get_ident(), unit), None)
        if start is not None:
            self.add(lane, unit, start, time.monotonic(), 0)

    def present(self, change: int) -> None:
        """Bytes of weights came (positive) or went (negative)."""
        self._present += change
        self.samples.append((time.monotonic() - self.zero, self.base_bytes + self._present))

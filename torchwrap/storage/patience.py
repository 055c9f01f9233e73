"""How long to wait for a disk before it counts as one that hangs: not while the process itself stood still.

A process that was stopped (Ctrl-Z, a frozen container, a debugger) finds on waking that nothing has moved for minutes. Whoever waits looks
every half second; a look that comes much later than that tells that nobody could move, and patience begins anew.
"""

from __future__ import annotations

import time

__all__ = ["LOOK_S", "Patience"]

LOOK_S = 0.5
"""Longest wait of one piece, chosen. Python looks for signals before a wait, and an interrupt that comes between the look and the wait
does not end it: it is raised when the wait is over, which without this bound is when the disk moves or the time-out runs out."""

_LATE_S = 1.0  # chosen: a busy machine is late by less, most of the time


class Patience:
    """Made when waiting begins.

    Args:
        limit_s: seconds without progress that count as a hang.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since = self._looked = time.monotonic()

    def left(self, moved: float = 0.0) -> float:
        """Seconds until this counts as a hang, none or fewer if it does now; to be asked at every look.

        Args:
            moved: when something moved, in `time.monotonic()` seconds.
        """
        now = time.monotonic()
        if now - self._looked > LOOK_S + _LATE_S:
            self._since = now
        self._looked = now
        return self._limit_s - (now - max(self._since, moved))

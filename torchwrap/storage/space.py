"""Which places of a file are free: sorted, neighbours joined, first fit.

Spilled tensors have few different sizes, so the hole that one leaves usually fits the next.
"""

from __future__ import annotations

from bisect import insort

__all__ = ["Space"]


class Space:
    """Free places of a file of `end` bytes."""

    def __init__(self) -> None:
        self.end: int = 0
        self._free: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int | None:
        """Offset of `nbytes` that are free and no longer are; `None` if no hole is large enough."""
        for index, (offset, size) in enumerate(self._free):
            if size >= nbytes:
                self._free[index : index + 1] = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                return offset
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Make a place free again."""
        insort(self._free, (offset, nbytes))
        index = self._free.index((offset, nbytes))
        if index + 1 < len(self._free) and offset + nbytes == self._free[index + 1][0]:
            self._free[index : index + 2] = [(offset, nbytes + self._free[index + 1][1])]
        if index and sum(self._free[index - 1]) == offset:
            self._free[index - 1 : index + 1] = [(self._free[index - 1][0], self._free[index - 1][1] + self._free[index][1])]

    def tail(self) -> int:
        """Free bytes at the very end, which growing makes larger."""
        return self._free[-1][1] if self._free and sum(self._free[-1]) == self.end else 0

    def extend(self, nbytes: int) -> None:
        """The file grew: its new end is free."""
        start, self.end = self.end, self.end + nbytes
        self.give(start, nbytes)

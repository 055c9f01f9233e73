"""Hangs that tests make, told from a machine that is busy: patience runs out while one of them lasts, and at no other time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from torchwrap.storage.patience import Patience

__all__ = ["answering", "hanging_now", "only_hangs_end_patience"]

_lock = threading.Lock()
_hangs = _answers = 0


@contextmanager
def hanging_now() -> Iterator[None]:
    """A call of a disk that does not answer within the block."""
    global _hangs
    with _lock:
        _hangs += 1
    try:
        yield
    finally:
        with _lock:
            _hangs -= 1


@contextmanager
def answering() -> Iterator[None]:
    """A call of such a disk that answers, as soon as the machine has time for it."""
    global _answers
    with _lock:
        _answers += 1
    try:
        yield
    finally:
        with _lock:
            _answers -= 1


@contextmanager
def only_hangs_end_patience() -> Iterator[None]:
    """Within the block time counts against a limit while something hangs that a test made hang, and nothing else is being read.

    A test can then have a limit that is soon over, and does not fail where an honest call takes longer than that.
    """
    left = Patience.left

    def counted(self: Patience, moved: float = 0.0) -> float:
        if not _hangs or _answers:
            self._since = time.monotonic()
        return left(self, moved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Patience, "left", counted)
        yield

"""A condition that an interrupt does not leave locked.

Python raises Ctrl-C, and whatever other signals raise, in the main thread where a function of Python begins or has called something. The
methods of `threading.Condition` for `with` are such functions around the lock: an interrupt that came while the thread waited for the
interpreter is raised between the lock and the block that lets go of it, and every other thread waits for ever (measured, Python 3.11: once
in some hundred interrupts of a backward). A lock's own methods are not of Python, and nothing is raised between them and the block. Its
`wait` has such a gap too, where the lock is let go of and nobody has noted how often it was held: the end of the block fails then.
"""

from __future__ import annotations

import threading
from itertools import starmap
from operator import attrgetter
from typing import TYPE_CHECKING, Any

__all__ = ["Condition"]


class Condition(threading.Condition):
    """As its base, for `with` and with what is inherited; reentrant."""

    if not TYPE_CHECKING:  # to which they are what they were
        __enter__ = property(attrgetter("_lock.__enter__"))
        __exit__ = property(attrgetter("_lock.__exit__"))

        def wait(self, timeout: float | None = None) -> bool:
            """Let others have the lock until one of them notifies, or for so many seconds; whether it was notified."""
            if not self._is_owned():
                raise RuntimeError("cannot wait on un-acquired lock")
            waiter, held = threading.Lock(), list[Any]()
            waiter.acquire()
            try:
                self._waiters.append(waiter)
                held.extend(starmap(self._release_save, [()]))  # one call, which is not of Python
                told = waiter.acquire(timeout=-1 if timeout is None else max(0, timeout))
            finally:
                if held:
                    self._acquire_restore(*held)
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            return told

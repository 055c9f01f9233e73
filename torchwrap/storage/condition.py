"""A condition that an interrupt does not leave locked.

Python raises Ctrl-C, and whatever other signals raise, in the main thread where a function of Python begins or has called something. The
methods of `threading.Condition` for `with` are such functions around the lock: an interrupt that came while the thread waited for the
interpreter is raised between the lock and the block that lets go of it, and every other thread waits for ever (measured, Python 3.11: once
in some hundred interrupts of a backward). A lock's own methods are not of Python, and nothing is raised between them and the block.
"""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import TYPE_CHECKING

__all__ = ["Condition"]


class Condition(threading.Condition):
    """As its base, for `with`; reentrant."""

    if not TYPE_CHECKING:  # to which they are what they were
        __enter__ = property(attrgetter("_lock.__enter__"))
        __exit__ = property(attrgetter("_lock.__exit__"))

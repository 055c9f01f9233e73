"""Several processes that each do a part of one thing: forks of one that has imported everything, which takes longer than the parts."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

__all__ = ["forks"]


def forks(count: int, work: Callable[[int], object]) -> None:
    """Call `work(rank)` in `count` forks of this process; ends this process with status 1 where one of them raises.

    To be called before torch has computed anything: its threads are not there in a fork.
    """
    made = []
    for rank in range(count):
        child = os.fork()
        if not child:
            _one(work, rank)
        made.append(child)
    if any([os.waitpid(child, 0)[1] for child in made]):
        sys.exit(1)


def _one(work: Callable[[int], object], rank: int) -> None:
    """Does not return."""
    try:
        work(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # A process group may be broken on purpose by now, and taking it down would wait for the others.
    os._exit(0)

"""Threads in a forked child: torch's OpenMP waits there for ever for those that only the parent has.

That is so for GNU's OpenMP once the parent has computed on several threads, and for every operation of torch that takes more than one.
The native kernels start threads of their own in a child (`src/parallel.cpp`); what torch computes around them has to do with one.
Torch's data loader sets one thread for all of a worker; here it is set for the length of a call, and the child's setting stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread", "stuck"]

_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_in_child)


def stuck() -> bool:
    """Whether an operation of torch may wait for ever: this is a forked child, and torch would take more than one thread."""
    return _forked and torch.get_num_threads() > 1


@contextmanager
def one_thread() -> Iterator[None]:
    """A region in which torch computes on the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Keeping large tensors out of the C library's heap, so that freeing them gives their memory back.

glibc begins by taking large blocks from the system one by one, and stops doing so once some were freed: up to 32 MiB they then come from
one heap. torch asks for tensors at 64-byte alignment, so a hole that one left is too small for the next of its size as soon as a few bytes
beside it are in use. In a backward that hands its gradients over one by one, while small ones stay, the heap grows by the gradients of the
whole model (measured, glibc 2.36: by 631 MiB instead of 186 for a model of 384 MiB). A fixed threshold switches that off.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

__all__ = ["keep_heap_small"]

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_THRESHOLD = 256 << 10  # chosen: the system call and the page faults cost little beside the computation on so much memory


def keep_heap_small() -> bool:
    """Have blocks from 256 KiB on taken from the system one by one, in this process, from now on.

    Changes no result. Does nothing without glibc, or where the user set a threshold (`MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`).

    Returns:
        Whether it was done.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    with suppress(AttributeError, OSError):
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
    return False

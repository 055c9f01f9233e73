"""Memory of large tensors: out of the C library's heap, so that freeing gives it back, and used again where that pays.

glibc begins by taking large blocks from the system one by one, and stops doing so once some were freed: up to 32 MiB they then come from
one heap. torch asks for tensors at 64-byte alignment, so a hole that one left is too small for the next of its size as soon as a few bytes
beside it are in use. In a backward that hands its gradients over one by one, while small ones stay, the heap grows by the gradients of the
whole model (measured, glibc 2.36: by 631 MiB instead of 186 for a model of 384 MiB). A fixed threshold switches that off.

The price is a page fault for every 4 KiB of every gradient and temporary. `FreedBlocks` takes most of it back in training: blocks that
torch frees are kept, up to a bound, for its next requests of their size (native/src/blocks.cpp says how), and new ones are asked for in
pages of 2 MiB. Nothing is cut or merged, so nothing is lost between blocks.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress

__all__ = ["FreedBlocks", "give_back", "keep_heap_small", "refusal"]

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_THRESHOLD = 256 << 10  # chosen: what is smaller costs little either way
_REFUSALS = {
    1: "it is made for glibc on x86-64 and aarch64",
    2: "torch's library libc10.so is not loaded",
    3: "another allocator, or a tool that watches allocations, is in torch's way to the C library",
    4: "the system does not let torch's table of imported functions be changed",
    5: "another thread does not let go of it",
}


def keep_heap_small() -> bool:
    """Have blocks from 256 KiB on taken from the system one by one, in this process, from now on.

    Changes no result. Does nothing without glibc, or where the user set a threshold (`MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`).

    Returns:
        Whether it was done.
    """
    if _threshold_is_set():
        return False
    with suppress(AttributeError, OSError):
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD))
    return False


def give_back() -> None:
    """Return freed memory inside the C library's heap to the system, once; what is in use stays. Does nothing without glibc.

    Weights below 32 MiB lie there, and holes that they left are not used for blocks taken from the system one by one (measured: 130 MiB
    of a T5 of 350 MiB stayed after its weights had gone).
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def refusal() -> str:
    """Why freed blocks cannot be kept in this process; empty if they can. Changes nothing."""
    from torchwrap.native import library  # slow: registers operators

    if _threshold_is_set():
        return "the environment sets a threshold of its own for large blocks"
    if not library.available():
        return f"no native code: {library.reason()}"
    return _REFUSALS.get(library.library().torchwrap_blocks_refusal(), "")


class FreedBlocks:
    """Keeps what torch frees on the CPU, in blocks of 256 KiB and more, for its next tensors of the same size, until closed.

    All that are open share one list and their bounds add up. A block comes back as it was freed: like any fresh memory of torch's it holds
    arbitrary values, at the same alignment. Threads and forked children may use it; tensors may be older than it and outlive it. A fork
    lets go of what is kept.

    Args:
        nbytes: kept at most.

    Attributes:
        nbytes: kept at most; 0 if nothing is kept.
        reason: why nothing is kept; empty if something is.

    Exactness: no result changes.
    Cost: up to `nbytes` of memory beside what is in use.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes: int = 0
        self._lent = self._held = 0
        self.reason: str = refusal() or ("" if nbytes > 0 else "there is nothing to keep")
        if not self.reason:
            from torchwrap.native.library import library  # slow: registers operators

            keep_heap_small()
            self.reason = _REFUSALS.get(library().torchwrap_blocks_hold(nbytes, _THRESHOLD), "")
            self.nbytes = self._held = 0 if self.reason else nbytes

    def lend(self, nbytes: int) -> None:
        """Keep `nbytes` less from now on, as the same memory is in use elsewhere, or more again if that is negative. One thread at a time.

        Something always remains, so that blocks go on coming from where they did.
        """
        self._lent += nbytes
        held = max(min(self.nbytes, _THRESHOLD), self.nbytes - self._lent)
        more, self._held = held - self._held, held
        if more:
            from torchwrap.native.library import library  # slow: registers operators

            if more < 0:
                library().torchwrap_blocks_release(-more)
            elif library().torchwrap_blocks_hold(more, _THRESHOLD):
                self._held -= more  # another thread did not let go: it keeps less until it is asked again

    @staticmethod
    def counts() -> Mapping[str, int]:
        """Bytes kept now, and requests so far in this process that were served from them (`reused`) or not (`fresh`)."""
        from torchwrap.native import library  # slow: registers operators

        found = (ctypes.c_uint64 * 3)()
        if library.available():
            library.library().torchwrap_blocks_counts(found)
        return dict(zip(("bytes", "reused", "fresh"), found, strict=True))

    def close(self) -> None:
        """Give up what this one may keep; after the last one everything is as it was. Calling it again does nothing."""
        from torchwrap.native.library import library  # slow: registers operators

        nbytes, self.nbytes, self._held = self._held, 0, 0
        if nbytes:
            library().torchwrap_blocks_release(nbytes)


def _threshold_is_set() -> bool:
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")

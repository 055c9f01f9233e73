"""Tensors over the pages of a file, and keeping those up to date whose value is written to another place.

A tensor in a state dict of a model in memory is the model's own memory: whoever holds it sees every later step. A tensor over stored bytes
would go on showing the place where these lay. So the pages of a new place are mapped where those of the old one were: no address changes,
nothing is read, and no memory is taken.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import MutableSet
from typing import Protocol

import numpy
import torch

from torchwrap.core.errors import StorageError
from torchwrap.storage.header import Segment

__all__ = ["Views", "map_segment", "show_segment"]

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in the mmap module since Python 3.13 only; the value is Linux's
_FLAGS, _ACCESS = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
_FIXED = 0x10  # MAP_FIXED of Linux, which the mmap module lacks

_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


class Viewed(Protocol):
    """A file of which tensors can be shown."""

    def view(self, name: str, live: MutableSet[mmap.mmap] | None = None) -> torch.Tensor:
        """A tensor over the file's own pages; its mapping is added to `live`."""
        ...


class Showing(Protocol):
    """A file to which values are written."""

    def show_in(self, mapping: mmap.mmap, name: str) -> None:
        """Let the mapping of a view, of this file or another, show a tensor of the same size."""
        ...


class Views:
    """Tensors that show one value, wherever it is written. Any thread may call the methods."""

    def __init__(self) -> None:
        self._live: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._lock = threading.Lock()

    def view(self, file: Viewed, name: str) -> torch.Tensor:
        """One more of them."""
        with self._lock:
            return file.view(name, self._live)

    def show(self, file: Showing, name: str) -> None:
        """The value lies here now."""
        with self._lock:
            for mapping in self._live:
                file.show_in(mapping, name)


def map_segment(fd: int, segment: Segment, live: MutableSet[mmap.mmap] | None = None) -> torch.Tensor:
    """The tensor over the file's own pages, private when written to; copied only if torch needs another alignment.

    Args:
        fd: of the file.
        segment: of some bytes.
        live: gets the mapping, which lives as long as the tensor.
    """
    start = segment.offset % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(fd, start + segment.nbytes, flags=_FLAGS, prot=_ACCESS, offset=segment.offset - start)
    if start % segment.dtype.itemsize:
        whole = mapping
        mapping = mmap.mmap(-1, segment.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _copy(whole, mapping, segment.nbytes)
        start = 0
    if live is not None:
        live.add(mapping)
    raw = torch.frombuffer(mapping, dtype=torch.uint8, count=segment.nbytes, offset=start)
    return raw.view(segment.dtype).reshape(segment.shape)


def show_segment(mapping: mmap.mmap, fd: int, segment: Segment) -> None:
    """Let a mapping of another segment of the same size show this one; what was written to the mapping is lost.

    Cost: none where both begin at the same place of a page; else from now on the memory of a copy.

    Raises:
        StorageError: the system refuses.
    """
    start = segment.offset % mmap.ALLOCATIONGRANULARITY
    if len(mapping) != start + segment.nbytes:
        _copy(mmap.mmap(fd, start + segment.nbytes, flags=_FLAGS, prot=_ACCESS, offset=segment.offset - start), mapping, segment.nbytes)
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if _mmap(address, len(mapping), _ACCESS, _FLAGS | _FIXED, fd, segment.offset - start) != address:
        code = ctypes.get_errno()
        raise StorageError(f"a tensor of a state dict cannot follow its weight: {os.strerror(code)}", where=segment.name)


def _copy(source: mmap.mmap, target: mmap.mmap, nbytes: int) -> None:
    """The data, which is at the end of both."""
    end = numpy.frombuffer(target, numpy.uint8)[len(target) - nbytes :]
    numpy.copyto(end, numpy.frombuffer(source, numpy.uint8)[len(source) - nbytes :])

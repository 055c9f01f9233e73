"""Where activations go: a private file, or page-locked host memory beside a separate device.

A tier stores and returns plain bytes. Writing is done by one background thread and blocks it; reading is begun by whoever needs the
bytes soon and finished by whoever needs them now.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torchwrap.storage import aio, pool
from torchwrap.storage.spill import SpillStore
from torchwrap.stream.arena import Arena
from torchwrap.stream.settings import Streaming

__all__ = ["DiskTier", "HostTier", "Loading", "Place", "Tier"]

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Place:
    """Stored bytes: what the tier finds them by, their number, their sum if one was taken, and the address modulo 256 they had.

    They come back at the same one, because kernels that peel off elements until an address is aligned give other last bits at another.
    """

    key: Any
    nbytes: int
    sum64: int | None
    residue: int


class Loading(Protocol):
    """Bytes on their way back."""

    def wait(self) -> torch.Tensor:
        """(nbytes,) uint8 on the execution device, in memory of its own; may be called again.

        Raises:
            CorruptDataError: the bytes are not those that were written.
            StorageError: reading failed, or did not end in time.
        """
        ...

    @property
    def waits(self) -> bool:
        """Whether `wait` would not return at once."""
        ...

    @property
    def interval(self) -> tuple[float, float]:
        """When the bytes moved, in `time.monotonic()` seconds; zeros if that is not known."""
        ...


class Tier(Protocol):
    """A store of bytes. `write` and `free` are called by one thread."""

    def mark(self) -> Any:
        """What `write` has to wait for so that everything computed until now is complete."""
        ...

    def write(self, memory: torch.Tensor, mark: Any) -> Place:
        """Store (nbytes,) uint8; returns when the memory is not needed any more.

        Raises:
            DiskFullError, BudgetError: there is no room.
            StorageError: the disk failed.
        """
        ...

    def read(self, place: Place) -> Loading:
        """Begin to bring bytes back."""
        ...

    def free(self, place: Place) -> None:
        """The bytes are not needed any more."""
        ...

    def close(self) -> None:
        """Remove everything."""
        ...


class DiskTier:
    """A file in a private folder, written and read past the page cache, compared with its sum on the way back.

    Args:
        config: path, threads, request size and time-out.
        device: where the bytes come from and go to.

    Cost: one block on the disk beside each tensor; 4 MiB of memory to write, and for each tensor what it takes to read.
    """

    def __init__(self, config: Streaming, device: torch.device) -> None:
        self._device = device
        self._store = SpillStore.create(config.path)
        self._reader = aio.Reader(config.io_threads or 2, int(config.io_chunk) or 4 << 20, config.io_timeout_s, mode=config.io_backend)
        self._names = (f"activation-{number}" for number in itertools.count())

    def mark(self) -> Any:
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def write(self, memory: torch.Tensor, mark: Any) -> Place:
        if mark is not None:
            mark.synchronize()
        name, residue = next(self._names), memory.data_ptr() % _ALIGNMENT
        self._store.put(name, memory)
        return Place(name, memory.numel(), self._store.file.records[name].sum64, residue)

    def read(self, place: Place) -> Loading:
        segment = self._store.segments[place.key]
        buffer = pool.allocate(place.nbytes + pool.BLOCK)
        self._store.file.check_unchanged()
        part = aio.Part(place.key, segment.offset, place.nbytes, place.sum64)
        ticket = self._reader.submit([aio.Read(self._store.file, segment.offset, place.nbytes, buffer, place.residue, (part,))])
        # From the buffer's memory and not from its tensor: the storage then begins where the first one did, to the byte.
        target = torch.frombuffer(buffer.memory[place.residue : place.residue + place.nbytes], dtype=torch.uint8)
        return _Reading(ticket, target, place.residue, self._device)

    def free(self, place: Place) -> None:
        self._store.remove(place.key)

    def close(self) -> None:
        self._reader.close()
        self._store.close()


class _Reading:
    """Reads into host memory, and from there to the device if that is another one."""

    def __init__(self, ticket: aio.Ticket, target: torch.Tensor, residue: int, device: torch.device) -> None:
        self._ticket, self._target, self._residue, self._device = ticket, target, residue, device

    def wait(self) -> torch.Tensor:
        self._ticket.wait()
        if self._target.device != self._device:
            self._target = _empty(self._target.numel(), self._residue, self._device).copy_(self._target)
        return self._target

    @property
    def waits(self) -> bool:
        return not self._ticket.done()

    @property
    def interval(self) -> tuple[float, float]:
        return self._ticket.interval


class HostTier:
    """Page-locked host memory beside a CUDA device, with a stream of its own for the copies.

    Args:
        arena: makes page-locked buffers.
        check: raises `BudgetError` if host memory for so many bytes more is not there.

    Cost: the bytes stored, and buffers of sizes used before, which are used again.
    """

    def __init__(self, arena: Arena, check: Callable[[int], None]) -> None:
        self._arena, self._check, self._device = arena, check, arena.device
        self._stream = torch.cuda.Stream(self._device)
        self._idle: dict[int, list[pool.Buffer]] = {}
        self._closed = False

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def write(self, memory: torch.Tensor, mark: Any) -> Place:
        size = pool.round_up(memory.numel())
        idle = self._idle.get(size)
        if not idle:
            self._check(size)
        buffer = idle.pop() if idle else self._arena.host_buffer(size)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            buffer.tensor()[: memory.numel()].copy_(memory, non_blocking=True)
            self._stream.synchronize()  # the caller may free the memory now
        return Place(buffer, memory.numel(), None, memory.data_ptr() % _ALIGNMENT)

    def read(self, place: Place) -> Loading:
        return _Copying(place, self._device, self._stream)

    def free(self, place: Place) -> None:
        if self._closed:
            self._arena.release_host(place.key)
        else:
            self._idle.setdefault(place.key.nbytes, []).append(place.key)

    def close(self) -> None:
        self._closed = True
        for buffer in itertools.chain.from_iterable(self._idle.values()):
            self._arena.release_host(buffer)
        self._idle.clear()


class _Copying:
    """A copy to the device under way."""

    interval: tuple[float, float] = (0.0, 0.0)
    waits: bool = False  # the device waits, not the caller

    def __init__(self, place: Place, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._target = _empty(place.nbytes, place.residue, device)
        stream.wait_stream(torch.cuda.current_stream(device))  # its memory may still be in use by work before it was freed
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self._target.copy_(place.key.tensor()[: place.nbytes], non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(stream)
        self._target.record_stream(stream)  # may be given up before the copy is complete

    def wait(self) -> torch.Tensor:
        torch.cuda.current_stream(self._device).wait_event(self._ready)
        return self._target


def _empty(nbytes: int, residue: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes + residue, dtype=torch.uint8, device=device)[residue:]

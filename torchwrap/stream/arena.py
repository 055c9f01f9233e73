"""Memory of the two tiers and the copies between them.

A *slot* is a reused buffer for the streamed part of one unit. On a CPU the memory that a read lands in is the memory the unit computes
with (`HostArena`, no copy). With a separate device, a slot has two sides: page-locked host memory for reads and a device tensor; a copy
stream moves one to the other while the compute stream works (`CudaArena`). Three orders have to hold, and each is one event:

* the copy waits until the compute stream has finished with what the slot held before (`free`),
* compute waits until the copy is complete (`ready`),
* the next read into the host side waits until the copy out of it is complete (`ready`, on the host).

Slots belong to the engine for its lifetime and never return to torch's caching allocator, so `record_stream` is not needed. Tests run the
same engine on a fake arena that delays every copy as long as these events allow, and fails on a missing one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torchwrap.core import errors
from torchwrap.storage import pool

__all__ = ["Arena", "CudaArena", "HostArena", "Slot", "arena_for"]


@dataclass(slots=True, eq=False)
class Slot:
    """One reused buffer.

    Attributes:
        host: memory that reads land in; page aligned.
        device: (nbytes,) uint8 on the execution device; the same memory as `host` where there is no separate device.
        free: event after the last computation that used the slot, or None.
        ready: event after the last copy into `device`, or None.
    """

    index: int
    host: pool.Buffer
    device: torch.Tensor
    free: Any = None
    ready: Any = None


class Arena(Protocol):
    """Where slots live and how bytes get into them."""

    separate: bool
    device: torch.device

    def make_slot(self, index: int, nbytes: int) -> Slot:
        """A new slot of `nbytes` bytes."""
        ...

    def host_buffer(self, nbytes: int) -> pool.Buffer:
        """Host memory that copies to the device can start from."""
        ...

    def release_host(self, buffer: pool.Buffer) -> None:
        """Give back what `host_buffer` made."""
        ...

    def before_read(self, slot: Slot) -> None:
        """Block until the host side of the slot may be overwritten."""
        ...

    def upload(self, slot: Slot, parts: list[tuple[int, torch.Tensor]]) -> None:
        """Start copying (offset in slot, uint8 host tensor) parts; sets `slot.ready`. Any thread may call it."""
        ...

    def before_compute(self, slot: Slot) -> None:
        """Order the computation that follows after the slot's copies."""
        ...

    def after_compute(self, slot: Slot) -> None:
        """Note that the computation so far is the last that uses what the slot holds; sets `slot.free`."""
        ...

    def free_slot(self, slot: Slot) -> None:
        """Give the memory back."""
        ...


class HostArena:
    """Slots in the machine's own memory: reads land where the weights are used."""

    separate = False

    def __init__(self) -> None:
        self.device: torch.device = torch.device("cpu")

    def make_slot(self, index: int, nbytes: int) -> Slot:
        buffer = pool.allocate(nbytes)
        return Slot(index, buffer, buffer.tensor())

    def host_buffer(self, nbytes: int) -> pool.Buffer:
        return pool.allocate(nbytes)

    def release_host(self, buffer: pool.Buffer) -> None:
        buffer.free()

    def before_read(self, slot: Slot) -> None:
        pass

    def upload(self, slot: Slot, parts: list[tuple[int, torch.Tensor]]) -> None:
        for offset, part in parts:
            slot.device[offset : offset + part.numel()].copy_(part)

    def before_compute(self, slot: Slot) -> None:
        pass

    def after_compute(self, slot: Slot) -> None:
        pass

    def free_slot(self, slot: Slot) -> None:
        slot.device = torch.empty(0, dtype=torch.uint8)
        slot.host.free()


class CudaArena:
    """Slots on a CUDA device, fed from page-locked host memory by one copy stream that lives as long as the arena."""

    separate = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device: torch.device = torch.device(device.type, index)
        self._copies = torch.cuda.Stream(self.device)

    def make_slot(self, index: int, nbytes: int) -> Slot:
        device = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return Slot(index, self.host_buffer(nbytes), device)

    def host_buffer(self, nbytes: int) -> pool.Buffer:
        buffer = pool.allocate(nbytes)
        # Registered in one piece: pin_memory() per tensor goes through an allocator that rounds sizes up to powers of two.
        code = torch.cuda.cudart().cudaHostRegister(buffer.address, buffer.nbytes, 0)
        if int(code) != 0:
            buffer.free()
            raise errors.BudgetError(
                f"torchwrap: the driver refused to page-lock {nbytes} bytes of host memory (CUDA error {int(code)})",
                needed=nbytes,
                available=0,
                fix="Lower host_memory=, or raise the limit on locked memory (ulimit -l).",
            )
        return buffer

    def before_read(self, slot: Slot) -> None:
        if slot.ready is not None:
            slot.ready.synchronize()

    def upload(self, slot: Slot, parts: list[tuple[int, torch.Tensor]]) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            if slot.free is not None:
                self._copies.wait_event(slot.free)
            for offset, part in parts:
                slot.device[offset : offset + part.numel()].copy_(part, non_blocking=True)
            slot.ready = torch.cuda.Event()
            slot.ready.record(self._copies)

    def before_compute(self, slot: Slot) -> None:
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)

    def after_compute(self, slot: Slot) -> None:
        slot.free = torch.cuda.Event()
        slot.free.record(torch.cuda.current_stream(self.device))

    def free_slot(self, slot: Slot) -> None:
        if slot.ready is not None:
            slot.ready.synchronize()
        if slot.free is not None:
            slot.free.synchronize()
        self.release_host(slot.host)
        slot.device = torch.empty(0, dtype=torch.uint8)

    def release_host(self, buffer: pool.Buffer) -> None:
        torch.cuda.cudart().cudaHostUnregister(buffer.address)
        buffer.free()


def arena_for(device: torch.device) -> Arena:
    """The arena of an execution device.

    Raises:
        UnsupportedModelError: neither CPU nor CUDA.
    """
    if device.type == "cpu":
        return HostArena()
    if device.type == "cuda":
        return CudaArena(device)
    raise errors.UnsupportedModelError(
        f"torchwrap: computing on {device} is not supported", where="device", fix='Use device="cuda" or device="cpu".'
    )

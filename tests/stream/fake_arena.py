"""A device that is not there: an arena with host memory and device memory apart, both on the CPU.

`FakeArena` is written from the three rules in arena.py's opening comment, on the simulated machine of machine.py; `simulated_cuda.py`
runs the library's own `CudaArena` on the same machine. Torch computes with the device side at once, in program order; what is
adversarial is when copies are done, and what lies in memory before: 255 in every byte, which is NaN in every float type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.stream.machine import HazardError, Machine
from torchwrap.storage import aio, pool
from torchwrap.stream.arena import Slot

__all__ = ["FakeArena", "HazardError", "Machine", "stand_in", "watch_reads"]


class FakeArena:
    """`Arena` with `separate = True` whose device tensors are CPU tensors in other memory than the slot's host side."""

    separate = True

    def __init__(self, machine: Machine) -> None:
        self.device = torch.device("cpu")
        self.machine = machine
        self.live: set[int] = set()
        self.most_live = 0
        self._copies = machine.queue("copies")

    def make_slot(self, index: int, nbytes: int) -> Slot:
        device = torch.full((nbytes,), 255, dtype=torch.uint8)
        self.machine.register(f"device side of slot {index}", device.data_ptr(), nbytes)
        if index in self.live:
            self.machine.hazard(f"two slots with index {index}")
        self.live.add(index)
        self.most_live = max(self.most_live, len(self.live))
        return Slot(index, self.host_buffer(nbytes), device)

    def host_buffer(self, nbytes: int) -> pool.Buffer:
        buffer = pool.allocate(nbytes)
        self.machine.register("host memory", buffer.address, buffer.nbytes)
        return buffer

    def release_host(self, buffer: Any) -> None:
        """Give page-locked memory back."""
        buffer.free()

    def before_read(self, slot: Slot) -> None:
        if slot.ready is not None:
            self.machine.synchronize(slot.ready)
        slot.host.tensor().fill_(255)

    def upload(self, slot: Slot, parts: list[tuple[int, torch.Tensor]]) -> None:
        with self.machine.lock:
            self.wait_free(slot)
            for offset, part in parts:
                self.machine.copy(self._copies, slot.device[offset : offset + part.numel()], part)
            slot.ready = self.machine.record(self._copies)

    def wait_free(self, slot: Slot) -> None:
        if slot.free is not None:
            self.machine.wait(self._copies, slot.free)

    def before_compute(self, slot: Slot) -> None:
        self.wait_ready(slot)
        self.machine.access(self.machine.compute, slot.device.data_ptr(), write=False, what="computing")

    def wait_ready(self, slot: Slot) -> None:
        if slot.ready is not None:
            self.machine.wait(self.machine.compute, slot.ready)

    def after_compute(self, slot: Slot) -> None:
        self.machine.work(self.machine.compute, self.machine.compute_s)
        self.machine.access(self.machine.compute, slot.device.data_ptr(), write=False, what="computing")
        slot.free = self.machine.record(self.machine.compute)

    def free_slot(self, slot: Slot) -> None:
        for event in (slot.ready, slot.free):
            if event is not None:
                self.machine.synchronize(event)
        self.live.discard(slot.index)
        self.machine.forget(slot.device.data_ptr())
        self.machine.forget(slot.host.address)
        slot.device = torch.empty(0, dtype=torch.uint8)
        slot.host.free()


def watch_reads(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Tell the machine of disk reads into its memory: they are writes by the host, and end when their ticket says so."""
    submit = aio.Reader.submit

    def watched(self: aio.Reader, reads: Sequence[aio.Read]) -> aio.Ticket:
        regions = []
        for read in reads:
            address = read.target.address if isinstance(read.target, pool.Buffer) else 0
            region = machine.region_at(address)
            if region is not None:
                machine.host_access(address, write=True, what="a disk read")
                regions.append(region)
        ticket = submit(self, reads)
        for region in regions:
            region.filling = ticket.done
        return ticket

    patch.setattr(aio.Reader, "submit", watched)


def stand_in(patch: pytest.MonkeyPatch, machine: Machine, make: Any = FakeArena, *, host_bytes: int = 1 << 40) -> list[Any]:
    """Let `offload` compute on a fake device with `host_bytes` of page-locked memory; returns the list its arenas are added to."""
    from torchwrap.offload import technique
    from torchwrap.weights import copying, place
    from torchwrap.weights import technique as shared

    arenas: list[Any] = []

    def arena_for(_: torch.device) -> Any:
        arenas.append(make(machine))
        return arenas[-1]

    def weight_budget(*args: Any) -> Any:
        return dataclasses.replace(plain(*args), host=host_bytes)

    plain = technique.weight_budget
    patch.setattr(technique, "weight_budget", weight_budget)
    for module in (shared, place, copying):
        patch.setattr(module, "arena_for", arena_for)
    watch_reads(patch, machine)
    return arenas

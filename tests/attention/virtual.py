"""A machine with a separate device that is not there: virtual clocks for device, link and host, and a check of every order.

Memory is ordinary and begins as NaN. Computing is done at once and its time is counted: bytes read over a rate. Copies are done as late as
the marks allow, when somebody waits for them, so that a missing wait reads NaN; and a copy into memory that is still being read, or work
before what it reads has arrived, is an error even if the numbers come out right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from torchwrap.attention.cooperative.planner import Rates

__all__ = ["OrderError", "VirtualMachine"]

T = TypeVar("T")


class OrderError(AssertionError):
    """Something was read before it was there, or overwritten while it was read."""


@dataclass(eq=False)
class Mark:
    """A time, and the copies that are done by then."""

    time: float
    lane: str
    copies: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Use:
    """When memory was last written and read."""

    written: float = 0.0
    read: float = 0.0


class VirtualMachine:
    """See the opening comment.

    Args:
        rates: of the three lanes.
        device_bytes, host_bytes: more than that cannot be allocated.
    """

    def __init__(self, rates: Rates, *, device_bytes: int = 1 << 40, host_bytes: int = 1 << 40) -> None:
        self.device = torch.device("cpu")
        self.rates = rates
        self.limits = {"device": device_bytes, "host": host_bytes}
        self.allocated = {"device": 0, "host": 0}
        self.busy = {"device": 0.0, "link": 0.0, "disk": 0.0}  # the end of what each lane was given
        self.hosts: dict[int, float] = {}
        self.uploaded = 0
        self._asked = 0.0  # when the last query went to the host
        self._uses: dict[int, Use] = {}
        self._waiting: list[Mark] = []
        self._lock = threading.RLock()

    def device_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._allocate("device", shape, dtype)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._allocate("host", shape, dtype)

    def _allocate(self, tier: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if self.allocated[tier] + nbytes > self.limits[tier]:
            error = torch.OutOfMemoryError if tier == "device" else MemoryError
            raise error(f"{tier}: {nbytes} more bytes than {self.limits[tier]} allow")
        self.allocated[tier] += nbytes
        memory = torch.full(shape, float("nan"), dtype=dtype)
        # Addresses come back: what was at this one before, somebody's query for example, is forgotten.
        inside = range(memory.data_ptr(), memory.data_ptr() + nbytes)
        self._uses = {address: use for address, use in self._uses.items() if address not in inside}
        return memory

    def release_host(self, memory: Tensor) -> None:
        self.allocated["host"] -= memory.nbytes

    def compute(self, work: Callable[[], T], *, reads: Sequence[Tensor], after: Sequence[Mark | None] = ()) -> T:
        with self._lock:
            start = self._wait(after, self.busy["device"])
            for memory in reads:
                self._check_written(memory, start)
            self.busy["device"] = start + sum(memory.nbytes for memory in reads) / self.rates.device
            for memory in reads:
                self._use(memory).read = self.busy["device"]
        return work()

    def computed(self) -> Mark:
        return Mark(self.busy["device"], "device")

    def download(self, source: Tensor, target: Tensor) -> Mark:
        with self._lock:
            self._check_free(target, self.busy["device"])
            self._asked = self.busy["device"]
            # In order with the device's work, which may overwrite the source as soon as this is issued.
            return self._copy("device", source.clone(), target)

    def upload(self, source: Tensor, target: Tensor, after: Sequence[Mark | None] = ()) -> Mark:
        with self._lock:
            start = self._wait(after, self.busy["link"])
            self._check_written(source, start)
            self._check_free(target, start)
            self.busy["link"] = start + source.nbytes / self.rates.link
            self.uploaded += source.nbytes
            target.fill_(float("nan"))
            return self._copy("link", source, target)

    def work(
        self, work: Callable[[], T], *, reads: Sequence[Tensor], lane: tuple[int, int], after: Sequence[Mark | None] = ()
    ) -> tuple[T, Mark]:
        with self._lock:
            start = self._wait(after, self.hosts.get(lane[0], 0.0))
            for memory in reads:
                self._check_written(memory, start)
            # The lanes share the host's memory.
            nbytes = sum(memory.nbytes for memory in reads)
            self.hosts[lane[0]] = end = start + self.rates.wake_s + nbytes * lane[1] / self.rates.host
        return work(), Mark(end, "host")

    def read(self, start: Callable[[], T], nbytes: int) -> tuple[T, Mark]:
        with self._lock:
            # Two blocks are on their way at a time, so that the disk never waits for who reads it, once the step has begun.
            self.busy["disk"] = max(self.busy["disk"], self._asked) + nbytes / self.rates.disk
            found = start()
            for name in ("keys", "values"):  # where something else may have been before
                self._uses.pop(getattr(found, name).data_ptr(), None)
            return found, Mark(self.busy["disk"], "disk")

    def now(self) -> float:
        with self._lock:
            self._wait(self._waiting, 0.0)
            return max(*self.busy.values(), *self.hosts.values(), 0.0)

    def _copy(self, lane: str, source: Tensor, target: Tensor) -> Mark:
        mark = Mark(self.busy[lane], lane, [lambda: target.copy_(source)])
        self._use(target).written = mark.time
        self._waiting.append(mark)
        return mark

    def _wait(self, marks: Sequence[Mark | None], start: float) -> float:
        for mark in [one for one in marks if one is not None]:
            start = max(start, mark.time)
            # A mark stands for everything before it on its lane.
            for earlier in [one for one in self._waiting if one is mark or (one.time <= mark.time and one.lane == mark.lane)]:
                for copy in earlier.copies:
                    copy()
                self._waiting.remove(earlier)
        return start

    def _use(self, memory: Tensor) -> Use:
        return self._uses.setdefault(memory.data_ptr(), Use())

    def _check_written(self, memory: Tensor, start: float) -> None:
        if self._use(memory).written > start:
            raise OrderError(f"read at {start}, written at {self._use(memory).written}")

    def _check_free(self, memory: Tensor, start: float) -> None:
        if self._use(memory).read > start:
            raise OrderError(f"overwritten at {start}, read until {self._use(memory).read}")

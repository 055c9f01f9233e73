"""A simulated machine with a separate device: two queues, events, a virtual clock, and a detector of missing orders.

Work on a queue is either done as *late* as the events allow (only when somebody waits for it), as *early* as possible (at once), or at
*random* moments between. Whatever the mode, every access to a piece of memory is checked like a race detector does it: queues and the
host carry vector clocks, waiting for an event joins its clock, and two accesses of which one writes must be ordered by them. A missing
wait therefore fails even where the bytes happen to be right. The host is one clock, however many threads it has: what these do among
themselves is ordered by locks that the simulation does not see.

Times are virtual seconds: copies take bytes / bandwidth, computation takes what the arena says, reading from disk takes none.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

__all__ = ["HazardError", "Machine", "Mark", "Queue", "Region"]

Order = Literal["late", "early", "random"]
Clock = dict[str, int]


class HazardError(AssertionError):
    """Two accesses to one memory that nothing orders."""


@dataclass(slots=True)
class Region:
    """Memory that queues and host share: name, address range, and the latest accesses by each of them as (time in its clock, what)."""

    name: str
    start: int
    end: int
    reads: dict[str, tuple[int, str]] = field(default_factory=dict)
    writes: dict[str, tuple[int, str]] = field(default_factory=dict)
    filling: Callable[[], bool] | None = None  # tells whether the disk read into this memory has ended


@dataclass(slots=True)
class Mark:
    """An event: everything before this point of a queue."""

    queue: Queue
    position: int
    clock: Clock
    time: float


class Queue:
    """Work in order, each piece begun when the one before it is complete."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}
        self.time = 0.0
        self.busy: list[tuple[float, float]] = []  # intervals of work
        self.issued = self.done = 0
        self._pending: list[Callable[[], None]] = []

    def push(self, work: Callable[[], None]) -> None:
        self._pending.append(work)
        self.issued += 1

    def run_to(self, position: int) -> None:
        while self.done < position:
            self._pending.pop(0)()
            self.done += 1


class Machine:
    """Clocks, queues and memory of one host and one device.

    Args:
        order: when copies are really done.
        bandwidth: bytes per virtual second of the copy queue.
        compute_s: virtual seconds of one use of a slot.
        seed: of the "random" order.
    """

    def __init__(self, order: Order = "late", *, bandwidth: float = 1e9, compute_s: float = 0.0, seed: int = 0) -> None:
        self.order, self.bandwidth, self.compute_s = order, bandwidth, compute_s
        self.compute = Queue("compute")
        self.hazards: list[str] = []
        self.copied_bytes = 0
        self.waits = 0
        self.lock = threading.RLock()
        self._host: Clock = {}
        self._host_time = 0.0
        self._regions: list[Region] = []
        self._queues = [self.compute]
        self._random = random.Random(seed)

    # -- memory ------------------------------------------------------------------------------------------------------------------

    def register(self, name: str, start: int, nbytes: int) -> Region:
        with self.lock:
            region = Region(name, start, start + nbytes)
            self._regions.append(region)
            return region

    def forget(self, start: int) -> None:
        """Memory was given back: that is a write, so nobody may still use it."""
        with self.lock:
            region = self.region_at(start)
            assert region is not None
            self.host_access(start, write=True, what="freeing")
            self._regions.remove(region)

    def region_at(self, address: int) -> Region | None:
        return next((region for region in self._regions if region.start <= address < region.end), None)

    @property
    def live_regions(self) -> list[str]:
        return [region.name for region in self._regions]

    def access(self, queue: Queue, address: int, *, write: bool, what: str) -> None:
        """Work issued now on `queue` touches the memory at `address`."""
        with self.lock:
            _join(queue.clock, self._host)
            self._access(queue.name, queue.clock, address, write, what)

    def host_access(self, address: int, *, write: bool, what: str) -> None:
        """The host touches the memory at `address` now."""
        with self.lock:
            self._access("host", self._host, address, write, what)

    def _access(self, who: str, clock: Clock, address: int, write: bool, what: str) -> None:
        region = self.region_at(address)
        if region is None:
            self.hazard(f"{what}: memory that is neither page-locked nor on the device")
            return
        clock[who] = clock.get(who, 0) + 1
        before = [*region.writes.items(), *(region.reads.items() if write else ())]
        for other, (time, earlier) in before:
            if clock.get(other, 0) < time:
                self.hazard(f"{what} on {region.name} ({who}) is not ordered after {earlier} ({other})")
        (region.writes if write else region.reads)[who] = (clock[who], what)

    def hazard(self, message: str) -> None:
        self.hazards.append(message)
        raise HazardError(message)

    def check(self) -> None:
        """Raise if any hazard was seen, also one that was raised in a thread."""
        if self.hazards:
            raise HazardError("; ".join(self.hazards))

    # -- queues and events -------------------------------------------------------------------------------------------------------

    def queue(self, name: str) -> Queue:
        with self.lock:
            made = Queue(f"{name}{len(self._queues)}")
            self._queues.append(made)
            return made

    def work(self, queue: Queue, seconds: float, does: Callable[[], None] = lambda: None) -> None:
        """Issue a piece of work."""
        with self.lock:
            _join(queue.clock, self._host)
            start = max(queue.time, self._host_time)
            queue.time = start + seconds
            if seconds:
                queue.busy.append((start, queue.time))
            queue.push(does)
            if self.order == "early" or queue is self.compute:  # torch has computed already
                queue.run_to(queue.issued)
            self._drift()

    def copy(self, queue: Queue, target: torch.Tensor, source: torch.Tensor) -> None:
        """Issue a copy between host and device memory."""
        with self.lock:
            self.access(queue, source.data_ptr(), write=False, what="an upload")
            region = self.region_at(source.data_ptr())
            if region is not None and region.filling is not None and not region.filling():
                self.hazard(f"an upload out of {region.name} began before the disk read into it had ended")
            self.access(queue, target.data_ptr(), write=True, what="an upload")
            target.fill_(255)  # from now on nobody may rely on the bytes: NaN, until the copy is really done
            self.copied_bytes += source.numel()
            self.work(queue, source.numel() / self.bandwidth, lambda: _copy(target, source))

    def record(self, queue: Queue) -> Mark:
        with self.lock:
            _join(queue.clock, self._host)
            return Mark(queue, queue.issued, dict(queue.clock), max(queue.time, self._host_time))

    def wait(self, queue: Queue, mark: Mark) -> None:
        """What is issued on `queue` from now on comes after the event."""
        with self.lock:
            self.waits += 1
            _join(queue.clock, mark.clock)
            queue.time = max(queue.time, mark.time)
            if queue is self.compute:  # torch computes as soon as it is told to
                mark.queue.run_to(mark.position)
            self._drift()

    def synchronize(self, mark: Mark) -> None:
        """Block the host until the event."""
        with self.lock:
            self.waits += 1
            _join(self._host, mark.clock)
            self._host_time = max(self._host_time, mark.time)
            mark.queue.run_to(mark.position)
            self._drift()

    def _drift(self) -> None:
        if self.order == "random":
            for queue in self._queues:
                queue.run_to(self._random.randint(queue.done, queue.issued))

    # -- time --------------------------------------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        return max(self._host_time, *(queue.time for queue in self._queues))

    @property
    def copy_seconds(self) -> float:
        return sum(end - start for queue in self._queues if queue is not self.compute for start, end in queue.busy)

    @property
    def overlap_seconds(self) -> float:
        """Virtual time during which something was copied and something computed."""
        return sum(
            max(0.0, min(end, c_end) - max(start, c_start))
            for queue in self._queues
            if queue is not self.compute
            for start, end in queue.busy
            for c_start, c_end in self.compute.busy
        )


def _join(clock: Clock, other: Clock) -> None:
    for who, time in other.items():
        clock[who] = max(clock.get(who, 0), time)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.numpy()[:] = source.numpy()  # not by torch: dispatch modes of the moment must not see it

"""The machine under a cache of two tiers: one device, one host, one link between them, and the order of what happens on the three.

Decoding one token reads every key and value once, so what counts is which memory each byte is read from and which way it takes. A `Machine`
offers verbs for that: `compute` on the device, `work` on the host, `upload` and `download` over the link, `read` from the disk, and marks
that order them.
`CudaMachine` issues them on streams and events. `OneMemory` has the device's tensors in the machine's own memory: the same schedule without
a card, exact, with nothing to gain but tests and the habit. Tests add a third with a virtual clock (tests/attention/virtual.py).

Three orders have to hold, and each is one mark: the host reads a query after its download; the device reads a staged chunk after its
upload; a staging buffer is filled again after the device has attended what lay in it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from torchwrap.core import errors

__all__ = ["CudaMachine", "Lane", "Machine", "Mark", "OneMemory", "cores", "free_on", "machine_for"]

T = TypeVar("T")
Lane = tuple[int, int]  # number of a worker thread, and how many there are
Mark = Any  # a point on the device's, the link's or the host's time line; what it is belongs to the machine


class Machine(Protocol):
    """Where memory of the two tiers comes from, and how work on it is ordered.

    Attributes:
        device: where queries come from and results go.
    """

    device: torch.device

    def device_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of the device. Raises `torch.OutOfMemoryError` when there is none."""
        ...

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of the host, page-locked where there is a card. Raises `MemoryError` when there is none."""
        ...

    def release_host(self, memory: torch.Tensor) -> None:
        """Give back what `host_memory` made; nothing uses it any more."""
        ...

    def compute(self, work: Callable[[], T], *, reads: Sequence[torch.Tensor], after: Sequence[Mark] = ()) -> T:
        """Issue `work` on the device; it may use `reads` once every mark of `after` is reached."""
        ...

    def computed(self) -> Mark:
        """The end of everything issued on the device so far."""
        ...

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Mark:
        """Start copying a device tensor to the host, in order with the device's work."""
        ...

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark] = ()) -> Mark:
        """Start copying a host tensor to the device, beside the device's work."""
        ...

    def work(self, work: Callable[[], T], *, reads: Sequence[torch.Tensor], lane: Lane, after: Sequence[Mark] = ()) -> tuple[T, Mark]:
        """Do `work` on the host, in the calling thread, which is one of several, once every mark of `after` is reached."""
        ...

    def read(self, start: Callable[[], T], nbytes: int) -> tuple[T, Mark]:
        """Start to read `nbytes` bytes from a disk; what `start` returns knows when they are there, and so does the mark."""
        ...

    def now(self) -> float:
        """Seconds on a clock of the machine's own, after waiting for the device."""
        ...


class OneMemory:
    """Both tiers in the machine's own memory: every verb is done when it returns, whatever its marks."""

    def __init__(self) -> None:
        self.device: torch.device = torch.device("cpu")

    def device_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        try:
            return _host_tensor(shape, dtype)
        except MemoryError as error:
            raise torch.OutOfMemoryError(str(error)) from error

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return _host_tensor(shape, dtype)

    def release_host(self, memory: torch.Tensor) -> None:
        pass

    def compute(self, work: Callable[[], T], *, reads: Sequence[torch.Tensor], after: Sequence[Mark] = ()) -> T:
        return work()

    def computed(self) -> Mark:
        return None

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Mark:
        target.copy_(source)
        return None

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark] = ()) -> Mark:
        target.copy_(source)
        return None

    def work(self, work: Callable[[], T], *, reads: Sequence[torch.Tensor], lane: Lane, after: Sequence[Mark] = ()) -> tuple[T, Mark]:
        return work(), None

    def read(self, start: Callable[[], T], nbytes: int) -> tuple[T, Mark]:
        return start(), None

    def now(self) -> float:
        return time.perf_counter()


class CudaMachine:
    """A CUDA device: computing on the current stream, uploads on a stream of their own, marks are events."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device: torch.device = torch.device(device.type, index)
        self._uploads = torch.cuda.Stream(self.device)
        self._locked: set[int] = set()

    def device_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = _host_tensor(shape, dtype)
        # Registered in one piece: pin_memory() goes through an allocator that rounds sizes up to powers of two.
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) if memory.nbytes else 0
        if code == 0:
            self._locked.add(memory.data_ptr())
        else:
            warnings.warn(
                f"torchwrap: the driver refused to page-lock {memory.nbytes} bytes for keys and values (CUDA error {code}); copies from "
                "ordinary memory are slower. Raise the limit on locked memory (ulimit -l) or put less on the host.",
                errors.TorchwrapWarning,
                stacklevel=2,
            )
        return memory

    def release_host(self, memory: torch.Tensor) -> None:
        if memory.data_ptr() in self._locked:
            torch.cuda.synchronize(self.device)
            self._locked.discard(memory.data_ptr())
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def compute(self, work: Callable[[], T], *, reads: Sequence[torch.Tensor], after: Sequence[Mark] = ()) -> T:
        stream = torch.cuda.current_stream(self.device)
        for mark in after:
            if mark is not None:
                stream.wait_event(mark)
        return work()

    def computed(self) -> Mark:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Mark:
        _copy(source, target)
        return self.computed()

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark] = ()) -> Mark:
        with torch.cuda.stream(self._uploads):
            for mark in after:
                if mark is not None:
                    self._uploads.wait_event(mark)
            _copy(source, target)
            event = torch.cuda.Event()
            event.record(self._uploads)
        return event

    def work(self, work: Callable[[], T], *, reads: Sequence[torch.Tensor], lane: Lane, after: Sequence[Mark] = ()) -> tuple[T, Mark]:
        for mark in after:
            if mark is not None:
                mark.synchronize()
        return work(), None

    def read(self, start: Callable[[], T], nbytes: int) -> tuple[T, Mark]:
        return start(), None

    def now(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """A copy over the link in runs of memory: of anything else torch makes an unlocked copy on the host first, and waits for it."""
    if source.dim() != 4 or (source.is_contiguous() and target.is_contiguous()):
        target.copy_(source, non_blocking=True)
        return
    for row in range(source.shape[0]):
        for head in range(source.shape[1]):
            target[row, head].copy_(source[row, head], non_blocking=True)


def machine_for(device: torch.device) -> Machine:
    """The machine of an execution device.

    Raises:
        UnsupportedModelError: neither CPU nor CUDA.
    """
    if device.type == "cpu":
        return OneMemory()
    if device.type == "cuda":
        return CudaMachine(device)
    raise errors.UnsupportedModelError(
        f"torchwrap: keys and values on the host beside {device} are not supported",
        where="device",
        fix='Use device="cuda" or device="cpu".',
    )


def free_on(device: torch.device) -> int:
    """Bytes that a cache may count on: 0.9 of what is free on a card; on a CPU, which has no memory of its own, half of what is free."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cores() -> int:
    """Cores that this process may use; two threads of one core share what reads memory, and count once."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii"))
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def _host_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device="cpu")
    except RuntimeError as error:  # torch's allocator for the CPU has no class of its own for "no memory"
        raise MemoryError(str(error)) from error

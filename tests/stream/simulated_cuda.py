"""The part of `torch.cuda` that `CudaArena` uses, on the simulated machine: its own code runs, and its events are checked.

The name `torch` in arena.py is replaced by an object that answers `torch.cuda`, makes device tensors on the CPU, and leaves everything
else to torch. Copies issued inside `torch.cuda.stream(...)` are caught by a dispatch mode and put on that stream's queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.stream.machine import Machine, Mark, Queue
from torchwrap.stream import arena
from torchwrap.stream.arena import CudaArena, Slot

__all__ = ["WatchedCuda", "simulate"]


class WatchedCuda(CudaArena):
    """`CudaArena` as it is; only the computation that a unit does between acquire and release is told to the machine."""

    machine: Machine

    def __init__(self, machine: Machine) -> None:
        super().__init__(torch.device("cuda", 0))
        self.machine = machine

    def before_compute(self, slot: Slot) -> None:
        super().before_compute(slot)
        self.machine.access(self.machine.compute, slot.device.data_ptr(), write=False, what="computing")

    def after_compute(self, slot: Slot) -> None:
        self.machine.work(self.machine.compute, self.machine.compute_s)
        self.machine.access(self.machine.compute, slot.device.data_ptr(), write=False, what="computing")
        super().after_compute(slot)

    def free_slot(self, slot: Slot) -> None:
        address = slot.device.data_ptr()
        super().free_slot(slot)
        self.machine.forget(address)


def simulate(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """From now on arena.py sees a CUDA device."""
    patch.setattr(arena, "torch", _Torch(machine))


class _Torch:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.cuda = _Cuda(machine)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")

    def empty(self, nbytes: int, *, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        made = torch.full((nbytes,), 255, dtype=dtype)
        if nbytes:
            self._machine.register("device side of a slot", made.data_ptr(), nbytes)
        return made


class _Cuda:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._current = _Stream(machine, machine.compute)
        self.Event = lambda: _Event(machine)
        self.Stream = lambda _: _Stream(machine, machine.queue("copies"))

    def current_device(self) -> int:
        return 0

    def device(self, _: Any) -> Any:
        return nullcontext()

    def current_stream(self, _: Any = None) -> _Stream:
        return self._current

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        with _Enqueue(self._machine, stream.queue):
            yield

    def cudart(self) -> _Runtime:
        return _Runtime(self._machine)


class _Runtime:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def cudaHostRegister(self, address: int, nbytes: int, _: int) -> int:
        self._machine.register("host memory", address, nbytes)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self._machine.forget(address)
        return 0


class _Stream:
    def __init__(self, machine: Machine, queue: Queue) -> None:
        self._machine, self.queue = machine, queue

    def wait_event(self, event: _Event) -> None:
        assert event.mark is not None
        self._machine.wait(self.queue, event.mark)


class _Event:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.mark: Mark | None = None

    def record(self, stream: _Stream) -> None:
        self.mark = self._machine.record(stream.queue)

    def synchronize(self) -> None:
        if self.mark is not None:
            self._machine.synchronize(self.mark)


class _Enqueue(TorchDispatchMode):
    """Puts copies on a queue instead of doing them."""

    def __init__(self, machine: Machine, queue: Queue) -> None:
        super().__init__()
        self._machine, self._queue = machine, queue

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source, non_blocking = (*args, False)[:3]
        assert non_blocking, "a copy that blocks the host keeps nothing apart"
        self._machine.copy(self._queue, target, source)
        return target

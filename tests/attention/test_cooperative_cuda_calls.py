"""`CudaMachine` without a card: what it asks of `torch.cuda`, in which order, and that everything page-locked is unlocked again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative import machine as subject
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import CudaMachine
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.reference import attention
from torchwrap.core import errors


class Cuda:
    """The part of `torch.cuda` that is used. Copies are done at once; waiting for an event that nobody recorded is an error.

    Args:
        locks: how many ranges the driver page-locks before it refuses.
    """

    def __init__(self, locks: int = 1000) -> None:
        self.locks = locks
        self.locked: dict[int, int] = {}
        self.current = Stream("compute", self)
        self.on: Stream = self.current
        self.log: list[tuple[str, str]] = []
        self.Event = lambda: Event(self)
        self.Stream = lambda device: Stream("uploads", self)

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: Any = None) -> Stream:
        return self.on

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.on, before = stream, self.on
        yield
        self.on = before

    def synchronize(self, device: Any = None) -> None:
        self.log.append(("host", "waits for all"))

    def cudart(self) -> Cuda:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if len(self.locked) >= self.locks:
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


class Stream:
    def __init__(self, name: str, cuda: Cuda) -> None:
        self.name, self.cuda = name, cuda

    def wait_event(self, event: Event) -> None:
        assert event.where is not None
        self.cuda.log.append((self.name, f"waits for {event.where}"))


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.where: str | None = None

    def record(self, stream: Stream) -> None:
        self.where = stream.name

    def synchronize(self) -> None:
        assert self.where is not None
        self.cuda.log.append(("host", f"waits for {self.where}"))


class Torch:
    """`torch` with another `torch.cuda`, whose device is the CPU."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")


def machine(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> CudaMachine:
    monkeypatch.setattr(subject, "torch", Torch(cuda))
    return CudaMachine(torch.device("cuda"))


def test_each_side_waits_for_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cache = TieredCache([Room(8, 4)], machine=machine(monkeypatch, cuda), streamed=0.5, chunk_tokens=4)
    torch.manual_seed(0)
    keys, values, q = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 4, 1, 8)
    cache.append(0, keys, values)
    cuda.log.clear()
    out, _ = cache.attend(0, q)
    assert torch.allclose(out.double(), attention(checked(q, keys, values), torch.float64)[0], atol=1e-6)
    counts = {entry: cuda.log.count(entry) for entry in set(cuda.log)}
    # 16 of 32 tokens in 4 chunks, keys and values: each upload waits for the spill and, from the third chunk on, for its buffer to be free;
    # each chunk is attended after both its uploads. The host waits for the query and for the spill.
    assert counts == {("uploads", "waits for compute"): 8 + 4, ("compute", "waits for uploads"): 8, ("host", "waits for compute"): 2}
    cache.release()
    assert cuda.locked == {}


def test_memory_that_cannot_be_locked_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(locks=1)
    cache = TieredCache([Room(8, 4)], machine=machine(monkeypatch, cuda))
    with pytest.warns(errors.TorchwrapWarning, match="refused to page-lock .* bytes"):
        cache.append(0, torch.zeros(1, 2, 40, 8), torch.zeros(1, 2, 40, 8))
    assert len(cuda.locked) == 1 and cache.layers[0].length == 40
    cache.release()
    assert cuda.locked == {}

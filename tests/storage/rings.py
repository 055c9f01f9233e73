"""Every reader on a ring: what fails on purpose in `pread` fails in the same way where one thread has many reads under way."""

from __future__ import annotations

import queue
import threading

import pytest

from torchwrap.storage.backend import Backend
from torchwrap.storage.ringpool import RingPool
from torchwrap.storage.uring import Ring

__all__ = ["Played", "beneath_every_reader"]

Result = tuple[int, int | BaseException]


class Played:
    """A `Ring` whose reads are the `pread` of a disk that fails on purpose, each in a thread of its own."""

    def __init__(self, disk: Backend) -> None:
        self._disk = disk
        self._results: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        self._under_way = 0

    def start(self, token: int, fd: int, target: memoryview, offset: int) -> None:
        def read() -> None:
            try:
                result: int | BaseException = self._disk.pread(fd, target, offset)
            except BaseException as error:
                result = error
            self._results.put((token, result))

        self._under_way += 1
        threading.Thread(target=read, daemon=True).start()

    def wait(self) -> list[Result]:
        result = self._results.get()
        self._under_way -= result is not None
        return [] if result is None else [result]

    def wake(self) -> None:
        self._results.put(None)

    def close(self) -> None:
        assert not self._under_way


def beneath_every_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers made from now on in this test use a ring, whatever their mode."""

    def queue_of(backend: Backend, depth: int) -> Ring | Played:
        return Ring(depth) if type(backend) is Backend else Played(backend)

    monkeypatch.setattr(Backend, "queue", queue_of)
    monkeypatch.setattr("torchwrap.storage.aio.Pool", RingPool)

"""What the tests of this room share: disks that fail on purpose, files with known content, and processes that can be killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchwrap.storage import Backend


class FaultyBackend(Backend):
    """Real calls, except those a test spoils: `fault(call number, kind)` returns an exception to raise, a byte count, or `None`."""

    def __init__(self, fault: Callable[[int, str], BaseException | int | None]) -> None:
        self.fault = fault
        self.calls = 0
        self.lock = threading.Lock()

    def _limit(self, kind: str, memory: memoryview) -> memoryview:
        with self.lock:
            number, self.calls = self.calls, self.calls + 1
        found = self.fault(number, kind)
        if isinstance(found, BaseException):
            raise found
        return memory if found is None else memory[: max(1, found)]

    def pread(self, fd: int, target: memoryview, offset: int) -> int:
        return self._plain(os.preadv, fd, self._limit("read", target), offset)

    def pwrite(self, fd: int, source: memoryview, offset: int) -> int:
        return self._plain(os.pwritev, fd, self._limit("write", source), offset)

    def reserve(self, fd: int, offset: int, nbytes: int) -> None:
        self._limit("reserve", memoryview(b""))
        super().reserve(fd, offset, nbytes)

    @staticmethod
    def _plain(call: Callable[..., int], fd: int, memory: memoryview, offset: int) -> int:
        """An odd length is moved through an ordinary descriptor: O_DIRECT itself would refuse it, a failing disk would not."""
        if len(memory) % 4096 == 0:
            return call(fd, [memory], offset)
        other = os.open(f"/proc/self/fd/{int(fd)}", os.O_RDWR)
        try:
            return call(other, [memory], offset)
        finally:
            os.close(other)


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.fixture
def faulty() -> type[FaultyBackend]:
    return FaultyBackend


@pytest.fixture
def eio() -> OSError:
    return error(errno.EIO)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(301, 1003, generator=generator),
        "half": torch.randn(77, 3, generator=generator).bfloat16(),
        "bytes": torch.randint(0, 255, (4099,), generator=generator, dtype=torch.uint8),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python program in another process; whatever still runs at the end is ended."""
    running: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()

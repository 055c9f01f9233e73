"""The disk as the benchmarks see it: drop cached pages, count them, and measure the raw read rate.

A virtual disk's speed changes within minutes, so every measured run is bracketed by probes and compared with the best of them. The
probe reads with O_DIRECT into private anonymous memory with huge pages (4 KiB pages cost up to half of the rate) from a few
threads; it is written here, independently of the library's own reader, so that the library is not its own judge.

How much memory the probe reads into decides what it finds: buffers that stay in the processor's cache are filled faster than memory
(measured on one machine: 8.2 GB/s into 8 MiB, 6.2 into 32 MiB, 5.8 into 128 MiB and 5.7 into 512 MiB). Weights have to arrive in as
much memory as a layer has, so both rates are reported, and the second is the limit that a streamed model is held against.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RawMixedRate", "RawRate", "cached_bytes", "drop_cached_pages", "raw_mixed_rate", "raw_read_rate"]

MIB = 1 << 20
TRIES = ((2, 4 * MIB), (2, 16 * MIB), (4, 4 * MIB))
LAYERS = 128 * MIB
"""Memory that the second probe fills in turn, less than two slots of the benchmark's layers take: rather too fast than too slow."""


@dataclass(frozen=True, slots=True)
class RawRate:
    """Best raw O_DIRECT read rates, in bytes per second; 0.0 where the file system refuses O_DIRECT.

    Attributes:
        cache: into buffers of one request per thread, which the processor's cache may hold.
        memory: into `LAYERS` bytes of memory, filled one after the other.
    """

    cache: float
    memory: float


@dataclass(frozen=True, slots=True)
class RawMixedRate:
    """Best raw O_DIRECT rates of reading and writing at the same time, in bytes per second; 0.0 where O_DIRECT is refused."""

    read: float
    write: float


def drop_cached_pages(files: Iterable[Path]) -> None:
    """Write back and drop the page-cache pages of `files`."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of `files` that are in the page cache now (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    total = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        states = (ctypes.c_ubyte * pages)()
        with path.open("rb") as file:
            # A private writable mapping of a read-only file: nothing is written, but ctypes can then take its address.
            mapping = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            start = ctypes.c_char.from_buffer(mapping)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states)
            del start
            mapping.close()
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore failed on {path}")
        total += sum(state & 1 for state in states) * mmap.PAGESIZE
    return total


def raw_read_rate(files: Sequence[Path], *, seconds: float = 0.4) -> RawRate:
    """Best rates over `TRIES`.

    Args:
        files: files to read, the first one that is large enough is used.
        seconds: time for each try.
    """
    path = max(files, key=lambda file: file.stat().st_size)
    return RawRate(
        cache=max(_rate(path, threads, chunk, threads * chunk, seconds) for threads, chunk in TRIES),
        memory=max(_rate(path, threads, chunk, LAYERS, seconds) for threads, chunk in TRIES),
    )


def raw_mixed_rate(folder: Path, *, nbytes: int = 256 * MIB, seconds: float = 0.4) -> RawMixedRate:
    """Rates of one or two readers beside one or two writers on a file of their own; the pair with the largest sum.

    Args:
        folder: on the disk that is meant; a file of `nbytes` is made there and removed.
        nbytes: a multiple of 64 MiB.
        seconds: time for each try.
    """
    path = folder / f"probe-{os.getpid()}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    except OSError:
        path.unlink(missing_ok=True)
        return RawMixedRate(0.0, 0.0)
    try:
        buffer = _huge_buffer(LAYERS)
        for start in range(0, nbytes, LAYERS):
            os.pwritev(descriptor, [buffer[: min(LAYERS, nbytes - start)]], start)
        found = [
            _mixed(descriptor, buffer, nbytes, threads, chunk, seconds) for threads, chunk in ((1, 4 * MIB), (1, 16 * MIB), (2, 4 * MIB))
        ]
    finally:
        os.close(descriptor)
        path.unlink()
    return max(found, key=lambda rate: rate.read + rate.write)


def _mixed(descriptor: int, buffer: memoryview, nbytes: int, pairs: int, chunk: int, seconds: float) -> RawMixedRate:
    counts = {os.preadv: [0] * pairs, os.pwritev: [0] * pairs}
    own = len(buffer) // (2 * pairs) // chunk * chunk
    start = time.perf_counter()

    def move(call: Callable[..., int], place: int, worker: int) -> None:
        number = 0
        while time.perf_counter() < start + seconds:
            at = place * own + number * chunk % own
            counts[call][worker] += call(descriptor, [buffer[at : at + chunk]], (worker + number * pairs) * chunk % nbytes)
            number += 1

    workers = [
        threading.Thread(target=move, args=(call, 2 * worker + place, worker))
        for worker in range(pairs)
        for place, call in enumerate((os.preadv, os.pwritev))
    ]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    elapsed = time.perf_counter() - start
    return RawMixedRate(sum(counts[os.preadv]) / elapsed, sum(counts[os.pwritev]) / elapsed)


def _rate(path: Path, threads: int, chunk: int, memory: int, seconds: float) -> float:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return 0.0
    blocks = max(1, path.stat().st_size // chunk)
    places = memory // chunk
    buffer = _huge_buffer(memory)
    counts = [0] * threads
    start = time.perf_counter()
    deadline = start + seconds
    # A different starting point for every try: a host behind a virtual disk may cache what was just read.
    first = (time.monotonic_ns() // 1000) % blocks

    def read(worker: int) -> None:
        number = worker
        while time.perf_counter() < deadline:
            at = number % places * chunk
            counts[worker] += os.preadv(descriptor, [buffer[at : at + chunk]], (first + number) % blocks * chunk)
            number += threads

    workers = [threading.Thread(target=read, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - start
    os.close(descriptor)
    return sum(counts) / elapsed


def _huge_buffer(nbytes: int) -> memoryview:
    huge = 2 * MIB
    area = mmap.mmap(-1, nbytes + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    offset = -address % huge
    view = memoryview(area)[offset : offset + nbytes]
    view[:: mmap.PAGESIZE] = bytes(len(view[:: mmap.PAGESIZE]))
    return view

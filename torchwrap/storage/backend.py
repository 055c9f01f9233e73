"""The system calls of this room, behind one small object, and the loops that make a read or a write complete.

Everything that moves weights goes through a `Backend`, so tests can inject what disks do: short reads, interrupted calls, a failing
sector, a full disk, a hang, wrong bytes. `reading`, `read_into` and `write_from` turn the calls into a promise: all bytes, or an error.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torchwrap.core.errors import CorruptDataError, StorageError
from torchwrap.storage.pool import round_down
from torchwrap.storage.uring import Ring

__all__ = ["Backend", "Queue", "Request", "Source", "Stats", "read_into", "reading", "run", "write_from"]

Request = tuple[int, memoryview, int]
"""A read: descriptor, target, offset."""


class Backend:
    """The real system calls. Subclass it to inject faults; methods raise `OSError` like the calls they stand for."""

    def pread(self, fd: int, target: memoryview, offset: int) -> int:
        """Read into `target` from `offset`; bytes read, 0 at the end of the file."""
        return os.preadv(fd, [target], offset)

    def pwrite(self, fd: int, source: memoryview, offset: int) -> int:
        """Write `source` at `offset`; bytes written."""
        return os.pwritev(fd, [source], offset)

    def queue(self, depth: int) -> Queue:
        """Up to `depth` reads under way at once, for one thread."""
        return Ring(depth)

    def reserve(self, fd: int, offset: int, nbytes: int) -> None:
        """Make sure later writes to the range cannot run out of space."""
        os.posix_fallocate(fd, offset, nbytes)

    def sync(self, fd: int) -> None:
        """Return once everything written is on the disk."""
        os.fsync(fd)


class Queue(Protocol):
    """Reads under way at once; the memory of each is kept until its result was taken. See `Ring`, which is the real one."""

    def start(self, token: int, fd: int, target: memoryview, offset: int) -> None:
        """Begin a read, known by `token` until its result was taken."""
        ...

    def wait(self) -> Sequence[tuple[int, int | BaseException]]:
        """Block until results are there, or `wake` was called: tokens with the bytes read, or the error."""
        ...

    def wake(self) -> None:
        """End the `wait` of another thread."""
        ...

    def close(self) -> None:
        """Wait for what is under way, and end."""
        ...


class Source(Protocol):
    """What a reader needs of a file: `TensorFile` and `SpillFile` have it."""

    @property
    def path(self) -> Path:
        """For messages."""
        ...

    def fd(self, direct: bool) -> int:
        """Descriptor opened with or without `O_DIRECT`; stays open while the returned object lives."""
        ...

    def check_unchanged(self) -> None:
        """Raise `CorruptDataError` when the file is not the one that was opened."""
        ...


@dataclass(slots=True)
class Stats:
    """What reads cost so far.

    Attributes:
        bytes: bytes delivered.
        busy_s: seconds during which at least one read was under way.
        short_reads: reads that returned less than asked for and were continued.
        retries: reads repeated after an I/O error.
        refused: files (by path) for which O_DIRECT was refused and buffered reads are used.
    """

    bytes: int = 0
    busy_s: float = 0.0
    short_reads: int = 0
    retries: int = 0
    refused: set[str] = field(default_factory=set)


def read_into(backend: Backend, source: Source, target: memoryview, offset: int, needed: int, *, direct: bool, stats: Stats) -> None:
    """Do all the reads of `reading`, one after the other."""
    steps = reading(source, target, offset, needed, direct=direct, stats=stats)
    run(backend, steps)


def run(backend: Backend, steps: Generator[Request, int, None]) -> None:
    """Give the steps the reads they ask for, here and now."""
    try:
        request = next(steps)
        while True:
            try:
                count = backend.pread(*request)
            except OSError as error:
                request = steps.throw(error)
            else:
                request = steps.send(count)
    except StopIteration:
        return


def reading(source: Source, target: memoryview, offset: int, needed: int, *, direct: bool, stats: Stats) -> Generator[Request, int, None]:
    """The reads that fill `target[:needed]` with the file's bytes from `offset` on.

    Each is yielded; what it brought is sent, its `OSError` thrown.

    Args:
        target: with `direct`, its address, its length and `offset` are multiples of 4096; it may be longer than `needed`, so that the
            block with the file's end can be asked for as a whole.

    Raises:
        CorruptDataError: the file ends before `needed` bytes.
        StorageError: the disk failed twice.
    """
    done, retried = 0, False
    while done < needed:
        # An O_DIRECT read starts at a block: after an odd short read the begun block is read again.
        start = round_down(done) if direct else done
        fd = source.fd(direct)
        try:
            count = yield fd, target[start:] if direct else target[start:needed], offset + start
        except InterruptedError:
            continue
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                stats.refused.add(str(source.path))
                direct = False
                continue
            if error.errno == errno.EIO and not retried:
                retried = True
                stats.retries += 1
                continue
            raise StorageError(
                f"reading failed: {error.strerror or error}",
                where=f"{source.path}, offset {offset + start}",
                fix="Check the disk (dmesg, smartctl) and copy the file to a healthy one.",
            ) from error
        if start + count <= done:
            if not direct:
                raise CorruptDataError(
                    f"the file ends at or before byte {offset + done}, {needed - done} bytes are missing",
                    where=f"{source.path}, offset {offset + done}",
                    fix="The file was truncated after it was opened: restore it and wrap the model again.",
                )
            direct = False  # the end, or a device with odd short reads: an ordinary read tells which
            continue
        done = start + count
        if done < needed:
            stats.short_reads += 1


def write_from(backend: Backend, direct: int | None, buffered: int, source: memoryview, offset: int) -> bool:
    """Write all of `source` at `offset`.

    Args:
        direct: descriptor with O_DIRECT, if there is one; then address and length of `source` and `offset` are multiples of 4096.
        buffered: descriptor without.

    Returns:
        Whether O_DIRECT worked; if not, the bytes were written through the page cache.

    Raises:
        OSError: the disk is full, failed twice, or accepts nothing.
    """
    done, retried, worked = 0, False, direct is not None
    while done < len(source):
        start = round_down(done) if worked else done
        try:
            count = backend.pwrite(direct if worked and direct is not None else buffered, source[start:], offset + start)
        except InterruptedError:
            continue
        except OSError as error:
            if worked and error.errno == errno.EINVAL:
                worked = False
                continue
            if error.errno == errno.EIO and not retried:
                retried = True
                continue
            raise
        if start + count <= done:
            if not worked:
                raise OSError(errno.EIO, "the disk accepts no bytes")
            worked = False
            continue
        done = start + count
    return worked

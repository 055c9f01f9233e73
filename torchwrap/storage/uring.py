"""Reads by io_uring: many under way at once, started and finished by one thread with one system call for all of them.

The kernel and the process share two rings in memory: requests go into one, results come out of the other, and `io_uring_enter` says how
many are new and waits. Everything here is raw system calls through ctypes, for which Python is fast enough: a request is megabytes.

Two rules make it safe. The kernel writes into a target until it has said so, whatever becomes of the thread, the reader or an
exception: a ring holds the memory of each read from `start` until its result was taken, and a ring that has not got all results is held
by this module. And nobody reads the rings while the kernel writes them: without a polling kernel thread requests are looked at only within
`io_uring_enter`, which orders memory; results are ordered by the processor, which is why only x86-64 is served, whose loads stay in order.

Source: Jens Axboe, "Efficient IO with io_uring", 2019; io_uring_setup(2), io_uring_enter(2).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import platform
import struct
import sys
import time

import numpy

__all__ = ["Ring", "unavailable_reason"]

_SETUP, _ENTER = 425, 426
_GETEVENTS = 1
_READ = 22  # IORING_OP_READ
_FEATURES = 1 << 0 | 1 << 1  # one mapping for both rings; no result is ever dropped
_RINGS_AT, _REQUESTS_AT = 0, 0x10000000
_LONGEST = 1 << 30  # a length has 32 bits; what is longer is continued like any short read
_WAKE = (1 << 64) - 1

_open: set[Ring] = set()
"""Rings in whose reads the kernel may still be writing to memory: only `close` takes one out, when nothing is under way."""


class Ring:
    """Reads under way in the kernel. One thread calls `start`, `wait` and `close`; others may `wake` it.

    Args:
        depth: reads under way at the same time.

    Raises:
        OSError: the kernel refuses.

    Cost: four descriptors and a few pages.
    """

    def __init__(self, depth: int) -> None:
        entries = 1 << depth.bit_length()  # more than depth: `wake` is a read too
        parameters = ctypes.create_string_buffer(120)
        self._fd = _call(_SETUP, entries, ctypes.addressof(parameters), 0, 0)
        self._signal, self._counter = -1, memoryview(bytearray(8))
        self._memory: dict[int, memoryview] = {}
        self._unsent, self._closing = 0, False
        try:
            words = struct.unpack("<30I", parameters)
            if words[5] & _FEATURES != _FEATURES:
                raise OSError(errno.ENOSYS, "it is older than Linux 5.5")
            requests, results, request_ring, result_ring = words[0], words[1], words[10:17], words[20:26]
            self._requests_tail_at, self._requests_mask = request_ring[1], requests - 1
            self._results_head_at, self._results_tail_at, self._results_at = result_ring[0], result_ring[1], result_ring[5]
            self._results_mask = results - 1
            self._rings = _shared(self._fd, max(request_ring[6] + 4 * requests, result_ring[5] + 16 * results), _RINGS_AT)
            self._requests = _shared(self._fd, 64 * requests, _REQUESTS_AT)
            struct.pack_into(f"<{requests}I", self._rings, request_ring[6], *range(requests))
            self._signal = os.eventfd(0)
        except BaseException:
            self._give_back()
            raise
        _open.add(self)
        self._listen()

    def start(self, token: int, fd: int, target: memoryview, offset: int) -> None:
        """Read from `offset` of `fd` into `target`; the kernel is told with the next `wait`.

        Args:
            token: what `wait` returns the result with; not that of a read under way.
        """
        address: int = numpy.frombuffer(target, dtype=numpy.uint8).__array_interface__["data"][0]
        length = min(len(target), _LONGEST)
        self._memory[token] = target
        tail = self._word(self._requests_tail_at)
        struct.pack_into(
            "<BBHiQQIIQ24x", self._requests, 64 * (tail & self._requests_mask), _READ, 0, 0, fd, offset, address, length, 0, token
        )
        self._put_word(self._requests_tail_at, tail + 1)
        self._unsent += 1

    def wait(self) -> list[tuple[int, int | OSError]]:
        """Block until a read is finished or `wake` is called: tokens with the bytes read, or the error; none when only woken."""
        while (found := self._take()) is None:
            try:
                self._unsent -= _call(_ENTER, self._fd, self._unsent, 1, _GETEVENTS)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EBUSY):
                    raise
                time.sleep(0.001)  # the kernel is short of memory for requests
        return found

    def wake(self) -> None:
        """End the `wait` of another thread, or the next one. Never at the same time as `close`."""
        os.eventfd_write(self._signal, 1)

    def close(self) -> None:
        """Wait for everything under way, then give descriptors and memory back."""
        self._closing = True
        self.wake()
        while len(self._memory) > self._unsent:  # what was not sent is not under way
            self.wait()
        _open.discard(self)
        self._give_back()

    def _listen(self) -> None:
        self.start(_WAKE, self._signal, self._counter, 0)

    def _take(self) -> list[tuple[int, int | OSError]] | None:
        """Results that are there, or None."""
        head, tail = self._word(self._results_head_at), self._word(self._results_tail_at)
        if head == tail:
            return None
        found: list[tuple[int, int | OSError]] = []
        woken = 8
        while head != tail:
            token, result = struct.unpack_from("<Qi", self._rings, self._results_at + 16 * (head & self._results_mask))
            head = (head + 1) % (1 << 32)
            del self._memory[token]
            if token == _WAKE:
                woken = result
            else:
                found.append((token, result if result >= 0 else OSError(-result, os.strerror(-result))))
        self._put_word(self._results_head_at, head)
        if woken != 8:
            raise OSError(-woken, f"it serves no reads: {os.strerror(-woken)}")
        if _WAKE not in self._memory and not self._closing:
            self._listen()
        return found

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._rings, at)[0])

    def _put_word(self, at: int, value: int) -> None:
        struct.pack_into("<I", self._rings, at, value % (1 << 32))

    def _give_back(self) -> None:
        for fd in (self._fd, self._signal):
            if fd >= 0:
                os.close(fd)
        self._fd = self._signal = -1
        for name in ("_rings", "_requests"):
            mapping = self.__dict__.pop(name, None)
            if mapping is not None:
                mapping.close()


def unavailable_reason() -> str | None:
    """Why no ring can be used here; None when one was made, read through, and given back."""
    if sys.platform != "linux":
        return "io_uring is a part of Linux"
    if platform.machine() != "x86_64":
        return f"on {platform.machine()} results need a memory barrier that Python does not have"
    try:
        ring = Ring(1)
        try:
            ring.wake()
            ring.wait()
        finally:
            ring.close()
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        return f"the kernel or a sandbox refuses it ({name}: {error.strerror})"
    return None


def _call(number: int, *arguments: int) -> int:
    """A system call; the interpreter lock is free meanwhile."""
    result: int = _libc().syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments), ctypes.c_long(0), ctypes.c_long(0))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _shared(fd: int, nbytes: int, at: int) -> mmap.mmap:
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=at)

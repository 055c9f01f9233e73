"""The threads behind a reader, and the ticket that waits for them.

One lock guards queue and tickets; requests are megabytes, so it is taken a few thousand times a second at most. Threads know the pool
and not the reader: a reader nobody uses is collected, and that ends its threads. After `fork` a child has none of the threads and must
not touch the lock (it may be held by a thread that does not exist there), so every entry compares the process id first.

A request that was read is *landed*; its checksums are still to be taken. Threads read before they sum, and whoever waits for a ticket sums
what of it has landed meanwhile: as long as the disk is what a model waits for, sums are taken while it would do nothing else, and do not
compete with its computation for a processor.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from typing import Literal

import numpy

from torchwrap.core.errors import CorruptDataError, StorageError, TorchwrapWarning
from torchwrap.storage.backend import Backend, Request, Source, Stats, reading, run
from torchwrap.storage.checksum import Part, crc32, crc32_join, sum64
from torchwrap.storage.condition import Condition
from torchwrap.storage.patience import LOOK_S, Patience
from torchwrap.storage.pool import Buffer, allocate
from torchwrap.storage.priority import give_way
from torchwrap.storage.request import Piece, Read

__all__ = ["Mode", "Pool", "Ticket", "mismatch", "typed"]

Mode = Literal["auto", "direct", "buffered", "uring"]


class Ticket:
    """Reads under way. The targets belong to the reader until `done()` is true, even after `wait` raised for lack of progress.

    Attributes:
        nbytes: bytes asked for.
        seconds: from the first request's start to the last one's end; 0.0 until done.
        sums: `{part name: sum64}` of all parts, once done; of parts with one name the last.
        codes: `{part name: crc32}` of the parts whose CRC was asked for, once done.
    """

    def __init__(self, reads: Sequence[Read], pool: Pool) -> None:
        self.nbytes: int = sum(read.nbytes for read in reads)
        self.seconds: float = 0.0
        self.sums: dict[str, int] = {}
        self.codes: dict[str, int] = {}
        self._reads = tuple(reads)
        self._first = f"{self._reads[0].file.path}, offset {self._reads[0].offset}" if reads else ""
        self._pool = pool
        self._pending = 0
        self._began = self._moved = 0.0
        self._error: StorageError | None = None
        self._finished = False
        self._tally = _Tally()

    @property
    def interval(self) -> tuple[float, float]:
        """(start of the first request, end of the last one), in `time.monotonic()` seconds; (0.0, 0.0) before it begins."""
        return self._began, self._moved

    def done(self) -> bool:
        """True once no thread touches the targets any more; `wait` then returns or raises at once."""
        return self._finished

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when everything is there and checked.

        Args:
            timeout_s: longest time without any progress; the reader's own if `None`.

        Raises:
            CorruptDataError: a file is truncated or was changed, or a checksum differs.
            StorageError: the disk failed, nothing moved for `timeout_s` seconds, the reader was closed, or this is a forked child.
        """
        if not self._finished:
            self._pool.wait(self, timeout_s)
        if self._error is not None:
            raise self._error

    def _fail(self, error: StorageError) -> None:
        # Without the traceback: the frames of the thread that met it would keep files and targets alive as long as the ticket.
        self._error = self._error or error.with_traceback(None)

    def _finish(self) -> None:
        """Compare what was read with what was expected; only then is the ticket done."""
        if self._error is None:
            try:
                for file in {id(read.file): read.file for read in self._reads}.values():
                    file.check_unchanged()
                for read in self._reads:
                    for index, part in enumerate(read.parts):
                        self.sums[part.name], code = self._tally.compare(read, index)
                        if code is not None:
                            self.codes[part.name] = code
            except BaseException as error:  # in a thread there is nobody to raise to: the waiter gets it
                self._fail(typed(error, self._first))
        self.seconds = self._moved - self._began
        self._tally = _Tally()
        self._reads = ()  # a finished ticket keeps neither files nor memory alive
        self._finished = True


class Pool:
    """Queue and threads of one reader in one process."""

    def __init__(
        self, threads: int, chunk: int, timeout_s: float, backend: Backend, mode: Mode, stats: Stats, background: bool = False
    ) -> None:
        self.pid: int = os.getpid()
        self.threads: int = threads
        self.chunk: int = chunk
        self.timeout_s: float = timeout_s
        self.backend: Backend = backend
        self.mode: Mode = mode
        self.stats: Stats = stats
        self.background: bool = background
        self._changed = Condition()
        self._queue: deque[tuple[Ticket, Piece]] = deque()
        self._active: dict[int, tuple[Ticket, Piece]] = {}
        self._landed: deque[tuple[Ticket, Piece]] = deque()
        self._workers: list[threading.Thread] = []
        self._moved = self._busy_since = time.monotonic()
        self._stopped = False
        self._warned: set[int] = set()

    def put(self, reads: Sequence[Read], pieces: Sequence[Piece]) -> Ticket:
        """Queue the requests of one ticket behind all earlier ones."""
        ticket = Ticket(reads, self)
        ticket._pending = len(pieces)
        if not pieces:
            ticket._finish()
            return ticket
        with self._changed:
            if self._stopped:
                raise StorageError("this reader was closed", fix="Make a new Reader.")
            self._hire()
            self._queue.extend((ticket, piece) for piece in pieces)
            self._poke()
        return ticket

    def wait(self, ticket: Ticket, timeout_s: float | None) -> None:
        """Block until the ticket is done, or raise when nothing moves."""
        if self.pid != os.getpid():
            raise StorageError("a read that was under way at fork() never ends in the child", fix="Submit it again in this process.")
        limit = self.timeout_s if timeout_s is None else timeout_s
        patience = Patience(limit)
        while (piece := self._next_landed(ticket, patience, limit)) is not None:
            self._sum(ticket, piece)
        if self.mode in ("auto", "uring"):
            self._warn_refused()

    def _next_landed(self, ticket: Ticket, patience: Patience, limit: float) -> Piece | None:
        """A request of the ticket to sum, waiting for one if there is none; None when the ticket is done."""
        with self._changed:
            while not ticket._finished:
                for index, (owner, piece) in enumerate(self._landed):
                    if owner is ticket:
                        del self._landed[index]
                        return piece
                # A ticket that waits in the queue moves when those before it move.
                left = patience.left(ticket._moved or self._moved)
                if left <= 0:
                    raise self._stuck(ticket, limit)
                self._changed.wait(min(left, LOOK_S))
        return None

    def stop(self, timeout_s: float) -> None:
        """End the threads after their present request; fail what was not begun. Waits at most `timeout_s`."""
        if self.pid != os.getpid():
            return
        with self._changed:
            self._stopped = True
            while self._queue or self._landed:
                ticket, _ = (self._queue or self._landed).popleft()
                ticket._fail(StorageError("the reader was closed before this read was complete", fix="Wait for tickets before close()."))
                ticket._pending -= 1
                if not ticket._pending:
                    ticket._finish()
            self._poke()
            workers = list(self._workers)
        deadline = time.monotonic() + timeout_s
        for worker in workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, deadline - time.monotonic()))

    def _hire(self) -> None:
        """Have all threads; the lock is held."""
        for number in range(len(self._workers), self.threads):
            worker = threading.Thread(target=self._begin_work, args=(number,), name=f"torchwrap-read-{number}", daemon=True)
            worker.start()
            self._workers.append(worker)

    def _begin_work(self, number: int) -> None:
        if self.background:
            give_way()
        self._work(number)

    def _poke(self) -> None:
        """There is something new for the threads, or for who waits; the lock is held."""
        self._changed.notify_all()

    def _work(self, number: int) -> None:
        """What each thread does until the pool stops."""
        bounce: list[Buffer] = []
        while (taken := self._take(number)) is not None:
            ticket, piece, landed = taken
            if landed:
                self._sum(ticket, piece)
            else:
                error: StorageError | None = None
                try:
                    run(self.backend, self._fetch(ticket, piece, bounce))
                except BaseException as caught:  # in a thread there is nobody to raise to: the waiter gets it
                    error = typed(caught, f"{piece.read.file.path}, offset {piece.low}")
                self._land(number, ticket, piece, error)
                del error
            del taken, ticket, piece  # an idle thread must not keep a target or a file alive

    def _take(self, number: int) -> tuple[Ticket, Piece, bool] | None:
        """What to do next: read a request (False), or sum one that landed (True)."""
        with self._changed:
            while not self._queue and not self._landed and not self._stopped:
                self._changed.wait()
            if not self._queue:
                return (*self._landed.popleft(), True) if self._landed else None
            return (*self._begin(number), False)

    def _begin(self, number: int) -> tuple[Ticket, Piece]:
        """The next request of the queue is under way from now on; the lock is held."""
        now = time.monotonic()
        if not self._active:
            self._busy_since = now
        ticket, piece = self._active[number] = self._queue.popleft()
        ticket._moved = now
        ticket._began = ticket._began or now
        return ticket, piece

    def _fetch(self, ticket: Ticket, piece: Piece, bounce: list[Buffer]) -> Generator[Request, int, None]:
        """The reads of one request, as in `reading`; none if its ticket failed meanwhile.

        Args:
            bounce: empty, or with the buffer that a request to be copied is read into; it is made when first needed.
        """
        if ticket._error is not None:
            return
        read, (first, last) = piece.read, piece.wanted()
        memory = piece.bytes_of(first, last)
        if self.mode == "buffered" or str(read.file.path) in self.stats.refused:
            yield from reading(read.file, memory, first, last - first, direct=False, stats=self.stats)
            # It will be read again only after everything else was: keeping it cached would evict something useful.
            os.posix_fadvise(read.file.fd(False), piece.low, piece.high - piece.low, os.POSIX_FADV_DONTNEED)
        else:
            if piece.place is None and not bounce:
                bounce.append(allocate(self.chunk))
            place = bounce[0].memory[: piece.high - piece.low] if piece.place is None else piece.place
            yield from reading(read.file, place, piece.low, last - piece.low, direct=True, stats=self.stats)
            if self.mode == "direct" and str(read.file.path) in self.stats.refused:
                raise StorageError("the file system refuses O_DIRECT", where=str(read.file.path), fix='Use io_backend="auto".')
            if piece.place is None:
                source = numpy.frombuffer(place, numpy.uint8, last - first, first - piece.low)
                numpy.copyto(numpy.frombuffer(memory, numpy.uint8), source)  # releases the GIL, slice assignment does not

    def _land(self, number: int, ticket: Ticket, piece: Piece, error: StorageError | None) -> None:
        """Account for a request that was read; it goes on to be summed, or is finished."""
        with self._changed:
            del self._active[number]
            self._moved = ticket._moved = time.monotonic()
            if not self._active:
                self.stats.busy_s += self._moved - self._busy_since
            if error is not None:
                ticket._fail(error)
            elif ticket._error is None:
                first, last = piece.wanted()
                self.stats.bytes += last - first
                if piece.read.parts and not self._stopped:
                    self._landed.append((ticket, piece))
                    self._changed.notify_all()
                    return
        self._settle(ticket)

    def _sum(self, ticket: Ticket, piece: Piece) -> None:
        """Add up the parts of a request that landed. An interrupt leaves it to the next who waits."""
        error: StorageError | None = None
        try:
            first, last = piece.wanted()
            if ticket._error is None:
                found = [
                    (index, low, high)
                    for index, part in enumerate(piece.read.parts)
                    if (low := max(first, part.offset)) < (high := min(last, part.offset + part.nbytes))
                ]
                ticket._tally.add(piece, found, self._changed)
        except Exception as caught:
            error = typed(caught, f"{piece.read.file.path}, offset {piece.low}")
        except BaseException:
            with self._changed:
                self._landed.append((ticket, piece))
                self._poke()
            raise
        self._settle(ticket, error)

    def _settle(self, ticket: Ticket, error: StorageError | None = None) -> None:
        """One request of the ticket is finished; so is the ticket if it was the last."""
        with self._changed:
            ticket._moved = time.monotonic()
            if error is not None:
                ticket._fail(error)
            ticket._pending -= 1
            complete = not ticket._pending
        if complete:
            ticket._finish()  # looks at the files: not under the lock
            with self._changed:
                self._changed.notify_all()

    def _stuck(self, ticket: Ticket, limit: float) -> StorageError:
        """The watchdog's error names a request under way, of this ticket if possible."""
        mine = [piece for owner, piece in self._active.values() if owner is ticket] or [piece for _, piece in self._active.values()]
        where = f"{mine[0].read.file.path}, offset {mine[0].low}" if mine else ticket._first
        fix = "Check the disk or the network mount, or raise io_timeout_s."
        return StorageError(f"reading made no progress for {limit:g} s", where=where, fix=fix)

    def _warn_refused(self) -> None:
        """Once per file system, in the thread that waits: a warning raised in a worker would be seen by nobody."""
        for path in sorted(self.stats.refused):
            try:
                device = os.stat(path).st_dev
            except OSError:
                continue
            if device not in self._warned:
                self._warned.add(device)
                warnings.warn(
                    f"the file system of {path} refuses O_DIRECT; reading through the page cache, which is slower under a memory limit. "
                    'Put the files on a local disk, or pass io_backend="buffered" to silence this.',
                    TorchwrapWarning,
                    stacklevel=4,
                )


class _Tally:
    """Sums of the parts of a ticket, from pieces in any order."""

    def __init__(self) -> None:
        # Keyed by the read's identity: one range may be read twice in one ticket.
        self._sums: dict[tuple[int, int], int] = {}
        self._codes: dict[tuple[int, int], list[tuple[int, int, int]]] = {}

    def add(self, piece: Piece, ranges: Sequence[tuple[int, int, int]], lock: Condition) -> None:
        """Take parts of a request into account, all or (when interrupted) none: (index of the part, low, high), as file positions."""
        found = []
        for index, low, high in ranges:
            part, memory = piece.read.parts[index], piece.bytes_of(low, high)
            code = crc32(memory) if part.take_crc or part.crc32 is not None else 0
            found.append(((id(piece.read), index), sum64(memory, low - part.offset), (low, high, code)))
        with lock:
            for key, value, code_range in found:
                self._sums[key] = (self._sums.get(key, 0) + value) % (1 << 64)
                self._codes.setdefault(key, []).append(code_range)

    def compare(self, read: Read, index: int) -> tuple[int, int | None]:
        """The part's sum64, and its CRC if that was asked for, after checking them against what is expected."""
        part, key = read.parts[index], (id(read), index)
        value = self._sums.get(key, 0)
        if part.sum64 is not None and value != part.sum64:
            raise mismatch(read.file, part, "sum64", part.sum64, value)
        if part.crc32 is None and not part.take_crc:
            return value, None
        joined = 0
        for low, high, code in sorted(self._codes.get(key, ())):
            joined = crc32_join(joined, code, high - low)
        if part.crc32 is not None and joined != part.crc32:
            raise mismatch(read.file, part, "crc32", part.crc32, joined)
        return value, joined


def mismatch(file: Source, part: Part, kind: str, expected: int, got: int) -> CorruptDataError:
    """The error for stored bytes that are not the ones that were written."""
    return CorruptDataError(
        f"tensor {part.name!r}: {kind} is {got:#x}, expected {expected:#x}",
        where=f"{file.path}, offset {part.offset}, {part.nbytes} bytes",
        fix="The file was altered or the disk returned other bytes: restore it and wrap the model again.",
    )


def typed(error: BaseException, where: str) -> StorageError:
    """The error as one of ours, as it is or as the cause."""
    if isinstance(error, StorageError):
        return error
    typed = StorageError(f"reading failed: {error!r}", where=where)
    typed.__cause__ = error
    return typed

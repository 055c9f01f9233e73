"""A reader's queue served by one thread, which has many reads under way in the kernel at once (see uring.py).

The steps of a request are those of `Pool`; only who waits for its reads is different. The thread blocks in one place, where a finished
read wakes it as well as a new ticket. What landed is summed by whoever waits for its ticket, and by the thread when nothing is queued.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torchwrap.core.errors import StorageError
from torchwrap.storage.backend import Backend, Queue, Request, Stats
from torchwrap.storage.pool import Buffer
from torchwrap.storage.request import Piece
from torchwrap.storage.workers import Mode, Pool, Ticket, typed

__all__ = ["RingPool"]


@dataclass(slots=True)
class _Flight:
    """A request under way."""

    ticket: Ticket
    piece: Piece
    steps: Generator[Request, int, None]


class RingPool(Pool):
    """As `Pool`, with `depth` requests under way in the kernel instead of in as many threads. The ring is made for the first request."""

    def __init__(
        self, depth: int, chunk: int, timeout_s: float, backend: Backend, mode: Mode, stats: Stats, background: bool = False
    ) -> None:
        super().__init__(1, chunk, timeout_s, backend, mode, stats, background)
        self._ring: Queue | None = None
        self._idle = list(range(depth))
        self._flights: dict[int, _Flight] = {}
        self._bounces: dict[int, list[Buffer]] = {token: [] for token in self._idle}

    def _hire(self) -> None:
        if self._workers:
            return
        try:
            ring = self.backend.queue(len(self._idle))
        except OSError as error:
            fix = 'Raise the limit of open files (ulimit -n), or use io_backend="auto".'
            raise StorageError(f"no ring for reads: {error.strerror}", fix=fix) from error
        self._ring = ring
        try:
            super()._hire()
        except BaseException:
            self._ring = None
            ring.close()
            raise

    def _poke(self) -> None:
        super()._poke()
        if self._ring is not None:
            self._ring.wake()

    def _work(self, number: int) -> None:
        with self._changed:
            ring = self._ring
        assert ring is not None
        while self._begin_more(ring):
            if not self._sum_one():
                self._reap(ring)

    def _reap(self, ring: Queue) -> None:
        for token, result in ring.wait():
            self._go_on(ring, token, result)

    def _begin_more(self, ring: Queue) -> bool:
        """Start what is queued, as far as it goes; false when the pool was stopped and nothing is under way any more."""
        while True:
            with self._changed:
                if not self._queue or not self._idle:
                    if self._stopped and not self._flights and not self._landed:
                        self._ring = None
                        ring.close()
                        return False
                    return True
                token = self._idle.pop()
                ticket, piece = self._begin(token)
            self._flights[token] = _Flight(ticket, piece, self._fetch(ticket, piece, self._bounces[token]))
            self._go_on(ring, token, None)

    def _sum_one(self) -> bool:
        """Sum a request that landed, if there is nothing to start and nobody did it yet."""
        with self._changed:
            if self._queue or not self._landed:
                return False
            ticket, piece = self._landed.popleft()
        self._sum(ticket, piece)
        return True

    def _go_on(self, ring: Queue, token: int, result: int | BaseException | None) -> None:
        """Hand a finished read to its request, which wants another one or has landed."""
        flight, error = self._flights[token], None
        try:
            if isinstance(result, BaseException):
                wanted = flight.steps.throw(result)
            else:
                wanted = next(flight.steps) if result is None else flight.steps.send(result)
            ring.start(token, *wanted)
            return
        except StopIteration:
            pass
        except BaseException as caught:  # in a thread there is nobody to raise to: the waiter gets it
            error = typed(caught, f"{flight.piece.read.file.path}, offset {flight.piece.low}")
        del self._flights[token]
        self._idle.append(token)
        self._land(token, flight.ticket, flight.piece, error)

"""The worker that updates weights and state in chunks, while the backward goes on or the step waits.

For each chunk three things happen, and three chunks are under way at once: the next is read, one is updated, the one before is written. The
reads are a `Reader`'s, the writes have a thread of their own, the update is the optimizer class of the user (see chunks.py). So memory is
three chunks of every stream, whatever the size of the model. A weight is withheld from who would read it from its first chunk to its last.

Sources: Liao et al., "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU", 2024, section 4 (a synchronous
optimizer on the disk, overlapped with backward, reading, updating and writing at the same time). Where we differ: chunks instead of
layers, a thread instead of a process, any elementwise class, and a crash loses nothing that was committed.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

from torchwrap.core import errors
from torchwrap.optimizer.chunks import Chunk, Chunks, Update
from torchwrap.storage.condition import Condition
from torchwrap.storage.heap import FreedBlocks
from torchwrap.storage.patience import LOOK_S, Patience
from torchwrap.storage.pool import Buffer
from torchwrap.storage.priority import give_way
from torchwrap.stream.engine import Engine
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Piece
from torchwrap.weights.footprint import IN_FLIGHT

__all__ = ["Job", "Updater"]


@dataclass(eq=False, slots=True)
class Job:
    """Updates that withhold `pieces`; those are none if the weights are in memory."""

    pieces: Sequence[Piece]
    updates: list[Update]
    failed: bool = False


@dataclass(eq=False, slots=True)
class _Step:
    job: Job
    chunk: Chunk


class Updater:
    """One worker and one writer thread, started when first needed.

    Args:
        chunks: what a chunk is.
        engine: withholds units; `None` where no weight is streamed.
        timeout_s: longest time without progress.
        timeline: where the trainer's waiting is recorded, if anywhere.
        freed: keeps freed tensors, together with the gradients that wait here.

    Attributes:
        unfinished: updates that did not happen because of an error.
        waited_s: seconds that the trainer spent in `wait` and `wait_for_room`.
    """

    def __init__(
        self, chunks: Chunks, engine: Engine | None, timeout_s: float, timeline: Timeline | None = None, freed: FreedBlocks | None = None
    ) -> None:
        self._chunks, self._engine, self._timeout_s, self._timeline, self._freed = chunks, engine, timeout_s, timeline, freed
        self._changed = Condition()
        self._jobs: deque[Job] = deque()
        self._begun: set[Job] = set()  # and not over
        self._writing: Job | None = None  # of the chunk that is being written
        self._writes: deque[_Step] = deque()
        self._free: list[dict[str, Buffer]] = []
        self._made = 0
        self._alive = 0  # chunks whose buffers are in use
        self._kept_from = self._aside = self._lent = 0
        self._moved = time.monotonic()
        self._threads: list[threading.Thread] = []
        self._claims = (threading.Lock(), threading.Lock())  # of the worker and the writer
        self._stopped = False
        self._error: errors.TorchwrapError | None = None
        self._pid = os.getpid()
        self.unfinished: list[Update] = []
        self.waited_s: float = 0.0

    # -- for the thread that trains --------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue the updates of one unit; returns at once. After an error they are put with the unfinished ones instead."""
        if self._pid != os.getpid():
            raise errors.StorageError("a forked child cannot train its parent's model", fix="Make the optimizer in the child.")
        with self._changed:
            if self._error is not None:
                self.unfinished += job.updates
                return
            if self._engine is not None:
                self._engine.expect_update(job.pieces)
            for number in range(len(self._threads), 2):
                name = ("torchwrap-update", "torchwrap-write")[number]
                thread = threading.Thread(target=self._serve, args=(number,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._jobs.append(job)  # the one thing that counts: an interrupt comes before it or after it
            self._share()
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when everything is done or has failed; `check` tells.

        Raises:
            StorageError: nothing moved for `timeout_s` seconds.
        """
        self._wait_while(lambda: bool(self._jobs or self._begun or self._alive))

    def wait_for_room(self, nbytes: int) -> None:
        """Return when the gradients that wait take no more than `nbytes`, or after an error."""
        self._wait_while(lambda: self._bytes > nbytes and self._error is None)

    def set_aside(self, nbytes: int) -> None:
        """So much of what gradients may take is for one that is being made: no freed tensors are kept there until it is handed in."""
        with self._changed:
            self._aside = nbytes
            self._share()

    def keep_less(self, nbytes: int) -> None:
        """Keep so much less of freed tensors than where no gradient waits, see `FreedBlocks.lend`."""
        with self._changed:
            self._kept_from = nbytes
            self._share()

    def check(self) -> None:
        """Raise the error of an update that failed, once; updates handed in later are carried out again."""
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def give_up(self) -> None:
        """Forget updates that did not happen, and the error that kept them from it."""
        with self._changed:
            self._error, self.unfinished = None, []

    def take_unfinished(self) -> list[Update]:
        """The updates that did not happen, as they were handed in; they are forgotten here."""
        with self._changed:
            taken, self.unfinished = self.unfinished, []
        return [update.again() for update in taken]

    def close(self, timeout_s: float = 5.0) -> None:
        """End the threads after what is queued; those that a disk does not let go are waited for `timeout_s` seconds at most, or less if
        that counts as a hang. Calling it again does nothing."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        end = time.monotonic() + min(timeout_s, self._timeout_s)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))
        self._free.clear()

    def _wait_while(self, busy: Callable[[], bool]) -> None:
        if self._pid != os.getpid():  # the threads are the parent's
            return
        begin, patience = time.monotonic(), Patience(self._timeout_s)
        with self._changed:
            self._changed.notify_all()  # of what an interrupt kept from being told
            waits = busy()
            while busy():
                left = patience.left(self._moved)
                if left <= 0:
                    raise errors.StorageError(
                        f"OffloadedOptimizer: an update made no progress for {self._timeout_s:g} s",
                        fix="Check the disk, or raise io_timeout_s.",
                    )
                self._changed.wait(min(left, LOOK_S))
            end = time.monotonic()
            self.waited_s += end - begin
        if waits and self._timeline is not None:
            self._timeline.add("stall", "optimizer", begin, end, 0)

    def _serve(self, number: int) -> None:
        """The whole of a thread. An interrupt may have had a second one started; it ends at once."""
        if self._claims[number].acquire(blocking=False):
            (self._work, self._write_all)[number]()

    # -- worker ------------------------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        give_way()
        ahead: deque[_Step] = deque()  # being read
        while (job := self._next_job(ahead)) is not None:
            try:
                self._withhold(job, ahead)
                for update in list(job.updates):
                    for index in range(self._chunks.begin(update)):
                        if job.failed:
                            break
                        ahead.append(self._read(job, update, index))
                        if len(ahead) > 1:
                            self._update(ahead.popleft())
            except BaseException as error:  # in a thread there is nobody to raise to: the next step gets it
                self._fail(job, error, None)
            del job

    def _next_job(self, ahead: deque[_Step]) -> Job | None:
        """The next job; while there is none, what was read is updated."""
        while True:
            with self._changed:
                if self._jobs:
                    self._begun.add(job := self._jobs.popleft())
                    return job
                if not ahead:
                    if self._stopped:
                        return None
                    self._changed.wait()
                    continue
            self._update(ahead.popleft())

    def _withhold(self, job: Job, ahead: deque[_Step]) -> None:
        if self._engine is None or not job.pieces:
            return
        mine = {piece.index for piece in job.pieces}
        if any(piece.index in mine for step in ahead for piece in step.job.pieces):
            while ahead:  # a tied weight is still withheld by the job before, which waits for us
                self._update(ahead.popleft())
        self._engine.begin_update(job.pieces)

    def _read(self, job: Job, update: Update, index: int) -> _Step:
        step = _Step(job, Chunk(update, index, self._take_buffers()))
        try:
            self._chunks.read(step.chunk)
        except BaseException:
            self._give_buffers(step.chunk)
            raise
        return step

    def _update(self, step: _Step) -> None:
        """Wait for what was read, run the optimizer on it, hand it to the writer."""
        ticket = step.chunk.ticket
        try:
            if ticket is not None:
                ticket.wait(self._timeout_s)
            if step.job.failed:
                self._give_buffers(step.chunk)
                return
            self._chunks.compute(step.chunk)
        except BaseException as error:
            if ticket is not None and not ticket.done():
                step.chunk.buffers = {}  # a read that hangs may still write into them: never used again
            self._give_buffers(step.chunk)
            self._fail(step.job, error, step.chunk.update)
            return
        with self._changed:
            self._moved = time.monotonic()
            self._writes.append(step)
            self._changed.notify_all()

    # -- writer ------------------------------------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        give_way()
        while True:
            with self._changed:
                while not self._writes:
                    if self._stopped and not (self._jobs or self._begun):
                        return
                    self._changed.wait(1.0 if self._stopped else None)
                step = self._writes.popleft()
                self._writing = step.job
            try:
                if not step.job.failed and self._chunks.write(step.chunk):
                    self._over(step.job, step.chunk.update)
            except BaseException as error:
                self._fail(step.job, error, step.chunk.update)
            finally:
                self._give_buffers(step.chunk)
                with self._changed:
                    self._writing = None
                    left = {step.job} & self._begun if step.job.failed else set()
                self._end(left)
            del step, left

    def _over(self, job: Job, update: Update) -> None:
        """An update is done: free its gradient, and its unit after the last one."""
        with self._changed:
            if job.failed:  # by another of its updates, which counted this one among the unfinished
                self.unfinished.remove(update)
                return
            gradient, update.gradient = update.gradient, None
            job.updates.remove(update)
            last = not job.updates
            self._share()
        del gradient  # when its memory may be kept
        if last:
            self._let_go(job)
        with self._changed:
            if last:
                self._begun.discard(job)
            self._moved = time.monotonic()
            self._changed.notify_all()

    # -- both --------------------------------------------------------------------------------------------------------------------------

    @property
    def _bytes(self) -> int:
        """Of gradients that wait."""
        return sum(update.gradient_nbytes for job in [*self._jobs, *self._begun] for update in list(job.updates))

    def _share(self) -> None:
        """Keep freed tensors where gradients may be and are not; any thread may call it, before gradients are freed."""
        lent = self._kept_from + self._aside + self._bytes
        if self._freed is not None and lent != self._lent:
            more, self._lent = lent - self._lent, lent
            self._freed.lend(more)

    def _let_go(self, job: Job) -> None:
        with self._changed:
            pieces, job.pieces = job.pieces, ()
        if pieces and self._engine is not None:
            self._engine.end_update(pieces)

    def _fail(self, job: Job, error: BaseException, update: Update | None) -> None:
        """Keep the error for the trainer; nothing that was queued is begun any more."""
        with self._changed:
            if self._error is None:
                self._error = _typed(error, update)
            failed = [*([] if job.failed else [job]), *self._jobs]
            self._begun.update(self._jobs)
            self._jobs.clear()
            for each in failed:
                each.failed = True
                self.unfinished += each.updates
            # What is written now may still become the present value: whoever writes it ends the job then.
            over = {job, *failed} - {self._writing}
        self._end(over)

    def _end(self, failed: Set[Job]) -> None:
        """Nothing of these happens any more."""
        for job in failed:
            with suppress(Exception):  # whatever it is, those behind it have to end too
                self._let_go(job)
        with self._changed:
            self._begun -= failed
            self._share()
            self._moved = time.monotonic()
            self._changed.notify_all()

    def _take_buffers(self) -> dict[str, Buffer]:
        with self._changed:
            while not self._free and self._made == IN_FLIGHT:
                self._changed.wait()
            self._alive += 1
            if self._free:
                return self._free.pop()
            self._made += 1
            return {}

    def _give_buffers(self, chunk: Chunk) -> None:
        with self._changed:
            self._alive -= 1
            self._free.append(chunk.buffers)
            self._changed.notify_all()


def _typed(error: BaseException, update: Update | None) -> errors.TorchwrapError:
    if isinstance(error, errors.TorchwrapError):
        return error
    where = "" if update is None else update.target.name
    typed = errors.TorchwrapError(
        f"OffloadedOptimizer: an update failed: {error!r}", where=where, fix="Call step() again, or rollback() to the last commit."
    )
    typed.__cause__ = error
    return typed

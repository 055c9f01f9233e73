"""Several calls of one model at once, each in a thread of its own, of which one runs at a time: unit after unit, each for all calls.

A thread gives its turn away when it comes to a unit. Who goes on is decided by the unit: first all that want the one that is present,
then those that want the next one in the model's order, round and round, as a lift serves its floors. Threads that are ahead, behind, or
on another way (an early exit, another number of tokens) are picked up when their floor comes. So each unit is fetched once for all
threads that keep step, and no order in which the calls use units can stop them.

Every thread runs the model's own code, so nothing has to be known about it; who comes next never depends on time, so a run can be
repeated. All state here belongs to the thread whose turn it is; the caller only says that it is over. The order (one unit for all
batches before the next unit) is that of Sheng et al., "FlexGen: High-Throughput Generative Inference of Large Language Models with a
Single GPU", 2023, section 4; threads instead of a rewritten loop are ours.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Ended", "Job", "Turns"]

_START = -1
"""What a thread wants before it has begun."""


class Ended(BaseException):
    """Raised in the other threads when one call failed. No `Exception`: a model that tries again must not swallow it."""


class Job(Protocol):
    """One call of the model, made in the thread whose turn it is."""

    def run(self) -> Any:
        """Make the call."""
        ...

    def suspend(self, units: Sequence[int]) -> None:
        """The turn goes to another job, or this one is over; `units` were begun since the last `resume`, or the beginning."""
        ...

    def resume(self) -> None:
        """The turn comes back."""
        ...


class Turns:
    """Leads the threads of one `run` through the units of one model.

    Args:
        units: how many there are; they are numbered in expected order of use.

    Attributes:
        kept: units left with a use that was to go on to another thread.
    """

    def __init__(self, units: int) -> None:
        self.kept: set[int] = set()
        self._units = max(1, units)
        self._at = 0  # the unit begun last
        self._mine = threading.local()
        self._threads: list[_Thread] = []
        self._jobs: Sequence[Job] = ()
        self._taken = 0
        self._results: list[Any] = []
        self._error: BaseException | None = None
        self._over = threading.Event()

    def run(self, jobs: Sequence[Job], threads: int) -> list[Any]:
        """What the jobs return, in their order.

        Args:
            threads: jobs under way at once, at least 1.

        Raises:
            BaseException: the error of the first job that failed, or what interrupted the caller, when all others have ended too.
        """
        self._jobs, self._results = jobs, [None] * len(jobs)
        # Each thread starts the next: only the first is started where a signal may interrupt.
        self._threads = every = [_Thread(self._work, number) for number in range(min(threads, len(jobs)))]
        begun = not every
        while not self._over.is_set() and every:
            try:
                if not begun:
                    begun = True
                    every[0].start()
                while not self._over.wait(1.0):
                    if every[0].thread.ident is None:  # interrupted, or refused by the system, before it existed
                        self._over.set()
            except BaseException as error:
                self.end(error)
        for each in every:
            if each.started and each.thread.ident is not None:
                each.thread.join()
        if self._error is not None:
            raise self._error
        return self._results

    def end(self, error: BaseException) -> None:
        """All threads end when they next come to a unit; the first error counts."""
        if self._error is None:
            self._error = error

    # -- the engine's side: threads that are not of this run pass freely ---------------------------------------------------------------

    @property
    def lock(self) -> threading.RLock | None:
        """What the model's lock is for the present thread; None for one that is not of this run."""
        me = self._me()
        return None if me is None else me.lock

    def arrive(self, unit: int) -> None:
        """The present thread is about to use the unit; returns when it has the turn to do so.

        Raises:
            Ended: the run is over.
        """
        me = self._me()
        if me is None:
            return
        if self._error is not None:
            raise Ended
        if unit not in me.uses:
            self._give_away(me, unit)
            me.begun.append(unit)
            self._at = unit
        me.uses[unit] = me.uses.get(unit, 0) + 1

    def take_over(self, unit: int) -> bool:
        """Whether the use that now begins is one that another thread passed on."""
        if self._me() is None or unit not in self.kept:
            return False
        self.kept.discard(unit)
        return True

    def abandon(self, unit: int) -> None:
        """The use could not begin."""
        me = self._me()
        if me is not None:
            me.uses[unit] -= 1
            if not me.uses[unit]:
                del me.uses[unit]

    def leave(self, unit: int) -> bool:
        """A use of the unit ends; whether it is passed on to a thread that waits for the unit."""
        me = self._me()
        if me is None:
            return False
        self.abandon(unit)
        if unit in me.uses or unit in self.kept or not self.awaited(unit):
            return False
        self.kept.add(unit)
        return True

    def awaited(self, unit: int) -> bool:
        """Whether another thread waits for the unit."""
        me = self._me()
        return me is not None and self._error is None and any(other.wants == unit for other in self._threads if other is not me)

    # -- the threads' side -------------------------------------------------------------------------------------------------------------

    def _me(self) -> _Thread | None:
        me: _Thread | None = getattr(self._mine, "thread", None)
        return me

    def _work(self, me: _Thread) -> None:
        self._mine.thread = me
        me.wants = None
        try:
            while self._error is None and self._taken < len(self._jobs):
                self._run_next(me)
        except BaseException as error:
            self.end(error)
        finally:
            self._threads.remove(me)
            if self._error is not None:
                self._threads = [other for other in self._threads if other.started]
            if self._threads:
                self._wake(self._next())
            else:
                self._over.set()

    def _run_next(self, me: _Thread) -> None:
        me.order, self._taken = self._taken, self._taken + 1
        me.job = self._jobs[me.order]
        try:
            self._results[me.order] = me.job.run()
        finally:
            job, me.job = me.job, None
            job.suspend(me.begun)
            me.begun.clear()

    def _give_away(self, me: _Thread, unit: int) -> None:
        assert me.job is not None
        me.wants = unit
        following = self._next()
        if following is not me:
            me.job.suspend(me.begun)
            me.begun.clear()
            self._wake(following)
            me.turn.acquire()
            me.job.resume()
        me.wants = None
        if self._error is not None:
            raise Ended

    def _next(self) -> _Thread:
        """Whose turn it is when all wait."""
        deepest = list(max(self._threads, key=lambda t: len(t.uses)).uses)
        if deepest:
            # Inside a unit: there are slots for one such nest at a time, so those outside of it may only join.
            joining = [t for t in self._threads if t.wants == deepest[-1] and list(t.uses) == deepest[:-1]]
            able = joining or [t for t in self._threads if list(t.uses) == deepest]
        else:
            able = [t for t in self._threads if t.wants == _START] or self._threads
        return min(able, key=lambda t: (0 if t.wants is None else (t.wants - self._at) % self._units, t.order))

    def _wake(self, thread: _Thread) -> None:
        if thread.started:
            thread.turn.release()
            return
        try:
            thread.start()
        except BaseException as error:  # the system has no thread left
            self.end(error)
            self._threads = [other for other in self._threads if other is not thread and other.started]
            if self._threads:
                self._next().turn.release()
            else:
                self._over.set()


class _Thread:
    """One thread that makes calls.

    Attributes:
        lock: what the model's lock is for it: whoever called `run` holds the real one for all.
        order: number of its present job; the lowest goes first where several want one unit.
        wants: the unit it waits for; None while it runs.
        uses: units it is inside of, outermost first, and how many times.
        begun: units begun in this turn.
        turn: released by whoever gives it the turn.
    """

    def __init__(self, work: Any, number: int) -> None:
        self.lock = threading.RLock()
        self.order = number
        self.wants: int | None = _START
        self.uses: dict[int, int] = {}
        self.begun: list[int] = []
        self.job: Job | None = None
        self.turn = threading.Lock()
        self.turn.acquire()
        self.started = False
        self.thread = threading.Thread(target=work, args=(self,), name=f"torchwrap-turn-{number}", daemon=True)

    def start(self) -> None:
        """Begin; it has the turn."""
        self.started = True
        self.thread.start()

"""The streaming engine: makes each unit's weights present while the unit runs, and reads the next ones meanwhile.

`acquire(unit)` waits until the unit's streamed pieces are in a slot, lets their parameters show them, and starts reading what the
schedule expects next into the free slots; `release(unit)` puts the placeholders back and frees the slot. Resident pieces are never
touched. Reading goes on between forward calls: the first units of the next token are read while the caller samples this one. Which unit
gets which slot is decided in window.py; this file is about who may use the model when: forwards, backwards, updates and changes of weights.

`lock`, held for the whole outermost forward, serialises threads: two threads inside one model would need twice the slots. Within
`in_turns` its holder shares it with threads that go through the model together, see turns.py. A backward
runs its hooks in threads of its own, so it does not take that lock: it *holds* units. A hold is only a preference. Whoever needs the
slot takes it, and the backward then works on private copies; a view of the slot that is still alive keeps the old memory for itself.
`state` guards the tables for the length of one call; no lock is held by the reading threads. Everything that can be known when the plan
is made (offsets in slots, requests, views) is computed once per unit and reused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from torchwrap.core import errors
from torchwrap.core.layer import runs_inside
from torchwrap.storage import aio
from torchwrap.storage.condition import Condition
from torchwrap.stream.abandoned import AbandonedWindow
from torchwrap.stream.arena import Arena
from torchwrap.stream.pieces import check_untouched, read_piece
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.turns import Turns
from torchwrap.stream.units import Piece, Unit

__all__ = ["Engine"]


class Engine(AbandonedWindow):
    """Streams the units of one model through the slots of one arena.

    Args:
        units: in expected order of use.
        plan: which pieces stay and how many slots of what size there are.
        arena: where slots live.
        reader: reads extents of files into host memory.
        verify: compare the checksum of every read with that of the first (or the stored one).
        timeout_s: seconds after which a read that does not finish, or an update that does not end, is an error.
        timeline: where events are recorded, if anywhere.
        batch: uses after which slots change hands, see batches.py.

    Attributes:
        turns: of the threads that share the lock now, if any do.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        plan: ResidencyPlan,
        arena: Arena,
        reader: aio.Reader,
        *,
        verify: bool = True,
        timeout_s: float = 60.0,
        timeline: Timeline | None = None,
        batch: int = 1,
    ) -> None:
        super().__init__(units, plan, arena, reader, verify=verify, timeout_s=timeout_s, timeline=timeline, batch=batch)
        self.turns: Turns | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._pid = os.getpid()

    # -- use ---------------------------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> threading.RLock:
        """Held from `acquire` to `release`; taken before `state`, never after it."""
        turns = self.turns
        shared = None if turns is None else turns.lock
        return self._lock if shared is None else shared

    def acquire(self, unit: Unit, *, roomy: bool = False, whole: bool = True) -> None:
        """Make the unit's weights present; other threads wait until the matching `release`.

        Args:
            roomy: the unit's computation needs memory of the size of its weights: until `release`, nothing is read ahead and slots not
                in use give their memory back to the system (not on a separate device).
            whole: False if experts may be left out until `begin_experts`, see routed.py.

        Raises:
            StorageError: a read failed or did not finish in time.
            CorruptDataError: the file is not what it was.
        """
        self.check_process()
        turns = self.turns
        if turns is not None:
            turns.arrive(unit.index)
        self.lock.acquire()
        try:
            with self.state:
                self._await_update(unit.pieces)
                if roomy and not self.arena.separate:
                    self._make_room(unit)
                self._acquire(unit, whole)
            if self.timeline is not None:
                self.timeline.begin("compute", unit.name)
        except BaseException:
            self._making_room = False
            if turns is not None:
                turns.abandon(unit.index)
            self.lock.release()
            raise

    def release(self, unit: Unit, training: bool | None = None) -> Piece | None:
        """End the use that the matching `acquire` began. Never raises.

        Args:
            training: mode of the module that ran; its first use in each mode is looked at more closely. None: this one is not.

        Returns:
            A streamed piece that the unit's own module wrote to, which is lost, if there is one.
        """
        found = None
        try:
            with self.state:
                turns = self.turns
                if self._making_room and not (turns is not None and turns.awaited(unit.index)):
                    self._making_room = False
                    self._guess()
                if turns is None or not turns.leave(unit.index):
                    found = self._end_use(unit, training)
                if self.timeline is not None:
                    self.timeline.end("compute", unit.name)
                self.state.notify_all()
        finally:
            self.lock.release()
        return found

    def _end_use(self, unit: Unit, training: bool | None = None) -> Piece | None:
        found = None
        fetch = self._fetches.get(unit.index)
        if fetch is not None and fetch.users:
            fetch.users -= 1
            if not fetch.users:
                found = self._written(fetch, training)
            if not fetch.bound:
                self._retire(fetch)
        return found

    def hold(self, unit: Unit) -> bool:
        """Keep the unit's weights present for a backward until `unhold`, or until something else needs the slot. Idempotent.

        Unlike `acquire`, no lock is kept. Returns whether the weights are present: not if forwards use every slot.

        Raises:
            StorageError, CorruptDataError: as `acquire`.
        """
        self.check_process()
        with self.state:
            self._await_taken(unit)
            self._await_update(unit.pieces)
            if self._closed:
                return False
            fetch = self._fetches.get(unit.index)
            if fetch is not None and fetch.bound:
                self._complete(fetch)
            else:
                try:
                    self._acquire(unit, True)
                except errors.UnsupportedModelError:  # every slot is in use by forwards
                    return False
                fetch = self._fetches.get(unit.index)
                if fetch is None or not fetch.users:  # all of its pieces are resident
                    return False
                fetch.users -= 1
            fetch.held = True
            return True

    def unhold(self, unit: Unit) -> None:
        """End the hold of the unit, if there is one."""
        with self.state:
            fetch = self._fetches.get(unit.index)
            if fetch is not None and fetch.held:
                fetch.held = False
                if not fetch.users:
                    self._leave_for_updates(fetch)
                    self._retire(fetch)
            self.state.notify_all()

    def _acquire(self, unit: Unit, whole: bool) -> None:
        if self._closed:  # unwrapped by another thread while this one waited for the lock: the weights are all there
            return
        fetch = self._fetches.get(unit.index)
        if fetch is not None and fetch.awaited:
            self._taken(fetch, set(fetch.awaited))
            fetch = None
        if whole and fetch is not None and fetch.bound:
            self._complete(fetch)
        if self.turns is not None and self.turns.take_over(unit.index):
            return
        if fetch is not None and fetch.bound:  # the inner of its two layers, a unit inside itself, or recomputed within a backward
            fetch.users += 1
            return
        self.counters["unit_uses"] += 1
        if self._prefetched(unit):
            self.schedule.advance(unit.index)
        if fetch is None:
            self._hand_over(len(self._slots) - 1)  # a batch ends early where a unit is missing
        if self.layout(unit).places:
            self._bring(unit, fetch, whole)
        try:
            if self.batches.begun(present=fetch is not None):
                self._guess()
        except BaseException:
            brought = self._fetches.get(unit.index)
            if brought is not None and brought.users:
                brought.users = 0
                self._retire(brought)
            raise

    # -- after an error ----------------------------------------------------------------------------------------------------------

    def ended_by(self, error: BaseException) -> None:
        """An error ended the outermost use of the model in this thread, which still has the lock and has let go of what it knew of."""
        left = any(fetch.users for fetch in list(self._fetches.values()))
        if (left or not isinstance(error, Exception)) and self.turns is None and self._lock._is_owned():  # type: ignore[attr-defined]
            self.abandon()

    def count_slots(self) -> None:
        """Find a slot again that an interrupt outside of a call left nowhere. The caller has the lock, and no use of its own."""
        with self.state:
            if self.turns is None and len(self._free) + len(self._fetches) < len(self._slots):
                self.abandon()

    def recover(self) -> None:
        """An error ended a backward somewhere: no unit is held any more, and what it left of recomputed units is let go of."""
        mine = self._lock._is_owned()  # type: ignore[attr-defined]
        try:
            if self.turns is None and not (mine and runs_inside(self)) and (mine or self._lock.acquire(blocking=False)):
                self.abandon()
            else:  # forwards use the slots
                with self.state:
                    self._end_holds(self._fetches.values())
        finally:
            while not mine and self._lock._is_owned():  # type: ignore[attr-defined]
                self._lock.release()

    # -- ends --------------------------------------------------------------------------------------------------------------------

    def read(self, piece: Piece) -> torch.Tensor:
        """A private copy in host memory of one stored piece, by an ordinary read; no slot is used."""
        with self.unchanging(piece):
            return read_piece(piece, self.reader, self._timeout_s, verify=self._verify)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within the block no other thread runs the model, no backward holds a unit, and nothing is read ahead."""
        with self.lock, self.state:
            if self.turns is not None:  # this is one of its threads: the others are inside the model
                raise errors.ConflictError("torchwrap: weights were to change while several batches use them", fix="Do it between calls.")
            self._end_holds(self._fetches.values())
            yield

    @contextmanager
    def in_turns(self) -> Iterator[Turns]:
        """Within the block, threads of `Turns.run` share this thread's right to the model.

        Raises:
            ConflictError: a forward of this model is running in this thread, or it is one of such threads.
        """
        self.check_process()
        if (self.turns is not None and self.turns.lock is not None) or self._lock._is_owned():  # type: ignore[attr-defined]
            raise errors.ConflictError("torchwrap: several batches at once, inside a forward of the same model", fix="Call it outside.")
        with self._lock:
            self.turns = turns = Turns(len(self.units))
            try:
                yield turns
            finally:
                self.turns = None
                with self.state:
                    self._making_room = False
                    for index in turns.kept:  # an error came before the thread for which it was kept
                        self._end_use(self.units[index])
                    self.state.notify_all()

    def check_away(self, piece: Piece) -> None:
        """Raise as `check_untouched` does, unless a unit in use, perhaps in another thread, shows the piece."""
        with self.state:
            if not any(fetch.bound and piece.index in fetch.stored for fetch in self._fetches.values()):
                check_untouched(piece)

    def forget_layouts(self) -> None:
        """Homes or dtypes of pieces changed: nothing computed from them holds."""
        with self.lock, self.state:
            self._empty("weights were to change")
            self._layouts.clear()

    @property
    def held_bytes(self) -> int:
        """Of slots that are allocated."""
        return len(self._slots) * self.plan.slot_bytes

    def give_up_guesses(self) -> None:
        """From now on nothing is on its way that nobody has asked for."""
        with self.lock, self.state:
            self._empty("what was read ahead was to be given up")

    def trim(self) -> None:
        """Free all slots; the next forward allocates and fills them again."""
        with self.lock, self.state:
            self._empty("slots were to be freed")
            for layout in self._layouts.values():
                layout.views.clear()
            for slot in self._slots:
                self.arena.free_slot(slot)
                self._touched.gone(slot)
            self._slots.clear()
            self._free.clear()

    def _empty(self, what: str) -> None:
        used = [fetch.unit.name for fetch in self._fetches.values() if fetch.users]
        if used:
            raise errors.StorageError(f"torchwrap: {what} during a forward pass", where=used[0], fix="Do it between calls.")
        self._end_holds(self._fetches.values())
        for fetch in list(self._fetches.values()):
            self._discard(fetch)

    def check_process(self) -> None:
        """In a forked child, begin anew: reads that were under way never end there, and a thread that holds the lock does not exist."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._lock, self.turns = threading.RLock(), None
        self.state = Condition()
        self._updating.clear()
        self._due.clear()
        for fetch in self._fetches.values():
            if fetch.bound:  # by a thread of the parent
                self._hide(fetch.unit)
        self._fetches.clear()
        self._free = list(self._slots)
        self._uploader = None

    def rehome(self, arena: Arena) -> None:
        """Use other slots from now on."""
        with self.lock, self.state:
            self.trim()
            self._layouts.clear()
            self.arena = arena

    def resize(self, plan: ResidencyPlan) -> None:
        """Use slots of other sizes from now on."""
        with self.lock, self.state:
            self.trim()
            self._layouts.clear()
            self.plan = plan

    def close(self) -> None:
        """End all reading and free all slots; the parameters must show real values again. Idempotent."""
        with self.lock:
            if not self._closed:
                self.trim()
                self._closed = True
                with self.state:
                    self.state.notify_all()  # a backward in another thread that waits for a slot goes on without one
                self._uploads.put(None)
                if self._uploader is not None:
                    self._uploader.join(5.0)
                self.reader.close()

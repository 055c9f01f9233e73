"""Which units are in the slots: who gets a slot, when a used one goes on to another unit, and what is read ahead.

A unit that is needed gets a slot at once, if need be that of the guess that is due last, or one that a backward holds. When its use ends
its parameters show placeholders again; its slot goes on at the end of a batch (batches.py), to the unit that the schedule expects next
and that has none. So units are fetched in the order in which they are used, as far ahead as slots allow, and one that is expected before
its slot is wanted stays. What is read ahead is a guess: an error of it is nobody's until the unit is really needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from torchwrap.core import errors
from torchwrap.core.tensors import bind, references
from torchwrap.storage import aio
from torchwrap.stream.arena import Arena, Slot
from torchwrap.stream.batches import Batches
from torchwrap.stream.pieces import check_untouched
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.routed import RoutedSlots
from torchwrap.stream.schedule import Schedule
from torchwrap.stream.slots import Fetch
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Piece, Unit
from torchwrap.stream.writes import version_of

__all__ = ["Window"]


class Window(RoutedSlots):
    """Slots that go from unit to unit in the order of use. Callers of private methods hold `state`.

    Attributes:
        schedule: which units come next.
        batches: uses after which slots change hands.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        plan: ResidencyPlan,
        arena: Arena,
        reader: aio.Reader,
        *,
        verify: bool,
        timeout_s: float,
        timeline: Timeline | None,
        batch: int,
    ) -> None:
        super().__init__(units, plan, arena, reader, verify=verify, timeout_s=timeout_s, timeline=timeline)
        self.schedule: Schedule = Schedule()
        self.schedule.seed([u.index for u in self.units if self._prefetched(u) and any(not piece.resident for piece in u.pieces)])
        self.batches: Batches = Batches(batch)
        self._finished: list[Fetch] = []  # used in this batch; their slots change hands at its end
        self._parents = {unit.parent for unit in self.units if unit.parent is not None}
        self._making_room = False
        self._updating: set[int] = set()  # indices of pieces whose stored values are being replaced
        self._due: set[int] = set()  # of those that will be, soon

    # -- one use -------------------------------------------------------------------------------------------------------------------

    def _bring(self, unit: Unit, guessed: Fetch | None, whole: bool) -> None:
        """Have the unit's weights in a slot and show them."""
        for piece, _ in self.layout(unit).places:
            check_untouched(piece)
        fetch = guessed or self._start(unit, self._take_slot(unit))
        self.counters["unit_hits"] += guessed is not None
        try:
            try:
                self._wait(fetch)
            except errors.StorageError:
                if guessed is None:
                    raise
                # Read ahead when the disk had a bad moment: the caller gets the error only if it still has one.
                self._discard(fetch)
                fetch = self._start(unit, self._take_slot(unit))
                self._wait(fetch)
            if whole:
                self._complete(fetch)
            self.arena.before_compute(fetch.slot)
            views, late = self._views(unit, fetch.slot), self._late(fetch)
            for (piece, _), view in zip(self.layout(unit).places, views, strict=True):
                if piece.index not in late:
                    bind(piece.parameter, view)
            fetch.versions = [version_of(piece.parameter) for piece, _ in self.layout(unit).places]
            fetch.stored = {piece.index: piece.version for piece, _ in self.layout(unit).places}
            fetch.references = references(fetch.slot.device)
            fetch.awaited, fetch.taken = set(), set()
        except BaseException:
            self._hide(unit)
            self._discard(fetch)
            raise
        fetch.users = 1

    def _hide(self, unit: Unit) -> None:
        places = self.layout(unit).places
        try:
            for piece, _ in places:
                bind(piece.parameter, piece.absent)
        except BaseException:  # interrupted half-way: all of them once more, so that none shows a slot that others will use
            for piece, _ in places:
                bind(piece.parameter, piece.absent)
            raise

    def _retire(self, fetch: Fetch) -> None:
        updated = fetch.outdated  # when its update ended, this slot was not free yet
        if self._put_away(fetch) or updated:
            self._guess()

    def _put_away(self, fetch: Fetch) -> bool:
        """Last use ended: hide the weights. At the end of a batch (True), keep slots only of units expected before others need them."""
        alive = fetch.lent and references(fetch.slot.device) > fetch.references
        fetch.lent = False
        self._hide(fetch.unit)
        self.arena.after_compute(fetch.slot)
        if fetch.spoiled:
            self._discard(fetch)
        elif alive:
            self._give_away(fetch)
        elif fetch.outdated and not fetch.awaited:
            self._drop(fetch)
        self._finished.append(fetch)
        if not self.batches.ended():
            return False
        self._hand_over(len(self._slots))
        return True

    def _hand_over(self, kept: int) -> None:
        """The slots of units used in this batch are free, but for those among the next `kept` different ones expected."""
        if not self._finished:
            return
        expected = self.schedule.predict(kept)
        # The slot freed last is taken first: the first copy into the batch's slots waits for its last unit, and the others come after it.
        for done in self._finished:
            if not done.bound and not done.awaited and done.unit.index not in expected and self._fetches.get(done.unit.index) is done:
                self._drop(done)
        self._finished.clear()

    def _end_holds(self, fetches: Iterable[Fetch]) -> None:
        for fetch in list(fetches):
            if fetch.held:
                fetch.held = False
                if not fetch.users:
                    self._put_away(fetch)

    # -- what comes next -----------------------------------------------------------------------------------------------------------

    def _make_room(self, unit: Unit) -> None:
        for fetch in list(self._fetches.values()):
            if not fetch.bound and fetch.unit is not unit:
                self._discard(fetch)
        for slot in self._free:
            slot.host.release_pages()
            self._touched.gone(slot)
        self._making_room = True

    def _guess(self) -> None:
        with suppress(errors.TorchwrapError):  # nobody asked for these bytes yet; the acquire that does meets the same error
            self._prefetch()

    def _prefetch(self) -> None:
        if self._making_room:
            return
        wanted = self.schedule.predict(len(self._slots) or self.plan.slots)
        # An expert will want a slot while its block is still in use: one taken for a guess would be given up for each of them again.
        in_use = [fetch for fetch in self._fetches.values() if fetch.bound]
        kept = int(any(fetch.unit.index in self._parents for fetch in in_use) and len(in_use) == 1)
        for index in wanted:
            unit = self.units[index]
            if index in self._fetches or self._updated_soon(unit.pieces) or not self.layout(unit).places:
                continue
            held = sum(1 for fetch in self._fetches.values() if fetch.bound or fetch.unit.index in wanted)
            slot = self._free_slot(spare=set(wanted)) if self.plan.slots - held > kept else None
            if slot is None:
                return
            self._start(unit, slot)

    def _take_slot(self, unit: Unit) -> Slot:
        while (slot := self._free_slot(spare={unit.index})) is None:
            # Every slot is in use by an enclosing unit, or holds what is needed even sooner: give up the latest guess.
            # What updates could still copy goes first: they can read it.
            idle = sorted((fetch for fetch in self._fetches.values() if not fetch.bound), key=lambda fetch: bool(fetch.awaited))
            held = [fetch for fetch in self._fetches.values() if fetch.held and not fetch.users]
            if idle:
                self._discard(idle[-1])
            elif held:
                self._end_holds(held[-1:])
            else:
                raise errors.UnsupportedModelError(
                    f"torchwrap: {unit.name} is used inside {len(self._fetches)} other unit(s), but there are {len(self._slots)} slots",
                    where=unit.name,
                    fix=f"Set k={len(self._slots) + 1}.",
                )
        return slot

    def _prefetched(self, unit: Unit) -> bool:
        """Whether the unit takes part in the schedule: tables have no slot, and which expert comes next is the router's decision."""
        return unit.kind in ("block", "leaf", "tile")

    def _updated_now(self, pieces: Iterable[Piece]) -> bool:
        return bool(self._updating) and any(piece.index in self._updating for piece in pieces)

    def _updated_soon(self, pieces: Iterable[Piece]) -> bool:
        return any(piece.index in self._updating or piece.index in self._due for piece in pieces)

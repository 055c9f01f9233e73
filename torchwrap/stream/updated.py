"""Stored values that are replaced while the model is in use: who may read them when, and weights that updates copy instead of reading.

An update withholds the pieces that it changes from its first byte to its last. A backward that holds their unit goes on with the values in
its slot. These are the values that the update begins with, so it copies them from there; and when the backward has left the unit and the
update has not come so far yet, the bytes stay in the slot for it. A backward that then wants the slot for its next unit waits: it is ahead
of the updates, which need the disk, and reading a weight for them a third time would keep it waiting longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from torchwrap.core import errors
from torchwrap.storage.patience import LOOK_S, Patience
from torchwrap.stream.slots import Fetch
from torchwrap.stream.units import Piece, Unit
from torchwrap.stream.window import Window
from torchwrap.stream.writes import written

__all__ = ["UpdatedWindow"]


class UpdatedWindow(Window):
    """Slots of a model whose weights are updated. Callers of private methods hold `state`."""

    def expect_update(self, pieces: Sequence[Piece]) -> None:
        """Updates of these pieces will begin soon: until they have ended, nothing is read ahead that would have to be given up then."""
        with self.state:
            self._due |= {piece.index for piece in pieces}

    def begin_update(self, pieces: Sequence[Piece]) -> None:
        """From now on nothing reads these pieces, so that their stored values may be replaced; any thread may call it.

        Waits until no forward uses them; what was read ahead is given up. A backward that holds them goes on with the values it has, and
        its slot is free when both are done with it. `end_update` must follow.

        Raises:
            StorageError: a use did not end in time.
        """
        mine = {piece.index for piece in pieces}
        name = pieces[0].name
        with self.state:
            self._await(lambda: not mine & self._updating and not any(fetch.users for fetch in self._over(mine)), f"a use of {name}", name)
            for fetch in self._over(mine):
                if fetch.held or fetch.awaited:
                    fetch.outdated = True
                else:
                    self._discard(fetch)
            self._updating |= mine

    def end_update(self, pieces: Sequence[Piece]) -> None:
        """The pieces may be read again, from the homes they have now; any thread may call it, also for an update that did not begin."""
        mine = {piece.index for piece in pieces}
        with self.state:
            self._updating -= mine
            self._due -= mine
            for left in list(self._fetches.values()):
                self._taken(left, mine)
            for other in self.units:
                fetch = self._fetches.get(other.index)
                if any(piece.index in mine for piece in other.pieces) and not (fetch is not None and fetch.outdated):
                    self._layouts.pop(other.index, None)  # that of a slot in use goes with it
            self._guess()
            self.state.notify_all()

    def outlasts_updates(self, unit: Unit) -> bool:
        """Whether a backward holds the unit, with nothing inside it that could want the slot: it can do without the stored values then."""
        with self.state:
            fetch = self._fetches.get(unit.index)
            whole = fetch is not None and fetch.held and fetch.rows is None
            return whole and unit.kind == "block" and unit.index not in self._parents

    def copy_held(self, piece: Piece, first: int, into: torch.Tensor) -> bool:
        """Copy elements of a piece, from `first` on, out of the slot of a unit that a backward holds or has left for the updates; any
        thread may call it, and does so in the order of the elements.

        Returns:
            Whether it did: not if no such unit is there, if the slot is on another device, or if what the slot shows is not what is stored.
        """
        if self.arena.separate:
            return False
        with self.state:  # so that the slot is nobody else's meanwhile: a chunk takes milliseconds
            for fetch in self._fetches.values():
                kept = fetch.held or fetch.awaited
                if not kept or fetch.spoiled or fetch.stored.get(piece.index) != piece.version or piece.index in self._late(fetch):
                    continue
                for shown in self._shown(fetch):
                    if shown[0] is piece and next(written([shown]), None) is None:
                        into.copy_(shown[1].view(-1)[first : first + into.numel()])
                        if first + into.numel() == shown[1].numel() and self._taken(fetch, {piece.index}):
                            self._guess()
                            self.state.notify_all()
                        return True
        return False

    @contextmanager
    def unchanging(self, piece: Piece) -> Iterator[None]:
        """Within the block no update of the piece begins; one that is under way is waited for."""
        with self.state:
            self._await_update((piece,))
            yield

    def _over(self, pieces: set[int]) -> list[Fetch]:
        return [fetch for fetch in self._fetches.values() if any(piece.index in pieces for piece in fetch.unit.pieces)]

    def _await_update(self, pieces: Sequence[Piece]) -> None:
        if self._updated_now(pieces):
            began = time.monotonic()
            self._await(lambda: not self._updated_now(pieces), f"an update of {pieces[0].name}", pieces[0].name)
            if self.timeline is not None:
                self.timeline.add("stall", pieces[0].name, began, time.monotonic(), 0)

    def _await(self, over: Callable[[], bool], what: str, where: str) -> None:
        patience = Patience(self._timeout_s)
        while not over():
            left = patience.left()
            if left <= 0:
                raise errors.StorageError(f"torchwrap: {what} took over {self._timeout_s} s", where=where)
            self.state.wait(min(left, LOOK_S))

    # -- slots left for updates ----------------------------------------------------------------------------------------------------

    def _leave_for_updates(self, fetch: Fetch) -> None:
        """A backward is about to let go of the unit: its bytes stay while updates of it have to begin or have not copied them.

        Half of the slots at most, so that others can be read ahead where there are more than two.
        """
        unit = fetch.unit
        nested = unit.parent is not None or unit.index in self._parents
        left = sum(1 for other in self._fetches.values() if other.awaited)
        if self.arena.separate or nested or fetch.rows is not None or fetch.spoiled or left >= self.plan.slots // 2:
            return
        if next(written(self._shown(fetch)), None) is None:
            due = self._due | self._updating
            fetch.awaited = {piece.index for piece, _ in self.layout(unit).places if piece.index in due} - fetch.taken

    def _taken(self, fetch: Fetch, pieces: set[int]) -> bool:
        """Updates need no more of these pieces from the slot; whether that frees it."""
        fetch.taken |= pieces
        if not fetch.awaited:
            return False
        fetch.awaited -= pieces
        if not fetch.awaited:
            self._drop(fetch)
        return not fetch.awaited

    def _await_taken(self, unit: Unit) -> None:
        """A backward needs a slot for the unit: wait while all that it could have are left for updates."""

        def over() -> bool:
            fetches = self._fetches.values()
            others = [fetch for fetch in fetches if not fetch.bound and not fetch.awaited]
            return unit.index in self._fetches or bool(self._free or others) or not any(fetch.awaited for fetch in fetches)

        if over() or not self.layout(unit).places:
            return
        began = time.monotonic()
        while not over() and (left := began + self._timeout_s - time.monotonic()) > 0:  # at the latest then it is taken from them
            self.state.wait(min(left, LOOK_S))
        ended = time.monotonic()
        self.counters["stalls"] += 1
        self.counters["stall_s"] += ended - began
        if self.timeline is not None:
            self.timeline.add("stall", unit.name, began, ended, 0)

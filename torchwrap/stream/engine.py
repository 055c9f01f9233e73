"""The streaming engine: makes each unit's weights present while the unit runs, and reads the next ones meanwhile.

`acquire(unit)` waits until the unit's streamed pieces are in a slot, lets their parameters show them, and starts reading what the
schedule expects next into the free slots; `release(unit)` puts the placeholders back and frees the slot. Resident pieces are never
touched. Reading goes on between forward calls: the first units of the next token are read while the caller samples this one.

One lock, held for the whole outermost forward, serialises threads: two threads inside one model would need twice the slots. No lock is
held by the reading threads. Everything that can be known when the plan is made (offsets in slots, requests, views) is computed once per
unit and reused.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue

import torch

from torchwrap.core import errors
from torchwrap.core.tensors import bind
from torchwrap.storage import aio
from torchwrap.stream.arena import Arena, Slot
from torchwrap.stream.batches import Batches
from torchwrap.stream.layout import Layout, Region, lay_out
from torchwrap.stream.pieces import check_untouched, learn, part_of, read_piece
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.schedule import Schedule
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Piece, Unit

__all__ = ["Engine"]


class _Fetch:
    """One unit on its way into, or present in, one slot."""

    __slots__ = ("error", "slot", "ticket", "unit", "uploaded", "users")

    def __init__(self, unit: Unit, slot: Slot, ticket: aio.Ticket | None) -> None:
        self.unit, self.slot, self.ticket = unit, slot, ticket
        self.users = 0
        self.uploaded: threading.Event | None = None
        self.error: BaseException | None = None


class Engine:
    """Streams the units of one model through the slots of one arena.

    Args:
        units: in expected order of use.
        plan: which pieces stay and how many slots of what size there are.
        arena: where slots live.
        reader: reads extents of files into host memory.
        verify: compare the checksum of every read with that of the first (or the stored one).
        timeout_s: seconds after which a read that does not finish is an error.
        timeline: where events are recorded, if anywhere.
        batch: uses after which slots change hands, see batches.py.
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
        self.units: list[Unit] = list(units)
        self.plan: ResidencyPlan = plan
        self.arena: Arena = arena
        self.reader: aio.Reader = reader
        self.lock: threading.RLock = threading.RLock()
        self.schedule: Schedule = Schedule()
        self.schedule.seed([u.index for u in self.units if self._prefetched(u) and any(not piece.resident for piece in u.pieces)])
        self.timeline: Timeline | None = timeline
        self.batches: Batches = Batches(batch)
        self._finished: list[_Fetch] = []  # used in this batch; their slots change hands at its end
        self._verify, self._timeout_s = verify, timeout_s
        self._layouts: dict[int, Layout] = {}
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._fetches: dict[int, _Fetch] = {}
        self._uploads: SimpleQueue[_Fetch | None] = SimpleQueue()
        self._uploader: threading.Thread | None = None
        self._closed = False
        self._pid = os.getpid()
        self._parents = {unit.parent for unit in self.units if unit.parent is not None}
        self._slots_made = 0  # a slot that a hung read keeps is replaced by one of another number
        self._making_room = False
        self.counters: dict[str, float] = {
            "bytes_read": 0,
            "reads": 0,
            "stalls": 0,
            "stall_s": 0.0,
            "unit_uses": 0,
            "unit_hits": 0,
            "uploads": 0,
        }

    # -- use ---------------------------------------------------------------------------------------------------------------------

    def acquire(self, unit: Unit, *, roomy: bool = False) -> None:
        """Make the unit's weights present; other threads wait until the matching `release`.

        Args:
            roomy: the unit's computation needs memory of the size of its weights: until `release`, nothing is read ahead and slots not
                in use give their memory back to the system (not on a separate device).

        Raises:
            StorageError: a read failed or did not finish in time.
            CorruptDataError: the file is not what it was.
        """
        self.check_process()
        self.lock.acquire()
        try:
            if roomy and not self.arena.separate:
                self._make_room(unit)
            self._acquire(unit)
        except BaseException:
            self._making_room = False
            self.lock.release()
            raise

    def release(self, unit: Unit) -> None:
        """End the use that the matching `acquire` began. Never raises."""
        try:
            if self._making_room:
                self._making_room = False
                self._guess()
            fetch = self._fetches.get(unit.index)
            if fetch is not None and fetch.users:
                fetch.users -= 1
                if fetch.users == 0:
                    self._retire(fetch)
            if self.timeline is not None:
                self.timeline.end("compute", unit.name)
        finally:
            self.lock.release()

    def _acquire(self, unit: Unit) -> None:
        if self._closed:  # unwrapped by another thread while this one waited for the lock: the weights are all there
            return
        fetch = self._fetches.get(unit.index)
        if fetch is not None and fetch.users:  # the inner of its two layers, or a unit inside itself: already bound
            fetch.users += 1
            return
        self.counters["unit_uses"] += 1
        if self._prefetched(unit):
            self.schedule.advance(unit.index)
        if self.layout(unit).places:
            self._bring(unit, fetch)
        try:
            if self.batches.begun(present=fetch is not None):
                self._guess()
        except BaseException:
            brought = self._fetches.get(unit.index)
            if brought is not None and brought.users:
                brought.users = 0
                self._retire(brought)
            raise
        if self.timeline is not None:
            self.timeline.begin("compute", unit.name)

    def _bring(self, unit: Unit, guessed: _Fetch | None) -> None:
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
            self.arena.before_compute(fetch.slot)
            views = self._views(unit, fetch.slot)
            for (piece, _), view in zip(self.layout(unit).places, views, strict=True):
                bind(piece.parameter, view)
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

    def _retire(self, fetch: _Fetch) -> None:
        """Last use ended: hide the weights. At the end of a batch, keep slots only of units expected again before others need them."""
        self._hide(fetch.unit)
        self.arena.after_compute(fetch.slot)
        self._finished.append(fetch)
        if not self.batches.ended():
            return
        expected = self.schedule.predict(len(self._slots))
        # The slot freed last is taken first: the first copy into the batch's slots waits for its last unit, and the others come after it.
        for done in self._finished:
            if not done.users and done.unit.index not in expected and self._fetches.get(done.unit.index) is done:
                self._drop(done)
        self._finished.clear()
        self._guess()

    # -- fetching ----------------------------------------------------------------------------------------------------------------

    def _make_room(self, unit: Unit) -> None:
        for fetch in list(self._fetches.values()):
            if not fetch.users and fetch.unit is not unit:
                self._discard(fetch)
        for slot in self._free:
            slot.host.release_pages()
        self._making_room = True

    def _guess(self) -> None:
        with suppress(errors.TorchwrapError):  # nobody asked for these bytes yet; the acquire that does meets the same error
            self._prefetch()

    def _prefetch(self) -> None:
        if self._making_room:
            return
        wanted = self.schedule.predict(len(self._slots) or self.plan.slots)
        # An expert will want a slot while its block is still in use: one taken for a guess would be given up for each of them again.
        in_use = [fetch for fetch in self._fetches.values() if fetch.users]
        kept = int(any(fetch.unit.index in self._parents for fetch in in_use) and len(in_use) == 1)
        for index in wanted:
            unit = self.units[index]
            if index in self._fetches or not self.layout(unit).places:
                continue
            held = sum(1 for fetch in self._fetches.values() if fetch.users or fetch.unit.index in wanted)
            slot = self._free_slot(spare=set(wanted)) if self.plan.slots - held > kept else None
            if slot is None:
                return
            self._start(unit, slot)

    def _start(self, unit: Unit, slot: Slot) -> _Fetch:
        layout = self.layout(unit)
        try:
            self.arena.before_read(slot)
            ticket = None
            if layout.regions:
                for file in {id(region.file): region.file for region in layout.regions}.values():
                    file.check_unchanged()
                ticket = self.reader.submit([self._read(region, slot) for region in layout.regions])
        except BaseException:
            self._free.append(slot)
            raise
        self.counters["reads"] += 1
        self.counters["bytes_read"] += layout.read_bytes
        fetch = _Fetch(unit, slot, ticket)
        self._fetches[unit.index] = fetch
        if self.timeline is not None:
            self.timeline.present(sum(piece.nbytes for piece, _ in layout.places))
        if self.arena.separate:
            fetch.uploaded = threading.Event()
            if ticket is None:
                self._upload(fetch)
            else:
                self._start_uploader()
                self._uploads.put(fetch)
        return fetch

    def _read(self, region: Region, slot: Slot) -> aio.Read:
        parts = tuple(part_of(piece) for piece in region.pieces) if self._verify else ()
        return aio.Read(region.file, region.offset, region.nbytes, slot.host, region.slot_offset, parts)

    def _wait(self, fetch: _Fetch) -> None:
        waits = (fetch.ticket is not None and not fetch.ticket.done()) or (fetch.uploaded is not None and not fetch.uploaded.is_set())
        began = time.monotonic()
        if fetch.ticket is not None:
            fetch.ticket.wait(self._timeout_s)
            self._learn_checksums(fetch)
        if fetch.uploaded is not None:
            if not fetch.uploaded.wait(self._timeout_s):
                raise errors.StorageError(f"offload: copying to {self.arena.device} took over {self._timeout_s} s", where=fetch.unit.name)
            if fetch.error is not None:
                raise fetch.error
        if waits:
            ended = time.monotonic()
            self.counters["stalls"] += 1
            self.counters["stall_s"] += ended - began
            if self.timeline is not None:
                self.timeline.add("stall", fetch.unit.name, began, ended, 0)
        if self.timeline is not None and fetch.ticket is not None:
            self.timeline.add("read", fetch.unit.name, *fetch.ticket.interval, fetch.ticket.nbytes)
        fetch.ticket = fetch.uploaded = None  # waited for: a unit that stays in its slot is not read again

    def _learn_checksums(self, fetch: _Fetch) -> None:
        if self._verify and fetch.ticket is not None:
            for piece, _ in self.layout(fetch.unit).places:
                learn(piece, fetch.ticket)

    # -- slots -------------------------------------------------------------------------------------------------------------------

    def _take_slot(self, unit: Unit) -> Slot:
        while (slot := self._free_slot(spare={unit.index})) is None:
            # Every slot is in use by an enclosing unit, or holds what is needed even sooner: give up the latest guess.
            idle = [fetch for fetch in self._fetches.values() if not fetch.users]
            if not idle:
                raise errors.UnsupportedModelError(
                    f"offload: {unit.name} is used inside {len(self._fetches)} other unit(s), but there are {len(self._slots)} slots",
                    where=unit.name,
                    fix=f"Set k={len(self._slots) + 1}.",
                )
            self._discard(idle[-1])
        return slot

    def _free_slot(self, spare: set[int]) -> Slot | None:
        """A free slot; else one whose unit is idle and not in `spare`; else None."""
        while len(self._slots) < self.plan.slots:
            with torch.inference_mode(False):
                slot = self.arena.make_slot(self._slots_made, self.plan.slot_bytes)
            self._slots_made += 1
            self._slots.append(slot)
            self._free.append(slot)
        if not self._free:
            for fetch in list(self._fetches.values()):
                if not fetch.users and fetch.unit.index not in spare:
                    self._discard(fetch)
                    break
        return self._free.pop() if self._free else None

    def _drop(self, fetch: _Fetch) -> None:
        del self._fetches[fetch.unit.index]
        self._free.append(fetch.slot)
        if self.timeline is not None:
            self.timeline.present(-sum(piece.nbytes for piece, _ in self.layout(fetch.unit).places))

    def _discard(self, fetch: _Fetch) -> None:
        """Give up a fetch that may still be running: its slot is free only when nothing writes into it any more."""
        if fetch.ticket is not None and not fetch.ticket.done():
            with suppress(errors.StorageError):
                fetch.ticket.wait(self._timeout_s)
        if fetch.uploaded is not None:
            fetch.uploaded.wait(self._timeout_s)
        if self._fetches.get(fetch.unit.index) is fetch:
            self._drop(fetch)
            if fetch.ticket is not None and not fetch.ticket.done():
                # A read that hangs may still write: its slot is never used again (the reader keeps the memory), a new one replaces it.
                self._free.remove(fetch.slot)
                self._slots.remove(fetch.slot)

    # -- layouts -----------------------------------------------------------------------------------------------------------------

    def layout(self, unit: Unit) -> Layout:
        """Where the unit's streamed pieces lie in a slot; computed once."""
        layout = self._layouts.get(unit.index)
        if layout is None:
            layout = self._layouts[unit.index] = lay_out(unit, self.plan.slot_bytes, self.arena.separate)
        return layout

    def forget_layouts(self) -> None:
        """Homes or dtypes of pieces changed: nothing computed from them holds."""
        with self.lock:
            self._refuse_in_use("weights were to change")
            for fetch in list(self._fetches.values()):
                self._discard(fetch)
            self._layouts.clear()

    def _views(self, unit: Unit, slot: Slot) -> list[torch.Tensor]:
        layout = self.layout(unit)
        views = layout.views.get(slot.index)
        if views is None:
            with torch.inference_mode(False):  # made in inference mode, they could not be used by autograd later
                views = layout.views[slot.index] = [
                    slot.device[offset : offset + piece.nbytes].view(piece.dtype).view(piece.shape) for piece, offset in layout.places
                ]
        return views

    def _prefetched(self, unit: Unit) -> bool:
        """Whether the unit takes part in the schedule: tables have no slot, and which expert comes next is the router's decision."""
        return unit.kind in ("block", "leaf")

    # -- uploads (separate device only) --------------------------------------------------------------------------------------------

    def _start_uploader(self) -> None:
        if self._uploader is None or not self._uploader.is_alive():
            self._uploader = threading.Thread(target=self._upload_loop, name="torchwrap-upload", daemon=True)
            self._uploader.start()

    def _upload_loop(self) -> None:
        while (fetch := self._uploads.get()) is not None:
            try:
                assert fetch.ticket is not None
                fetch.ticket.wait(self._timeout_s)
                self._upload(fetch)
            except BaseException as error:
                fetch.error = error
                if fetch.uploaded is not None:
                    fetch.uploaded.set()

    def _upload(self, fetch: _Fetch) -> None:
        layout = self.layout(fetch.unit)
        landed = {piece.index: offset for piece, offset in layout.landing}
        memory = fetch.slot.host.tensor()
        parts = []
        for piece, offset in layout.places:
            if piece.host is not None:
                parts.append((offset, piece.host))
            else:
                start = landed[piece.index]
                parts.append((offset, memory[start : start + piece.nbytes]))
        self.arena.upload(fetch.slot, parts)
        self.counters["uploads"] += 1
        if fetch.uploaded is not None:
            fetch.uploaded.set()

    # -- ends --------------------------------------------------------------------------------------------------------------------

    def read(self, piece: Piece) -> torch.Tensor:
        """A private copy in host memory of one stored piece, by an ordinary read; no slot is used."""
        return read_piece(piece, self.reader, self._timeout_s, verify=self._verify)

    def piece_at(self, tensor: torch.Tensor) -> tuple[Piece, int] | None:
        """(piece, elements into it) if the tensor lies in a slot that holds a unit in use; None for any other tensor."""
        if tensor.device != self.arena.device or tensor.device.type == "meta":
            return None
        address = tensor.data_ptr()
        for fetch in self._fetches.values():
            base = fetch.slot.device.data_ptr()
            if fetch.users and base <= address < base + fetch.slot.device.numel():
                for piece, offset in self.layout(fetch.unit).places:
                    if base + offset <= address < base + offset + piece.nbytes:
                        return piece, (address - base - offset) // tensor.element_size()
        return None

    def trim(self) -> None:
        """Free all slots; the next forward allocates and fills them again."""
        with self.lock:
            self._refuse_in_use("slots were to be freed")
            for fetch in list(self._fetches.values()):
                self._discard(fetch)
            for layout in self._layouts.values():
                layout.views.clear()
            for slot in self._slots:
                self.arena.free_slot(slot)
            self._slots.clear()
            self._free.clear()

    def check_process(self) -> None:
        """In a forked child, begin anew: reads that were under way never end there, and a thread that holds the lock does not exist."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self.lock = threading.RLock()
        for fetch in self._fetches.values():
            if fetch.users:  # by a thread of the parent
                self._hide(fetch.unit)
        self._fetches.clear()
        self._free = list(self._slots)
        self._uploader = None

    def _refuse_in_use(self, what: str) -> None:
        used = [fetch.unit.name for fetch in self._fetches.values() if fetch.users]
        if used:
            raise errors.StorageError(f"offload: {what} during a forward pass", where=used[0], fix="Do it between calls.")

    def rehome(self, arena: Arena) -> None:
        """Use other slots from now on."""
        with self.lock:
            self.trim()
            self._layouts.clear()
            self.arena = arena

    def resize(self, plan: ResidencyPlan) -> None:
        """Use slots of other sizes from now on."""
        with self.lock:
            self.trim()
            self._layouts.clear()
            self.plan = plan

    def close(self) -> None:
        """End all reading and free all slots; the parameters must show real values again. Idempotent."""
        with self.lock:
            if not self._closed:
                self.trim()
                self._closed = True
                self._uploads.put(None)
                if self._uploader is not None:
                    self._uploader.join(5.0)
                self.reader.close()

"""The streaming engine: makes each unit's weights present while the unit runs, and reads the next ones meanwhile.

`acquire(unit)` waits until the unit's streamed pieces are in a slot, lets their parameters show them, and starts reading what the
schedule expects next into the free slots; `release(unit)` puts the placeholders back and frees the slot. Resident pieces are never
touched. Reading goes on between forward calls: the first units of the next token are read while the caller samples this one.

One lock, held for the whole outermost forward, serialises threads: two threads inside one model would need twice the slots. No lock is
held by the reading threads. Everything that can be known when the plan is made (offsets in slots, requests, views) is computed once per
unit and reused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from torchwrap.core import errors
from torchwrap.core.tensors import bind
from torchwrap.storage import aio
from torchwrap.stream.arena import Arena, Slot
from torchwrap.stream.pieces import part_of, read_piece
from torchwrap.stream.planner import PAGE, ResidencyPlan
from torchwrap.stream.schedule import Schedule
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Piece, SourceFile, Unit

__all__ = ["Engine"]

_DEVICE_ALIGN = 256
_MERGE_GAP = 2 * PAGE  # the slot was sized for two pages of slack per piece, so a gap this small costs nothing


@dataclass(slots=True)
class _Region:
    """A run of bytes of one file that is read in one go, and where it lands in the slot."""

    file: SourceFile
    offset: int
    nbytes: int
    slot_offset: int  # congruent to `offset` modulo a page
    pieces: list[Piece]


@dataclass(slots=True)
class _Layout:
    """How a unit's streamed pieces lie in a slot."""

    regions: list[_Region] = field(default_factory=list)
    landing: list[tuple[Piece, int]] = field(default_factory=list)  # (piece read from disk, offset in the slot's host side)
    places: list[tuple[Piece, int]] = field(default_factory=list)  # (piece, offset in the slot's device side)
    views: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # slot index -> views in the order of `places`

    @property
    def read_bytes(self) -> int:
        return sum(region.nbytes for region in self.regions)


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
    ) -> None:
        self.units: list[Unit] = list(units)
        self.plan: ResidencyPlan = plan
        self.arena: Arena = arena
        self.reader: aio.Reader = reader
        self.lock: threading.RLock = threading.RLock()
        self.schedule: Schedule = Schedule()
        self.schedule.seed([u.index for u in self.units if self._prefetched(u) and any(not piece.resident for piece in u.pieces)])
        self.timeline: Timeline | None = timeline
        self._verify, self._timeout_s = verify, timeout_s
        self._layouts: dict[int, _Layout] = {}
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._fetches: dict[int, _Fetch] = {}
        self._uploads: SimpleQueue[_Fetch | None] = SimpleQueue()
        self._uploader: threading.Thread | None = None
        self._closed = False
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
                with suppress(errors.TorchwrapError):
                    self._prefetch()
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
        self.counters["unit_uses"] += 1
        fetch = self._fetches.get(unit.index)
        if fetch is not None and fetch.users:  # a unit inside itself: already bound
            fetch.users += 1
            return
        if self._prefetched(unit):
            self.schedule.advance(unit.index)
        if self.layout(unit).places:
            if fetch is None:
                fetch = self._start(unit, self._take_slot(unit))
            else:
                self.counters["unit_hits"] += 1
            try:
                self._wait(fetch)
            except BaseException:
                self._discard(fetch)
                raise
            self.arena.before_compute(fetch.slot)
            for (piece, _), view in zip(self.layout(unit).places, self._views(unit, fetch.slot), strict=True):
                bind(piece.parameter, view)
            fetch.users = 1
        self._prefetch()
        if self.timeline is not None:
            self.timeline.begin("compute", unit.name)

    def _retire(self, fetch: _Fetch) -> None:
        """Last use ended: hide the weights, keep the slot only if the unit is expected again before others need it."""
        for piece, _ in self.layout(fetch.unit).places:
            bind(piece.parameter, piece.absent)
        self.arena.after_compute(fetch.slot)
        if fetch.unit.index not in self.schedule.predict(max(1, len(self._slots) - 1)):
            self._drop(fetch)
        with suppress(errors.TorchwrapError):  # nobody asked for these bytes yet; the acquire that does meets the same error
            self._prefetch()

    # -- fetching ----------------------------------------------------------------------------------------------------------------

    def _make_room(self, unit: Unit) -> None:
        for fetch in list(self._fetches.values()):
            if not fetch.users and fetch.unit is not unit:
                self._discard(fetch)
        for slot in self._free:
            slot.host.release_pages()
        self._making_room = True

    def _prefetch(self) -> None:
        if self._making_room:
            return
        wanted = self.schedule.predict(len(self._slots) or self.plan.slots)
        for index in wanted:
            unit = self.units[index]
            if index in self._fetches or not self.layout(unit).places:
                continue
            slot = self._free_slot(spare=set(wanted))
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

    def _read(self, region: _Region, slot: Slot) -> aio.Read:
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

    def _learn_checksums(self, fetch: _Fetch) -> None:
        if self._verify and fetch.ticket is not None:
            for piece, _ in self.layout(fetch.unit).places:
                if piece.checksum is None:
                    piece.checksum = fetch.ticket.sums.get(piece.name)

    # -- slots -------------------------------------------------------------------------------------------------------------------

    def _take_slot(self, unit: Unit) -> Slot:
        slot = self._free_slot(spare={unit.index})
        if slot is None:  # every slot is in use by an enclosing unit, or holds what is needed even sooner: give up the latest guess
            idle = [fetch for fetch in self._fetches.values() if not fetch.users]
            if not idle:
                raise errors.UnsupportedModelError(
                    f"offload: {unit.name} is used inside {len(self._fetches)} other unit(s), but there are {len(self._slots)} slots",
                    where=unit.name,
                    fix=f"Set k={len(self._slots) + 1}.",
                )
            self._discard(idle[-1])
            slot = self._free.pop()
        return slot

    def _free_slot(self, spare: set[int]) -> Slot | None:
        """A free slot; else one whose unit is idle and not in `spare`; else None."""
        while len(self._slots) < self.plan.slots:
            with torch.inference_mode(False):
                slot = self.arena.make_slot(len(self._slots), self.plan.slot_bytes)
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

    def layout(self, unit: Unit) -> _Layout:
        """Where the unit's streamed pieces lie in a slot; computed once."""
        layout = self._layouts.get(unit.index)
        if layout is None:
            layout = self._layouts[unit.index] = _lay_out(unit, self.plan.slot_bytes, self.arena.separate)
        return layout

    def forget_layouts(self) -> None:
        """Homes or dtypes of pieces changed: nothing computed from them holds."""
        with self.lock:
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
            if any(fetch.users for fetch in self._fetches.values()):
                raise errors.StorageError("offload: trim() during a forward pass", fix="Call it between calls.")
            for fetch in list(self._fetches.values()):
                self._discard(fetch)
            for layout in self._layouts.values():
                layout.views.clear()
            for slot in self._slots:
                self.arena.free_slot(slot)
            self._slots.clear()
            self._free.clear()

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


def _lay_out(unit: Unit, slot_bytes: int, separate: bool) -> _Layout:
    """Place a unit's streamed pieces.

    Where reads land in the memory that computes, a piece keeps its file offset modulo a page, so that it needs no second copy. On a
    separate device each piece is copied anyway and goes to a multiple of 256 bytes, where the device's kernels want it.
    """
    streamed = [piece for piece in unit.pieces if not piece.resident]
    homes = sorted(((p.home, p) for p in streamed if p.home is not None), key=lambda pair: (id(pair[0].file), pair[0].offset))
    layout = _Layout()
    at = 0
    for home, piece in homes:
        last = layout.regions[-1] if layout.regions else None
        if not separate and home.offset % 64 != piece.residue:
            # The original had another alignment than the file gives: the reader copies it into place.
            layout.regions.append(_Region(home.file, home.offset, piece.nbytes, at + piece.residue, [piece]))
            layout.landing.append((piece, at + piece.residue))
            at = (at + piece.residue + piece.nbytes + PAGE - 1) // PAGE * PAGE
            continue
        if (
            last is not None
            and last.slot_offset % PAGE == last.offset % PAGE
            and last.file is home.file
            and 0 <= home.offset - (last.offset + last.nbytes) <= _MERGE_GAP
        ):
            last.nbytes = home.offset + piece.nbytes - last.offset
            last.pieces.append(piece)
        else:
            last = _Region(home.file, home.offset, piece.nbytes, at + home.offset % PAGE, [piece])
            layout.regions.append(last)
        layout.landing.append((piece, last.slot_offset + home.offset - last.offset))
        at = (last.slot_offset + last.nbytes + PAGE - 1) // PAGE * PAGE
    needed = at
    if separate:
        at = 0
        for piece in [p for p in streamed if p.host is not None] + [piece for _, piece in homes]:
            layout.places.append((piece, at))
            at = -(-(at + piece.nbytes) // _DEVICE_ALIGN) * _DEVICE_ALIGN
        needed = max(needed, at)
    else:
        layout.places = layout.landing
    if needed > slot_bytes:
        raise errors.StorageError(f"offload: {unit.name} needs a slot of {needed} bytes, but slots have {slot_bytes}", where=unit.name)
    return layout

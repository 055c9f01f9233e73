"""Getting the bytes of one unit into one slot, and out of the way again.

This is the mechanical half of the engine: which unit goes where and when is decided in window.py. A `Fetch` is one unit on its way into
a slot, or present in it. Reads are asynchronous; with a separate device one thread starts the copy of each unit when its reads are done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue

import torch

from torchwrap.core import errors
from torchwrap.core.tensors import data_of
from torchwrap.storage import aio
from torchwrap.storage.condition import Condition
from torchwrap.stream.arena import Arena, Slot
from torchwrap.stream.layout import Layout, Region, lay_out
from torchwrap.stream.pieces import learn, part_of
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.touched import Touched
from torchwrap.stream.units import Piece, Unit
from torchwrap.stream.writes import changed_bytes, written

__all__ = ["Fetch", "Slots"]


class Fetch:
    """One unit on its way into, or present in, one slot.

    Attributes:
        users: uses begun and not ended; the parameters show the slot while there is one, or while `held`.
        held: kept present by a backward, which can do without.
        awaited: indices of pieces for which the bytes stay in the slot after a backward, because updates have still to copy them.
        taken: of those that updates have copied.
        lent: views were given to that backward.
        references: tensors over the slot's memory when the parameters had just been shown.
        rows: experts present, by group; None: all of the unit's bytes are (see routed.py).
        marked: experts that are not present begin with NaN.
        outdated: stored values of some of its pieces were replaced while it was held; the backward goes on with those it has.
        spoiled: the slot must not be used again as it is: a read into it while the unit was in use did not end well, or its module wrote.
        versions: of the parameters when they had just been shown, in the order of the layout's places.
        stored: versions of the pieces when they had just been shown, by index.
    """

    __slots__ = (
        "awaited",
        "error",
        "held",
        "lent",
        "marked",
        "outdated",
        "references",
        "rows",
        "slot",
        "spoiled",
        "stored",
        "taken",
        "ticket",
        "unit",
        "uploaded",
        "users",
        "versions",
    )

    def __init__(self, unit: Unit, slot: Slot, ticket: aio.Ticket | None) -> None:
        self.unit: Unit = unit
        self.slot: Slot = slot
        self.ticket: aio.Ticket | None = ticket
        self.users: int = 0
        self.held: bool = False
        self.awaited: set[int] = set()
        self.taken: set[int] = set()
        self.lent: bool = False
        self.rows: dict[int, set[int]] | None = None
        self.marked: bool = False
        self.outdated: bool = False
        self.spoiled: bool = False
        self.references: int = 0
        self.versions: list[int] = []
        self.stored: dict[int, int] = {}
        self.uploaded: threading.Event | None = None
        self.error: BaseException | None = None

    @property
    def bound(self) -> bool:
        """Whether the unit's parameters show the slot."""
        return self.held or self.users > 0


class Slots:
    """The slots of one model, what is in them, and the reads and copies under way. Callers of private methods hold `state`.

    Attributes:
        state: guards the tables; notified when a use or an update ends.
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
    ) -> None:
        self.units: list[Unit] = list(units)
        self.plan: ResidencyPlan = plan
        self.arena: Arena = arena
        self.reader: aio.Reader = reader
        self.timeline: Timeline | None = timeline
        self.state: Condition = Condition()
        self._verify, self._timeout_s = verify, timeout_s
        self._layouts: dict[int, Layout] = {}
        self._touched = Touched()
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._fetches: dict[int, Fetch] = {}
        self._uploads: SimpleQueue[Fetch | None] = SimpleQueue()
        self._uploader: threading.Thread | None = None
        self._staying: dict[int, Piece] = {}  # by address of their storage
        self._compared: set[tuple[int, bool]] = set()  # units whose bytes were found unchanged after a use, by whether it was training
        self._slots_made = 0  # a slot that a hung read keeps is replaced by one of another number
        self.counters: dict[str, float] = {
            "bytes_read": 0,
            "reads": 0,
            "stalls": 0,
            "stall_s": 0.0,
            "unit_uses": 0,
            "unit_hits": 0,
            "uploads": 0,
        }

    def layout(self, unit: Unit) -> Layout:
        """Where the unit's streamed pieces lie in a slot; computed once."""
        layout = self._layouts.get(unit.index)
        if layout is None:
            layout = self._layouts[unit.index] = lay_out(unit, self.plan.slot_bytes, self.arena.separate)
        return layout

    def _views(self, unit: Unit, slot: Slot) -> list[torch.Tensor]:
        layout = self.layout(unit)
        views = layout.views.get(slot.index)
        if views is None:
            with torch.inference_mode(False):  # made in inference mode, they could not be used by autograd later
                views = layout.views[slot.index] = [
                    slot.device[offset : offset + piece.nbytes].view(piece.dtype).view(piece.shape) for piece, offset in layout.places
                ]
        return views

    def _start(self, unit: Unit, slot: Slot) -> Fetch:
        layout = self.layout(unit)
        try:
            self.arena.before_read(slot)
            ticket = None
            if not self.arena.separate:
                self._touched.fill(slot, layout.needed, self._free, self.units, self.plan)
            regions = self._regions(unit)
            if regions:
                for file in {id(region.file): region.file for region in regions}.values():
                    file.check_unchanged()
                ticket = self.reader.submit([self._read(region, slot) for region in regions])
        except BaseException:
            self._free.append(slot)
            raise
        self.counters["reads"] += 1
        self.counters["bytes_read"] += sum(region.nbytes for region in regions)
        fetch = self._begun(Fetch(unit, slot, ticket))
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

    def _regions(self, unit: Unit) -> list[Region]:
        """What a fetch of the unit reads."""
        return self.layout(unit).regions

    def _begun(self, fetch: Fetch) -> Fetch:
        """The fetch that has just begun."""
        return fetch

    def _late(self, fetch: Fetch) -> frozenset[int]:
        """Indices of pieces that do not come with the rest of the unit."""
        return frozenset()

    def _read(self, region: Region, slot: Slot) -> aio.Read:
        parts = tuple(part_of(piece) for piece in region.pieces) if self._verify else ()
        return aio.Read(region.file, region.offset, region.nbytes, slot.host, region.slot_offset, parts)

    def _wait(self, fetch: Fetch) -> None:
        waits = (fetch.ticket is not None and not fetch.ticket.done()) or (fetch.uploaded is not None and not fetch.uploaded.is_set())
        began = time.monotonic()
        if fetch.ticket is not None:
            fetch.ticket.wait(self._timeout_s)
            self._learn_checksums(fetch)
        if fetch.uploaded is not None:
            if not fetch.uploaded.wait(self._timeout_s):
                raise errors.StorageError(f"torchwrap: copying to {self.arena.device} took over {self._timeout_s} s", where=fetch.unit.name)
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

    def _learn_checksums(self, fetch: Fetch) -> None:
        if self._verify and fetch.ticket is not None:
            for piece, _ in self.layout(fetch.unit).places:
                learn(piece, fetch.ticket)

    def _written(self, fetch: Fetch, training: bool | None) -> Piece | None:
        """A piece that the unit's own module wrote to in the use that ends now; the slot is given up then.

        Bytes are compared once for each value of `training`, and where they lie in host memory.
        """
        unit = fetch.unit
        shown = self._shown(fetch)
        untried = training is not None and (unit.index, training) not in self._compared and not fetch.outdated
        if (found := next(written(shown), None)) is None and untried:
            if self._verify and not self.arena.separate:
                late = self._late(fetch)
                found = next(changed_bytes(each for each in shown if each[0].index not in late), None)
            if found is None and training is not None:
                self._compared.add((unit.index, training))
        fetch.spoiled = fetch.spoiled or found is not None
        return found

    def _shown(self, fetch: Fetch) -> list[tuple[Piece, torch.Tensor, int]]:
        """What `written` and `changed_bytes` look at."""
        places = self.layout(fetch.unit).places
        return list(zip((piece for piece, _ in places), self._views(fetch.unit, fetch.slot), fetch.versions, strict=True))

    def _free_slot(self, spare: set[int]) -> Slot | None:
        """A free slot; else one whose unit is idle, not awaited and not in `spare`; else None."""
        while len(self._slots) < self.plan.slots:
            with torch.inference_mode(False):
                slot = self.arena.make_slot(self._slots_made, self.plan.slot_bytes)
            self._slots_made += 1
            self._slots.append(slot)
            self._free.append(slot)
        if not self._free:
            for fetch in list(self._fetches.values()):
                if not fetch.bound and not fetch.awaited and fetch.unit.index not in spare:
                    self._discard(fetch)
                    break
        return self._free.pop() if self._free else None

    def _drop(self, fetch: Fetch) -> None:
        del self._fetches[fetch.unit.index]
        self._free.append(fetch.slot)
        if self.timeline is not None:
            self.timeline.present(-sum(piece.nbytes for piece, _ in self.layout(fetch.unit).places))
        if fetch.outdated:
            self._layouts.pop(fetch.unit.index, None)

    def _discard(self, fetch: Fetch) -> None:
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
                self._touched.gone(fetch.slot)

    def _give_away(self, fetch: Fetch) -> None:
        """Somebody still looks at the slot's memory: it is theirs from now on, and a new slot replaces it."""
        self._drop(fetch)
        self._free.remove(fetch.slot)
        self._slots.remove(fetch.slot)
        self._touched.gone(fetch.slot)
        for layout in self._layouts.values():
            layout.views.pop(fetch.slot.index, None)
        self.arena.free_slot(fetch.slot)

    # -- looking in ----------------------------------------------------------------------------------------------------------------

    def held_view(self, piece: Piece) -> tuple[torch.Tensor, int] | None:
        """The piece in the slot of a unit that a backward holds, and its version there, or None.

        Whoever keeps it keeps the slot's memory.
        """
        with self.state:
            for fetch in self._fetches.values():
                if fetch.held:
                    for (present, _), view in zip(self.layout(fetch.unit).places, self._views(fetch.unit, fetch.slot), strict=True):
                        if present is piece:
                            fetch.lent = True
                            self.arena.before_compute(fetch.slot)  # whatever stream the caller computes on
                            return view.detach(), fetch.stored[piece.index]
        return None

    def shown_version(self, piece: Piece) -> int:
        """Version of the values that the piece's parameter shows, or will show when it is present."""
        with self.state:
            shown = [fetch for fetch in self._fetches.values() if fetch.bound and fetch.outdated and piece.index in fetch.stored]
            return shown[0].stored[piece.index] if shown else piece.version

    def piece_at(self, tensor: torch.Tensor) -> tuple[Piece, int] | None:
        """(piece, bytes into it) if the tensor lies in a slot that holds a unit in use, or in a piece that came to stay; else None."""
        if tensor.device != self.arena.device or tensor.device.type == "meta":
            return None
        address = tensor.data_ptr()
        if self._staying and (piece := self._staying.get(tensor.untyped_storage().data_ptr())) is not None:
            shown = data_of(piece.parameter)  # which may have other memory since, and somebody else this
            inside = address - shown.data_ptr()
            return (piece, inside) if 0 <= inside < piece.nbytes else None
        with self.state:
            for fetch in self._fetches.values():
                base = fetch.slot.device.data_ptr()
                if fetch.bound and base <= address < base + fetch.slot.device.numel():
                    for piece, offset in self.layout(fetch.unit).places:
                        if base + offset <= address < base + offset + piece.nbytes:
                            return piece, address - base - offset
        return None

    def pieces_in_use(self) -> list[Piece]:
        """Pieces, resident ones included, of the units that are present now."""
        with self.state:
            present = [piece for fetch in self._fetches.values() if fetch.bound for piece in fetch.unit.pieces]
        return present + list(self._staying.values())

    def stay(self, piece: Piece) -> None:
        """The piece, streamed until now, is shown by its parameter for good. What is saved of it goes on being noted, not kept: a block
        whose forward ran before and is computed again after must save the same tensors again."""
        self._staying[data_of(piece.parameter).untyped_storage().data_ptr()] = piece

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

    def _upload(self, fetch: Fetch) -> None:
        layout = self.layout(fetch.unit)
        landed = {piece.index: offset for piece, offset in layout.landing}
        memory = fetch.slot.host.tensor()
        parts = []
        late = self._late(fetch)
        for piece, offset in layout.places:
            if piece.index in late:
                continue
            if piece.host is not None:
                parts.append((offset, piece.host))
            else:
                start = landed[piece.index]
                parts.append((offset, memory[start : start + piece.nbytes]))
        self.arena.upload(fetch.slot, parts)
        self.counters["uploads"] += 1
        if fetch.uploaded is not None:
            fetch.uploaded.set()

"""Experts of a mixture whose weights are slices of one tensor: only those that tokens were routed to are read.

A layer of such experts keeps one parameter of shape (experts, ...) per projection. A token uses a few of them, and which ones is known
only when the router has run, inside the block. So a unit may be fetched without them: its slot has room for all, but the slices that a
call needs are read when it begins, to where they belong in the slot, and the parameters show that memory for the length of the call. The
model's own code indexes the whole parameter and gets the same bytes at the same addresses as if all had been read.

Slices that were not read begin with bytes of 0xFF, a NaN in every floating-point type, so a computation that touches one is loudly wrong.
Outside such a call the parameters show placeholders. A read of whole pages may touch the ends of neighbouring slices: what was checked
before is put back, so that no byte is used that was not compared with its sum.

When most experts are used (a prompt of many tokens) or gradients are wanted, units are fetched whole and ahead of time, as all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torchwrap.core import errors
from torchwrap.core.tensors import bind
from torchwrap.storage import aio
from torchwrap.stream.arena import Slot
from torchwrap.stream.layout import Layout, Region
from torchwrap.stream.planner import PAGE
from torchwrap.stream.slots import Fetch, Slots
from torchwrap.stream.units import Home, Piece, Unit

__all__ = ["ExpertGroup", "RoutedSlots"]

_MOST = 0.75
"""Share of the experts used by one call above which the following units are fetched whole (chosen: nearly all is read then, and reading
ahead overlaps with computing)."""


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The experts of one module.

    Attributes:
        unit: index of the unit they belong to.
        pieces: indices of the streamed pieces, each of shape (count, ...).
        count: how many experts there are.
    """

    unit: int
    pieces: frozenset[int]
    count: int


@dataclass(slots=True)
class _Slice:
    """One expert's part of one piece."""

    piece: Piece
    home: Home
    row: int
    nbytes: int
    target: int  # offset in the slot

    @property
    def offset(self) -> int:
        return self.home.offset + self.row * self.nbytes

    @property
    def name(self) -> str:
        return f"{self.piece.name}[{self.row}]"


class RoutedSlots(Slots):
    """Slots that may hold units without all of their experts. Callers of private methods hold `state`."""

    groups: Sequence[ExpertGroup] = ()
    _whole: bool = True  # units are fetched with all experts: what the last call suggests

    def route(self, groups: Sequence[ExpertGroup]) -> None:
        """From now on read routed experts only, of these groups; with none, everything."""
        self.groups = tuple(groups)
        self._whole = True
        self._sums: dict[int, tuple[int, list[int | None]]] = {}  # of slices, by piece: version of the values, sums
        if groups:
            self.counters |= {"expert_bytes_read": 0, "expert_bytes_skipped": 0}

    def begin_experts(self, number: int, rows: Sequence[int] | None) -> None:
        """Make the slices of a group present; its unit must be in use.

        Args:
            number: of the group, in the order given to `route`.
            rows: experts that the call uses, distinct; None: all.

        Raises:
            StorageError, CorruptDataError: as `Engine.acquire`.
        """
        if number >= len(self.groups):
            return
        group = self.groups[number]
        with self.state:
            before, self._whole = self._whole, rows is None or len(rows) > _MOST * group.count
            fetch = self._fetches.get(group.unit)
            if fetch is None or not fetch.bound or fetch.rows is None:
                return
            if rows is None:
                self._complete(fetch)
            else:
                self._read_rows(fetch, {number: set(rows)})
                self._show(fetch, group.pieces)
                nbytes = sum(piece.nbytes for piece, _ in self.layout(fetch.unit).places if piece.index in group.pieces)
                self.counters["expert_bytes_skipped"] += nbytes // group.count * (group.count - len(rows))
            if self._whole and not before:
                self._begin_again()

    def end_experts(self, number: int) -> None:
        """End what `begin_experts` began."""
        if number >= len(self.groups):
            return
        group = self.groups[number]
        with self.state:
            fetch = self._fetches.get(group.unit)
            if fetch is not None and fetch.rows is not None:
                for piece, _ in self.layout(fetch.unit).places:
                    if piece.index in group.pieces:
                        bind(piece.parameter, piece.absent)

    # -- for the engine ------------------------------------------------------------------------------------------------------------

    def _late(self, fetch: Fetch) -> frozenset[int]:
        return frozenset() if fetch.rows is None else self._routed(fetch.unit)

    def _complete(self, fetch: Fetch) -> None:
        """Read the experts that are missing, of all groups; the fetch is a whole one from now on."""
        if fetch.rows is None:
            return
        self._read_rows(fetch, {number: set(range(self.groups[number].count)) for number in fetch.rows})
        late, fetch.rows = self._late(fetch), None
        if fetch.bound:
            self._show(fetch, late)

    def _begin_again(self) -> None:
        """What was read ahead lacks experts that will be needed: read it whole, while this call computes."""
        for fetch in list(self._fetches.values()):
            if not fetch.bound and fetch.rows is not None:
                self._discard(fetch)
        self._guess()

    def _guess(self) -> None:
        """Read ahead, if anything is expected."""

    def _show(self, fetch: Fetch, pieces: frozenset[int]) -> None:
        for (piece, _), view in zip(self.layout(fetch.unit).places, self._views(fetch.unit, fetch.slot), strict=True):
            if piece.index in pieces:
                bind(piece.parameter, view)

    def _begun(self, fetch: Fetch) -> Fetch:
        unit = fetch.unit
        if self._partial(unit):
            fetch.rows = {number: set() for number, group in enumerate(self.groups) if group.unit == unit.index}
        elif self.groups:
            routed = self._routed(unit)
            self.counters["expert_bytes_read"] += sum(piece.nbytes for piece, _ in self.layout(unit).places if piece.index in routed)
        return fetch

    # -- reading -------------------------------------------------------------------------------------------------------------------

    def _partial(self, unit: Unit) -> bool:
        if self._whole:
            return False
        routed = self._routed(unit)
        return bool(routed) and all(self._comparable(piece) for piece in unit.pieces if piece.index in routed)

    def _comparable(self, piece: Piece) -> bool:
        """Whether reading slices checks as much as reading the piece: not if its sum is known and theirs are not."""
        return not self._verify or piece.home is None or piece.checksum is None or None not in self._known(piece)

    def _routed(self, unit: Unit) -> frozenset[int]:
        return frozenset(index for group in self.groups if group.unit == unit.index for index in group.pieces)

    def _regions(self, unit: Unit) -> list[Region]:
        layout = self.layout(unit)
        return _without(layout, self._routed(unit)) if self._partial(unit) else layout.regions

    def _read(self, region: Region, slot: Slot) -> aio.Read:
        read = super()._read(region, slot)
        if not (self.groups and self._verify):
            return read
        # The first whole read learns the sums of all slices, so that a slice read later is compared with these very bytes.
        learned = tuple(
            aio.Part(part.name, part.offset, part.nbytes)
            for piece in region.pieces
            for part in self._slices(piece, 0, None)
            if self._sum(part) is None
        )
        return aio.Read(read.file, read.offset, read.nbytes, read.target, read.start, read.parts + learned)

    def _learn_checksums(self, fetch: Fetch) -> None:
        super()._learn_checksums(fetch)
        if self.groups and self._verify and fetch.ticket is not None:
            for piece, _ in self.layout(fetch.unit).places:
                self._learn(self._slices(piece, 0, None), fetch.ticket)

    def _read_rows(self, fetch: Fetch, wanted: dict[int, set[int]]) -> None:
        """Read what is missing of the experts wanted, by group."""
        assert fetch.rows is not None
        if fetch.spoiled:
            raise errors.StorageError(f"torchwrap: reading experts of {fetch.unit.name} failed before in this call", where=fetch.unit.name)
        missing = {number: rows - fetch.rows[number] for number, rows in wanted.items()}
        layout = self.layout(fetch.unit)
        self.arena.before_compute(fetch.slot)  # the NaN is written where computing is done
        if not fetch.marked:
            self._mark(fetch, layout)
            fetch.marked = True
        slices = [
            part
            for number, rows in missing.items()
            for piece, target in layout.landing
            if piece.index in self.groups[number].pieces
            for part in self._slices(piece, target, sorted(rows))
        ]
        if slices:
            self._read_slices(fetch, slices)
        if self.arena.separate:
            self._upload_rows(fetch, missing)
        for number, rows in missing.items():
            group = self.groups[number]
            fetch.rows[number] |= rows
            self.counters["expert_bytes_read"] += sum(
                piece.nbytes // group.count * len(rows) for piece, _ in layout.places if piece.index in group.pieces
            )

    def _read_slices(self, fetch: Fetch, slices: list[_Slice]) -> None:
        runs = list(_runs(slices))
        memory = fetch.slot.host.tensor()
        beside = [] if self.arena.separate else [span for run in runs for span in _beside(run)]
        kept = [memory[first:last].clone() for first, last in beside]
        for file in {id(part.home.file): part.home.file for part in slices}.values():
            file.check_unchanged()
        self.arena.before_read(fetch.slot)
        fetch.spoiled = True  # until all is in its place: nobody uses the slot's contents after an error or an interrupt
        ticket = fetch.ticket = self.reader.submit([self._read_run(run, fetch.slot) for run in runs])
        self._wait(fetch)
        for (first, last), before in zip(beside, kept, strict=True):
            memory[first:last].copy_(before)
        fetch.spoiled = False
        self._learn(slices, ticket)
        self.counters["reads"] += 1
        self.counters["bytes_read"] += sum(run[-1].offset + run[-1].nbytes - run[0].offset for run in runs)

    def _upload_rows(self, fetch: Fetch, missing: dict[int, set[int]]) -> None:
        """Copy slices to the device: those just read, and those from page-locked memory."""
        layout, slot = self.layout(fetch.unit), fetch.slot
        landed = {piece.index: offset for piece, offset in layout.landing}
        memory, parts = slot.host.tensor(), []
        for number, rows in missing.items():
            group = self.groups[number]
            for piece, offset in layout.places:
                if piece.index in group.pieces:
                    nbytes = piece.nbytes // group.count
                    source = piece.host if piece.host is not None else memory[landed[piece.index] : landed[piece.index] + piece.nbytes]
                    parts += [(offset + row * nbytes, source[row * nbytes : (row + 1) * nbytes]) for row in sorted(rows)]
        if parts:
            self.arena.after_compute(slot)  # the copy comes after the NaN that it replaces
            self.arena.upload(slot, parts)
            self.counters["uploads"] += 1
            self.arena.before_compute(slot)

    def _read_run(self, run: list[_Slice], slot: Slot) -> aio.Read:
        parts = tuple(aio.Part(part.name, part.offset, part.nbytes, self._sum(part)) for part in run) if self._verify else ()
        first, last = run[0], run[-1]
        return aio.Read(first.home.file, first.offset, last.offset + last.nbytes - first.offset, slot.host, first.target, parts)

    def _mark(self, fetch: Fetch, layout: Layout) -> None:
        """Let every slice begin with NaN; the fetch is new, none has been read."""
        for group in self.groups:
            for piece, target in layout.places:
                if piece.index in group.pieces:
                    slices = fetch.slot.device[target : target + piece.nbytes].view(group.count, -1)
                    slices[:, : _mark_bytes(piece)].fill_(0xFF)

    # -- sums ----------------------------------------------------------------------------------------------------------------------

    def _slices(self, piece: Piece, target: int, rows: Iterable[int] | None) -> list[_Slice]:
        count = next((group.count for group in self.groups if piece.index in group.pieces), 0)
        if piece.home is None or not count:
            return []
        nbytes = piece.nbytes // count
        return [_Slice(piece, piece.home, row, nbytes, target + row * nbytes) for row in (range(count) if rows is None else rows)]

    def _known(self, piece: Piece) -> list[int | None]:
        version, sums = self._sums.get(piece.index, (-1, []))
        if version != piece.version:
            sums = [None] * piece.shape[0]
            self._sums[piece.index] = (piece.version, sums)
        return sums

    def _sum(self, part: _Slice) -> int | None:
        return self._known(part.piece)[part.row]

    def _learn(self, slices: list[_Slice], ticket: aio.Ticket) -> None:
        for part in slices:
            if (value := ticket.sums.get(part.name)) is not None:
                self._known(part.piece)[part.row] = value


def _mark_bytes(piece: Piece) -> int:
    """How much of an unread slice is NaN: its first row, which every product with the slice uses."""
    return piece.shape[-1] * piece.dtype.itemsize


def _without(layout: Layout, routed: frozenset[int]) -> list[Region]:
    """The regions without these pieces, where leaving them out saves whole pages."""
    regions: list[Region] = []
    for region in layout.regions:
        last: Region | None = None
        for piece in region.pieces:
            home = piece.home
            assert home is not None
            if piece.index in routed:
                continue
            if last is not None and home.offset - (last.offset + last.nbytes) < 2 * PAGE:
                last.nbytes = home.offset + piece.nbytes - last.offset
                last.pieces.append(piece)
            else:
                last = Region(region.file, home.offset, piece.nbytes, region.slot_offset + home.offset - region.offset, [piece])
                regions.append(last)
    return regions


def _runs(slices: list[_Slice]) -> Iterator[list[_Slice]]:
    """Slices that are read in one go: no two runs touch one page of memory."""
    run: list[_Slice] = []
    for part in sorted(slices, key=lambda part: part.target):
        end = run[-1].target + run[-1].nbytes if run else 0
        if run and (part.target // PAGE * PAGE >= -(-end // PAGE) * PAGE or not _in_line(run[-1], part)):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _in_line(one: _Slice, other: _Slice) -> bool:
    return one.home.file is other.home.file and other.offset - one.offset == other.target - one.target


def _beside(run: list[_Slice]) -> Iterator[tuple[int, int]]:
    """Ranges of the slot that reading a run overwrites, besides its slices."""
    at = run[0].target // PAGE * PAGE
    for part in run:
        if part.target > at:
            yield at, part.target
        at = part.target + part.nbytes
    if at % PAGE:
        yield at, -(-at // PAGE) * PAGE

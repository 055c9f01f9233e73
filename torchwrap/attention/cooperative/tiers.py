"""Keys and values of one layer in several memories: the first and the most recent tokens on the device, the middle on the host.

The device's arena is one tensor, `[first tokens | recent tokens | free]`, so that everything on the device is one run of memory. When it is
full the oldest of the recent tokens move to the host, `spill` at a time, and the others move up: with R recent tokens that copies R / spill
tokens for each new one, little beside a step that reads all. The host's memory is a list of arenas: growing adds one and copies nothing.
Where the host's memory ends and there is a disk, the oldest of the host's arenas moves there as a whole and is filled again.

A token is in exactly one place and tokens are in order: first, disk, host, recent. Memory is asked for before anything moves, and what
moves is counted as it moves: whatever fails, `crop` to the length before leaves the layer as it was.

Letters: B sequences, Hkv heads, D and Dv widths of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchwrap.attention.cooperative.arena import Arena, Piece, Tier, exchange, make_arena, selected, write
from torchwrap.attention.cooperative.disk import Disk, Shelf, ShelfPiece
from torchwrap.attention.cooperative.machine import Machine, Mark
from torchwrap.attention.cooperative.rounding import Rounding
from torchwrap.core import errors

__all__ = ["Room", "TieredLayer"]

FIRST_ARENA = 4096  # tokens of the first arena on the host where no plan says how many


@dataclass(frozen=True, slots=True)
class Room:
    """How much of a layer goes where, in tokens.

    Attributes:
        device: most tokens on the device; where nothing may go to the host, tokens to reserve there.
        recent: how many of those are for the most recent tokens; 0: new tokens go to the host once the first ones fill the device.
        spill: tokens that move to the host at a time, at least 1.
        host: tokens on the host to reserve; None: memory is added as it is needed.
        host_allowed: False: nothing goes to the host, and a device without memory is an error.
        block: tokens that move from the host to the disk at a time; 0: none do. Otherwise `host` is a multiple of it.
    """

    device: int
    recent: int
    spill: int = 1
    host: int | None = None
    host_allowed: bool = True
    block: int = 0


class TieredLayer:
    """The keys and values of one layer.

    Args:
        index: of the layer; errors name it.
        machine: where memory comes from.
        room: how much goes where.
        storage: dtype on the host and the disk; None: that of the device.
        disk: takes what the host has no room for, where the room has blocks.

    Attributes:
        rounding: what a narrower storage has cost; None: nothing.
        shelf: what is on the disk, or None.
        first: tokens `[0, first)` are on the device, at the beginning of its arena.
        recent: the last tokens, on the device behind those. What is between is on the host.
        previous: tokens held before the last `append`.
        version: changes whenever the tokens do.
        spilled: mark after the last copy to the host; the host's tokens are complete once it is reached.

    Cost: `device_bytes` and `host_bytes`. An append copies the new tokens once, and now and then the recent ones. A device arena that was
    not reserved grows by copying: for that moment the old and the new one exist.
    """

    def __init__(
        self, index: int, machine: Machine, room: Room, storage: torch.dtype | None = None, disk: Disk | None = None
    ) -> None:  # fmt: skip
        self.index: int = index
        self.machine: Machine = machine
        self.room: Room = room
        self.rounding: Rounding | None = Rounding(storage) if storage is not None else None
        self.shelf: Shelf | None = Shelf(disk) if disk is not None and room.block else None
        self.first: int = 0
        self.recent: int = 0
        self.previous: int = 0
        self.version: int = 0
        self.spilled: Mark = None
        self.near: Arena | None = None
        self.far: list[Arena] = []
        self._unbounded()

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.first + self.disk_tokens + self.host_tokens + self.recent

    @property
    def parts(self) -> tuple[tuple[TieredLayer, int, int], ...]:
        """Layers of which this one is made, and which of its heads each holds: itself, all."""
        return ((self, 0, self.shape[1]),)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv); zeros before there is memory."""
        return self.near.shape if self.near is not None else (0, 0, 0, 0)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values on the device."""
        return self.near.keys.dtype if self.near is not None else torch.float32

    @property
    def storage(self) -> torch.dtype:
        """Of keys and values on the host."""
        return self.rounding.dtype if self.rounding is not None else self.dtype

    @property
    def batch(self) -> int:
        """B; 0 before there is memory."""
        return self.shape[0]

    @property
    def host_tokens(self) -> int:
        """Tokens in the host's memory."""
        return sum(arena.count for arena in self.far)

    @property
    def disk_tokens(self) -> int:
        """Tokens on the disk."""
        return self.shelf.tokens if self.shelf is not None else 0

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device."""
        return self.near.nbytes if self.near is not None else 0

    @property
    def host_bytes(self) -> int:
        """Bytes allocated on the host."""
        return sum(arena.nbytes for arena in self.far)

    def reserve(self, batch: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype, *, whole: bool = True) -> None:
        """Allocate: everything (`whole`), or the host's part and a beginning on the device, which grows.

        Raises:
            MemoryError: the host has no memory for it.
            torch.OutOfMemoryError: the device has none.
        """
        begin = self.room.device if whole else min(self.room.device, 64)
        shape = batch, kv_heads, width, value_width
        near = make_arena(self.machine, "device", shape, begin, dtype)
        if self.room.host:
            size = self.room.block if self.shelf is not None else self.room.host
            for _ in range(self.room.host // size):
                self.far.append(make_arena(self.machine, "host", shape, size, self.rounding.dtype if self.rounding else dtype))
        self.near = near

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens at the end.

        Args:
            keys: `[B, Hkv, n, D]` on the device.
            values: `[B, Hkv, n, Dv]`.

        Raises:
            ConfigError: other batch size, heads or widths than before.
            MemoryError: the host has no memory for what must move there. The layer holds what it held.
            torch.OutOfMemoryError: the device has none and nothing may go to the host. The layer holds what it held.
        """
        new, length = keys.shape[2], self.length
        shape = keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3]
        if self.near is None:
            self.reserve(*shape, keys.dtype, whole=False)
        elif self.near.shape != shape:
            raise errors.ConfigError(
                f"new tokens have (batch, heads, width of keys, width of values) {shape}, the cache {self.near.shape}",
                where=f"layer {self.index}",
                fix="Make the cache for this model and batch size; beams and returned sequences count as batch.",
            )
        near = self._grown(min(self.first + self.recent + new, self._limit))
        first = min(new, self._first_limit - self.first) if length == self.first else 0
        over = self.recent + new - first - (self._limit - self._first_limit)
        out = max(over, min(self.room.spill, self.recent + new - first)) if over > 0 else 0
        old = min(out, self.recent)  # of the recent tokens; the others of `out` are new ones, which go to the host at once
        self._need_host_room(out)
        self.previous = length
        self.version += 1
        if self.rounding is not None:
            self.rounding.seen(values)

        if first:
            write(near, self.first, keys[:, :, :first], values[:, :, :first])
            self.first += first
        while old:
            step = self._spill(*near.span(self.first, self.first + old))
            self._move_up(self.first, step)
            self.recent, old, out = self.recent - step, old - step, out - step
        direct = first + out
        while first < direct:
            first += self._spill(keys[:, :, first:direct], values[:, :, first:direct])
        write(near, self.first + self.recent, keys[:, :, direct:], values[:, :, direct:])
        self.recent += new - direct

    def pieces(self, end: int | None = None) -> list[Piece]:
        """Where tokens `[0, end)` lie that are in memory, in order; `end` None: all."""
        if self.near is None:
            return []
        runs: list[tuple[Tier, Arena, int, int, int]] = [("device", self.near, 0, 0, self.first)]
        start = self.first + self.disk_tokens
        for arena in self.far:
            runs.append(("host", arena, start, 0, arena.count))
            start += arena.count
        runs.append(("device", self.near, start, self.first, self.recent))
        found, stop = list[Piece](), self.length if end is None else end
        for tier, arena, start, offset, count in runs:
            if (count := min(count, stop - start)) > 0:
                found.append(Piece(tier, start, *arena.span(offset, offset + count)))
        return found

    def on_disk(self, end: int | None = None) -> list[ShelfPiece]:
        """Tokens of `[0, end)` that are on the disk, in order; `end` None: all."""
        return self.shelf.pieces(self.first, self.length if end is None else end) if self.shelf is not None else []

    def gathered(self, kind: Literal["keys", "values"]) -> Tensor:
        """All of them on the device, in its dtype. Shapes: `[B, Hkv, S, D]` or `[B, Hkv, S, Dv]`."""
        self.machine.now()  # every copy has ended
        runs: list[tuple[int, Tensor]] = [(piece.first, getattr(piece, kind)) for piece in self.pieces()]
        for piece in self.on_disk():
            with piece.fetched() as (keys, values):
                runs.append((piece.first, (keys if kind == "keys" else values).clone()))
        return torch.cat([memory.to(self.machine.device, self.dtype) for _, memory in sorted(runs, key=lambda run: run[0])], 2)

    def crop(self, length: int) -> None:
        """Forget tokens from `length` on; memory stays allocated."""
        behind = self.length - length
        if behind <= 0:
            return
        gone = min(behind, self.recent)
        self.recent -= gone
        behind -= gone
        for arena in reversed(self.far):
            gone = min(behind, arena.count)
            arena.count -= gone
            behind -= gone
        if self.shelf is not None:
            behind -= self.shelf.crop(behind)
        self.first -= behind
        self.previous = min(self.previous, length)
        self.version += 1

    def select(self, index: Tensor) -> None:
        """Rows `index` of the batch in place of all, as beam search and dropping finished sequences need it.

        Args:
            index: `[B']` integers; B' may differ from B.

        Raises:
            MemoryError, torch.OutOfMemoryError: another number of rows, and no memory for them. The layer holds what it held.

        Cost: as many rows as before: those that change, twice at a time. Otherwise all of it twice at a time. Nothing on the disk moves:
        rows there are picked when they are read.
        """
        rows = index.tolist()
        if self.near is None or rows == list(range(self.batch)):
            return
        self.machine.now()  # every copy has ended
        if len(rows) == self.batch:
            exchange(self.near, self.first + self.recent, rows)
            for arena in self.far:
                exchange(arena, arena.count, rows)
        else:
            near, far = selected(self.machine, "device", self.near, self.first + self.recent, rows), list[Arena]()
            try:
                for arena in self.far:
                    far.append(selected(self.machine, "host", arena, arena.count, rows))
            except BaseException:
                for arena in far:
                    self._release(arena)
                raise
            self.near, self.far, old = near, far, self.far
            for arena in old:
                self._release(arena)
        if self.shelf is not None:
            self.shelf.select(rows)
        self.version += 1

    def release(self) -> None:
        """Give all memory back and hold nothing."""
        if self.far:
            self.machine.now()
        for arena in self.far:
            self._release(arena)
        if self.shelf is not None:
            self.shelf.clear()
        self.first = self.recent = self.previous = 0
        self.spilled, self.near, self.far = None, None, []
        self._unbounded()
        self.version += 1

    def _unbounded(self) -> None:
        """The device may hold what its room says; where nothing may go to the host, any number: some tokens beyond a plan find memory."""
        self._limit = self.room.device if self.room.host_allowed else 1 << 40
        self._first_limit = max(0, self._limit - self.room.recent)

    def _grown(self, needed: int) -> Arena:
        """The device's arena with room for `needed` tokens, or as it is where the device has no memory and the host may help."""
        near = self.near
        assert near is not None
        if needed <= near.capacity:
            return near
        # Doubling copies each token about once; from 64 Ki tokens on memory is dearer than copies.
        size = near.capacity * 2 if near.capacity < 1 << 16 else near.capacity * 5 // 4
        try:
            larger = make_arena(self.machine, "device", near.shape, min(self._limit, max(needed, size)), near.keys.dtype)
        except torch.OutOfMemoryError:
            if not self.room.host_allowed:
                raise
            self._stop_growing(near.capacity)
            return near
        write(larger, 0, *near.span(0, self.first + self.recent))
        self.near = larger
        return larger

    def _stop_growing(self, capacity: int) -> None:
        """The device gives no more: from now on its oldest tokens go to the host."""
        self._limit, self._first_limit = capacity, max(0, capacity - self.room.recent)
        if self.host_tokens + self.disk_tokens == 0:
            # The tokens on the device are one run, and which of them are the first ones is a matter of counting.
            held = self.first + self.recent
            self.first = min(held, self._first_limit)
            self.recent = held - self.first
        else:
            self._first_limit = self.first

    def _need_host_room(self, tokens: int) -> None:
        near, free = self.near, sum(arena.capacity - arena.count for arena in self.far)
        if tokens > free and near is not None and self.shelf is None:
            size = max(tokens - free, FIRST_ARENA, sum(arena.capacity for arena in self.far) // 2)
            self.far.append(make_arena(self.machine, "host", near.shape, size, self.storage))

    def _spill(self, keys: Tensor, values: Tensor) -> int:
        """Copy tokens of the device behind the last one on the host, as many as one arena takes; how many. Arenas are filled in order."""
        arena = next((one for one in self.far if one.count < one.capacity), None) or self._emptied()
        step = min(keys.shape[2], arena.capacity - arena.count)
        keys, values = keys[:, :, :step], values[:, :, :step]
        if self.rounding is not None:
            keys, values = self.rounding.stored(keys, values)
        there = arena.span(arena.count, arena.count + step)
        self.machine.download(keys, there[0])
        self.spilled = self.machine.download(values, there[1])
        arena.count += step
        return step

    def _emptied(self) -> Arena:
        """The oldest of the host's arenas, free again: what was in it is on the disk."""
        assert self.shelf is not None
        self.machine.now()  # every copy into it has ended
        self.shelf.put(self.far[0])
        arena = self.far.pop(0)
        arena.count = 0
        self.far.append(arena)
        return arena

    def _move_up(self, start: int, gone: int) -> None:
        """Close the gap that `gone` tokens left at `start`, in steps of that length: source and target of a copy must not overlap."""
        if not gone or self.near is None:
            return
        for at in range(start, start + self.recent - gone, gone):
            step = min(gone, start + self.recent - gone - at)
            write(self.near, at, *self.near.span(at + gone, at + gone + step))

    def _release(self, arena: Arena) -> None:
        self.machine.release_host(arena.keys)
        self.machine.release_host(arena.values)

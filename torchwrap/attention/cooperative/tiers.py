"""Keys and values of one layer in two memories: the first and the most recent tokens on the device, the middle on the host.

The device's arena is one tensor, `[first tokens | recent tokens | free]`, so that everything on the device is one run of memory. When it is
full the oldest of the recent tokens move to the host, `spill` at a time, and the others move up: with R recent tokens that copies R / spill
tokens for each new one, little beside a step that reads all. The host's memory is a list of arenas: growing adds one and copies nothing.

A token is in exactly one place and tokens are in order. Memory is asked for before anything moves: where there is none, the layer holds
what it held.

Letters: B sequences, Hkv heads, D and Dv widths of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchwrap.attention.cooperative.machine import Machine, Mark
from torchwrap.core import errors

__all__ = ["Arena", "Piece", "Room", "Tier", "TieredLayer"]

Tier = Literal["device", "host"]
FIRST_ARENA = 4096  # tokens of the first arena on the host where no plan says how many


@dataclass(frozen=True, slots=True)
class Room:
    """How much of a layer goes where, in tokens.

    Attributes:
        device: most tokens on the device.
        recent: how many of those are for the most recent tokens; 0: new tokens go to the host once the first ones fill the device.
        spill: tokens that move to the host at a time, at least 1.
        host: tokens on the host to reserve; None: memory is added as it is needed.
        host_allowed: False: nothing goes to the host, and a device without memory is an error.
    """

    device: int
    recent: int
    spill: int = 1
    host: int | None = None
    host_allowed: bool = True


@dataclass(slots=True, eq=False)
class Arena:
    """Memory for tokens of one layer.

    Attributes:
        count: tokens in it, where it is one of the host's; the layer itself counts those on the device.
        keys: `[B, Hkv, capacity, D]`.
        values: `[B, Hkv, capacity, Dv]`.
    """

    keys: Tensor
    values: Tensor
    count: int = 0

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self.keys.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv)."""
        return self.keys.shape[0], self.keys.shape[1], self.keys.shape[3], self.values.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def span(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens `[first, end)` of this arena, as views."""
        return self.keys[:, :, first:end], self.values[:, :, first:end]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A run of tokens in one memory: `keys[:, :, i]` belongs to token `first + i`."""

    tier: Tier
    first: int
    keys: Tensor
    values: Tensor

    @property
    def end(self) -> int:
        """The token after the last."""
        return self.first + self.keys.shape[2]


class TieredLayer:
    """The keys and values of one layer.

    Args:
        index: of the layer; errors name it.
        machine: where memory comes from.
        room: how much goes where.

    Attributes:
        first: tokens `[0, first)` are on the device, at the beginning of its arena.
        recent: the last tokens, on the device behind those. What is between is on the host.
        previous: tokens held before the last `append`.
        version: changes whenever the tokens do.
        spilled: mark after the last copy to the host; the host's tokens are complete once it is reached.

    Cost: `device_bytes` and `host_bytes`. An append copies the new tokens once, and now and then the recent ones. A device arena that was
    not reserved grows by copying: for that moment the old and the new one exist.
    """

    def __init__(self, index: int, machine: Machine, room: Room) -> None:
        self.index, self.machine, self.room = index, machine, room
        self.first = self.recent = self.previous = self.version = 0
        self.spilled: Mark = None
        self.near: Arena | None = None
        self.far: list[Arena] = []
        self._limit = room.device
        self._first_limit = max(0, room.device - room.recent)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.first + self.host_tokens + self.recent

    @property
    def batch(self) -> int:
        """B; 0 before there is memory."""
        return self.near.shape[0] if self.near is not None else 0

    @property
    def host_tokens(self) -> int:
        """Tokens on the host."""
        return sum(arena.count for arena in self.far)

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
        begin = self._limit if whole else min(self._limit, 64)
        shape = batch, kv_heads, width, value_width
        near = _arena(self.machine, "device", shape, begin, dtype)
        if self.room.host:
            self.far.append(_arena(self.machine, "host", shape, self.room.host, dtype))
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

        if first:
            _write(near, self.first, keys[:, :, :first], values[:, :, :first])
        start = self.first + first
        self._spill(*near.span(start, start + old))
        self._move_up(start, old)
        direct = first + out - old
        self._spill(keys[:, :, first:direct], values[:, :, first:direct])
        _write(near, start + self.recent - old, keys[:, :, direct:], values[:, :, direct:])
        self.first, self.recent, self.previous = start, self.recent - old + new - direct, length
        self.version += 1

    def pieces(self, end: int | None = None) -> list[Piece]:
        """Where tokens `[0, end)` lie, in order; `end` None: all."""
        if self.near is None:
            return []
        runs: list[tuple[Tier, Arena, int, int]] = [("device", self.near, 0, self.first)]
        runs += [("host", arena, 0, arena.count) for arena in self.far]
        runs += [("device", self.near, self.first, self.recent)]
        found, start = list[Piece](), 0
        for tier, arena, offset, count in runs:
            count = min(count, (self.length if end is None else end) - start)
            if count > 0:
                found.append(Piece(tier, start, *arena.span(offset, offset + count)))
                start += count
        return found

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
        self.first -= behind
        self.previous = min(self.previous, length)
        self.version += 1

    def select(self, index: Tensor) -> None:
        """Rows `index` of the batch in place of all, as beam search and dropping finished sequences need it.

        Args:
            index: `[B']` integers; B' may differ from B.

        Cost: as many rows as before: those that change, twice at a time. Otherwise one arena is there twice at a time.
        """
        rows = index.tolist()
        if self.near is None or rows == list(range(self.batch)):
            return
        self.machine.now()  # every copy has ended
        if len(rows) == self.batch:
            _exchange(self.near, self.first + self.recent, rows)
            for arena in self.far:
                _exchange(arena, arena.count, rows)
        else:
            self.near = _selected(self.machine, "device", self.near, self.first + self.recent, rows)
            for position, arena in enumerate(self.far):
                self.far[position] = _selected(self.machine, "host", arena, arena.count, rows)
                self._release(arena)
        self.version += 1

    def release(self) -> None:
        """Give all memory back and hold nothing."""
        if self.far:
            self.machine.now()
        for arena in self.far:
            self._release(arena)
        self.first = self.recent = self.previous = 0
        self.spilled, self.near, self.far = None, None, []
        self._limit, self._first_limit = self.room.device, max(0, self.room.device - self.room.recent)
        self.version += 1

    def _grown(self, needed: int) -> Arena:
        """The device's arena with room for `needed` tokens, or as it is where the device has no memory and the host may help."""
        near = self.near
        assert near is not None
        if needed <= near.capacity:
            return near
        # Doubling copies each token about once; from 64 Ki tokens on memory is dearer than copies.
        size = near.capacity * 2 if near.capacity < 1 << 16 else near.capacity * 5 // 4
        try:
            larger = _arena(self.machine, "device", near.shape, min(self._limit, max(needed, size)), near.keys.dtype)
        except torch.OutOfMemoryError:
            if not self.room.host_allowed:
                raise
            self._stop_growing(near.capacity)
            return near
        _write(larger, 0, *near.span(0, self.first + self.recent))
        self.near = larger
        return larger

    def _stop_growing(self, capacity: int) -> None:
        """The device gives no more: from now on its oldest tokens go to the host."""
        self._limit, self._first_limit = capacity, max(0, capacity - self.room.recent)
        if not self.host_tokens:  # then the tokens on the device are one run, and which of them are the first ones is a matter of counting
            held = self.first + self.recent
            self.first = min(held, self._first_limit)
            self.recent = held - self.first
        else:
            self._first_limit = self.first

    def _need_host_room(self, tokens: int) -> None:
        if tokens and not self.room.host_allowed:
            raise torch.OutOfMemoryError(f"layer {self.index} may hold {self._limit} tokens on the device and none on the host")
        near, free = self.near, sum(arena.capacity - arena.count for arena in self.far)
        if tokens > free and near is not None:
            size = max(tokens - free, FIRST_ARENA, sum(arena.capacity for arena in self.far) // 2)
            self.far.append(_arena(self.machine, "host", near.shape, size, near.keys.dtype))

    def _spill(self, keys: Tensor, values: Tensor) -> None:
        """Copy tokens behind the last one on the host. Arenas are filled one after the other."""
        done = 0
        for arena in self.far:
            step = min(keys.shape[2] - done, arena.capacity - arena.count)
            if step > 0:
                there = arena.span(arena.count, arena.count + step)
                self.machine.download(keys[:, :, done : done + step], there[0])
                self.spilled = self.machine.download(values[:, :, done : done + step], there[1])
                arena.count += step
                done += step

    def _move_up(self, start: int, gone: int) -> None:
        """Close the gap that `gone` tokens left at `start`, in steps of that length: source and target of a copy must not overlap."""
        if not gone or self.near is None:
            return
        for at in range(start, start + self.recent - gone, gone):
            step = min(gone, start + self.recent - gone - at)
            _write(self.near, at, *self.near.span(at + gone, at + gone + step))

    def _release(self, arena: Arena) -> None:
        self.machine.release_host(arena.keys)
        self.machine.release_host(arena.values)


def _arena(machine: Machine, tier: Tier, shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> Arena:
    batch, kv_heads, width, value_width = shape
    memory = machine.device_memory if tier == "device" else machine.host_memory
    # A cache outlives the region it is made in, and tensors made in inference mode cannot be written outside it.
    with torch.inference_mode(False):
        keys = memory((batch, kv_heads, tokens, width), dtype)
        try:
            return Arena(keys, memory((batch, kv_heads, tokens, value_width), dtype))
        except BaseException:
            if tier == "host":
                machine.release_host(keys)
            raise


def _write(arena: Arena, at: int, keys: Tensor, values: Tensor) -> None:
    there = arena.span(at, at + keys.shape[2])
    there[0].copy_(keys)
    there[1].copy_(values)


def _exchange(arena: Arena, count: int, rows: list[int]) -> None:
    changed = [row for row, chosen in enumerate(rows) if row != chosen]
    for memory in (arena.keys, arena.values):
        memory[changed, :, :count] = memory[[rows[row] for row in changed], :, :count]


def _selected(machine: Machine, tier: Tier, arena: Arena, count: int, rows: list[int]) -> Arena:
    made = _arena(machine, tier, (len(rows), *arena.shape[1:]), arena.capacity, arena.keys.dtype)
    for new, old in ((made.keys, arena.keys), (made.values, arena.values)):
        for row, chosen in enumerate(rows):
            new[row, :, :count] = old[chosen, :, :count]
    made.count = arena.count
    return made

"""Keys and values for which neither side has memory: whole blocks of tokens in a private file, read ahead of those who attend them.

A block is written once and read in every step. Reads are checked against the sums taken when it was written, go past the page cache where
the file system allows it, and land in buffers that are used in turn. The file lies in a folder of this process alone and is gone when the
store is closed; what a killed process left is removed by the next one that uses the same folder (torchwrap/storage/folder.py).

Beams exchange the rows of a batch after every token. On the disk nothing moves for that: a block remembers which of its rows belongs where.

Letters: B sequences, Hkv heads, D and Dv widths of keys and values.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchwrap.attention.cooperative.arena import Arena
from torchwrap.storage.aio import Read, Reader, Ticket
from torchwrap.storage.backend import Backend
from torchwrap.storage.pool import Buffer, allocate, round_up
from torchwrap.storage.spill import SpillStore

__all__ = ["Disk", "Fetch", "Shelf", "ShelfPiece", "block_nbytes"]

HEADER = 4096  # of each tensor in a spill file


def block_nbytes(keys: int, values: int) -> int:
    """Bytes that a block of so many bytes of keys and of values takes on the disk."""
    return 2 * HEADER + round_up(keys) + round_up(values)


class Disk:
    """A private file for blocks of all layers of one cache.

    Args:
        folder: where to make a folder of our own; None: the system's for temporary files.
        nbytes: to reserve at once.
        backend: the system calls; replaced in tests.

    Attributes:
        store: the file.

    Raises:
        DiskFullError: less than `nbytes` is free.
        UnsafePathError: the folder is a link, somebody else's, or writable by others.
        StorageError: it cannot be written to.

    Cost: two reading threads; buffers for the blocks that are read at the same time, two for each reading layer.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, nbytes: int = 0, backend: Backend | None = None) -> None:
        self.store: SpillStore = SpillStore.create(folder, needed=nbytes, backend=backend)
        self._reader = Reader(threads=2, backend=backend)
        self._names = (f"block{number}" for number in itertools.count())
        self._buffers: list[Buffer] = []
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the file, free places included."""
        return self.store.file.nbytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory of the buffers for what is read; they stay for the next step."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def write(self, keys: Tensor, values: Tensor) -> str:
        """Write a block; its name.

        Raises:
            DiskFullError: no room. Nothing is kept of it.
            StorageError: the disk failed. Nothing is kept of it.
        """
        name = next(self._names)
        self.store.put(f"{name} keys", _bytes(keys))
        try:
            self.store.put(f"{name} values", _bytes(values))
        except BaseException:
            self.store.remove(f"{name} keys")
            raise
        return name

    def start(self, block: Block) -> Fetch:
        """Start to read a block."""
        segments = [self.store.segments[f"{block.name} {kind}"] for kind in ("keys", "values")]
        places = 0, round_up(segments[0].nbytes)
        needed = places[1] + round_up(segments[1].nbytes)
        with self._lock:
            fitting = next((index for index, buffer in enumerate(self._free) if buffer.nbytes == needed), None)
            if fitting is None:
                self._buffers.append(allocate(needed))
            buffer = self._buffers[-1] if fitting is None else self._free.pop(fitting)
        file = self.store.file
        ticket = self._reader.submit([
            Read(file, segment.offset, segment.nbytes, buffer, place, (file.part(segment.name),))
            for segment, place in zip(segments, places, strict=True)
        ])  # fmt: skip
        raw = buffer.tensor()
        both = [raw[place : place + segment.nbytes].view(block.dtype) for segment, place in zip(segments, places, strict=True)]
        return Fetch(self, buffer, ticket, both[0].view(block.shapes[0]), both[1].view(block.shapes[1]))

    def give_back(self, buffer: Buffer, *, whole: bool) -> None:
        """A buffer that nobody reads any more; if not `whole`, a reading thread may still write to it, and it is not used again."""
        with self._lock:
            if whole:
                self._free.append(buffer)
            elif buffer in self._buffers:
                self._buffers.remove(buffer)

    def remove(self, names: Sequence[str]) -> None:
        """Forget blocks; their places are used for others."""
        for name in names:
            self.store.remove(f"{name} keys")
            self.store.remove(f"{name} values")

    def close(self) -> None:
        """Remove the file and its folder. Calling it again does nothing."""
        self._reader.close()
        self.store.close()
        self._free, self._buffers = [], []


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """A block on its way from the disk.

    Attributes:
        keys: `[B, Hkv, block, D]`, complete after `wait`; valid until `release`.
        values: `[B, Hkv, block, Dv]`.
    """

    disk: Disk
    buffer: Buffer
    ticket: Ticket
    keys: Tensor
    values: Tensor

    def wait(self) -> None:
        """Return when everything is there.

        Raises:
            CorruptDataError: the bytes are not the ones that were written.
            StorageError: the disk failed, or nothing moved for a minute.
        """
        self.ticket.wait()

    def release(self) -> None:
        """Let the buffer be used again, unless a read that failed may still write to it."""
        self.disk.give_back(self.buffer, whole=self.ticket.done())


@dataclass(frozen=True, slots=True)
class Block:
    """Some tokens on the disk.

    Attributes:
        name: of the two tensors.
        count: of its tokens, from the first, those that are still held.
        rows: row b of the batch is its row `rows[b]`; None: row b.
        dtype, shapes: of keys and values as they were written.
    """

    name: str
    count: int
    rows: tuple[int, ...] | None
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


class Shelf:
    """The blocks of one layer, in order of their tokens.

    Args:
        disk: that holds them.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.blocks: list[Block] = []

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(block.count for block in self.blocks)

    def put(self, arena: Arena) -> None:
        """Write what an arena holds behind what is here. Raises as `Disk.write`; then nothing changed."""
        name = self.disk.write(arena.keys, arena.values)
        shapes = tuple(arena.keys.shape), tuple(arena.values.shape)
        self.blocks.append(Block(name, arena.count, None, arena.keys.dtype, shapes))

    def crop(self, tokens: int) -> int:
        """Forget the last `tokens` tokens, or all; how many were forgotten."""
        left, gone = tokens, list[str]()
        while left > 0 and self.blocks:
            last = self.blocks.pop()
            forgotten = min(left, last.count)
            left -= forgotten
            if forgotten < last.count:
                self.blocks.append(replace(last, count=last.count - forgotten))
            else:
                gone.append(last.name)
        self.disk.remove(gone)
        return tokens - left

    def select(self, rows: Sequence[int]) -> None:
        """Rows of the batch in place of all."""
        self.blocks = [replace(one, rows=tuple(rows) if one.rows is None else tuple(one.rows[row] for row in rows)) for one in self.blocks]

    def clear(self) -> None:
        """Hold nothing."""
        self.crop(self.tokens)

    def pieces(self, first: int, end: int) -> list[ShelfPiece]:
        """The blocks with tokens of `[0, end)`, where the first token here is token `first`."""
        found = []
        for block in self.blocks:
            if (count := min(block.count, end - first)) > 0:
                found.append(ShelfPiece(self.disk, block, first, count))
            first += block.count
        return found


@dataclass(frozen=True, slots=True, eq=False)
class ShelfPiece:
    """A run of tokens on the disk: the first `count` of a block, of which the first is token `first`."""

    disk: Disk
    block: Block
    first: int
    count: int

    @property
    def end(self) -> int:
        """The token after the last."""
        return self.first + self.count

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(math.prod(shape) for shape in self.block.shapes) * self.block.dtype.itemsize

    def start(self) -> Fetch:
        """Start to read it; what comes has all tokens and all rows of the block."""
        return self.disk.start(self.block)

    def of(self, fetch: Fetch) -> tuple[Tensor, Tensor]:
        """Its keys and values in what was fetched: views, or copies where rows were exchanged."""
        keys, values = fetch.keys[:, :, : self.count], fetch.values[:, :, : self.count]
        rows = self.block.rows
        return (keys, values) if rows is None else (keys[list(rows)], values[list(rows)])

    @contextmanager
    def fetched(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values, read now; valid inside the block."""
        fetch = self.start()
        try:
            fetch.wait()
            yield self.of(fetch)
        finally:
            fetch.release()


def _bytes(tensor: Tensor) -> Tensor:
    """Any dtype, as the file knows only some."""
    return tensor.reshape(-1).view(torch.uint8)

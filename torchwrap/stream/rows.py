"""Embedding tables read row by row.

A forward pass looks up a few rows of a table that is often the largest tensor of a model (vocabulary times width). Instead of keeping
or streaming the whole table, the rows of this call's ids are read: one 4096-byte page or two per distinct id. The result is that of
`torch.nn.functional.embedding` bit for bit, because looking up copies rows and computes nothing; the gradient with respect to the table is
made by the same operator that torch uses.

Traffic: `distinct ids * (row bytes + at most 2 pages)` per call. With verification on, the first call reads the table once, in pieces,
and keeps one 64-bit sum per row, so that every later row read is checked.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.storage import aio, pool
from torchwrap.storage.checksum import sum64
from torchwrap.stream.planner import PAGE
from torchwrap.stream.units import Home, Piece

__all__ = ["RowTable"]

_SCRATCH = 16 << 20  # bytes read per batch of rows, and per step of the first verification
_MERGE_GAP = 2 * PAGE


class RowTable:
    """Reads rows of one stored (N, C) piece.

    Args:
        piece: the table; its home must be a file or page-locked host memory.
        reader: reads extents.
        verify: check every row against the sums taken at first use.
        timeout_s: seconds after which an unfinished read is an error.
    """

    def __init__(self, piece: Piece, reader: aio.Reader, *, verify: bool, timeout_s: float) -> None:
        self.piece = piece
        self._reader, self._verify, self._timeout_s = reader, verify, timeout_s
        self._sums: numpy.ndarray[Any, numpy.dtype[numpy.uint64]] | None = None
        self._scratch: pool.Buffer | None = None
        self.bytes_read: int = 0

    def forward(self, module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """What `F.embedding(ids, table)` gives, for a module whose table is away.

        Shapes: ids (...) integer, any device; returns (..., C) in the table's dtype on the device of `ids`.

        Raises:
            IndexError: an id is outside [0, N), as torch raises it.
            CorruptDataError: a row is not what it was.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            return nn.functional.embedding(ids, torch.empty(1, *self.piece.shape[1:], dtype=self.piece.dtype))  # torch's own refusal
        wanted, inverse = torch.unique(ids.detach().reshape(-1).cpu(), return_inverse=True)
        if wanted.numel() and not (int(wanted[0]) >= 0 and int(wanted[-1]) < self.piece.shape[0]):
            raise IndexError("index out of range in self")
        rows = self.rows(wanted).to(ids.device)
        inverse = inverse.reshape(ids.shape).to(ids.device)
        weight = module.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            result: torch.Tensor = _Lookup.apply(weight, rows, inverse, ids, module)  # type: ignore[no-untyped-call]
            return result
        return nn.functional.embedding(inverse, rows)

    def rows(self, wanted: torch.Tensor) -> torch.Tensor:
        """Rows of the table. Shapes: wanted (U,) sorted distinct int64 on the CPU; returns (U, C) on the CPU."""
        width = self.piece.shape[1:]
        if self.piece.host is not None:
            return self.piece.host.view(self.piece.dtype).view(self.piece.shape)[wanted]
        home = self._home()
        if self._verify and self._sums is None:
            self._sums = self._take_sums(home)
        out = torch.empty((len(wanted), self._row_bytes), dtype=torch.uint8)
        positions: list[int] = wanted.tolist()
        done = 0
        while done < len(positions):
            done = self._read_batch(home, positions, done, out)
        if self._sums is not None and len(positions):
            self._compare(out, positions, home)
        return out.view(self.piece.dtype).view(len(positions), *width)

    @property
    def _row_bytes(self) -> int:
        """Bytes of one row in the type that the table has now: `model.to(dtype)` changes it."""
        return self.piece.nbytes // self.piece.shape[0]

    def forget(self, piece: Piece) -> None:
        """The piece got other values: sums taken of the old ones hold no longer."""
        if piece is self.piece:
            self._sums = None

    def free(self) -> None:
        """Give the scratch memory back."""
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None

    def _read_batch(self, home: Home, positions: list[int], first: int, out: torch.Tensor) -> int:
        """Read rows from `first` on until the scratch memory is full; the next position to read."""
        row_bytes = self._row_bytes
        scratch = self._memory(max(_SCRATCH, row_bytes + 2 * PAGE))
        room = scratch.nbytes
        reads: list[aio.Read] = []
        landed: list[tuple[int, int]] = []  # (row of `out`, offset in scratch)
        at, position = 0, first
        while position < len(positions):
            start = home.offset + positions[position] * row_bytes
            end = start + row_bytes
            last = position + 1
            while last < len(positions):
                following = home.offset + positions[last] * row_bytes
                if following - end > _MERGE_GAP or at + (following + row_bytes - start) + 2 * PAGE > room:
                    break
                end, last = following + row_bytes, last + 1
            if at + (end - start) + 2 * PAGE > room:
                break
            target = at + start % PAGE
            reads.append(aio.Read(home.file, start, end - start, scratch, target))
            landed += [(p, target + home.offset + positions[p] * row_bytes - start) for p in range(position, last)]
            at = (target + end - start + PAGE - 1) // PAGE * PAGE
            position = last
        home.file.check_unchanged()
        self._wait(reads)
        memory = scratch.tensor()
        for row, offset in landed:
            out[row] = memory[offset : offset + row_bytes]
        return position

    def _take_sums(self, home: Home) -> numpy.ndarray[Any, numpy.dtype[numpy.uint64]]:
        """One sum per row, and the table's own checksum if one is known, from one pass in pieces."""
        count, row_bytes = self.piece.shape[0], self._row_bytes
        step = max(1, _SCRATCH // row_bytes)
        scratch = self._memory(step * row_bytes + 2 * PAGE)
        sums = numpy.empty(count, dtype=numpy.uint64)
        total = 0
        for first in range(0, count, step):
            rows = min(step, count - first)
            offset = home.offset + first * row_bytes
            start = offset % PAGE
            self._wait([aio.Read(home.file, offset, rows * row_bytes, scratch, start)])
            chunk = scratch.tensor()[start : start + rows * row_bytes].numpy().reshape(rows, row_bytes)
            sums[first : first + rows] = _row_sums(chunk)
            if row_bytes % 8:
                total = (total + sum64(chunk.reshape(-1).data, first * row_bytes)) % (1 << 64)
        if row_bytes % 8 == 0:
            total = int(sums.sum(dtype=numpy.uint64))  # rows of whole words: the sum of all is the sum of theirs
        if self.piece.checksum is not None and total != self.piece.checksum:
            self._corrupt(home, "the table", self.piece.checksum, total)
        self.piece.checksum = total
        return sums

    def _wait(self, reads: list[aio.Read]) -> None:
        try:
            ticket = self._reader.submit(reads)
            ticket.wait(self._timeout_s)
        except BaseException:
            self._scratch = None  # a read that hangs may still write into it: never used again
            raise
        self.bytes_read += ticket.nbytes

    def _compare(self, out: torch.Tensor, positions: list[int], home: Home) -> None:
        assert self._sums is not None
        got = _row_sums(out.numpy())
        expected = self._sums[numpy.asarray(positions)]
        for row in numpy.flatnonzero(got != expected):
            self._corrupt(home, f"row {positions[row]}", int(expected[row]), int(got[row]))

    def _corrupt(self, home: Home, what: str, expected: int, got: int) -> None:
        raise errors.CorruptDataError(
            f"{what} of {self.piece.name} is not what it was: sum {got:#x} instead of {expected:#x}",
            where=str(home.file.path),
            fix="Restore the file, then wrap the model again.",
        )

    def _memory(self, nbytes: int) -> pool.Buffer:
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self.free()
            self._scratch = pool.allocate(nbytes)
        return self._scratch

    def _home(self) -> Home:
        if self.piece.home is None:
            raise errors.StorageError(f"torchwrap: {self.piece.name} has no stored copy", where=self.piece.name)
        return self.piece.home


def _row_sums(rows: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, numpy.dtype[numpy.uint64]]:
    """(U, row bytes) uint8 -> (U,) wrap-around sums; of 64-bit words where rows divide into them, of bytes times their place otherwise."""
    if rows.shape[1] % 8 == 0:
        words: numpy.ndarray[Any, numpy.dtype[numpy.uint64]] = rows.view(numpy.uint64).sum(axis=1, dtype=numpy.uint64)
        return words
    places = numpy.arange(1, rows.shape[1] + 1, dtype=numpy.uint64)
    weighted: numpy.ndarray[Any, numpy.dtype[numpy.uint64]] = (rows.astype(numpy.uint64) * places).sum(axis=1, dtype=numpy.uint64)
    return weighted


class _Lookup(torch.autograd.Function):
    """Lookup in rows that were read, with the gradient of a lookup in the whole table."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor, ids: torch.Tensor, module: nn.Embedding
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.module = module
        return nn.functional.embedding(inverse, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        module: nn.Embedding = ctx.module
        padding = -1 if module.padding_idx is None else module.padding_idx
        table = torch.ops.aten.embedding_backward(
            gradients[0], ids, module.num_embeddings, padding, module.scale_grad_by_freq, module.sparse
        )
        return table, None, None, None, None

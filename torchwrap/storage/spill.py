"""Weights that were in memory, written to a private file so that they can be streamed back.

One file holds segments of whole 4096-byte blocks: a header (see record.py), then the tensor's bytes on a block boundary. A tensor that
is written again goes to a fresh place and only then is its old place free for others, so no read ever sees half of two versions.
Space is reserved before it is needed: a full disk is found when the model is wrapped, not in the middle of a forward pass.

The file is not flushed: nothing of it outlives the process, unless the store is closed with `keep=True`.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy
import torch

from torchwrap.core.errors import CorruptDataError, StorageError
from torchwrap.storage.atomic import as_storage_error, atomic_write
from torchwrap.storage.backend import Backend, Stats, read_into
from torchwrap.storage.checksum import crc32, memory_of, sum64
from torchwrap.storage.folder import INDEX, OwnFolder
from torchwrap.storage.header import Segment
from torchwrap.storage.pool import Buffer, allocate, round_up
from torchwrap.storage.record import Record, header_nbytes, unpack
from torchwrap.storage.safefile import Descriptor
from torchwrap.storage.space import Space
from torchwrap.storage.spillfile import SpillFile
from torchwrap.storage.workers import mismatch
from torchwrap.storage.writing import DataWriter

__all__ = ["SpillFile", "SpillStore"]

_CHUNK = 4 << 20
_SMALL = 1 << 20  # below this a copy is cheaper than a mapping of its own


class SpillStore:
    """A private folder with one data file. Make one with `SpillStore.create`.

    Attributes:
        file: what a `Reader` reads from.
        folder: the private folder.
    """

    def __init__(self, folder: OwnFolder, backend: Backend) -> None:
        self._cleanup = weakref.finalize(self, folder.close, False)
        self._own = folder
        self.folder: Path = folder.path
        name = f"weights-{secrets.token_hex(4)}.tws"
        with as_storage_error("making the spill file", folder.path / name):
            self.file: SpillFile = SpillFile(folder.path / name, Descriptor(folder.create(name)), os.O_RDWR)
        self._disk = DataWriter(self.file, backend)
        self._space = Space()
        self._generation = 0
        self._checked: dict[str, int] = {}
        self._staging: Buffer | None = None
        self._change = threading.RLock()

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None = None, *, needed: int = 0, backend: Backend | None = None) -> SpillStore:
        """An empty store in a new private folder below `path` (default: the system's folder for temporary files).

        Args:
            path: made with mode 0700 if missing. Folders that dead processes left in it are removed.
            needed: bytes to reserve at once.
            backend: the system calls; replaced in tests.

        Raises:
            DiskFullError: less than `needed` is free.
            UnsafePathError: the folder is a link, somebody else's, or writable by others.
            StorageError: it cannot be written to.
        """
        own = OwnFolder(None if path is None else Path(path))
        store = cls(own, backend or Backend())
        try:
            own.warn_of_memory()
            if needed:
                store._grow(round_up(needed))
        except BaseException:
            store.close()
            raise
        return store

    @property
    def segments(self) -> Mapping[str, Segment]:
        """Where each tensor's bytes are now."""
        return self.file.segments

    def put(self, name: str, tensor: torch.Tensor) -> Segment:
        """Write a tensor, as a new version if there is one of this name; the old one stays intact until this one is complete.

        The old version's place is used for others afterwards: finish reads of it first.

        Raises:
            DiskFullError: no room; what was stored before is intact.
            StorageError: the disk failed, or this is a forked child of the process that made the store.

        Cost: 4 to 8 KiB on the disk beyond the bytes, 4 MiB of memory, and a copy of the tensor if it is not contiguous on the CPU.
        """
        memory = memory_of(tensor)
        self._check_ours()
        with self._change:
            blank = Segment(name, tensor.dtype, tuple(tensor.shape), 0, len(memory))
            header = header_nbytes(blank)
            total = header + round_up(len(memory))
            if (offset := self._space.take(total)) is None:
                self._grow(total - self._space.tail())
                offset = self._space.take(total)
                assert offset is not None
            try:
                with as_storage_error("spilling", self.file.path, total):
                    record = self._write(blank, memory, offset, header)
            except BaseException:
                self._space.give(offset, total)
                raise
            before = self.file.place(record)
            if before is not None:
                self._give_when_unused(before)
            return record.segment

    def get(self, name: str) -> torch.Tensor:
        """The tensor's present version in fresh memory, checked: header and sum every time, CRC once for each version.

        Raises:
            KeyError: no such tensor.
            CorruptDataError: the bytes are not the ones that were written.
        """
        with self._guard():
            record = self.file.records[name]
            segment, (offset, _) = record.segment, record.extent
            buffer = allocate(record.header_nbytes + segment.nbytes)
            length = record.header_nbytes + segment.nbytes
            stats = Stats()
            read_into(self._disk.backend, self.file, buffer.memory, offset, length, direct=self._disk.direct, stats=stats)
            if stats.refused:
                self._disk.give_up_direct()
        if buffer.memory[: record.header_nbytes] != record.pack():
            unpack(bytes(buffer.memory[: record.header_nbytes]), self.file.path, offset)
            raise CorruptDataError(f"tensor {name!r}: the header is of another version", where=f"{self.file.path}, offset {offset}")
        data, part = buffer.memory[record.header_nbytes : length], record.part()
        if (total := sum64(data)) != record.sum64:
            raise mismatch(self.file, part, "sum64", record.sum64, total)
        if self._checked.get(name) != record.generation:
            if (code := crc32(data)) != record.crc32:
                raise mismatch(self.file, part, "crc32", record.crc32, code)
            self._checked[name] = record.generation
        raw = buffer.tensor()[record.header_nbytes : length]
        return (raw.clone() if segment.nbytes < _SMALL else raw).view(segment.dtype).reshape(segment.shape)

    def remove(self, name: str) -> None:
        """Forget a tensor; its place is used for others."""
        self._check_ours()
        with self._change:
            self._give_when_unused(self.file.drop(name))
            self._checked.pop(name, None)

    def _give_when_unused(self, record: Record) -> None:
        """Let a place be used for others, once no view shows it any more."""
        with self._change:
            live = list(self.file.mappings.get(record.segment.offset, ()))
            if live:
                # Not at the exit of the interpreter, where the view still lives: that would ask for another one, for ever.
                weakref.finalize(live[0], _retry, weakref.ref(self), record).atexit = False
            else:
                self.file.mappings.pop(record.segment.offset, None)
                self._space.give(*record.extent)

    def close(self, keep: bool = False) -> None:
        """Remove the folder; or, with `keep`, flush it to the disk so that `SpillFile.open(store.folder)` can read it.

        Reads under way and views keep working. In a forked child nothing is removed. Calling it again does nothing.
        """
        with self._guard():
            if not self._cleanup.alive:
                return
            if keep and os.getpid() == self._own.pid:
                with as_storage_error("keeping the store", self.folder):
                    self._disk.backend.sync(self.file.fd(False))
                offsets = {name: record.extent[0] for name, record in self.file.records.items()}
                index = {"version": 1, "file": self.file.path.name, "records": offsets}
                atomic_write(self.folder / INDEX, json.dumps(index).encode())
            self._cleanup.detach()
            self._own.close(keep)
            self.file.close()
            self._staging = None

    def __enter__(self) -> SpillStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> None:
        raise TypeError("a spill store belongs to one process; copy the tensors instead")

    def _guard(self) -> AbstractContextManager[object]:
        """The lock; in a forked child nothing, as a thread that is not there may hold it, and nothing changes any more."""
        return self._change if os.getpid() == self._own.pid else nullcontext()

    def _check_ours(self) -> None:
        if not self._cleanup.alive:
            raise StorageError("this store was closed", where=str(self.folder), fix="Make a new one.")
        if os.getpid() != self._own.pid:
            raise StorageError(
                "a forked child may read its parent's spill store, not change it", where=str(self.folder), fix="Make one in the child."
            )

    def _grow(self, nbytes: int) -> None:
        self._disk.reserve(self._space.end, nbytes)
        self._space.extend(nbytes)

    def _write(self, blank: Segment, memory: memoryview, offset: int, header: int) -> Record:
        """Data first, then the header that vouches for it."""
        if self._staging is None:
            self._staging = allocate(_CHUNK)
        total = code = 0
        for start in range(0, len(memory), _CHUNK):
            chunk = memory[start : start + _CHUNK]
            numpy.copyto(numpy.frombuffer(self._staging.memory, numpy.uint8, len(chunk)), numpy.frombuffer(chunk, numpy.uint8))
            total = (total + sum64(chunk, start)) % (1 << 64)
            code = crc32(chunk, code)
            self._put(len(chunk), offset + header + start)
        self._generation += 1
        segment = Segment(blank.name, blank.dtype, blank.shape, offset + header, blank.nbytes)
        record = Record(segment, self._generation, total, code)
        packed = record.pack()
        for start in range(0, header, _CHUNK):
            piece = packed[start : start + _CHUNK]
            self._staging.memory[: len(piece)] = piece
            self._put(len(piece), offset + start)
        return record

    def _put(self, nbytes: int, offset: int) -> None:
        """Write the staging buffer's first bytes, filled up with zeros to whole blocks."""
        assert self._staging is not None
        whole = round_up(nbytes)
        self._staging.memory[nbytes:whole] = bytes(whole - nbytes)
        self._disk.write(self._staging.memory[:whole], offset)


def _retry(store: weakref.ref[SpillStore], record: Record) -> None:
    """A view of the record is gone; there may be others."""
    alive = store()
    if alive is not None:
        alive._give_when_unused(record)

"""The reading side of a spill store: the data file, where each tensor is in it, and what its bytes must sum up to."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping, MutableSet
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import torch

from torchwrap.core.errors import CorruptDataError, StorageError
from torchwrap.storage.atomic import as_storage_error, safe_join
from torchwrap.storage.checksum import Part
from torchwrap.storage.folder import INDEX
from torchwrap.storage.header import Segment, strict_json
from torchwrap.storage.pool import BLOCK
from torchwrap.storage.record import Record, read_length, unpack
from torchwrap.storage.safefile import Descriptor, open_direct
from torchwrap.storage.views import map_segment, show_segment

__all__ = ["SpillFile"]


class SpillFile:
    """The data file of a store, with the reading side of `TensorFile`. Made by `SpillStore.create`, or by `SpillFile.open`.

    Attributes:
        path: the file.
        records: current version of each tensor, with generation and checksums.
        segments: where each tensor's bytes are now.
    """

    def __init__(self, path: Path, descriptor: Descriptor, access: int) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        self._segments: dict[str, Segment] = {}
        self.records: Mapping[str, Record] = MappingProxyType(self._records)
        self.segments: Mapping[str, Segment] = MappingProxyType(self._segments)
        self._access = access
        self._end = 0  # end of the last segment written
        self._descriptors: dict[bool, Descriptor] = {False: descriptor}
        self._closed = False
        self.mappings: dict[int, weakref.WeakSet[mmap.mmap]] = {}  # live views, by the offset of their data

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SpillFile:
        """Read a folder that was closed with `keep=True`; every header is checked.

        Raises:
            StorageError: there is no kept store.
            CorruptDataError: index and file contradict each other.
        """
        index = Path(folder, INDEX)
        with as_storage_error("opening a kept store", index):
            table = strict_json(index.read_bytes(), index)
            name, offsets = table.get("file"), table.get("records")
            if not isinstance(name, str) or not isinstance(offsets, dict) or not all(type(at) is int for at in offsets.values()):
                raise CorruptDataError("not the index of a spill store", where=str(index), fix="Write the store again.")
            path = safe_join(folder, name)
            file = cls(path, Descriptor(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)), os.O_RDONLY)
        for tensor, offset in offsets.items():
            record = file.header_at(offset)
            if record.segment.name != tensor:
                raise CorruptDataError(f"{tensor!r} expected, {record.segment.name!r} found", where=f"{path}, offset {offset}")
            file.place(record)
        return file

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes, free places included."""
        return os.fstat(self.fd(False)).st_size

    def fd(self, direct: bool) -> int:
        """A descriptor; with `direct`, past the page cache. It stays open while the returned object lives."""
        if self._closed:
            raise StorageError("this store was closed", where=str(self.path), fix="Wrap the model again.")
        found = self._descriptors.get(direct)
        if found is None:
            found = self._descriptors.setdefault(direct, open_direct(self._descriptors[False], self.path, self._access))
        return found

    def check_unchanged(self) -> None:
        """Raise `CorruptDataError` if another file took the name, or the file is shorter than what is in it. Cost: two `stat`."""
        mine = os.fstat(self.fd(False))
        with suppress(FileNotFoundError):  # deleted: still whole behind the descriptor
            if not os.path.samestat(os.stat(self.path), mine):
                raise CorruptDataError("another file has its name now", where=str(self.path), fix="Wrap the model again.")
        if mine.st_size < self._end:
            raise CorruptDataError(
                f"the spill file was truncated to {mine.st_size} bytes, {self._end} are in use",
                where=str(self.path),
                fix="Wrap the model again.",
            )

    def part(self, name: str) -> Part:
        """The tensor's present version as a part of a read, with its checksums."""
        return self._records[name].part()

    def check_header(self, name: str) -> None:
        """Compare the header on the disk with what was written. Cost: one block read.

        Raises:
            CorruptDataError: it is damaged, or of another tensor or generation.
        """
        record = self._records[name]
        found = self.header_at(record.extent[0])
        if found != record:
            raise CorruptDataError(
                f"expected {name!r} of generation {record.generation}, found {found.segment.name!r} of generation {found.generation}",
                where=f"{self.path}, offset {record.extent[0]}",
                fix="The spill file was altered: wrap the model again.",
            )

    def header_at(self, offset: int) -> Record:
        """The record whose header lies at `offset` of the file."""
        block = os.pread(self.fd(False), BLOCK, offset)
        length = read_length(block, self.path, offset)
        return unpack(block if length <= BLOCK else os.pread(self.fd(False), length, offset), self.path, offset)

    def view(self, name: str, live: MutableSet[mmap.mmap] | None = None) -> torch.Tensor:
        """The tensor over the file's own pages. Its place is not used for others while it, or memory shared with it, is in use.

        Args:
            name: of the tensor.
            live: gets the mapping; see `Views`.
        """
        segment = self._segments[name]
        self.check_unchanged()
        if not segment.nbytes:
            return torch.empty(segment.shape, dtype=segment.dtype)
        mapped: set[mmap.mmap] = set()
        tensor = map_segment(self.fd(False), segment, mapped)
        self.mappings.setdefault(segment.offset, weakref.WeakSet()).update(mapped)
        if live is not None:
            live |= mapped
        return tensor

    def show_in(self, mapping: mmap.mmap, name: str) -> None:
        """Let the mapping of a view show this tensor; the place that it showed before may be used for others."""
        segment = self._segments[name]
        show_segment(mapping, self.fd(False), segment)
        for others in self.mappings.values():
            others.discard(mapping)
        self.mappings.setdefault(segment.offset, weakref.WeakSet()).add(mapping)

    def close(self) -> None:
        """Let the descriptors go; reads under way and views keep working."""
        self._closed = True
        self._descriptors = {}

    def place(self, record: Record) -> Record | None:
        """Make a record the present one of its name; the one it replaces, if any."""
        name = record.segment.name
        before = self._records.get(name)
        self._records[name], self._segments[name] = record, record.segment
        self._end = max(self._end, sum(record.extent))
        return before

    def drop(self, name: str) -> Record:
        """Forget a name; the record it had."""
        del self._segments[name]
        return self._records.pop(name)

    def __getstate__(self) -> None:
        raise TypeError(f"{self.path} belongs to one process; copy the tensors instead")

"""The data file of a `GenerationStore`: where the chunks of each record lie, and the reading side that a model's weights need."""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, MutableSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from torchwrap.core.errors import CorruptDataError, StorageError
from torchwrap.storage.atomic import as_storage_error
from torchwrap.storage.header import Segment
from torchwrap.storage.pool import BLOCK, round_up
from torchwrap.storage.safefile import Descriptor, open_direct
from torchwrap.storage.views import Views, map_segment, show_segment

__all__ = ["Draft", "GenerationFile", "Record", "Version"]


@dataclass(frozen=True, slots=True)
class Version:
    """One value of one record.

    Attributes:
        half: which of the record's places holds it.
        sums: `sum64` of each chunk's data, counted from the chunk's first byte.
    """

    half: int
    sums: tuple[int, ...]

    @property
    def sum64(self) -> int:
        """The sum of the whole, if `lead * itemsize` is a multiple of eight: words then end where chunks do, and their sums add up."""
        return sum(self.sums) % (1 << 64)


@dataclass(slots=True)
class Record:
    """One tensor that changes.

    Attributes:
        name: unique in its store.
        dtype: its element type.
        shape: its shape.
        lead: elements of room before the first one.
        chunk: elements per chunk, the lead counted; `chunk * itemsize` is a multiple of 4096.
        offsets: where its places begin in the file, multiples of 4096.
        current: the present version, `None` before the first.
        committed: the version a crash would leave.
        torn: an update in place was cut short, so the present version is neither old nor new.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    lead: int
    chunk: int
    offsets: tuple[int, ...]
    current: Version | None = None
    committed: Version | None = None
    torn: bool = False

    def __post_init__(self) -> None:
        size = self.dtype.itemsize
        if self.chunk < 1 or self.chunk * size % BLOCK or not 0 <= self.lead < self.chunk or not self.numel:
            raise ValueError(f"{self.name}: chunks of {self.chunk} and a lead of {self.lead} {self.dtype} of shape {list(self.shape)}")

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-(self.lead + self.numel) // self.chunk)

    def span(self, index: int) -> tuple[int, int]:
        """(first element, end) of a chunk."""
        return max(0, index * self.chunk - self.lead), min(self.numel, (index + 1) * self.chunk - self.lead)

    def head(self, index: int) -> int:
        """Bytes between a chunk's first block and its data."""
        return 0 if index else self.lead * self.dtype.itemsize

    def place(self, half: int, index: int) -> tuple[int, int]:
        """(file offset, bytes) of a chunk's data."""
        first, last = self.span(index)
        return self.offset(half) + first * self.dtype.itemsize, (last - first) * self.dtype.itemsize

    def offset(self, half: int) -> int:
        """File offset of the data in one of its places."""
        return self.offsets[half] + self.lead * self.dtype.itemsize

    def whole(self) -> Version:
        """The present version; raises `StorageError` if there is none or if it is torn."""
        if self.current is None:
            raise StorageError(f"{self.name} has no stored value", where=self.name)
        if self.torn:
            raise StorageError(
                f"an update of {self.name} was cut short, so its value is neither the old one nor the new one",
                where=self.name,
                fix="Go back to the last commit with rollback(), or load the model and the optimizer from a checkpoint.",
            )
        return self.current


@dataclass(slots=True)
class Draft:
    """A version being written; `in_place` if it replaces the present one, `before`, where that lies, chunk by chunk."""

    record: Record
    half: int
    sums: list[int | None]
    in_place: bool
    before: Version | None

    def version(self) -> Version:
        """The finished version; raises `StorageError` if a chunk is missing."""
        sums = tuple(value for value in self.sums if value is not None)
        if len(sums) != self.record.count:
            raise StorageError(f"{self.record.name}: {len(sums)} of {self.record.count} chunks were written", where=self.record.name)
        return Version(self.half, sums)


class GenerationFile:
    """An open data file. It has the reading side of `TensorFile`; unlike one, its content changes under the store that owns it.

    Attributes:
        path: the file.
        segments: where the present version of each record lies.
        pid: the process that opened it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path: Path = path
        self.pid: int = os.getpid()
        self._segments: dict[str, Segment] = {}
        self.segments: Mapping[str, Segment] = MappingProxyType(self._segments)
        self._descriptors: dict[bool, Descriptor] = {False: Descriptor(descriptor)}
        self._views: dict[str, Views] = {}

    @classmethod
    def create(cls, folder: Path, create: Callable[[str], int]) -> GenerationFile:
        """A new, empty file."""
        name = f"generations-{secrets.token_hex(8)}.tws"
        with as_storage_error("making the data file", folder / name):
            return cls(folder / name, create(name))

    @classmethod
    def open(cls, folder: Path, name: str, opening: Callable[[str], int]) -> GenerationFile:
        """The file that a manifest names."""
        try:
            return cls(folder / name, opening(name))
        except OSError as error:
            raise CorruptDataError(
                f"the manifest names a data file that cannot be opened: {error.strerror}",
                where=str(folder / name),
                fix="Restore the file, or use an empty folder.",
            ) from error

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self.fd(False)).st_size

    def fd(self, direct: bool) -> int:
        """A descriptor; with `direct`, past the page cache. It stays open while the returned object lives."""
        found = self._descriptors.get(direct)
        if found is None:
            found = self._descriptors.setdefault(direct, open_direct(self._descriptors[False], self.path, os.O_RDWR))
        return found

    def check_unchanged(self) -> None:
        """Raise `CorruptDataError` if another file took the name, or the file lost bytes that are in use. Cost: two `stat`."""
        mine = os.fstat(self.fd(False))
        with suppress(FileNotFoundError):  # deleted: still whole behind the descriptor
            if not os.path.samestat(os.stat(self.path), mine):
                raise CorruptDataError("another file has its name now", where=str(self.path), fix="Restore the file.")
        needed = max((segment.offset + segment.nbytes for segment in self._segments.values()), default=0)
        if mine.st_size < needed:
            raise CorruptDataError(
                f"the data file was truncated to {mine.st_size} bytes, {needed} are in use", where=str(self.path), fix="Restore the file."
            )

    def check_found(self) -> None:
        """Raise `StorageError` if whoever opens the file by its name would not find what is in use. Cost: three `stat`."""
        self.check_unchanged()
        if not self.path.exists():
            raise StorageError("the data file was removed", where=str(self.path), fix="Save what you need, and begin in another folder.")

    def check_holds(self, records: Iterable[Record]) -> None:
        """Raise `CorruptDataError` if a record's places reach beyond the end of the file."""
        size = self.nbytes
        for record in records:
            for offset in record.offsets:
                if offset < 0 or offset % BLOCK or offset + round_up((record.lead + record.numel) * record.dtype.itemsize) > size:
                    raise CorruptDataError(
                        f"{record.name} at offset {offset} is outside of a data file of {size} bytes",
                        where=str(self.path),
                        fix="Restore the file, or use an empty folder.",
                    )

    def show(self, record: Record) -> None:
        """Let `segments` and `view` give the record's present version, and what `followed` gave show it."""
        version = record.current
        assert version is not None
        self._segments[record.name] = Segment(record.name, record.dtype, record.shape, record.offset(version.half), record.nbytes)
        if (views := self._views.get(record.name)) is not None:
            views.show(self, record.name)

    def hide(self, record: Record) -> None:
        """The record has no value now."""
        self._segments.pop(record.name, None)

    def view(self, name: str, live: MutableSet[mmap.mmap] | None = None) -> torch.Tensor:
        """The tensor over the file's own pages: no copy, private when written to, and stale or torn once the record changes.

        Args:
            name: of the record.
            live: gets the mapping; see `Views`.
        """
        self.check_unchanged()
        return map_segment(self.fd(False), self._segments[name], live)

    def followed(self, name: str) -> torch.Tensor:
        """A view that shows later versions of the record, too."""
        return self._views.setdefault(name, Views()).view(self, name)

    def show_in(self, mapping: mmap.mmap, name: str) -> None:
        """Let the mapping of a view show this record as it is now."""
        show_segment(mapping, self.fd(False), self._segments[name])

    def __getstate__(self) -> None:
        raise TypeError(f"{self.path} belongs to one process; copy the tensors instead")

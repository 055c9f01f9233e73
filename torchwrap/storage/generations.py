"""Values that change while a program runs, on a disk, so that a crash at any moment leaves the last committed generation whole.

One data file holds *records*, each twice (its halves). What was committed lies in one half and is not written to until something newer is
committed: the first new version of a record goes to the other half, later ones replace that. A *commit* flushes the data and then replaces
a small manifest that names, for each record, the half and the sums of its chunks. Opening the folder again gives what the manifest names.

Records are written and read in chunks of a fixed number of elements, each with its own sum, so that gigabytes pass through a few megabytes
of memory and every chunk is checked before it is used. A record may begin some elements late in its first chunk (`lead`), which lets the
data stand at any address modulo a page while all requests stay whole blocks.

Source: shadow paging; R. A. Lorie, Physical Integrity in a Large Segmented Database, ACM TODS 2(1), 1977.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy
import torch

from torchwrap.core.errors import StorageError
from torchwrap.storage.atomic import as_storage_error
from torchwrap.storage.backend import Backend, Stats, read_into
from torchwrap.storage.checksum import Part, memory_of, sum64
from torchwrap.storage.folder import OwnFolder
from torchwrap.storage.generationfile import Draft, GenerationFile, Record, Version
from torchwrap.storage.manifest import Json, KeptFolder, Manifest, pack
from torchwrap.storage.pool import Buffer, allocate, round_up
from torchwrap.storage.request import Read
from torchwrap.storage.workers import mismatch
from torchwrap.storage.writing import DataWriter

__all__ = ["Draft", "GenerationFile", "GenerationStore", "Record", "Version"]


class GenerationStore:
    """Records in a folder, committed together.

    Args:
        path: a folder to keep, which then holds this store and nothing else's; made with mode 0700 if missing. `None`: a temporary folder
            that is removed when nothing uses the store's file any more, or at the next use of the folder after a kill.
        beside: with `path=None`, where the temporary folder is made; `None` means the system's.
        backend: the system calls; replaced in tests.

    Attributes:
        file: what a `Reader` reads from, and what a model's weights may name as their home.
        records: by name.
        bytes_written: since it was opened.
        generation: number of commits so far, those of earlier processes included.
        run: what the last commit stored beside the records; empty if there is none.

    Raises:
        StorageError: the folder is in use by another process, or cannot be written to.
        UnsafePathError: the folder is a link, somebody else's, or writable by others.
        CorruptDataError: the manifest is damaged or does not fit the data.

    Cost on the disk: twice the records for a folder that is kept, once for a temporary one.
    """

    def __init__(self, path: Path | None, *, beside: Path | None = None, backend: Backend | None = None) -> None:
        self._change = threading.RLock()
        self._closed = False
        self._staging: Buffer | None = None
        self.generation: int = 0
        self.bytes_written: int = 0
        self.run: Mapping[str, Json] = {}
        self._records: dict[str, Record] = {}
        self._kept: KeptFolder | None = None
        if path is None:
            own = OwnFolder(beside)
            self.folder: Path = own.path
            try:
                own.warn_of_memory()
                self.file: GenerationFile = GenerationFile.create(own.path, own.create)
            except BaseException:
                own.close(False)
                raise
            weakref.finalize(self.file, own.close, False)
        else:
            kept = self._kept = KeptFolder(path)
            self.folder = kept.path
            try:
                self.file = self._open(kept)
            except BaseException:
                kept.close()
                raise
            self._release = weakref.finalize(self.file, kept.close)
        self._disk = DataWriter(self.file, backend or Backend())
        self._end = self.file.nbytes
        self.records: Mapping[str, Record] = self._records

    def _open(self, kept: KeptFolder) -> GenerationFile:
        manifest = kept.manifest()
        kept.sweep(None if manifest is None else manifest.file)
        if manifest is None:
            return GenerationFile.create(kept.path, kept.create)
        file = GenerationFile.open(kept.path, manifest.file, kept.open)
        file.check_holds(manifest.records.values())
        self._adopt(manifest)
        for record in self._records.values():
            file.show(record)
        return file

    def _adopt(self, manifest: Manifest) -> None:
        self.generation, self.run = manifest.generation, manifest.run
        self._records.update(manifest.records)

    @property
    def halves(self) -> int:
        """How often each record has room: 2 where generations are kept, else 1."""
        return 1 if self._kept is None else 2

    # -- records -----------------------------------------------------------------------------------------------------------------

    def reserve(self, records: Iterable[tuple[str, torch.dtype, tuple[int, ...], int, int]]) -> None:
        """Make room for (name, dtype, shape, lead, chunk) records, so that writing them cannot run out of space.

        `lead` and `chunk` are elements; `chunk * itemsize` is a multiple of 4096. Names that exist are left as they are.

        Raises:
            DiskFullError: the disk cannot take them; nothing was reserved.
        """
        self._check_open()
        with self._change:
            made, end = [], self._end
            for name, dtype, shape, lead, chunk in records:
                if name in self._records:
                    continue
                record = Record(name, dtype, tuple(shape), lead, chunk, ())
                size = round_up((lead + record.numel) * dtype.itemsize)
                record.offsets = tuple(end + half * size for half in range(self.halves))
                end += size * self.halves
                made.append(record)
            self._grow(end)
            self._records.update((record.name, record) for record in made)

    def read(self, record: Record, index: int, target: Buffer, draft: Draft | None = None) -> Read:
        """A request for one chunk of the present version, compared with its sum; the data lands at `record.head(index)` of `target`.

        Args:
            draft: the version being written from this one: chunks that it has not replaced yet can be read.

        Raises:
            StorageError: an update of the record was cut short, or nothing was written to it yet.
        """
        version = draft.before if draft is not None and draft.before is not None else record.whole()
        offset, nbytes = record.place(version.half, index)
        part = Part(record.name, offset, nbytes, version.sums[index])
        return Read(self.file, offset, nbytes, target, record.head(index), (part,))

    def draft(self, record: Record) -> Draft:
        """Begin a new version of a record. Until `finish`, the present one is what `read` gives."""
        self._check_open()
        committed, current = record.committed, record.current
        half = 0 if current is None else current.half
        # Before the first commit there is nothing to go back to, so the present version is the one to be kept whole.
        keep = current if committed is None and self.halves == 2 else committed
        if keep is not None and half == keep.half:
            half = 1 - half
        in_place = current is not None and current.half == half
        return Draft(record, half, [None] * record.count, in_place, None if record.torn else current)

    @staticmethod
    def sum_of(draft: Draft, index: int, memory: memoryview) -> int:
        """Sum of the data in `memory`, for `write`: taken by another thread, it does not keep the one that writes from the disk."""
        head = draft.record.head(index)
        return sum64(memory[head : head + draft.record.place(draft.half, index)[1]])

    def write(self, draft: Draft, index: int, memory: memoryview, total: int | None = None) -> None:
        """Write one chunk of a new version.

        Args:
            memory: from the chunk's first block on (the data begins at `record.head(index)`), whole blocks; its address is a multiple of
                4096. What surrounds the data is set to zero.
            total: what `sum_of` gave for it, if it was asked.

        Raises:
            DiskFullError, StorageError: the present version is intact, unless the draft replaces it in place: then the record is torn.
        """
        self._check_open()
        record = draft.record
        head = record.head(index)
        offset, nbytes = record.place(draft.half, index)
        whole = round_up(head + nbytes)
        memory[:head] = bytes(head)
        memory[head + nbytes : whole] = bytes(whole - head - nbytes)
        if draft.in_place:
            record.torn = True
        with as_storage_error("writing", self.file.path, whole):
            self._disk.write(memory[:whole], offset - head)
        self.bytes_written += whole
        draft.sums[index] = self.sum_of(draft, index, memory) if total is None else total

    def finish(self, *drafts: Draft) -> None:
        """Make complete drafts the present versions of their records, all at once."""
        versions = [draft.version() for draft in drafts]
        with self._change:
            for draft, version in zip(drafts, versions, strict=True):
                draft.record.current, draft.record.torn = version, False
                self.file.show(draft.record)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor as the new version of a reserved record.

        Cost: the memory of one chunk; a copy of the tensor if it is not contiguous on the CPU.
        """
        record = self._records[name]
        memory = memory_of(tensor)
        with self._change:
            draft = self.draft(record)
            needed = min(record.chunk, record.lead + record.numel) * record.dtype.itemsize
            if self._staging is None or self._staging.nbytes < needed:
                self._staging = allocate(needed)
            for index in range(record.count):
                first, last = (element * record.dtype.itemsize for element in record.span(index))
                target = numpy.frombuffer(self._staging.memory, numpy.uint8, last - first, record.head(index))
                numpy.copyto(target, numpy.frombuffer(memory[first:last], numpy.uint8))
                self.write(draft, index, self._staging.memory)
            self.finish(draft)

    def get(self, name: str) -> torch.Tensor:
        """A record's present version as a tensor of its own, checked.

        Raises:
            CorruptDataError: the bytes are not the ones that were written.
        """
        record = self._records[name]
        value = torch.empty(record.shape, dtype=record.dtype)
        buffer = allocate(record.chunk * record.dtype.itemsize)
        for index in range(record.count):
            read = self.read(record, index, buffer)
            data = buffer.memory[read.start : read.start + read.nbytes]
            read_into(self._disk.backend, self.file, data, read.offset, read.nbytes, direct=False, stats=Stats())
            (part,) = read.parts
            if (total := sum64(data)) != part.sum64:
                raise mismatch(self.file, part, "sum64", part.sum64 or 0, total)
            first, last = record.span(index)
            value.view(-1)[first:last] = buffer.tensor()[read.start : read.start + read.nbytes].view(record.dtype)
        return value

    def forget(self, name: str) -> None:
        """The record has no value any more; its room stays reserved for the next one."""
        record = self._records[name]
        record.current, record.torn = None, False
        self.file.hide(record)

    # -- generations ---------------------------------------------------------------------------------------------------------------

    def commit(self, run: Mapping[str, Json]) -> None:
        """Make the present versions of all records, and `run`, what a later `GenerationStore(path)` finds.

        Raises:
            StorageError: it failed, and the generation before is what will be found; or a record is torn.
        """
        self._check_open()
        kept = self._kept
        if kept is None:
            raise StorageError("a temporary store keeps no generations", where=str(self.folder), fix="Give it a folder: path=.")
        with self._change:
            for record in self._records.values():
                if record.current is not None:
                    record.whole()
            held = {name: record for name, record in self._records.items() if record.current is not None}
            self.file.check_found()
            with as_storage_error("flushing", self.file.path):
                self._disk.backend.sync(self.file.fd(False))
            content = pack(self.generation + 1, self.file.path.name, held, run)
            try:
                kept.replace(content)
            except BaseException:
                # It may have been replaced before something else failed: what lies there decides which half must not be written to.
                found = None
                with suppress(StorageError):
                    found = kept.manifest()
                if found is not None and found.generation == self.generation + 1:
                    self._committed(run)
                raise
            self._committed(run)

    def _committed(self, run: Mapping[str, Json]) -> None:
        self.generation += 1
        self.run = run
        for record in self._records.values():
            record.committed = record.current

    def rollback(self) -> None:
        """Make the last committed versions the present ones; what was written since is forgotten.

        Raises:
            StorageError: nothing was committed yet.
        """
        self._check_open()
        if not self.generation:
            raise StorageError("nothing was committed yet", where=str(self.folder), fix="Load the model from its checkpoint again.")
        with self._change:
            for record in self._records.values():
                record.current, record.torn = record.committed, False
                if record.current is None:
                    self.file.hide(record)
                else:
                    self.file.show(record)

    def close(self) -> None:
        """Write no more. What lies in the file stays readable as long as something refers to `file`; the folder's lock is let go."""
        if self._kept is not None and not (self._closed or self._end or self.generation) and os.getpid() == self.file.pid:
            with suppress(OSError, StorageError):
                self._kept.sweep(None)  # nothing was ever put into the file: the disk was full, say
        self._closed = True
        self._staging = None
        if self._kept is not None:
            self._release()

    def __getstate__(self) -> None:
        raise TypeError("a generation store belongs to one process")

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError("this store was closed", where=str(self.folder), fix="Open it again.")
        if os.getpid() != self.file.pid:
            raise StorageError("a forked child may not change its parent's store", where=str(self.folder), fix="Make one in the child.")

    def _grow(self, end: int) -> None:
        if end > self._end:
            self._disk.reserve(self._end, end - self._end)
            self._end = end

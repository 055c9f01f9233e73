"""Writing the data file of a store: into room that was reserved before, past the page cache where the file system allows it.

Room is reserved so that a full disk is found before anything depends on the bytes. O_DIRECT is tried first, because the aim is to have the
bytes out of memory; once the file system has refused it, it is not tried again.
"""

from __future__ import annotations

import os
from contextlib import suppress

from torchwrap.core.errors import DiskFullError, StorageError
from torchwrap.storage.atomic import as_storage_error, free_bytes
from torchwrap.storage.backend import Backend, Source, write_from

__all__ = ["DataWriter"]


class DataWriter:
    """Writes to one data file; the caller sees to it that nobody else changes the same bytes, or the file's length, meanwhile.

    Args:
        file: the data file.
        backend: the system calls.

    Attributes:
        backend: may be replaced, in tests.
    """

    def __init__(self, file: Source, backend: Backend) -> None:
        self._file, self._direct = file, True
        self.backend: Backend = backend

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT works, as far as is known.

        Raises:
            StorageError: the file was closed.
        """
        if self._direct:
            try:
                self._file.fd(True)
            except OSError as error:
                if isinstance(error, StorageError):
                    raise
                self._direct = False
        return self._direct

    def give_up_direct(self) -> None:
        """O_DIRECT was refused."""
        self._direct = False

    def write(self, memory: memoryview, offset: int) -> None:
        """Write all of it at `offset`, whole blocks of 4096 bytes at an address that is a multiple of that.

        Raises:
            OSError: the disk is full, failed twice, or accepts nothing.
        """
        direct = self._file.fd(True) if self.direct else None
        worked = write_from(self.backend, direct, self._file.fd(False), memory, offset)
        self._direct = self._direct and worked

    def reserve(self, end: int, nbytes: int) -> None:
        """Make the file, which ends at `end`, longer by `nbytes` that exist on the disk; or leave it as it was.

        Raises:
            DiskFullError: less than that is free.
            StorageError: the disk failed.
        """
        fd = self._file.fd(False)
        available = free_bytes(fd)
        if nbytes > available:
            raise DiskFullError(
                f"{nbytes:,} bytes are needed, {available:,} are free",
                needed=nbytes,
                available=available,
                where=str(self._file.path.parent),
                fix="Free space, or pass path= on another disk.",
            )
        try:
            with as_storage_error("reserving space", self._file.path, nbytes):
                self.backend.reserve(fd, end, nbytes)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(fd, end)  # a failed reservation keeps what it got
            raise

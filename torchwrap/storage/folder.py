"""A folder of our own below a folder of the user's: nobody else reads it, and it does not outlive us.

Its name is random, so nobody can wait for it; everything in it is opened relative to its descriptor, so nobody can swap it for a link.
A lock and the record of who made it let the next store, in any process, remove what a killed process left behind.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

from torchwrap.core.errors import TorchwrapWarning
from torchwrap.storage.atomic import Owner, as_storage_error, private_folder
from torchwrap.storage.safefile import Descriptor

__all__ = ["INDEX", "OwnFolder", "file_system", "sweep"]

INDEX = "index.json"
"""Its presence says that the folder is kept on purpose."""

_NAME = re.compile(r"^torchwrap-[0-9a-f]{16}$")
_LOCK = "LOCK"
_UNFINISHED_S = 3600.0  # a folder without a record is being made, which takes milliseconds; after an hour nobody is making it (chosen)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class OwnFolder:
    """A new folder `torchwrap-<random>` of mode 0700, locked while this process lives.

    Args:
        parent: where to make it; `None` means the system's folder for temporary files.

    Raises:
        UnsafePathError: the parent is a link, somebody else's, or writable by others without the sticky bit.
        StorageError: it cannot be made.
    """

    def __init__(self, parent: Path | None) -> None:
        parent = private_folder(parent or Path(tempfile.gettempdir()).resolve())
        self.pid: int = os.getpid()
        self._name = f"torchwrap-{secrets.token_hex(8)}"
        self.path: Path = parent / self._name
        with as_storage_error("making a folder", self.path):
            above = Descriptor(os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            sweep(above)
            os.mkdir(self._name, 0o700, dir_fd=above)
            self._fds = [above, Descriptor(os.open(self._name, _FOLDER, dir_fd=above))]
            lock = Descriptor(self.create(_LOCK))
            self._fds.append(lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.pwrite(lock, Owner.current().to_json(), 0)

    def warn_of_memory(self) -> None:
        """Warn when it lies in memory: called by whoever is about to put weights into it."""
        kind = file_system(self.path)
        if kind in ("tmpfs", "ramfs"):
            warnings.warn(
                f"{self.path.parent} lies in memory ({kind}): what is spilled there saves nothing. Pass path= on a disk.",
                TorchwrapWarning,
                stacklevel=3,
            )

    def create(self, name: str) -> int:
        """Descriptor of a new file of mode 0600 inside."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fds[1])

    def close(self, keep: bool) -> None:
        """Remove the folder with all files, or leave it; let the lock go. In a forked child only the child's descriptors close."""
        if self._fds and os.getpid() == self.pid and not keep:
            _remove(self._fds[0], self._name, self._fds[1])
        self._fds = []


def sweep(parent: int) -> None:
    """Remove folders that stores of dead processes left in `parent` (a descriptor). Others' folders and kept ones stay."""
    for name in os.listdir(parent):
        if _NAME.match(name):
            with suppress(OSError):  # being removed by its owner or by another sweeper, or locked by a living owner
                fd = os.open(name, _FOLDER, dir_fd=parent)
                try:
                    _sweep_one(parent, name, fd)
                finally:
                    os.close(fd)


def file_system(path: Path) -> str:
    """Type of the file system that holds a path, such as "ext4" or "tmpfs"; empty if unknown."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return ""


def _sweep_one(parent: int, name: str, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or INDEX in os.listdir(fd):
        return
    owner: Owner | None = None
    lock: int | None = None
    try:
        with suppress(FileNotFoundError):
            lock = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            # Both signs are needed: in another pid namespace a living owner looks dead, but holds its lock.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = Owner.from_json(os.pread(lock, 256, 0))
        abandoned = not owner.alive() if owner else time.time() - status.st_mtime > _UNFINISHED_S
        if abandoned:
            _remove(parent, name, fd)
    finally:
        if lock is not None:
            os.close(lock)


def _remove(parent: int, name: str, fd: int) -> None:
    with suppress(OSError):
        for entry in sorted(os.listdir(fd), key=lambda entry: entry == _LOCK):  # the lock last: it guards the rest
            if not stat.S_ISDIR(os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(entry, dir_fd=fd)
        os.rmdir(name, dir_fd=parent)

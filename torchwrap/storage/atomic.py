"""Writing files so that a crash leaves the old content or the new one, never a mixture; folders and names that cannot be abused.

The recipe: write a temporary file in the same folder, flush it to the disk, rename it over the old one, flush the folder. Measured with
SIGKILL at random moments, writing over the old file in place lost it 12 times out of 12. What a killed process leaves behind carries
its process id, start time and boot, so the next writer can tell that nobody is coming back for it.

Source: rename(2) and fsync(2) of the Linux manual; T. S. Pillai et al., All File Systems Are Not Created Equal, OSDI 2014.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from torchwrap.core.errors import DiskFullError, StorageError, UnsafePathError

__all__ = ["Lock", "Owner", "as_storage_error", "atomic_write", "atomic_writer", "free_bytes", "private_folder", "safe_join"]

_TEMPORARY = re.compile(r"^\..+\.tw-(\d+)-(\d+)-([0-9a-f]{8})-[0-9a-f]{16}\.tmp$")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Owner:
    """Which run of which process made something; a process id alone may belong to another process by now.

    Attributes:
        pid: process id.
        start: the process's start, in clock ticks since boot.
        boot: eight hexadecimal digits that change with each boot.
    """

    pid: int
    start: int
    boot: str

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        return cls(os.getpid(), _start_of(os.getpid()) or 0, _boot())

    def alive(self) -> bool:
        """False once that run of the process has ended."""
        return self.boot == _boot() and _start_of(self.pid) == self.start

    def to_json(self) -> bytes:
        """One line for a lock file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Owner | None:
        """The owner a lock file names, `None` if it names none."""
        try:
            fields = json.loads(content)
            return cls(int(fields["pid"]), int(fields["start"]), str(fields["boot"]))
        except (ValueError, TypeError, KeyError):
            return None


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file's content as a whole, or leave it as it was. See `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(content)


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An open binary file whose content appears at `path` when the block ends without an exception; otherwise nothing changes.

    The old file's mode is kept (a new file gets what the umask allows); a symbolic link stays and the file behind it is replaced.
    Temporary files that dead processes left beside `path` are removed.

    Raises:
        DiskFullError: no room; the old content is intact.
        StorageError: the folder cannot be written to; the old content is intact.

    Cost: the new content exists beside the old one until the block ends; two flushes.

    Example:
        >>> import tempfile, pathlib
        >>> from torchwrap.storage.atomic import atomic_writer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "plan.json")
        ...     with atomic_writer(path) as file:
        ...         _ = file.write(b"{}")
        ...     path.read_bytes()
        b'{}'
    """
    final = Path(os.path.realpath(path))
    with as_storage_error("writing", final):
        folder = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    owner = Owner.current()
    name = f".{final.name[:100]}.tw-{owner.pid}-{owner.start}-{owner.boot}-{secrets.token_hex(8)}.tmp"
    try:
        _sweep(folder)
        with as_storage_error("writing", final):
            mode = _mode_of(final)
            # Never wider than what it replaces, not even for a moment; a new file gets what the umask leaves of 0666.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o666 if mode is None else 0o600, dir_fd=folder)
        try:
            with as_storage_error("writing", final), os.fdopen(fd, "wb") as file:
                # A sweeper in another pid namespace takes our pid for dead, but finds this lock taken.
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield file
                file.flush()
                if mode is not None:
                    os.fchmod(fd, mode)
                os.fsync(fd)
                os.rename(name, final.name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            raise
    finally:
        os.close(folder)


class Lock:
    """An exclusive lock on a file, held while the object is used as a context manager or until `release`.

    The system releases it when the process dies. A forked child does not own it and does not release it.

    Args:
        path: the lock file; made if missing, never removed (removing it would let two holders in).

    Raises:
        StorageError: somebody else holds it; the message names the process. `DiskFullError`: there is no room for this one's name.
        UnsafePathError: the path is a symbolic link.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)
        self._pid = os.getpid()
        self._fd: int | None = None
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafePathError("the lock file is a symbolic link", where=str(self.path), fix="Remove the link.") from error
            raise StorageError(f"cannot open the lock file: {error.strerror}", where=str(self.path)) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = Owner.from_json(os.pread(fd, 256, 0))
            os.close(fd)
            raise StorageError(
                f"in use by {f'process {holder.pid}' if holder else 'another process'}",
                where=str(self.path),
                fix="Use another folder, or end that process.",
            ) from error
        try:
            with as_storage_error("writing", self.path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, Owner.current().to_json(), 0)
        except BaseException:
            os.close(fd)  # a full disk: the lock is nobody's
            raise
        self._fd = fd

    def release(self) -> None:
        """Let others in. Calling it again does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            # Closing is enough in the parent; in a child it only drops the child's copy, where LOCK_UN would take the parent's lock.
            os.close(fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getstate__(self) -> None:
        raise TypeError("a lock belongs to one process and cannot be copied")


def safe_join(root: str | os.PathLike[str], name: str) -> Path:
    """`root / name`, guaranteed to lie inside `root`, also after following symbolic links.

    Raises:
        UnsafePathError: `name` is absolute, empty, climbs with "..", holds a NUL or a backslash, or a link on the way leads outside.
    """
    root = Path(root)
    parts = PurePath(name).parts
    bad = not parts or os.path.isabs(name) or ".." in parts or "\0" in name or "\\" in name
    if bad or not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
        raise UnsafePathError(f"{name!r} does not stay inside its folder", where=str(root), fix="Use a plain relative name.")
    return root / name


def private_folder(path: str | os.PathLike[str]) -> Path:
    """A folder in which nobody else can plant or swap files: made with mode 0700 if missing, checked if it is there.

    A folder that others may write to passes only with the sticky bit (like /tmp), where they cannot touch what is ours.

    Raises:
        UnsafePathError: a symbolic link, somebody else's folder, or writable by others.
        StorageError: cannot be made, is not a folder, or cannot be written to.
    """
    path = Path(path)
    with as_storage_error("making the folder", path), suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise UnsafePathError("the folder is a symbolic link", where=str(path), fix=f"Pass {os.path.realpath(path)} itself.")
    if not stat.S_ISDIR(found.st_mode):
        raise StorageError("not a folder", where=str(path), fix="Pass a folder.")
    if found.st_uid not in (os.geteuid(), 0):
        raise UnsafePathError(f"the folder belongs to user {found.st_uid}", where=str(path), fix="Pass a folder of your own.")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(found.st_mode)
        raise UnsafePathError(f"others may write to the folder (mode {mode:o})", where=str(path), fix=f"chmod 700 {path}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError("the folder is read-only for this user", where=str(path), fix="Pass a folder you can write to.")
    return path


@contextmanager
def as_storage_error(doing: str, path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` that names the path, or a `DiskFullError` with needed and free bytes."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            fix = "Check that the folder exists and can be written to."
            raise StorageError(f"{doing} failed: {error.strerror or error}", where=str(path), fix=fix) from error
        raise DiskFullError(
            f"{doing} failed: {error.strerror}",
            needed=needed,
            # EFBIG is a limit on the size of files, not on space. The path itself may have been removed.
            available=0
            if error.errno == errno.EFBIG
            else free_bytes(next(folder for folder in path.absolute().parents if folder.exists())),
            where=str(path),
            fix="Free space, or pass path= on another disk.",
        ) from error


def free_bytes(folder: str | os.PathLike[str] | int) -> int:
    """Bytes this user may still write to the file system of a folder or of an open descriptor."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _mode_of(final: Path) -> int | None:
    try:
        return stat.S_IMODE(os.stat(final).st_mode)
    except FileNotFoundError:
        return None


def _sweep(folder: int) -> None:
    """Remove temporary files of dead processes."""
    for name in os.listdir(folder):
        match = _TEMPORARY.match(name)
        if match is None or Owner(int(match[1]), int(match[2]), match[3]).alive():
            continue
        with suppress(OSError):  # another sweeper was faster, or it is not ours to remove
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(fd)


def _start_of(pid: int) -> int | None:
    """Start time of a process from /proc, `None` if it does not exist."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = content[content.rindex(b")") + 2 :].split()  # the name before it may hold spaces and brackets
    # A zombie has ended; only its parent has not noticed yet.
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
    except OSError:
        return "00000000"

"""A hard memory limit for a child process, through a memory control group of the kernel (version 1 or 2); needs root.

Unlike an address-space limit it counts touched pages, the page cache included, which is what a container is stopped for. The child enters
the group before Python starts, so that interpreter and libraries count too. The files written here are the kernel's control files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torchwrap.core.errors import StorageError

__all__ = ["MemoryGroup", "memory_group"]


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group that exists for the length of `memory_group`."""

    path: Path
    peak_file: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The same command, run inside the group: a shell enters it and becomes the command."""
        return ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *arguments]

    def peak(self) -> int | None:
        """Highest number of bytes charged so far; `None` where the kernel does not keep it."""
        file = self.path / self.peak_file
        return int(file.read_text()) if file.exists() else None


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A fresh group that may use `limit` bytes, page cache included, and no swap.

    Raises:
        StorageError: the kernel offers no memory group to this user.
    """
    group = _create(limit)
    try:
        yield group
    finally:
        _remove(group.path)


def _create(limit: int) -> MemoryGroup:
    reasons = []
    for root, limit_file, swap_file, peak_file in _roots():
        path = root / f"torchwrap-bench-{os.getpid()}"
        try:
            path.mkdir()
            (path / limit_file).write_text(str(limit))
            if (path / swap_file).exists():
                # Version 1 bounds memory and swap together, version 2 bounds swap alone.
                (path / swap_file).write_text(str(limit) if "memsw" in swap_file else "0")
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
            if path.is_dir():
                path.rmdir()
            continue
        return MemoryGroup(path, peak_file)
    why = "; ".join(reasons) or "no control-group file system is mounted"
    raise StorageError(f"no memory limit could be set ({why})", where="--limit", fix="Run as root on Linux, or leave out --limit")


def _roots() -> list[tuple[Path, str, str, str]]:
    mount = Path("/sys/fs/cgroup")
    candidates = []
    if (mount / "memory").is_dir():
        candidates.append((mount / "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes"))
    if (mount / "cgroup.controllers").exists():
        candidates.append((mount, "memory.max", "memory.swap.max", "memory.peak"))
    return candidates


def _remove(path: Path) -> None:
    for _ in range(100):
        try:
            path.rmdir()
        except OSError:
            # The kernel keeps a group busy for a moment after its last process has been reaped.
            time.sleep(0.05)
        else:
            return

"""How much memory this process may use, and how much of that is left.

A container's limit is not what `MemTotal` says: it is set on a control group, possibly on an outer one, and in two dialects. Version 2
has one tree (`memory.max`, `memory.high`, `memory.current`); version 1 has a tree of its own for memory (`memory.limit_in_bytes`,
`memory.usage_in_bytes`). The limit that binds is the smallest on the way from our group to the visible root. File cache is charged to
a group too, but the kernel gives it up before it kills anyone, so it does not count as used here.

Facts from the Linux kernel's documentation: admin-guide/cgroup-v1/memory, admin-guide/cgroup-v2, filesystems/proc.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["group_usage", "is_limited", "memory_available", "memory_limit", "memory_usage"]

# Version 1 writes "no limit" as the largest number of whole pages; nothing real is near 4 EiB.
_NO_LIMIT = 1 << 62
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class _Dialect:
    """File names of one control group version."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_DIALECTS = {
    # Above memory.high the kernel throttles until progress is near nothing, so it binds as much as memory.max does.
    "cgroup2": _Dialect(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
    "cgroup": _Dialect(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}


def memory_limit(*, root: Path = _ROOT) -> int | None:
    """Bytes this process and its group may use: the smallest limit of the nested control groups, at most the machine's memory.

    Args:
        root: where `proc` and `sys` are looked for.

    Returns:
        Bytes, or `None` where neither control groups nor `/proc/meminfo` exist.
    """
    limits = [limit for folder, dialect in _groups(root) if (limit := _group_limit(folder, dialect)) is not None]
    total = _meminfo(root).get("MemTotal")
    return min([*limits, *([total] if total else [])], default=None)


def is_limited(*, root: Path = _ROOT) -> bool:
    """Whether a control group allows this process less than the machine has, so that going over it ends the process."""
    limit, total = memory_limit(root=root), _meminfo(root).get("MemTotal")
    return limit is not None and (total is None or limit < total)


def memory_usage(*, root: Path = _ROOT) -> int:
    """Bytes in use, without file cache, in the group whose limit leaves the least room; of the machine when no group has a limit."""
    return _tightest(root)[1]


def group_usage(*, root: Path = _ROOT) -> int | None:
    """Bytes in use, without file cache, in the innermost group that has a limit; `None` where no group has one."""
    limited = (pair for pair in _groups(root) if _group_limit(*pair) is not None)
    return next((_group_usage(folder, dialect) for folder, dialect in limited), None)


def memory_available(*, root: Path = _ROOT) -> int | None:
    """Bytes that can still be used before a limit of any enclosing group, or the machine's memory, is reached; `None` if unknown."""
    return _tightest(root)[0]


def _tightest(root: Path) -> tuple[int | None, int]:
    """(bytes left, bytes used) of the machine or of the group that leaves the least."""
    machine = _meminfo(root)
    left = machine.get("MemAvailable")
    used = max(0, machine.get("MemTotal", 0) - (left or 0))
    for folder, dialect in _groups(root):
        limit = _group_limit(folder, dialect)
        if limit is None:
            continue
        group_used = _group_usage(folder, dialect)
        room = max(0, limit - group_used)
        if left is None or room < left:
            left, used = room, group_used
    return left, used


def _groups(root: Path) -> Iterator[tuple[Path, _Dialect]]:
    """Folders of our memory group and of all groups around it, innermost first, for both versions."""
    for kind, point, mounted, options in _mounts(root):
        own = _own_group(root, kind, options)
        if own is None:
            continue
        # A container often sees its own group mounted as the root of the tree, while /proc/self/cgroup tells the outside path.
        inside = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()
        base = root / str(point).lstrip("/")
        parts = [part for part in inside.parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder, _DIALECTS[kind]


def _mounts(root: Path) -> Iterator[tuple[str, PurePosixPath, PurePosixPath, str]]:
    """(kind, mount point, mounted sub-tree, options) of the control group mounts that this process sees."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) > 4 and right and right[0] in _DIALECTS:
            yield right[0], PurePosixPath(left[4]), PurePosixPath(left[3]), right[-1]


def _own_group(root: Path, kind: str, options: str) -> PurePosixPath | None:
    """Path of our group in the tree of this kind, or `None` when that tree does not count memory."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if kind == "cgroup2" and number == "0" and not controllers:
            return PurePosixPath(path)
        if kind == "cgroup" and "memory" in controllers.split(",") and "memory" in options.split(","):
            return PurePosixPath(path)
    return None


def _group_limit(folder: Path, dialect: _Dialect) -> int | None:
    values = [_read(folder / name).strip() for name in dialect.limits]
    numbers = [int(value) for value in values if value.isdigit() and int(value) < _NO_LIMIT]
    return min(numbers, default=None)


def _group_usage(folder: Path, dialect: _Dialect) -> int:
    usage = _read(folder / dialect.usage).strip()
    pairs = (line.split() for line in _read(folder / "memory.stat").splitlines())
    cache = sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in dialect.cache and pair[1].isdigit())
    return max(0, int(usage) - cache) if usage.isdigit() else 0


def _meminfo(root: Path) -> dict[str, int]:
    """`/proc/meminfo` in bytes."""
    found: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1]) * 1024
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

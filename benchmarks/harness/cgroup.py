"""Run a Python child under a hard memory limit and report what the kernel counted.

The limit is a memory control group, version 1 (`memory.limit_in_bytes`) or version 2 (`memory.max`), created below the caller's own
group where that is visible and at the top of the mount otherwise, and removed afterwards. The child enters the group before Python
starts, so interpreter and libraries count. Unlike `RLIMIT_AS` a group charges touched pages, page cache included, which is what a
container is killed for. Two figures come back that mean different things: `peak_bytes` is everything charged to the group (a full
page cache reaches the limit without harm), `failures` counts how often the kernel had to reclaim because the limit was hit.

Shared-library pages are charged to whoever read them first, so a child on a warm machine is charged less than its resident set;
`hwm_bytes` (VmHWM of the child) is the other view.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RESULT_VARIABLE", "ChildResult", "MemoryGroup", "hwm_bytes", "memory_group", "report", "run_child", "unavailable_reason"]

RESULT_VARIABLE = "TORCHWRAP_CHILD_RESULT"
MOUNTS = Path("/proc/self/mounts")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Dialect:
    """File names of one version of the control-group interface."""

    version: int
    limit: str
    peak: str
    swap_limit: str
    no_limit: str


V1 = Dialect(1, "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.memsw.limit_in_bytes", "-1")
V2 = Dialect(2, "memory.max", "memory.peak", "memory.swap.max", "max")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One memory control group that exists until `remove()`."""

    path: Path
    dialect: Dialect

    def set_limit(self, limit: int | None) -> None:
        """Bound memory to `limit` bytes without swap; None lifts the bound."""
        value = self.dialect.no_limit if limit is None else str(limit)
        (self.path / self.dialect.limit).write_text(value)
        swap = self.path / self.dialect.swap_limit
        if limit is not None and swap.exists():
            # Version 1 bounds memory + swap together, version 2 bounds swap alone.
            swap.write_text(value if self.dialect.version == 1 else "0")

    def peak_bytes(self) -> int | None:
        """Highest charge so far in bytes; None where the kernel keeps no peak (version 2 before Linux 5.19)."""
        file = self.path / self.dialect.peak
        return int(file.read_text()) if file.exists() else None

    def failures(self) -> int:
        """Times the limit was hit (`memory.failcnt`, or `max` of `memory.events`).

        Linux 6.18 shows 0 in version 1 whatever happens, so `refaulted_pages` is counted as well.
        """
        if self.dialect.version == 1:
            return int((self.path / "memory.failcnt").read_text())
        return self._events("memory.events").get("max", 0)

    def refaulted_pages(self) -> int:
        """File pages that had to be read again because they had been reclaimed: what thrashing costs."""
        return self._events("memory.stat").get("workingset_refault_file", 0)

    def kills(self) -> int:
        """Processes of the group ended by the out-of-memory killer."""
        name = "memory.oom_control" if self.dialect.version == 1 else "memory.events"
        return self._events(name).get("oom_kill", 0)

    def remove(self, timeout_s: float = 10.0) -> None:
        """Remove the group, ending what still runs in it."""
        deadline = time.monotonic() + timeout_s
        while self.path.exists():
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            try:
                self.path.rmdir()
            except OSError:
                # A group stays busy for a moment after its last process has been reaped.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _events(self, name: str) -> dict[str, int]:
        file = self.path / name
        if not file.exists():
            return {}
        pairs = (line.split() for line in file.read_text().splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


@dataclass(frozen=True, slots=True)
class ChildResult:
    """What a child left behind: its own report and the kernel's figures."""

    returncode: int
    wall_s: float
    limit_bytes: int | None
    peak_bytes: int | None
    failures: int | None
    refaulted_pages: int | None
    killed: bool
    hwm_bytes: int | None
    data: dict[str, Any] = field(default_factory=dict)
    output: str = ""

    def check(self) -> ChildResult:
        """Return self, or raise RuntimeError with the end of the child's output when it did not finish."""
        if self.returncode != 0 or self.killed:
            why = "ended by the out-of-memory killer" if self.killed else f"exit status {self.returncode}"
            raise RuntimeError(f"child failed ({why}, peak {self.peak_bytes} of {self.limit_bytes} bytes):\n{self.output[-4000:]}")
        return self


def unavailable_reason() -> str | None:
    """Why no limited child can be run on this machine; None when it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "memory control groups need root"
    try:
        with memory_group():
            return None
    except OSError as error:
        return f"no writable memory control group: {error}"


@contextlib.contextmanager
def memory_group(limit: int | None = None) -> Iterator[MemoryGroup]:
    """A fresh memory group with `limit` bytes, removed on exit.

    Raises:
        OSError: no parent accepts a group with a memory controller.
    """
    group = _create()
    try:
        group.set_limit(limit)
        yield group
    finally:
        group.remove()


def run_child(
    arguments: Sequence[str],
    *,
    limit: int | None = None,
    timeout_s: float = 600.0,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> ChildResult:
    """Run a command under `limit` bytes and collect its report.

    Args:
        arguments: the command; a Python child calls `report()` once, before it ends.
        limit: bytes; None runs it in an unlimited group so that the peak is still counted, or in no group where there is none.
        timeout_s: seconds until the child is ended; its returncode is then -9.
        environment: variables added to the caller's.
        folder: working folder of the child.
    """
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(limit))
        except OSError:
            if limit is not None:
                raise
            group = None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchwrap-child-")))
        return _run(list(arguments), group, limit, timeout_s, {**os.environ, **(environment or {})}, scratch, folder)


def report(data: Mapping[str, Any]) -> None:
    """Called in the child: hand `data` (JSON) and this process's VmHWM to `run_child`; prints it when there is no parent waiting."""
    text = json.dumps({"data": dict(data), "hwm_bytes": hwm_bytes()})
    target = os.environ.get(RESULT_VARIABLE)
    if target:
        Path(target).write_text(text)
    else:
        print(text)


def hwm_bytes() -> int | None:
    """Highest resident set of this process in bytes (VmHWM); None where /proc does not tell.

    `ru_maxrss` is no substitute: it survives exec, so a child of a large parent starts with the parent's figure.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _run(
    arguments: list[str],
    group: MemoryGroup | None,
    limit: int | None,
    timeout_s: float,
    environment: dict[str, str],
    scratch: Path,
    folder: Path | None,
) -> ChildResult:
    result_file, output_file = scratch / "result.json", scratch / "output.txt"
    environment[RESULT_VARIABLE] = str(result_file)
    command = arguments
    if group is not None:
        # The shell joins the group and becomes the command, so not one page of the child is charged elsewhere.
        command = ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', str(group.path / "cgroup.procs"), *arguments]
    started = time.monotonic()
    with output_file.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        try:
            returncode = process.wait(timeout_s)
        except BaseException as error:
            process.kill()
            returncode = process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    told = json.loads(result_file.read_text()) if result_file.exists() else {}
    return ChildResult(
        returncode=returncode,
        wall_s=time.monotonic() - started,
        limit_bytes=limit,
        peak_bytes=group.peak_bytes() if group else None,
        failures=group.failures() if group else None,
        refaulted_pages=group.refaulted_pages() if group else None,
        killed=bool(group and group.kills()),
        hwm_bytes=told.get("hwm_bytes"),
        data=told.get("data", {}),
        output=output_file.read_text(errors="replace"),
    )


def _create() -> MemoryGroup:
    refusals = []
    for parent, dialect in _parents():
        path = parent / f"torchwrap-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            if dialect.version == 2:
                _delegate_memory(parent)
            path.mkdir()
        except OSError as error:
            refusals.append(f"{parent}: {error.strerror}")
            continue
        if (path / dialect.limit).exists():
            return MemoryGroup(path, dialect)
        path.rmdir()
        refusals.append(f"{parent}: no memory controller")
    raise OSError("; ".join(refusals) or "no control-group file system is mounted")


def _delegate_memory(parent: Path) -> None:
    if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        # Refused with EBUSY while processes sit directly in `parent` (unless it is the root): the next candidate is then tried.
        (parent / "cgroup.subtree_control").write_text("+memory")


def _parents() -> list[tuple[Path, Dialect]]:
    """Candidate parent groups, the closest to this process first."""
    own = {}
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []:
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    found = []
    for line in MOUNTS.read_text().splitlines() if MOUNTS.exists() else []:
        _, mount, kind, options = line.split()[:4]
        root = Path(mount)
        if kind == "cgroup" and "memory" in options.split(","):
            mine = next((path for controllers, path in own.items() if "memory" in controllers.split(",")), "")
            found += [(root / mine, V1), (root, V1)]
        elif kind == "cgroup2" and "memory" in (root / "cgroup.controllers").read_text().split():
            mine_v2 = root / own.get("", "")
            found += [(mine_v2, V2), (mine_v2.parent if mine_v2 != root else root, V2), (root, V2)]
    return [(path, dialect) for path, dialect in dict.fromkeys(found) if path.is_dir()]

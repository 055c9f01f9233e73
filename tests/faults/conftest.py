"""Fixtures of the fault tests, the summary at the end of a session, and the check that no test leaves anything behind."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import hangs
from tests.faults.tally import Faults, Tally, add_to_report, summary_line

REPORT = "TORCHWRAP_FAULT_REPORT"
"""Environment variable: where the counts of a session are written as JSON."""

DEADLINE_S = 10.0

_tally = pytest.StashKey[Tally]()
_from_workers = pytest.StashKey[Tally]()
_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tally], config.stash[_from_workers] = Tally(), Tally()


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    counts = config.stash[_tally]
    if not counts:
        return
    if os.environ.get(REPORT):
        add_to_report(Path(os.environ[REPORT]), counts, os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex)
    if hasattr(config, "workeroutput"):
        config.workeroutput["torchwrap_faults"] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The controller of pytest-xdist takes over what a worker counted."""
    node.config.stash[_from_workers].update(getattr(node, "workeroutput", {}).get("torchwrap_faults", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = config.stash[_tally] + config.stash[_from_workers]
    if counts:
        terminalreporter.write_line(summary_line(counts))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Note failures: a failed test keeps its model alive in its traceback, so what it left says nothing."""
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Faults:
    """Judges and counts the faults of one test."""
    return Faults(request.config.stash[_tally])


@pytest.fixture
def only_hangs() -> Iterator[None]:
    """Calls that are slow because the test machine is busy are no hangs, however short the limit."""
    with hangs.only_hangs_end_patience():
        yield


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until the condition holds; false after the deadline."""
    end = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        pause.wait(0.005)
    return True


def descriptors() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def readers() -> int:
    """Threads of ours that are running."""
    return sum(thread.name.startswith("torchwrap-") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files go to a folder of the test's own; in the end no file, no thread and no descriptor of ours is left."""
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = descriptors(), readers()

    def clean() -> bool:
        return descriptors() <= before[0] and readers() <= before[1] and not list(temporary.glob("torchwrap-*"))

    yield
    if not request.node.stash.get(_failed, False) and not clean():
        gc.collect()
        assert eventually(clean), (before, (descriptors(), readers()), os.listdir(temporary))

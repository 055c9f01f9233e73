"""The worker by itself: what an update that fails leaves, whatever is under way beside it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

import torchwrap as tw
from torchwrap.optimizer.updates import Job, Updater

WAIT_S = 5.0


class _Update:
    gradient: object = None
    gradient_nbytes = 0
    target = SimpleNamespace(name="weight")


class _Chunks:
    """Of each update one; the first is being written when reading this one fails."""

    def __init__(self, failing: _Update) -> None:
        self.failing, self.writing, self.go_on, self.told = failing, threading.Event(), threading.Event(), list[str]()

    def begin(self, update: Any) -> int:
        return 1

    def read(self, chunk: Any) -> None:
        if chunk.update is self.failing:
            assert self.writing.wait(WAIT_S)
            raise tw.StorageError("reading failed")

    def compute(self, chunk: Any) -> None:
        pass

    def write(self, chunk: Any) -> bool:
        self.writing.set()
        self.go_on.wait(WAIT_S)
        self.told.append("written")
        return True


class _Engine:
    def __init__(self, told: list[str], error: Exception | None) -> None:
        self.told, self.error = told, error

    def expect_update(self, pieces: Any) -> None:
        pass

    begin_update = expect_update

    def end_update(self, pieces: Any) -> None:
        self.told.append(f"ended {pieces[0].index}")
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, ValueError("unexpected")], ids=["", "error"])
def test_weights_are_withheld_until_what_is_written_is_theirs(error: Exception | None) -> None:
    """They were read in between, at the place that they had before."""
    updates = [_Update() for _ in range(4)]
    chunks = _Chunks(updates[2])
    engine = _Engine(chunks.told, error)
    updater = Updater(chunks, engine, 2.0)  # type: ignore[arg-type]
    jobs = [Job([SimpleNamespace(index=number)], each) for number, each in enumerate((updates[:3], updates[3:]))]  # type: ignore[list-item, arg-type]
    with updater._changed:  # both are there when the first begins
        for job in jobs:
            updater.submit(job)
    assert chunks.writing.wait(WAIT_S)
    with updater._changed:
        assert updater._changed.wait_for(lambda: updater.unfinished, WAIT_S)
    chunks.go_on.set()
    updater.wait()
    assert chunks.told.index("written") < chunks.told.index("ended 0")
    assert "ended 1" in chunks.told
    with pytest.raises(tw.StorageError, match="reading failed"):
        updater.check()
    assert updater.unfinished == updates[1:]
    updater.close()

"""Threads that give way have a lower priority, and only they."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

import torchwrap
from torchwrap.storage.priority import give_way

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")


def niceness() -> dict[str, int]:
    """Of the threads of Python, by name."""
    return {thread.name: os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) for thread in threading.enumerate()}


def test_only_the_calling_thread_gives_way_and_no_more_if_one_that_did_began_it() -> None:
    before, seen = niceness()["MainThread"], []

    def work(more: int) -> None:
        give_way()
        give_way()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        if more:
            run(more - 1)

    def run(more: int) -> None:
        worker = threading.Thread(target=work, args=(more,))
        worker.start()
        worker.join()

    run(2)
    assert seen == [min(19, before + 5)] * 3
    assert niceness()["MainThread"] == before


@pytest.mark.parametrize("backend", ["auto", "uring"])
def test_the_trainer_and_the_reader_of_weights_go_before_updates(tmp_path: Path, backend: str) -> None:
    from torchwrap.storage.uring import unavailable_reason

    if backend == "uring" and (reason := unavailable_reason()):
        pytest.skip(reason)
    before = niceness()["MainThread"]
    model = torchwrap.offload(
        torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))),
        device_memory="48KiB",
        path=tmp_path / "weights",
        io_backend=backend,
    )
    optimizer = torchwrap.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3, path=tmp_path / "run")
    for _ in range(2):  # the state is read in the second
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = niceness()
    assert found["MainThread"] == before
    assert {found["torchwrap-update"], found["torchwrap-write"]} == {min(19, before + 5)}
    readers = sorted(
        os.getpriority(os.PRIO_PROCESS, t.native_id or 0) for t in threading.enumerate() if t.name.startswith("torchwrap-read")
    )
    assert {readers[0], readers[-1]} == {before, min(19, before + 5)}
    optimizer.close()
    torchwrap.unwrap(model)

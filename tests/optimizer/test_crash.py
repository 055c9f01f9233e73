"""A run in a folder can be continued: after an ordinary end, and after SIGKILL at any moment."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer

ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 16384}
ROOT = Path(__file__).parents[2]
TRIALS = int(os.environ.get("TORCHWRAP_CRASH_TRIALS", "8"))

# Importing takes longer than the steps: one process imports, and each run is a fork of it. It says its number and where it goes on.
RUNS = """
import os, sys, tempfile
from tests.optimizer.optimizing import pair, trained
from torchwrap import OffloadedOptimizer
import torch
while line := sys.stdin.readline():
    folder, durability, offload, temporary = line.split()
    if child := os.fork():
        print("gone", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    tempfile.tempdir = temporary
    _, model = pair(offload={"params": "disk"} if offload == "disk" else {"device_memory": 2_000_000})
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=folder, durability=durability, lr=1e-2, chunk=16384)
    print(os.getpid(), optimizer.steps, flush=True)
    while optimizer.steps < 400:
        trained(model, optimizer, range(optimizer.steps, optimizer.steps + 1))
        if durability == "save" and optimizer.steps % 2 == 0:
            optimizer.commit()
        print(optimizer.steps, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Told a folder, a durability, what is offloaded and a folder for temporary files, it starts a run there; and says when it is gone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [sys.executable, "-c", RUNS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        cwd=tmp_path_factory.mktemp("runs"),
    ) as process:  # fmt: skip
        yield process
        process.kill()


def test_a_run_goes_on_where_it_was_committed(tmp_path: Path) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(reference, 0.9)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    mine = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(4):
        for net, opt, way in ((plain, reference, schedule), (model, optimizer, mine)):
            trained(net, opt, range(step, step + 1))
            way.step()
        if step == 2:
            optimizer.commit()
            committed = mine.state_dict()
    optimizer.close()
    del model, optimizer, mine
    _, again = pair()
    resumed = OffloadedOptimizer(again, torch.optim.AdamW, path=tmp_path / "run", lr=123.0, chunk=4096)
    assert resumed.steps == 3
    way = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
    way.load_state_dict(committed)
    for step in range(3, 5):
        trained(again, resumed, range(step, step + 1))
        way.step()
    trained(plain, reference, range(4, 5))
    schedule.step()
    assert differences(plain, reference, again, resumed) == []


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "single"])
@pytest.mark.parametrize("offload", [{"params": "disk"}, {"device_memory": 2_000_000}], ids=["disk", "half"])
def test_every_commit_has_the_weights_that_stay_in_memory(tmp_path: Path, offload: dict[str, Any], options: dict[str, Any]) -> None:
    plain, model = pair(offload=offload)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, **options)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", durability="step", **ADAM, **options)
    trained(model, optimizer, range(3))
    trained(plain, reference, range(3))
    trained(model, optimizer, range(3, 4))
    optimizer.close()
    again = pair(offload=offload)[1]
    resumed = OffloadedOptimizer(again, torch.optim.AdamW, path=tmp_path / "run", **ADAM, **options)
    trained(plain, reference, range(3, 4))
    assert differences(plain, reference, again, resumed) == []


@pytest.mark.parametrize("change", ["class", "model"])
def test_a_folder_with_another_run_is_refused(tmp_path: Path, change: str) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    trained(model, optimizer, range(1))
    optimizer.commit()
    optimizer.close()
    _, other = pair(width=31) if change == "model" else pair()
    before = tw.core.tensors
    with pytest.raises(tw.ConfigError, match="holds a run of something else"):
        OffloadedOptimizer(other, torch.optim.AdamW if change == "model" else torch.optim.Adam, path=tmp_path / "run", **ADAM)
    assert tw.core.tensors is before and loss_of(other, 0).isfinite()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    _, other = pair()
    with pytest.raises(tw.StorageError, match="in use by process"):
        OffloadedOptimizer(other, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    assert trained(model, optimizer, range(1))


def test_commit_needs_a_folder_and_a_finished_step(tmp_path: Path) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    with pytest.raises(tw.ConfigError, match="path="):
        optimizer.commit()
    optimizer.close()
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    with pytest.raises(tw.StorageError, match="nothing was committed"):
        optimizer.rollback()
    loss_of(model, 0).backward()
    with pytest.raises(tw.ConflictError, match="in the middle of a step"):
        optimizer.commit()
    optimizer.step()
    optimizer.commit()


def test_commit_before_the_first_step_can_be_gone_back_to(tmp_path: Path) -> None:
    plain, model = pair(offload={"device_memory": 2_000_000})
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    optimizer.commit()
    first = trained(model, optimizer, range(3))
    optimizer.rollback()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    assert optimizer.steps == 0
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(3)) == first == trained(plain, reference, range(3))


@pytest.mark.parametrize("durability", ["step", "save"])
@pytest.mark.parametrize("offload", ["disk", "half"])
def test_sigkill_at_random_moments_leaves_the_last_commit_bit_for_bit(
    tmp_path: Path, durability: str, offload: str, runs: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, temporary, chance, steps = tmp_path / "run", tmp_path / "temporary", random.Random(), 0
    temporary.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    plain, _ = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    fields: dict[str, Any] = {"params": "disk"} if offload == "disk" else {"device_memory": 2_000_000}
    assert runs.stdin is not None and runs.stdout is not None
    for _ in range(max(1, TRIALS // 4)):
        print(folder, durability, offload, temporary, file=runs.stdin, flush=True)
        begun = runs.stdout.readline().split()
        assert begun[1:] == [str(steps)]
        for _ in range(chance.randint(2, 4)):  # of two steps one at least is committed before it is printed
            runs.stdout.readline()
        threading.Event().wait(chance.uniform(0.0, 0.15))
        os.kill(int(begun[0]), signal.SIGKILL)
        said: list[str] = []
        for line in iter(runs.stdout.readline, f"gone {-signal.SIGKILL}\n"):
            assert line.strip().isdigit(), line
            said += line.split()
        _, model = pair(offload=fields)
        optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=folder, **ADAM)
        assert optimizer.steps > steps
        # What was printed after a commit was committed; one more step may have been.
        if said and durability == "step":
            assert int(said[-1]) <= optimizer.steps <= int(said[-1]) + 1
        trained(plain, reference, range(steps, optimizer.steps))
        steps = optimizer.steps
        assert differences(plain, reference, model, optimizer) == []
        assert set(os.listdir(folder)) == {"LOCK", optimizer._works.store.file.path.name} | ({"manifest.json"} if steps else set())
        assert trained(model, optimizer, range(steps, steps + 2)) == trained(plain, reference, range(steps, steps + 2))
        optimizer.commit()
        steps += 2
        optimizer.close()
        del model, optimizer
        gc.collect()
        assert not list(temporary.glob("torchwrap-*"))
    assert steps


def test_a_fork_cannot_train(tmp_path: Path) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    trained(model, optimizer, range(1))
    optimizer.commit()
    optimizer.zero_grad()
    child = os.fork()
    if child == 0:
        try:
            optimizer.commit()
        except tw.StorageError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert trained(model, optimizer, range(1, 2))

"""Processes that are killed, end without unwrapping, are forked, or may not write: no orphan, no lost file, no deadlock."""

from __future__ import annotations

import gc
import os
import resource
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torchwrap as tw
from tests.contract.compare import model_difference
from tests.contract.processes import fresh_process
from tests.faults.children import DEADLINE_S, in_child
from tests.faults.disks import Disk
from tests.faults.subjects import checkpoint, lean, llama, probe, tower, twin_of
from tests.faults.tally import Faults, same
from torchwrap.core.errors import DiskFullError, StorageError


def left(path: Path) -> list[str]:
    """What there is in a folder."""
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else []


ENDS = {"return": "pass", "exit": "sys.exit(0)", "collected": "del model", "exception": "1 / 0"}


def test_processes_end_without_unwrapping(tmp_path: Path, faults: Faults) -> None:
    """Four ends of an interpreter; each process has a spill folder of its own, and none of them is left."""
    program = f"""
        import tempfile
        from pathlib import Path
        from tests.faults.subjects import lean, probe, tower, twin_of
        tempfile.tempdir = {tempfile.gettempdir()!r}
        ends, root = {ENDS!r}, Path({str(tmp_path)!r})
        for name, end in ends.items():
            if child := os.fork():
                os.waitpid(child, 0)
                continue
            if name == "exception":
                sys.stderr = open(os.devnull, "w")
            model = lean(tower(), path=str(root / name))
            assert torch.equal(probe(model), twin_of(tower)) and list((root / name).iterdir())
            (root / (name + ".right")).touch()
            exec(end)
            break
    """
    fresh_process(program)
    for name in ENDS:
        faults.judged(lambda name=name: name, lambda name: (tmp_path / f"{name}.right").exists() and not left(tmp_path / name))


def test_a_collected_model_leaves_nothing(tmp_path: Path, faults: Faults) -> None:
    model = lean(tower(), path=str(tmp_path / "spill"))
    probe(model)
    assert left(tmp_path / "spill")
    del model
    gc.collect()
    faults.judged(lambda: left(tmp_path / "spill"), lambda found: found == [])


@pytest.mark.parametrize("number", [0, 1, 2, 5, 9, 14])
def test_killed_while_packing(number: int, tmp_path: Path, faults: Faults) -> None:
    """SIGKILL at a write: the next start removes what was left, and the user's checkpoint is whole."""
    path, saved = tmp_path / "spill", checkpoint(tower(), tmp_path / "mine.safetensors")

    def pack() -> None:
        def write(call: int) -> None:
            if call == number:
                os.kill(os.getpid(), signal.SIGKILL)

        from torchwrap.storage import spill

        spill.Backend = lambda: Disk(write=write)
        lean(tower(), path=str(path))

    with faults.intact(saved):
        assert in_child(pack) == -signal.SIGKILL
    assert len(left(path)) == 1
    model = tower()
    model.load_state_dict(load_file(saved))
    faults.survived(lambda: probe(lean(model, path=str(path))), twin_of(tower))
    assert len(left(path)) == 1, "what the killed process left was not removed"
    tw.unwrap(model)
    assert not left(path)


@pytest.mark.parametrize("moment", ["forward", "load", "unwrap"])
def test_killed_later(moment: str, tmp_path: Path, faults: Faults) -> None:
    path = tmp_path / "spill"
    llama().save_pretrained(tmp_path / "checkpoint")

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def use() -> None:
        model = lean(llama(), path=str(path))
        probe(model)
        if moment == "forward":
            model.model.layers[2].register_forward_hook(die)
            probe(model)
        elif moment == "load":
            tw.handle_of(model, "offload").store._disk.backend = Disk(write=die)
            model.load_state_dict(llama().state_dict())
        else:
            tw.handle_of(model, "offload").store.close = die
            tw.unwrap(model)

    with faults.intact(tmp_path / "checkpoint"):
        assert in_child(use) == -signal.SIGKILL
    assert len(left(path)) == 1
    model = llama()
    faults.survived(lambda: probe(lean(model, path=str(path))), twin_of(llama))
    tw.unwrap(model)
    assert not left(path)


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path, faults: Faults) -> None:
    path = tmp_path / "spill"

    def limited() -> Any:
        model = tower()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            lean(model, path=str(path))
        except DiskFullError as error:
            return error, left(path), model_difference(model, tower()), same(probe(model), twin_of(tower))

    def wrapped() -> None:
        error, files, difference, right = in_child(limited)
        assert (files, difference, right) == ([], None, True)
        raise error

    found = faults.detected(wrapped, DiskFullError, says=[path])
    assert found.needed > 4 << 20


def test_a_memory_limit_is_met_or_refused(tmp_path: Path, faults: Faults) -> None:
    """Under a limit on address space wrapping and running end right, or with a `MemoryError`; the model is still whole then."""

    def limited() -> Any:
        model, expected = tower(), twin_of(tower)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            lean(model, path=str(tmp_path / "spill"), io_threads=1)
            return same(probe(model), expected)
        except (MemoryError, RuntimeError) as error:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return isinstance(error, (MemoryError, RuntimeError)) and same(probe(model), expected)

    faults.judged(lambda: in_child(limited), lambda right: right is True)


def test_a_folder_that_this_user_may_not_write_to(tmp_path: Path, faults: Faults) -> None:
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o555)

    def refused() -> Any:
        model, expected = tower(), twin_of(tower)
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            lean(model, path=str(path))
        except StorageError as error:
            return error, model_difference(model, tower()), same(probe(model), expected)

    def wrapped() -> None:
        error, difference, right = in_child(refused)
        assert difference is None and right
        raise error

    try:
        faults.detected(wrapped, StorageError, says=[path])
    finally:
        path.rmdir()


def test_two_processes_in_one_path(tmp_path: Path, faults: Faults) -> None:
    path, expected = tmp_path / "spill", twin_of(tower)
    model = lean(tower(), path=str(path))

    def other() -> Any:
        mine = lean(tower(), path=str(path))
        right = same(probe(mine), expected) and len(left(path)) == 2
        tw.unwrap(mine)
        return right

    faults.judged(lambda: in_child(other), lambda right: right is True)
    assert len(left(path)) == 1
    faults.survived(lambda: probe(model), expected)
    tw.unwrap(model)
    assert not left(path)


def opened(folder: Path) -> nn.Module:
    """Served from the user's checkpoint."""
    llama().save_pretrained(folder / "checkpoint")
    return tw.offload.from_pretrained(folder / "checkpoint", params="disk", k=2)


@pytest.mark.parametrize("then", ["use", "unwrap", "collect"])
@pytest.mark.parametrize("kind", ["spilled", "opened"])
def test_fork_after_wrapping(kind: str, then: str, tmp_path: Path, faults: Faults) -> None:
    model = lean(tower(), path=str(tmp_path / "spill")) if kind == "spilled" else opened(tmp_path)
    expected = probe(model)  # reads for the next pass may be under way at the fork

    def child() -> Any:
        right = 0
        for _ in range(3):
            try:
                right += same(probe(model), expected)
            except StorageError as error:
                assert "fork" in str(error)
        if then == "unwrap":
            tw.unwrap(model)
            right += same(probe(model), expected) - 1
        if then == "collect":
            del model.__dict__["_torchwrap_applied"]
            gc.collect()
        return right

    faults.judged(lambda: in_child(child), lambda right: right in (2, 3))
    assert len(left(tmp_path / "spill")) == (kind == "spilled")
    faults.survived(lambda: probe(model), expected)
    tw.unwrap(model)
    assert same(probe(model), expected) and not left(tmp_path / "spill")


def test_a_forked_child_that_exits_orderly_leaves_its_parents_files(tmp_path: Path, faults: Faults) -> None:
    program = f"""
        from pathlib import Path
        from tests.faults.subjects import lean, probe, tower
        path = Path({str(tmp_path / "spill")!r})
        model = lean(tower(), path=str(path))
        expected = probe(model)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            assert len(list(path.iterdir())) == 1 and torch.equal(probe(model), expected)
            print("right")
    """
    faults.judged(lambda: fresh_process(program), lambda output: "right" in output and not left(tmp_path / "spill"))


def test_fork_while_a_forward_runs_in_another_thread(tmp_path: Path, faults: Faults) -> None:
    """The child has the model, but not the thread that holds its lock: right or an error, never a deadlock."""
    expected, model = twin_of(tower), lean(tower())
    inside, go = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        inside.set()
        assert go.wait(DEADLINE_S)

    hook = model.blocks[1].register_forward_hook(stop)
    other = threading.Thread(target=lambda: probe(model))
    other.start()
    assert inside.wait(DEADLINE_S)

    def child() -> Any:
        hook.remove()
        try:
            return same(probe(model), expected)
        except StorageError as error:
            return "fork" in str(error)

    try:
        outcome = in_child(child)
    finally:
        go.set()
        other.join(DEADLINE_S)
        hook.remove()
    faults.judged(lambda: outcome, lambda found: found is True)
    faults.survived(lambda: probe(model), expected)


@pytest.mark.parametrize("moment", ["converting", "planning", "living"])
def test_killed_beside_a_converted_checkpoint(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    """What `from_pretrained(dtype=)` wrote for a process that was killed is removed by the next one; that of a living one stays."""
    path, folder = tmp_path / "spill", tmp_path / "checkpoint"
    llama().save_pretrained(folder)
    plain = type(llama()).from_pretrained(folder, dtype=torch.bfloat16).eval()

    def opened() -> nn.Module:
        return tw.offload.from_pretrained(folder, dtype=torch.bfloat16, params="disk", path=str(path))

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def use() -> None:
        from torchwrap.weights import folder as opening

        if moment == "converting":
            opening.as_placeholders = die
        elif moment == "planning":
            opening.apply = die
        model = opened()
        probe(model)
        die()

    living = opened()
    mine = left(path)
    with faults.intact(folder):
        assert in_child(use) == -signal.SIGKILL
    assert len(left(path)) > len(mine)
    model = opened()
    assert set(mine) <= set(left(path)) and len(left(path)) == 2 * len(mine), "an orphan stayed, or a living folder went"
    for opened_model in (model, living):
        faults.survived(lambda opened_model=opened_model: probe(opened_model), probe(plain))
    del living, model, opened_model
    gc.collect()
    assert not left(path)

"""Files, disks, signals and threads that fail while a model trains: right steps or a typed error, and never a step that counts twice."""

from __future__ import annotations

import functools
import os
import pkgutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.faults.children import in_child
from tests.faults.disks import Disk, hanging, settle
from tests.faults.tally import Faults
from tests.hangs import hanging_now
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer
from torchwrap.core.errors import CorruptDataError, StorageError
from torchwrap.storage import Backend

ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}
PATIENCE_S = 0.3

overlapping = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])


class Training:
    """One model twice: in memory, and offloaded with an optimizer of ours."""

    def __init__(self, offload: dict[str, Any] | None = None, **options: Any) -> None:
        self.plain, self.model = pair(offload=offload)
        self.reference = torch.optim.AdamW(self.plain.parameters(), lr=ADAM["lr"])
        self.optimizer = OffloadedOptimizer(self.model, torch.optim.AdamW, **ADAM, **options)

    def steps(self, *numbers: int) -> None:
        """Take these steps in both."""
        assert trained(self.model, self.optimizer, iter(numbers)) == trained(self.plain, self.reference, iter(numbers))

    def equal(self) -> bool:
        """Whether all weights and all state are."""
        return differences(self.plain, self.reference, self.model, self.optimizer) == []

    def disk(self, backend: Backend) -> Backend:
        """Writes of the optimizer go there from now on; what was there."""
        disk = self.optimizer._works.store._disk
        before, disk.backend = disk.backend, backend
        return before

    def end(self) -> None:
        """Close, and let the model go."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tw.TorchwrapWarning)
            self.optimizer.close()
        tw.unwrap(self.model)


# -- files -----------------------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit in every block of the file."""
    content = bytearray(path.read_bytes())
    for offset in range(2048, len(content), 4096):
        content[offset] ^= 8
    with path.open("r+b") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


EDITS: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "replace": replace, "remove": os.unlink}


@overlapping
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("where", ["weights", "run"])
def test_a_file_that_changes_under_a_training_run(where: str, edit: str, overlap: bool, tmp_path: Path, faults: Faults) -> None:
    """`weights` are those that the model was wrapped with, before any was updated; `run` holds weights and state of a run."""
    run = Training(path=tmp_path / "run", overlap=overlap)
    store = tw.handle_of(run.model, "offload").store
    assert store is not None
    if where == "run":
        run.steps(0, 1)
        run.optimizer.commit()
    EDITS[edit](store.file.path if where == "weights" else run.optimizer._works.store.file.path)

    def step() -> None:
        trained(run.model, run.optimizer, range(2, 3))

    trained(run.plain, run.reference, range(2, 3))
    # A file behind a descriptor is whole whoever has its name, but then no commit may say that it can be found.
    _, error = faults.judged(step, lambda _: run.equal(), StorageError)
    assert isinstance(error, StorageError) or edit in ("replace", "remove")
    if where == "run" and edit != "flip":  # bits are looked at where they are read
        faults.detected(run.optimizer.commit, StorageError, tw.ConflictError)
    run.optimizer._works.close()


@pytest.mark.parametrize("edit", EDITS)
def test_a_run_whose_file_changed_is_not_continued_with_other_values(edit: str, tmp_path: Path, faults: Faults) -> None:
    run = Training(path=tmp_path / "run")
    run.steps(0, 1)
    run.optimizer.commit()
    path = run.optimizer._works.store.file.path
    run.end()
    EDITS[edit](path)

    def reopened() -> None:
        again = Training(path=tmp_path / "run")
        try:
            again.steps(2)
        finally:
            again.end()

    faults.detected(reopened, CorruptDataError, StorageError)


def test_a_folder_that_is_removed_under_a_training_run(tmp_path: Path, faults: Faults) -> None:
    run = Training(path=tmp_path / "run")
    run.steps(0)
    run.optimizer.commit()
    for file in (tmp_path / "run").iterdir():
        file.unlink()
    (tmp_path / "run").rmdir()
    faults.survived(lambda: run.steps(1), lambda _: run.equal())
    faults.detected(run.optimizer.commit, StorageError, says=["run"])
    run.end()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """48 MiB of tmpfs, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.filterwarnings("ignore:.*lies in memory:torchwrap.TorchwrapWarning")
def test_a_disk_that_fills_up_fails_at_the_commit_and_neither_before_nor_for_good(small_disk: Path, faults: Faults) -> None:
    """Room for weights and state was reserved when the optimizer was made; a commit needs some for its manifest."""
    run = Training(path=small_disk / "run")
    run.steps(0, 1)
    run.optimizer.commit()
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    run.steps(2, 3)
    faults.detected(run.optimizer.commit, tw.DiskFullError, says=[small_disk])
    run.steps(4)
    run.end()
    again = Training(path=small_disk / "run")
    assert again.optimizer.steps == 2
    trained(again.plain, again.reference, range(2))
    assert again.equal()
    (small_disk / "filler").unlink()
    again.steps(2)
    again.optimizer.commit()
    again.end()
    assert Training(path=small_disk / "run").optimizer.steps == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.filterwarnings("ignore:.*lies in memory:torchwrap.TorchwrapWarning")
@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_whose_commit_finds_the_disk_full_is_repeated_and_counts_once(overlap: bool, small_disk: Path, faults: Faults) -> None:
    run = Training(path=small_disk / "run", durability="step", overlap=overlap)
    run.steps(0)
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    run.optimizer.zero_grad()
    loss_of(run.model, 100).backward()
    for _ in range(2):
        faults.detected(run.optimizer.step, tw.DiskFullError, says=[small_disk])
    (small_disk / "filler").unlink()
    run.optimizer.step()
    trained(run.plain, run.reference, range(1, 2))
    assert run.optimizer.steps == 2 and run.equal()
    run.steps(2)  # the next one is a step again
    run.end()
    assert Training(path=small_disk / "run").optimizer.steps == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.filterwarnings("ignore:.*lies in memory:torchwrap.TorchwrapWarning")
def test_a_disk_without_room_for_the_state_is_refused_before_training(small_disk: Path, faults: Faults) -> None:
    (small_disk / "filler").write_bytes(bytes(40 << 20))
    plain, model = pair()
    make = functools.partial(OffloadedOptimizer, model, torch.optim.AdamW, path=small_disk / "run", **ADAM)
    error = faults.detected(make, tw.DiskFullError)
    assert error.needed > error.available
    (small_disk / "filler").unlink()
    reference, optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2), make()
    assert trained(model, optimizer, range(1)) == trained(plain, reference, range(1))
    optimizer.close()


# -- disks that hang -------------------------------------------------------------------------------------------------------------------


class Stuck(Disk):
    """Write number `wanted` blocks until `go` is set; `began` tells that it does."""

    def __init__(self, wanted: int = 0) -> None:
        super().__init__(write=self._hang)
        self.wanted, self.go, self.began = wanted, threading.Event(), threading.Event()
        self.ended = False

    def _hang(self, number: int) -> None:
        if number == self.wanted:
            with hanging_now():
                self.began.set()
                let_go = self.go.wait(20)
            self.ended = True
            assert let_go


def patient(**options: Any) -> Training:
    return Training({"params": "disk", "io_timeout_s": PATIENCE_S}, **options)


def finished(run: Training) -> None:
    """Call `step` as its error says, until it is done."""
    for _ in range(10):
        try:
            run.optimizer.step()
        except StorageError:
            continue
        return
    raise AssertionError("the step cannot be finished")


@overlapping
@pytest.mark.parametrize("wanted", [0, 3, 11])
@pytest.mark.parametrize("way", ["read", "write"])
@pytest.mark.usefixtures("only_hangs")
def test_a_disk_that_hangs_in_an_update_is_an_error_and_the_step_counts_once(
    way: str, wanted: int, overlap: bool, tmp_path: Path, faults: Faults
) -> None:
    run = patient(path=tmp_path / "run", overlap=overlap)
    run.steps(0, 1)
    run.optimizer.commit()
    reader = run.optimizer._works.reader
    stuck: Any = hanging(wanted) if way == "read" else Stuck(wanted)
    with serving(run, stuck, way):
        run.optimizer.zero_grad()
        loss = loss_of(run.model, 200)
        in_backward = None
        if overlap:
            _, in_backward = faults.judged(loss.backward, lambda _: True, StorageError)
        else:
            loss.backward()
        faults.detected(run.optimizer.step, StorageError)
        assert stuck.began.is_set()
        stuck.release() if way == "read" else stuck.go.set()
    assert reader is run.optimizer._works.reader
    if in_backward is not None:  # not all gradients came
        run.optimizer.rollback()
        trained(run.model, run.optimizer, range(2, 3))
    else:
        finished(run)
    trained(run.plain, run.reference, range(2, 3))
    assert run.equal()
    run.steps(3)
    assert run.equal()
    run.end()


@contextmanager
def serving(run: Training, disk: Any, way: str) -> Iterator[None]:
    reader = run.optimizer._works.reader
    if way == "write":
        before = run.disk(disk)
        yield
        run.disk(before)
        return
    before, reader.backend = reader.backend, disk
    pools = reader._pool
    if pools is not None:
        pools.stop(0.0)
        reader._pool = None
    yield
    reader.backend = before
    if reader._pool is not None:
        reader._pool.backend = before


@pytest.mark.parametrize("way", ["read", "write"])
@pytest.mark.usefixtures("only_hangs")
def test_closing_while_an_update_hangs(way: str, tmp_path: Path, faults: Faults) -> None:
    run = patient(path=tmp_path / "run", overlap=False)
    run.steps(0)
    stuck: Any = hanging(0) if way == "read" else Stuck()
    with serving(run, stuck, way):
        loss_of(run.model, 100).backward()
        faults.detected(run.optimizer.step, StorageError)
        run.optimizer.close()
        assert not (stuck.ended.is_set() if way == "read" else stuck.ended)  # it did not wait for the disk
        stuck.release() if way == "read" else stuck.go.set()
    settle(run.model)
    again = Training(path=tmp_path / "other")
    again.steps(0)
    again.end()


# -- signals ---------------------------------------------------------------------------------------------------------------------------


COMMITTING = ["os.fsync", "os.rename", "os.chmod"]
KILLS = range(10)  # a commit makes five of these calls; each kills before it is made, or after


@pytest.mark.parametrize("number", KILLS)
def test_killed_at_each_call_of_a_commit(number: int, tmp_path: Path, faults: Faults) -> None:
    def use() -> None:
        _, model = pair()
        optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
        trained(model, optimizer, range(1))
        optimizer.commit()
        trained(model, optimizer, range(1, 2))
        moments = iter(range(1000))

        def at(call: Callable[..., Any]) -> Callable[..., Any]:
            def dying(*args: Any, **kwargs: Any) -> Any:
                if next(moments) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*args, **kwargs)
                if next(moments) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return dying

        for name in COMMITTING:
            setattr(os, name.removeprefix("os."), at(pkgutil.resolve_name(name)))
        optimizer.commit()

    assert in_child(use) == -signal.SIGKILL
    run = Training(path=tmp_path / "run")
    steps = run.optimizer.steps
    renamed = 5  # sync of the data, of the manifest, then its new name
    assert steps == (2 if number >= renamed else 1)
    trained(run.plain, run.reference, range(steps))
    faults.survived(lambda: run, lambda _: run.equal())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"LOCK", "manifest.json", run.optimizer._works.store.file.path.name}
    run.steps(steps)
    run.end()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """An interrupt is raised here, although a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def signals_go_to_other_threads() -> Iterator[None]:
    """What a signal that comes just before a wait looks like to this thread: it is noted, and the wait is not interrupted."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@pytest.mark.parametrize("arrives", [nullcontext, signals_go_to_other_threads], ids=["in-the-wait", "just-before-it"])
@overlapping
def test_ctrl_c_while_a_step_waits(
    overlap: bool, arrives: Callable[[], AbstractContextManager[None]], tmp_path: Path, faults: Faults, interrupts: None
) -> None:
    run = Training(path=tmp_path / "run", overlap=overlap)
    run.steps(0, 1)
    run.optimizer.commit()
    stuck = Stuck(5)
    before = run.disk(stuck)

    def interrupt() -> None:
        assert stuck.began.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()

    def step() -> None:
        run.optimizer.zero_grad()
        loss_of(run.model, 200).backward()
        run.optimizer.step()

    with arrives():
        faults.detected(step, KeyboardInterrupt)
    assert not stuck.ended  # the interrupt did not have to wait for the disk
    thread.join()
    stuck.go.set()
    run.disk(before)
    if overlap:  # the backward was cut short
        run.optimizer.rollback()
        trained(run.model, run.optimizer, range(2, 3))
    else:
        run.optimizer.step()
    trained(run.plain, run.reference, range(2, 3))
    assert run.equal()
    run.steps(3)
    assert run.equal()
    run.end()


# -- threads ---------------------------------------------------------------------------------------------------------------------------


@overlapping
@pytest.mark.parametrize("when", ["head.weight", "blocks.2.up.weight", "blocks.0.norm.weight"])
def test_a_forward_in_another_thread_sees_the_weights_of_one_step(when: str, overlap: bool, faults: Faults) -> None:
    run = Training(overlap=overlap)
    run.steps(0)
    before = loss_of(run.plain, 7)
    got: list[Any] = []
    inside = threading.Event()

    def look() -> None:
        try:
            with torch.no_grad():
                got.append(loss_of(run.model, 7))
        except tw.ConflictError as error:
            got.append(error)
        inside.set()

    def pause(parameter: torch.Tensor) -> None:
        run.optimizer._works.updater.wait()
        threading.Thread(target=look).start()
        assert inside.wait(20)

    hook = run.model.get_parameter(when).register_post_accumulate_grad_hook(pause)
    run.optimizer.zero_grad()
    loss_of(run.model, 100).backward()
    hook.remove()
    run.optimizer.step()

    def seen() -> torch.Tensor:
        if isinstance(got[0], tw.ConflictError):
            raise got[0]
        return got[0]

    faults.judged(seen, before.detach(), *([tw.ConflictError] if overlap else []))
    trained(run.plain, run.reference, range(1, 2))
    assert run.equal()
    run.end()

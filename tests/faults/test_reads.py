"""Disks that read badly: late, little, nothing, or something else. Right result or typed error, and right again afterwards."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.faults.disks import Disk, erring, error, fails, flipped, hanging, interrupted, settle, short, under, zeroed
from tests.faults.subjects import IDS, at_rest, lean, llama, probe, right_again, tower, twin_of
from tests.faults.tally import Faults, same
from tests.storage.rings import beneath_every_reader
from torchwrap.core.errors import CorruptDataError, StorageError
from torchwrap.storage.uring import unavailable_reason
from torchwrap.storage.workers import Pool

MAKES: dict[str, Callable[[], nn.Module]] = {"tower": tower, "tied": lambda: tower(tied=True), "llama": llama}


@pytest.fixture(autouse=True, params=["threads", "ring"])
def reads_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of this with threads that read, and with one thread that has many reads under way."""
    if request.param == "ring":
        if unavailable_reason():
            pytest.skip(str(unavailable_reason()))
        beneath_every_reader(monkeypatch)
    return str(request.param)


every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
every_slots = pytest.mark.parametrize("slots", [1, 2], ids=["one-slot", "two-slots"])


@pytest.mark.parametrize(
    "disk",
    [lambda: short(511), lambda: short(4096), lambda: short(5000), lambda: interrupted(2), lambda: interrupted(5)],
    ids=["511-bytes", "one-block", "odd", "eintr-often", "eintr"],
)
@every_make
def test_short_and_interrupted_reads_are_continued(make: Callable[[], nn.Module], disk: Callable[[], Disk], faults: Faults) -> None:
    expected, model = twin_of(make), lean(make())
    with under(model, disk()):
        for _ in range(2):
            faults.survived(lambda: probe(model), expected)
    right_again(model, expected)


CALLS = 8
"""Reads of about two passes of a small model with one reading thread."""


@pytest.mark.parametrize("number", range(CALLS))
@pytest.mark.parametrize("make", [tower, llama], ids=["tower", "llama"])
def test_one_io_error_is_retried(make: Callable[[], nn.Module], number: int, faults: Faults) -> None:
    expected, model = twin_of(make), lean(make(), io_threads=1)
    with under(model, erring(number)):
        for _ in range(2):
            faults.survived(lambda: probe(model), expected)
    right_again(model, expected)


@pytest.mark.parametrize("number", range(CALLS))
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("make", [tower, llama], ids=["tower", "llama"])
def test_a_bad_sector_at_each_call(make: Callable[[], nn.Module], slots: int, number: int, faults: Faults) -> None:
    expected, model = twin_of(make), lean(make(), slots=slots, io_threads=1)
    disk = erring(number, number + 1)
    with under(model, disk):
        errors = []
        for _ in range(4):
            _, error = faults.judged(lambda: probe(model), expected, StorageError)
            at_rest(model)
            errors += [error] if error is not None else []
        assert disk.hits == 2 and len(errors) <= 1
        for found in errors:
            assert not isinstance(found, CorruptDataError) and found.__cause__.errno == errno.EIO
            assert ".tws, offset " in found.where and "dmesg" in str(found)
    right_again(model, expected)


def test_a_read_ahead_that_failed_is_not_what_the_next_call_gets(faults: Faults) -> None:
    """The disk fails only while nobody waits for it: between two calls."""
    expected, model = twin_of(llama), lean(llama())
    broken = threading.Event()

    def read(number: int, real: Any, fd: int, target: memoryview, offset: int) -> int:
        if broken.is_set():
            raise error(errno.EIO)
        return real(fd, target, offset)

    with under(model, Disk(read)):
        for _ in range(2):
            assert same(probe(model), expected)
        hook = model.model.layers[3].register_forward_hook(lambda *_: broken.set())
        faults.survived(lambda: probe(model), expected)
        settle(model)
        hook.remove()
        broken.clear()
        faults.survived(lambda: probe(model), expected)
    right_again(model, expected)


@pytest.mark.parametrize(
    "raised",
    [
        lambda: error(errno.EIO),
        lambda: error(errno.ENXIO),
        lambda: error(errno.ESTALE),
        lambda: MemoryError("no memory"),
        KeyboardInterrupt,
        lambda: SystemExit(3),
        lambda: RuntimeError("odd"),
    ],
    ids=["eio", "enxio", "estale", "memory", "interrupt", "exit", "other"],
)
@every_make
def test_a_dead_disk(make: Callable[[], nn.Module], raised: Callable[[], BaseException], faults: Faults) -> None:
    expected, model = twin_of(make), lean(make())
    assert same(probe(model), expected)
    with under(model, fails(raised)):
        for _ in range(2):
            found = faults.detected(lambda: probe(model), StorageError, says=[".tws, offset "])
            assert isinstance(found, OSError) and type(found.__cause__) is type(raised())
            at_rest(model)
        faults.detected(lambda: tw.unwrap(model), StorageError)
        at_rest(model)
        assert "offload" in tw.wrappers_of(model)
    right_again(model, expected)


@pytest.mark.filterwarnings("ignore::torchwrap.TorchwrapWarning")  # the ring of the healthy disk, which is another one, says it again
def test_a_refused_direct_read_falls_back_with_one_warning(faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    refused = []

    def read(number: int, real: Any, fd: int, target: memoryview, offset: int) -> int:
        if fd == model_file.fd(True):
            refused.append(number)
            raise error(errno.EINVAL)
        return real(fd, target, offset)

    model_file = tw.handle_of(model, "offload").store.file
    with under(model, Disk(read)), pytest.warns(tw.TorchwrapWarning, match="O_DIRECT") as caught:
        for _ in range(2):
            faults.survived(lambda: probe(model), expected)
    assert refused and len(caught) == 1
    right_again(model, expected)


@pytest.mark.parametrize("spoil", [flipped, zeroed], ids=["bit", "block"])
@pytest.mark.parametrize("number", range(CALLS))
@pytest.mark.parametrize("make", [tower, llama], ids=["tower", "llama"])
def test_wrong_bytes_at_each_call(make: Callable[[], nn.Module], number: int, spoil: Callable[[int], Disk], faults: Faults) -> None:
    expected, model = twin_of(make), lean(make(), io_threads=1)
    disk = spoil(number)
    with under(model, disk):
        errors = []
        for _ in range(4):
            # A spoiled byte may be one between two tensors, which nobody uses; then the result is right.
            _, error = faults.judged(lambda: probe(model), expected, CorruptDataError, says=["sum"])
            at_rest(model)
            errors += [error] if error is not None else []
        assert disk.hits == 1 and len(errors) <= 1
    right_again(model, expected)


@pytest.mark.parametrize("spoil", [flipped, zeroed], ids=["bit", "block"])
@pytest.mark.parametrize("verify", ["first", "always"])
@every_make
def test_wrong_bytes_in_every_call(make: Callable[[], nn.Module], verify: str, spoil: Callable[[int], Disk], faults: Faults) -> None:
    expected, model = twin_of(make), lean(make(), verify=verify)
    with under(model, spoil(-1)):
        for _ in range(2):
            faults.detected(lambda: probe(model), CorruptDataError, says=["sum", "0x"])
            at_rest(model)
        faults.detected(lambda: tw.unwrap(model), CorruptDataError)
    right_again(model, expected)


def test_wrong_bytes_of_the_first_read_of_a_table_whose_rows_are_no_multiple_of_eight(faults: Faults) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(90_001, 3), nn.Linear(3, 3), nn.Linear(3, 3)).eval()

    def once(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(IDS)

    expected, model = once(make()), lean(make(), slots=0)
    with under(model, flipped(-1)):
        faults.detected(lambda: once(model), CorruptDataError)
    assert same(once(model), expected)


def test_slow_disk_whose_every_read_starts_only_when_it_is_waited_for(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower(), slots=1)  # no unit is read beside the one that is waited for
    wanted = threading.Event()
    real_wait = Pool.wait

    def wait(pool: Pool, *args: Any) -> None:
        wanted.set()
        try:
            real_wait(pool, *args)
        finally:
            wanted.clear()

    def read(number: int, real: Any, fd: int, target: memoryview, offset: int) -> int:
        assert wanted.wait(20)
        return real(fd, target, offset)

    monkeypatch.setattr(Pool, "wait", wait)
    with under(model, Disk(read)):
        for _ in range(2):
            faults.survived(lambda: probe(model), expected)
        stats = tw.handle_of(model, "offload").stats()
        # Rows of the embedding are waited for as well, once a pass, and may let the first unit through.
        assert 2 < stats["unit_uses"] - 2 <= stats["stalls"] <= stats["unit_uses"] and stats["stall_s"] > 0
    right_again(model, expected)


@every_slots
@pytest.mark.parametrize("number", [0, 1, 3, 4])
@pytest.mark.parametrize("make", [tower, llama], ids=["tower", "llama"])
@pytest.mark.usefixtures("only_hangs")
def test_a_hanging_read_is_an_error_and_nothing_of_it_is_used_later(
    make: Callable[[], nn.Module], number: int, slots: int, faults: Faults
) -> None:
    expected, model = twin_of(make), lean(make(), slots=slots, io_timeout_s=0.1)
    for _ in range(2):
        assert same(probe(model), expected)
    disk = hanging(number)
    with under(model, disk, trim=False):  # views of the slots are known, and must not outlive a slot that is given up
        hung = 0
        for _ in range(4):
            _, error = faults.judged(lambda: probe(model), expected, StorageError)
            at_rest(model)
            if error is not None:
                hung += 1
                assert "no progress for 0.1 s" in str(error) and ".tws, offset" in error.where
        assert hung <= 2, "a hang is met by who waits for it, not by everybody after"
        disk.release()
        for _ in range(3):
            assert same(probe(model), expected)
    right_again(model, expected)


def patient(model: nn.Module) -> None:
    """From now on a read that is slow because the test machine is busy is no hang."""
    handle = tw.handle_of(model, "offload")
    for waiting in (handle.engine, *handle.tables.values()):
        waiting._timeout_s = 60.0


@pytest.mark.usefixtures("only_hangs")
def test_a_hang_that_ends_while_the_next_rows_are_read(faults: Faults) -> None:
    """The table's buffer belongs to a read that hangs; what that read brings later must not become somebody's rows."""
    expected, model = twin_of(tower), lean(tower(), io_timeout_s=0.05, verify="header")
    other = IDS + 100
    expected_other = probe(tower(), other % 8192)
    disk = hanging(0)
    with under(model, disk):
        faults.detected(lambda: probe(model), StorageError, says=["no progress"])

        patient(model)

        def read(number: int, real: Any, fd: int, target: memoryview, offset: int) -> int:
            count = real(fd, target, offset)
            disk.release()  # the old rows arrive just after the new ones
            return count

        with under(model, Disk(read), trim=False):
            faults.survived(lambda: probe(model, other % 8192), expected_other)
    right_again(model, expected)


@pytest.mark.usefixtures("only_hangs")
def test_closing_while_a_read_hangs(faults: Faults) -> None:
    model = lean(tower(), io_timeout_s=0.05)
    disk = hanging(1)
    with under(model, disk):
        faults.detected(lambda: probe(model), StorageError)
        tw.handle_of(model, "offload").reader.close(0.05)
        faults.detected(lambda: probe(model), StorageError, says=["closed"])
        at_rest(model)
        disk.release()


def test_wrong_bytes_while_resident_weights_are_read_again_for_unwrap(tmp_path: Path, faults: Faults) -> None:
    expected, model = twin_of(llama), lean(llama())
    with under(model, flipped(2)):
        faults.judged(lambda: probe(tw.unwrap(model)), expected, CorruptDataError, says=["sum64"])
    if "offload" in tw.wrappers_of(model):
        right_again(model, expected)

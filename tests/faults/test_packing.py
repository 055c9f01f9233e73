"""Wrapping that fails half-way: the model is as it was, nothing of the user's is lost, nothing of ours is left."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.compare import model_difference
from tests.faults.disks import Disk, beneath_all, error, fails
from tests.faults.subjects import lean, llama, probe, tower, twin_of
from tests.faults.tally import Faults, same
from tests.weights.budgets import smallest_budget
from torchwrap.core.errors import DiskFullError, StorageError
from torchwrap.core.tensors import bind as real_bind

WRITES = 24
"""More calls that write, reserve or flush than packing a tower takes."""


def packed(path: Path, make: Callable[[], nn.Module] = tower, **fields: Any) -> Callable[[nn.Module], nn.Module]:
    """What wraps a model with its weights in `path`; the budget is worked out beforehand, on a healthy disk."""
    fields = {"params": "disk", "k": 2, **fields}
    least = smallest_budget(make(), **fields)
    return lambda model: tw.offload(model, device_memory=least, path=str(path), **fields)


def failing_from(number: int, code: int, *, once: bool = False) -> Disk:
    """Writes fail with `code` from call `number` on, or only then."""

    def write(call: int) -> None:
        if call == number or (call > number and not once):
            disk.hits += 1
            raise error(code)

    disk = Disk(write=write)
    return disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS], ids=["full", "quota", "eio", "read-only"])
@pytest.mark.parametrize("number", range(0, WRITES, 3))
def test_disk_fails_from_each_write_of_packing_on(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    wrap, path, model = packed(tmp_path / "spill"), tmp_path / "spill", tower()
    expected, before = twin_of(tower), [id(p) for p in model.parameters()]
    disk = failing_from(number, code)
    beneath_all(monkeypatch, disk)
    kind = DiskFullError if code in (errno.ENOSPC, errno.EDQUOT) else StorageError
    _, raised = faults.judged(lambda: probe(wrap(model)), expected, kind, says=[path])
    monkeypatch.undo()
    assert (raised is not None) == (disk.hits > 0)
    if raised is not None:
        assert isinstance(raised, DiskFullError) == (kind is DiskFullError) and isinstance(raised, OSError)
        assert kind is not DiskFullError or raised.needed > 0
        assert not list(path.iterdir()), "orphans"
        assert model_difference(model, tower()) is None and [id(p) for p in model.parameters()] == before
        assert same(probe(model), expected)
        wrap(model)
    assert same(probe(model), expected)
    tw.unwrap(model)
    assert same(probe(model), expected) and not list(path.iterdir())


@pytest.mark.parametrize("number", range(0, WRITES, 4))
@pytest.mark.parametrize("kind", ["short", "eintr", "eio-once"])
def test_odd_writes_are_completed(number: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    wrap, model, expected = packed(tmp_path / "spill"), tower(), twin_of(tower)

    def write(call: int) -> int | None:
        if call != number:
            return None
        if kind == "short":
            return 4096
        raise error(errno.EINTR if kind == "eintr" else errno.EIO)

    beneath_all(monkeypatch, Disk(write=write))
    _, raised = faults.judged(lambda: probe(wrap(model)), expected, StorageError)
    monkeypatch.undo()
    assert raised is None or number == 0, "only the reservation, which is one call, may fail at once"
    if raised is not None:
        assert not list((tmp_path / "spill").iterdir())
        wrap(model)
    assert same(probe(model), expected)
    tw.unwrap(model)
    assert same(probe(model), expected)


@pytest.mark.parametrize("number", range(0, WRITES, 5))
@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt, lambda: MemoryError("no memory"), lambda: SystemExit(1)], ids=["ctrl-c", "memory", "exit"]
)
def test_packing_is_interrupted(
    number: int, raised: Callable[[], BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    wrap, model, expected = packed(tmp_path / "spill"), tower(), twin_of(tower)

    def write(call: int) -> None:
        if call == number:
            raise raised()

    beneath_all(monkeypatch, Disk(write=write))
    _, found = faults.judged(lambda: probe(wrap(model)), expected, type(raised()))
    monkeypatch.undo()
    if found is not None:
        assert not list((tmp_path / "spill").iterdir()) and model_difference(model, tower()) is None
        wrap(model)
    assert same(probe(model), expected)
    tw.unwrap(model)
    assert same(probe(model), expected)


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    wrap, model = packed(tmp_path / "spill"), tower()
    disk = Disk()
    beneath_all(monkeypatch, disk)
    monkeypatch.setattr("torchwrap.storage.writing.free_bytes", lambda _: 1 << 20)
    raised = faults.detected(lambda: wrap(model), DiskFullError, says=["path=", tmp_path / "spill"])
    assert raised.available == 1 << 20 and raised.needed > 4 << 20 and disk.writes == 0
    assert model_difference(model, tower()) is None and not list((tmp_path / "spill").iterdir())


@pytest.mark.parametrize("after", range(0, 20, 3))
def test_wrapping_fails_while_parameters_are_hidden(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    wrap, model, expected = packed(tmp_path / "spill"), tower(), twin_of(tower)
    calls = iter(range(1 << 30))

    def bind(parameter: torch.Tensor, data: torch.Tensor) -> None:
        if next(calls) == after:
            raise MemoryError("no memory")
        real_bind(parameter, data)

    monkeypatch.setattr("torchwrap.weights.place.bind", bind)
    _, found = faults.judged(lambda: probe(wrap(model)), expected, MemoryError)
    monkeypatch.undo()
    if found is not None:
        assert model_difference(model, tower()) is None and not list((tmp_path / "spill").iterdir())
        assert same(probe(model), expected)
        wrap(model)
    assert same(probe(model), expected)
    tw.unwrap(model)
    assert same(probe(model), expected)


def test_attaching_layers_fails_after_weights_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    from torchwrap.core import transaction

    expected, wrap = twin_of(tower), packed(tmp_path / "spill")
    for after in range(7):
        model, calls = tower(), iter(range(1 << 30))

        def attach(*args: Any, calls: Iterator[int] = calls, after: int = after, real: Any = transaction.attach, **kwargs: Any) -> None:
            if next(calls) == after:
                raise KeyboardInterrupt
            real(*args, **kwargs)

        monkeypatch.setattr("torchwrap.core.transaction.attach", attach)
        _, found = faults.judged(lambda model=model: probe(wrap(model)), expected, KeyboardInterrupt)
        monkeypatch.undo()
        if found is not None:
            assert model_difference(model, tower()) is None and not list((tmp_path / "spill").iterdir())
        assert same(probe(model), expected)
        tw.unwrap(model)


@pytest.mark.parametrize("raised", [lambda: error(errno.EIO), KeyboardInterrupt], ids=["eio", "interrupt"])
def test_comparing_with_a_checkpoint_that_cannot_be_read(
    raised: Callable[[], BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    """The weights are in memory: a checkpoint that fails is simply not used, or the error says so; nothing is half wrapped."""
    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "checkpoint")
    model, expected = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint").eval(), twin_of(llama)
    with faults.intact(tmp_path / "checkpoint"):
        beneath_all(monkeypatch, fails(raised))
        _, found = faults.judged(lambda: lean(model), lambda made: True, StorageError)
        monkeypatch.undo()
        if found is not None:
            assert not tw.wrappers_of(model)
            lean(model)
        assert same(probe(model), expected)
        tw.unwrap(model)
        assert same(probe(model), expected)


def test_the_checkpoint_differs_from_the_weights_in_memory(tmp_path: Path, faults: Faults) -> None:
    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "checkpoint")
    model, plain = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint").eval(), llama()
    for one in (model, plain):
        with torch.no_grad():
            one.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    with faults.intact(tmp_path / "checkpoint"):
        faults.survived(lambda: probe(lean(model)), probe(plain))
        faults.survived(lambda: probe(tw.unwrap(model)), probe(plain))

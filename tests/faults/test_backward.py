"""Disks that fail, lie or hang while a backward runs: the right gradients or a typed error, and the right ones afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.faults.disks import Disk, erring, flipped, hanging, settle, under
from tests.faults.subjects import IDS, at_rest, lean, tower
from tests.faults.tally import Faults, same
from torchwrap.core.errors import CorruptDataError, StorageError

CALLS = range(2, 20, 3)

every_slots = pytest.mark.parametrize("slots", [1, 2], ids=["one-slot", "two-slots"])


@pytest.fixture(autouse=True)
def _queue_emptied() -> Iterator[None]:
    yield
    # torch 2.13 keeps what a failed backward had queued, and the graph with it, until the next backward in this thread.
    torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()  # a caught error's frames, which hold a graph; the model, which the graph held, goes in the next collection


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients of one pass, one after another."""
    model.zero_grad()
    model(IDS).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def right_again(model: nn.Module, expected: torch.Tensor) -> None:
    """The fault is gone: two passes give the right gradients, and nothing is left in use."""
    for _ in range(2):
        assert same(gradients(model), expected)
    at_rest(model)


@every_slots
@pytest.mark.parametrize("number", CALLS)
@pytest.mark.parametrize(
    ("disk", "raised"),
    [(lambda n: erring(n, n + 1), StorageError), (flipped, CorruptDataError)],
    ids=["bad-sector", "wrong-bit"],
)
def test_a_fault_at_each_call(disk: Callable[[int], Disk], raised: type[Exception], number: int, slots: int, faults: Faults) -> None:
    expected, model = gradients(tower().train()), lean(tower().train(), slots=slots, io_threads=1)
    gradients(model)  # the sums are known, and what follows what
    with under(model, disk(number)):
        for _ in range(3):
            faults.judged(lambda: gradients(model), expected, raised)
            tw.handle_of(model, "offload").backward.settle()
            at_rest(model)
    right_again(model, expected)


@every_slots
@pytest.mark.parametrize("number", [8, 12])
@pytest.mark.usefixtures("only_hangs")
def test_a_hanging_read_is_an_error_and_nothing_of_it_is_used_later(number: int, slots: int, faults: Faults) -> None:
    expected, model = gradients(tower().train()), lean(tower().train(), slots=slots, io_threads=1, io_timeout_s=0.3)
    disk = hanging(number)
    with under(model, disk):
        for _ in range(2):
            faults.judged(lambda: gradients(model), expected, StorageError)
        disk.release()
    settle(model)
    right_again(model, expected)

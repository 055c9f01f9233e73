"""Routed experts on a device of their own, simulated: only their slices are copied, outputs equal to the bit, and no missing order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.stream.fake_arena import FakeArena, Machine, stand_in
from tests.stream.simulated_cuda import WatchedCuda, simulate
from tests.weights.budgets import smallest_budget
from tests.weights.test_experts import EXPERTS, LAYERS, SLICES, generated, handle, logits, make, routings, settle, token
from torchwrap.stream import routed

every_arena = pytest.mark.parametrize("arena", [FakeArena, WatchedCuda], ids=["fake", "cuda"])
every_mode = pytest.mark.parametrize("mode", ["late", "early", "random"])
every_home = pytest.mark.parametrize("params", ["host", "disk"])


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        made.setattr(routed, "_mark_bytes", lambda piece: piece.nbytes)
        yield made


def on_device(
    patch: pytest.MonkeyPatch, arena: Any, mode: Any, *, host_bytes: int = 1 << 40, **fields: Any
) -> tuple[torch.nn.Module, torch.nn.Module, Machine]:
    """(plain model, offloaded one on the tightest budget, its machine)."""
    machine = Machine(mode)
    if issubclass(arena, WatchedCuda):
        simulate(patch, machine)
    stand_in(patch, machine, arena, host_bytes=host_bytes)
    plain = make("qwen3_moe", "batched_mm")
    model = copy.deepcopy(plain)
    least = smallest_budget(model, params="disk")
    return plain, tw.offload(model, **{"device_memory": least, **fields}), machine


def end(model: torch.nn.Module, machine: Machine) -> None:
    """No order was missing, and no memory is left behind."""
    tw.unwrap(model)
    machine.check()
    assert not [name for name in machine.live_regions if "device" in name]


@every_mode
@every_home
@every_arena
def test_generation(patch: pytest.MonkeyPatch, arena: Any, params: str, mode: Any) -> None:
    plain, wrapped, machine = on_device(patch, arena, mode, params=params)
    expected = generated(plain, 2)
    for _ in range(2):
        assert torch.equal(generated(wrapped, 2), expected)
    assert handle(wrapped).stats()["expert_bytes_skipped"] > 0
    end(wrapped, machine)


@every_home
@every_arena
def test_a_step_brings_the_routed_slices_and_no_others(patch: pytest.MonkeyPatch, arena: Any, params: str) -> None:
    plain, wrapped, machine = on_device(patch, arena, "late", params=params)
    settle(wrapped)
    before = handle(wrapped).stats()
    with routings(wrapped) as seen:
        assert torch.equal(logits(wrapped, token()), logits(plain, token()))
    after = handle(wrapped).stats()
    used = sum(map(len, seen))
    assert after["expert_bytes_read"] - before["expert_bytes_read"] == used * SLICES
    assert after["expert_bytes_skipped"] - before["expert_bytes_skipped"] == (LAYERS * EXPERTS - used) * SLICES
    if params == "host":
        assert after["bytes_read"] == before["bytes_read"]
    end(wrapped, machine)


@every_mode
@every_arena
def test_gradients_between_passes_without(patch: pytest.MonkeyPatch, arena: Any, mode: Any) -> None:
    plain, wrapped, machine = on_device(patch, arena, mode, params="host")
    settle(wrapped)
    for model in (plain, wrapped):
        model(token(5, 3), labels=token(5, 3)).loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in wrapped.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, theirs[name].grad), name
    assert torch.equal(logits(wrapped, token()), logits(plain, token()))
    end(wrapped, machine)


@every_mode
@every_arena
def test_some_in_host_memory_and_some_on_disk(patch: pytest.MonkeyPatch, arena: Any, mode: Any) -> None:
    plain, wrapped, machine = on_device(patch, arena, mode, host_bytes=LAYERS * EXPERTS * SLICES // 2)
    stats = handle(wrapped).stats()
    assert stats["host_bytes"] > 0 and stats["disk_bytes"] > 0
    assert torch.equal(generated(wrapped, 2), generated(plain, 2))
    assert handle(wrapped).stats()["expert_bytes_skipped"] > 0
    end(wrapped, machine)

"""Whole models offloaded on a device of their own, simulated: outputs equal to the bit, and no missing order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import torchwrap as tw
from tests.models import ModelFixture, by_name, run
from tests.stream.fake_arena import FakeArena, HazardError, Machine, stand_in
from tests.stream.simulated_cuda import WatchedCuda, simulate
from tests.weights.budgets import smallest_budget
from tests.weights.training import different_gradients
from torchwrap.storage import aio
from torchwrap.stream.arena import Slot

every_model = pytest.mark.parametrize("fixture", [by_name(name) for name in ("llama", "t5", "mixtral")], ids=lambda f: f.name)
every_mode = pytest.mark.parametrize("mode", ["late", "early", "random"])
every_home = pytest.mark.parametrize("params", ["host", "disk"])


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


def tensors(output: Any) -> list[torch.Tensor]:
    output = getattr(output, "to_tuple", lambda: output)()
    return [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]


def same(got: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def on_device(
    patch: pytest.MonkeyPatch, machine: Machine, fixture: ModelFixture, make: Any = FakeArena, *, host_bytes: int = 1 << 40, **fields: Any
) -> tuple[torch.nn.Module, torch.nn.Module, list[Any]]:
    """(plain model, offloaded one on the tightest budget, arenas)."""
    if issubclass(make, WatchedCuda):
        simulate(patch, machine)
    arenas = stand_in(patch, machine, make, host_bytes=host_bytes)
    plain = fixture.build()
    model = copy.deepcopy(plain)
    least = smallest_budget(model, params=fields.get("params", "disk"), k=fields.get("k", 0))
    return plain, tw.offload(model, **{"device_memory": least, **fields}), arenas


@every_mode
@every_home
@every_model
@pytest.mark.parametrize("make", [FakeArena, WatchedCuda], ids=["fake", "cuda"])
def test_outputs(patch: pytest.MonkeyPatch, make: Any, fixture: ModelFixture, params: str, mode: Any) -> None:
    machine = Machine(mode)
    plain, model, _ = on_device(patch, machine, fixture, make, params=params)
    expected = run(plain, fixture.inputs())
    for _ in range(3):
        assert same(run(model, fixture.inputs()), expected)
    assert machine.copied_bytes > 0
    tw.unwrap(model)
    assert same(run(model, fixture.inputs()), expected)
    machine.check()
    assert not [name for name in machine.live_regions if "device" in name]


@every_mode
@every_home
@every_model
@pytest.mark.parametrize("make", [FakeArena, WatchedCuda], ids=["fake", "cuda"])
def test_gradients_in_training_mode(patch: pytest.MonkeyPatch, make: Any, fixture: ModelFixture, params: str, mode: Any) -> None:
    machine = Machine(mode)
    plain, model, _ = on_device(patch, machine, fixture, make, params=params)
    for step in range(2):
        for each in (plain.train(), model.train()):
            torch.manual_seed(step)
            tensors(each(**fixture.inputs()))[0].square().mean().backward()
    assert different_gradients(model, plain) == []
    machine.check()
    tw.unwrap(model)
    assert not [name for name in machine.live_regions if "device" in name]


@every_mode
@every_model
def test_generated_tokens(patch: pytest.MonkeyPatch, fixture: ModelFixture, mode: Any) -> None:
    machine = Machine(mode)
    plain, model, _ = on_device(patch, machine, fixture, params="host", k=3)
    tokens = [one.generate(**fixture.prompt(), max_new_tokens=5, do_sample=False) for one in (plain, model)]
    assert torch.equal(*tokens)
    machine.check()


@every_mode
@every_model
def test_some_in_host_memory_and_some_on_disk(patch: pytest.MonkeyPatch, fixture: ModelFixture, mode: Any) -> None:
    machine = Machine(mode)
    total = sum(p.numel() * p.element_size() for p in fixture.build().parameters())
    plain, model, _ = on_device(patch, machine, fixture, host_bytes=total // 3, params="auto")
    stats = tw.handle_of(model, "offload").stats()
    assert stats["host_bytes"] > 0 and stats["disk_bytes"] > 0
    expected = run(plain, fixture.inputs())
    for _ in range(2):
        assert same(run(model, fixture.inputs()), expected)
    machine.check()


@every_mode
@every_home
def test_gradients(patch: pytest.MonkeyPatch, params: str, mode: Any) -> None:
    fixture = by_name("llama")
    machine = Machine(mode)
    plain, model, _ = on_device(patch, machine, fixture, params=params)
    for one in (plain, model):
        one(**fixture.inputs()).logits.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())
    machine.check()


@every_home
def test_reads_that_end_in_another_order(patch: pytest.MonkeyPatch, params: str) -> None:
    class Backwards(aio.Backend):
        """The first of two requests waits for the second, if one comes soon."""

        def __init__(self) -> None:
            import threading

            self.turn = threading.Semaphore(0)
            self.count = 0

        def pread(self, fd: int, target: memoryview, offset: int) -> int:
            self.count += 1
            if self.count % 2:
                self.turn.acquire(timeout=0.002)
            else:
                self.turn.release()
            return super().pread(fd, target, offset)

    machine, fixture, plain_init = Machine("random", seed=3), by_name("mixtral"), aio.Reader.__init__
    patch.setattr(aio.Reader, "__init__", lambda self, *args, **more: plain_init(self, *args, **{**more, "backend": Backwards()}))
    plain, model, _ = on_device(patch, machine, fixture, params=params)
    expected = run(plain, fixture.inputs())
    for _ in range(3):
        assert same(run(model, fixture.inputs()), expected)
    machine.check()


def test_new_values_reach_the_device(patch: pytest.MonkeyPatch) -> None:
    fixture = by_name("llama")
    machine = Machine("late")
    plain, model, _ = on_device(patch, machine, fixture, params="host")
    run(model, fixture.inputs())
    state = {name: value * 0.5 for name, value in plain.state_dict().items()}
    for one in (plain, model):
        one.load_state_dict(state)
    assert same(run(model, fixture.inputs()), run(plain, fixture.inputs()))
    machine.check()


def test_a_copy_runs_on_slots_of_its_own(patch: pytest.MonkeyPatch) -> None:
    fixture = by_name("llama")
    machine = Machine("random", seed=1)
    plain, model, arenas = on_device(patch, machine, fixture, params="disk")
    run(model, fixture.inputs())
    twin = copy.deepcopy(model)
    expected = run(plain, fixture.inputs())
    for one in (twin, model, twin):
        assert same(run(one, fixture.inputs()), expected)
    assert sum(bool(arena.live) for arena in arenas) == 2
    machine.check()


def test_an_error_in_a_block_frees_its_slot(patch: pytest.MonkeyPatch) -> None:
    fixture = by_name("llama")
    machine = Machine("late")
    plain, model, _ = on_device(patch, machine, fixture, params="host")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for index in (0, 2, 3):
        hook = model.get_submodule(f"model.layers.{index}.mlp").register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(model, fixture.inputs())
        hook.remove()
        assert same(run(model, fixture.inputs()), run(plain, fixture.inputs()))
    tw.handle_of(model, "offload").trim()
    assert not [name for name in machine.live_regions if "device" in name]
    machine.check()


def test_prefetch_overlaps_with_computation(patch: pytest.MonkeyPatch) -> None:
    fixture = by_name("llama")
    spent = {}
    for k in (1, 2):
        with pytest.MonkeyPatch.context() as own:
            machine = Machine("late", bandwidth=1e5, compute_s=1.0)
            _, model, _ = on_device(own, machine, fixture, params="host", k=k)
            for _ in range(2):
                run(model, fixture.inputs())
            machine.check()
            spent[k] = machine
    assert spent[1].overlap_seconds == 0
    hidden = min(spent[2].copy_seconds, sum(end - start for start, end in spent[2].compute.busy))
    assert spent[2].overlap_seconds > 0.7 * hidden
    assert spent[2].elapsed < 0.75 * spent[1].elapsed


@pytest.mark.parametrize("broken", ["wait_free", "wait_ready", "before_read"])
def test_a_missing_order_is_caught_in_a_whole_model(patch: pytest.MonkeyPatch, broken: str) -> None:
    made = type("Broken", (FakeArena,), {broken: lambda self, slot: None})
    fixture = by_name("llama")
    machine = Machine("late")
    _, model, _ = on_device(patch, machine, fixture, made, params="disk")
    with pytest.raises((HazardError, tw.TorchwrapError)):
        for _ in range(3):
            run(model, fixture.inputs())
    with pytest.raises(HazardError):
        machine.check()


def test_a_copy_that_is_never_made_shows_in_the_numbers(patch: pytest.MonkeyPatch) -> None:
    class Forgetful(FakeArena):
        def upload(self, slot: Slot, parts: list[tuple[int, torch.Tensor]]) -> None:
            super().upload(slot, parts[1:])

    fixture = by_name("llama")
    _, model, _ = on_device(patch, Machine("early"), fixture, Forgetful, params="host")
    assert run(model, fixture.inputs()).logits.isnan().any()

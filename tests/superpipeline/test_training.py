"""Training under a window: bits of training in memory, never more than k blocks, and 2 (n - k) blocks brought in per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.models import ModelFixture, by_name
from tests.pairs import every_two
from tests.superpipeline.device import handle_of
from tests.weights.training import OutsideAdamW, different_gradients, loss_of
from torchwrap.core import tensors
from torchwrap.superpipeline.policy import Knobs

FAMILIES = ["llama", "gpt2", "t5", "vit", "bert", "llava", "convnet"]
OPTIMIZED = ["llama", "llava", "vit", "convnet"]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOWS = {f"{k}-{k_prime}": (k, k_prime) for k, k_prime in [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]}

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@contextmanager
def watched(model: nn.Module) -> Iterator[list[int]]:
    """In every block's forward, and whenever a gradient of one of its parameters is complete: no more than k blocks in k slots."""
    handle, seen = handle_of(model), []
    engine = handle.engine
    assert engine is not None

    def look(*_: Any) -> None:
        assert len(engine._fetches) <= handle.knobs.k and len(engine._slots) <= handle.knobs.k
        seen.append(len(engine._fetches))

    hooks: list[Any] = [model.get_submodule(unit.name).register_forward_pre_hook(look) for unit in handle.units]
    hooks += [p.parameter.register_post_accumulate_grad_hook(look) for unit in handle.units for p in unit.pieces]
    yield seen
    for hook in hooks:
        hook.remove()


def inputs_of(fixture: ModelFixture, dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in fixture.inputs().items()}


def step(model: nn.Module, inputs: dict[str, Any], seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    loss = loss_of(model, inputs)
    loss.backward()
    return loss.detach()


@every_two(fixture={name: by_name(name) for name in FAMILIES}, dtype=DTYPES, window=WINDOWS)
def test_gradients_and_weights_are_those_of_training_in_memory(fixture: ModelFixture, dtype: torch.dtype, window: tuple[int, int]) -> None:
    k, k_prime = window
    plain, model = fixture.build().to(dtype).train(), tw.superpipeline(fixture.build().to(dtype).train(), k=k, k_prime=k_prime)
    outside, inside = OutsideAdamW(model, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    with watched(model) as seen:
        for seed in range(3):
            plain.zero_grad()
            model.zero_grad()
            assert torch.equal(step(model, inputs_of(fixture, dtype), seed), step(plain, inputs_of(fixture, dtype), seed))
            assert different_gradients(model, plain) == []
            inside.step()
            outside.step()
    assert 1 <= max(seen) <= k
    with tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())
    tw.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_activation_checkpointing(name: str, k: int, k_prime: int, reentrant: bool) -> None:
    fixture = by_name(name)
    plain, model = fixture.build().train(), fixture.build().train()
    for each in (plain, model):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tw.superpipeline(model, k=k, k_prime=k_prime)
    with watched(model) as seen:
        for seed in range(3):
            assert torch.equal(step(model, fixture.inputs(), seed), step(plain, fixture.inputs(), seed))
    assert max(seen) <= k
    assert different_gradients(model, plain) == []


class Chain(nn.Module):
    def __init__(self, depth: int, *, recompute: bool, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.recompute = recompute
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return x


@pytest.mark.parametrize(("k", "k_prime"), [(k, k_prime) for k in (1, 2, 3, 5) for k_prime in range(1, k + 1)])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_step_brings_in_what_the_turns_do_not_keep(recompute: bool, k: int, k_prime: int) -> None:
    """2 (n - k) blocks per step: those present at each turn from forward to backward and back are used again."""
    model = tw.superpipeline(Chain(6, recompute=recompute).train(), k=k, k_prime=k_prime)
    handle, x = handle_of(model), torch.randn(4, 32)
    with watched(model):
        for _ in range(3):
            model(x).square().mean().backward()
        before = handle.stats()
        for _ in range(k_prime):
            model(x).square().mean().backward()
    now = handle.stats()
    assert now["transfers"] - before["transfers"] == k_prime * Knobs(k, k_prime, 6).moved_per_step
    assert now["schedule_miss"] == before["schedule_miss"]


def test_knobs_chosen_between_a_forward_and_its_backward() -> None:
    fixture = by_name("llama")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), max_slowdown=1.0, train=False)
    handle = handle_of(model)
    for seed in range(4):
        assert torch.equal(step(model, fixture.inputs(), seed), step(plain, fixture.inputs(), seed))
        assert (handle.chosen is not None) == (seed > 0)
    assert different_gradients(model, plain) == []


@pytest.mark.parametrize(("k", "k_prime"), [(3, 1), (4, 1), (2, 2)])
def test_knobs_turned_between_a_forward_and_its_backward(k: int, k_prime: int) -> None:
    fixture = by_name("gpt2")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), k=1)
    for each in (plain, model):
        torch.manual_seed(0)
        loss = loss_of(each, fixture.inputs())
        if each is model:
            handle_of(model).turn(k, k_prime)
        loss.backward()
    assert different_gradients(model, plain) == []


@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (3, 2)], ids=lambda value: str(value))
@every_dtype
@pytest.mark.parametrize("fixture", [by_name(name) for name in OPTIMIZED], ids=OPTIMIZED)
def test_five_steps_of_adamw(fixture: ModelFixture, dtype: torch.dtype, k: int, k_prime: int) -> None:
    plain, model = fixture.build().to(dtype).train(), tw.superpipeline(fixture.build().to(dtype).train(), k=k, k_prime=k_prime)
    ours = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    with watched(model) as seen:
        for seed in range(5):
            assert torch.equal(step(model, inputs_of(fixture, dtype), seed), step(plain, inputs_of(fixture, dtype), seed))
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
    assert 1 <= max(seen) <= k
    state = ours.state_dict()["state"]
    assert state and all(torch.equal(values[key], state[at][key]) for at, values in theirs.state_dict()["state"].items() for key in values)
    tw.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)], ids=lambda value: str(value))
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "convnet"])
def test_a_step_of_a_model_brings_in_what_the_turns_do_not_keep(name: str, k: int, k_prime: int) -> None:
    fixture = by_name(name)
    model = tw.superpipeline(fixture.build().train(), k=k, k_prime=k_prime)
    handle, at = handle_of(model), Knobs(k, k_prime, 4)

    def brought(steps: int) -> int:
        before = handle.stats()["transfers"]
        for seed in range(steps):
            step(model, fixture.inputs(), seed)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        return int(handle.stats()["transfers"] - before)

    optimizer = None
    brought(3 * k_prime)
    assert brought(k_prime) == at.moved_per_step * k_prime
    model.zero_grad()
    optimizer = tw.OffloadedOptimizer(model, torch.optim.SGD, lr=1e-3)
    brought(3 * k_prime)
    assert brought(k_prime) == at.moved_per_update * k_prime


@pytest.mark.parametrize("how", ["ours", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(("k", "k_prime"), [(3, 2), (4, 1)])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_knobs_turned_before_blocks_are_computed_again(name: str, k: int, k_prime: int, autocast: bool, how: str) -> None:
    """Blocks whose weights came to stay meanwhile save the same tensors as in the forward."""
    fixture = by_name(name)
    plain, model = fixture.build().train(), fixture.build().train()
    for each in (plain, model):
        if how != "ours":
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
    tw.superpipeline(model, k=1, activations="recompute" if how == "ours" else "keep")
    inputs = fixture.inputs() | ({"use_cache": False} if fixture.generates else {})
    for seed in range(2):
        losses = []
        for each in (plain, model):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                losses.append(loss_of(each, inputs))
            if each is model and not seed:
                handle_of(model).turn(k, k_prime)
            losses[-1].backward()
        assert torch.equal(*losses)
    assert different_gradients(model, plain) == []


def test_weights_that_came_to_stay_may_not_change_before_the_backward_either() -> None:
    model = tw.superpipeline(Chain(4, recompute=False).train(), k=1)
    handle_of(model).turn(4, 1)
    loss = model(torch.randn(4, 32)).square().mean()
    with torch.no_grad():
        model.blocks[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_ordinary_optimizer_steps_weights_that_came_to_stay() -> None:
    plain, model = Chain(4, recompute=False).train(), tw.superpipeline(Chain(4, recompute=False).train(), k=1)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    model(x)
    handle_of(model).turn(4, 1)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (plain, model)]
    for _ in range(3):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    tw.unwrap(model)
    assert torch.equal(model(x), plain(x))


def test_an_ordinary_optimizer_is_refused_and_the_offloaded_one_trains() -> None:
    fixture = by_name("llama")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), k=2)
    step(model, fixture.inputs(), 0)
    with pytest.raises(tw.ConflictError, match="OffloadedOptimizer"):
        torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    model.zero_grad()
    ours = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for seed in range(3):
        assert torch.equal(step(model, fixture.inputs(), seed), step(plain, fixture.inputs(), seed))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    with tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())


@pytest.mark.parametrize("k", [1, 3, 4])
def test_knobs_turned_under_the_offloaded_optimizer(k: int) -> None:
    fixture = by_name("llama")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), k=2)
    ours = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for seed in range(4):
        if seed == 2:
            handle_of(model).turn(k, 1)
        assert torch.equal(step(model, fixture.inputs(), seed), step(plain, fixture.inputs(), seed))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    with tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())
    tw.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_a_small_trained_part_of_frozen_blocks_stays_and_is_stepped_as_ever() -> None:
    fixture = by_name("llama")
    plain, model = fixture.build().train(), fixture.build().train()
    for each in (plain, model):
        each.requires_grad_(False)
        for block in each.model.layers:
            block.input_layernorm.weight.requires_grad_(True)
    tw.superpipeline(model, k=2, k_prime=1)
    optimizers = [torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2) for each in (plain, model)]
    for seed in range(4):
        assert torch.equal(step(model, fixture.inputs(), seed), step(plain, fixture.inputs(), seed))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert handle_of(model).stats()["transfers"] > 0
    tw.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))

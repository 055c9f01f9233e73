"""Training steps of a streamed model are those of the unwrapped one, bit for bit: losses, gradients, weights and optimizer state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.models import ModelFixture, by_name
from tests.pairs import every_two
from tests.weights.budgets import streamed
from tests.weights.training import Blocks, OutsideAdamW, at_rest, different_gradients, loss_of
from torchwrap.core import tensors

FAMILIES = [by_name(name) for name in ("llama", "llama-tied", "qwen2", "mixtral", "gpt2", "t5", "bert", "albert", "vit")]
every_family = pytest.mark.parametrize("fixture", FAMILIES, ids=lambda fixture: fixture.name)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINTING = {"plain": None, "reentrant": True, "non-reentrant": False}
every_slots = pytest.mark.parametrize("k", [1, 2, 3])

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def _train(model: nn.Module, inputs: dict[str, Any], optimizer: Any, steps: int = 5) -> list[torch.Tensor]:
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step < steps - 1:
            model.zero_grad()
    return losses


@every_two(fixture={fixture.name: fixture for fixture in FAMILIES}, dtype=DTYPES, reentrant=CHECKPOINTING)
def test_five_steps(fixture: ModelFixture, dtype: torch.dtype, reentrant: bool | None) -> None:
    plain, model = fixture.build().to(dtype).train(), fixture.build().to(dtype).train()
    if reentrant is not None:
        if not model.supports_gradient_checkpointing or fixture.name == "albert":  # ALBERT says so, and does not do it
            pytest.skip("this architecture has no gradient checkpointing")
        for each in (plain, model):
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    streamed(model)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fixture.inputs().items()}
    options = {"lr": 1e-2, "weight_decay": 0.1}
    outside, inside = OutsideAdamW(model, **options), torch.optim.AdamW(plain.parameters(), **options)
    expected, losses = _train(plain, inputs, inside), _train(model, inputs, outside)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert different_gradients(model, plain) == []
    with tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())
    state, wanted = outside.optimizer.state_dict()["state"], inside.state_dict()["state"]
    assert all(torch.equal(state[i][key], wanted[i][key]) for i in wanted for key in wanted[i])
    assert state.keys() == wanted.keys()
    at_rest(model)
    stats = tw.handle_of(model, "offload").stats()
    assert stats["bytes_read"] > 0 and stats["streamed_bytes"] > 0


@every_slots
@every_family
def test_gradients_accumulate_whatever_the_number_of_slots(fixture: ModelFixture, k: int) -> None:
    plain, model = fixture.build().train(), streamed(fixture.build().train(), k=k)
    for each in (plain, model):
        for step in range(3):
            torch.manual_seed(step)
            loss_of(each, fixture.inputs()).backward()
    assert different_gradients(model, plain) == []
    at_rest(model)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant", "two at a time", "two at a time, reentrant"])
@pytest.mark.parametrize("k", [2, 3])
def test_experts_tables_and_heads(k: int, how: str, tied: bool) -> None:
    plain, model = Blocks.pair(tied=tied)
    ids = torch.randint(0, 8192, (24,), generator=torch.Generator().manual_seed(1))
    for each in (plain, model):
        _checkpoint(each, how)
    streamed(model, units=("_Routed",), k=k)
    handle = tw.handle_of(model, "offload")
    assert {"rows", "leaf", "block", "expert"} <= {unit.kind for unit in handle.units}
    outside, inside = OutsideAdamW(model, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    expected, losses = _train(plain, {"ids": ids}, inside, 3), _train(model, {"ids": ids}, outside, 3)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert different_gradients(model, plain) == []
    assert tied or not plain.embedding.weight.grad[3].any()
    with tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())
    at_rest(model)


def _checkpoint(model: Blocks, how: str) -> None:
    if how == "plain":
        return
    if "two" in how:  # a region over units: recomputed as a whole while the backward holds the last of them
        first, second, third = model.layers
        pair = nn.Sequential(first, second)
        model.around = lambda block, x: (
            third(x) if block is third else x if block is second else checkpoint(pair, x, use_reentrant="reentrant" in how)
        )
    else:
        model.around = lambda block, x: checkpoint(block, x, use_reentrant=how == "reentrant")


@pytest.mark.parametrize("where", ["embedding", "layers.1", "layers.2", "head", "layers.0.experts"])
def test_frozen_parts(where: str) -> None:
    plain, model = Blocks.pair()
    ids = torch.arange(24)
    for each in (plain, model):
        each.get_submodule(where).requires_grad_(False)
    streamed(model, units=("_Routed",))
    for each in (plain, model):
        torch.manual_seed(2)
        loss_of(each, {"ids": ids}).backward()
    assert different_gradients(model, plain) == []
    at_rest(model)


def test_a_sparse_gradient_of_a_table() -> None:
    plain, model = Blocks.pair()
    for each in (plain, model):
        each.embedding.sparse = True
    streamed(model, units=("_Routed",))
    for each in (plain, model):
        torch.manual_seed(2)
        loss_of(each, {"ids": torch.arange(24)}).backward()
    got, wanted = model.embedding.weight.grad, plain.embedding.weight.grad
    assert got.is_sparse and torch.equal(got.to_dense(), wanted.to_dense())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "albert"])
def test_autocast(name: str, frozen: bool) -> None:
    fixture = by_name(name)
    plain, model = fixture.build().train(), fixture.build().train()
    if frozen:
        for each in (plain, model):
            each.get_submodule(fixture.block).requires_grad_(False)
    streamed(model)
    outside, inside = OutsideAdamW(model, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(3):  # a cast copy of an earlier step would show in the second loss
        losses = []
        for each, optimizer in ((plain, inside), (model, outside)):
            each.zero_grad()
            torch.manual_seed(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses.append(loss_of(each, fixture.inputs()))
            losses[-1].backward()
            if step == 2:
                continue
            optimizer.step()
        assert torch.equal(*losses)
    assert different_gradients(model, plain) == []
    at_rest(model)

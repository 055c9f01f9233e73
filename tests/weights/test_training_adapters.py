"""Fine-tuning a streamed model through low-rank adapters: the base is streamed and frozen, the adapters stay and train as usual."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.models import by_name, run
from tests.weights.budgets import streamed
from tests.weights.training import at_rest, different_gradients, loss_of, with_adapters

pytest.importorskip("peft")

FIXTURE = by_name("llama")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def _build(order: str) -> Any:
    model = FIXTURE.build()
    if order == "offload first":
        return with_adapters(streamed(model)).train()
    adapted = with_adapters(model).train()
    streamed(adapted)
    return adapted


every_order = pytest.mark.parametrize("order", ["offload first", "adapters first"])


@every_order
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_adapters_train_with_an_ordinary_optimizer(order: str, reentrant: bool | None) -> None:
    plain, model = with_adapters(FIXTURE.build()).train(), _build(order)
    losses: list[list[torch.Tensor]] = [[], []]
    for each, kept in zip((plain, model), losses, strict=True):
        if reentrant is not None:
            each.enable_input_require_grads()
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2, fused=True)
        for step in range(5):
            torch.manual_seed(step)
            each.zero_grad()
            loss = loss_of(each, FIXTURE.inputs())
            loss.backward()
            optimizer.step()
            kept.append(loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True)) and not torch.equal(losses[0][0], losses[0][-1])
    assert different_gradients(model, plain) == []
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(model.get_parameter(name), p) for name, p in trained.items())


def test_adapters_that_were_there_stay_in_memory() -> None:
    model = _build("adapters first")
    handle = tw.handle_of(model, "offload")
    assert all(piece.resident for piece in handle.pieces if piece.parameter.requires_grad)
    assert not all(piece.resident for piece in handle.pieces)
    at_rest(model)


@every_order
def test_merging_into_absent_weights_is_an_error(order: str) -> None:
    model = _build(order).eval()
    expected = run(model, FIXTURE.inputs()).logits
    with pytest.raises(RuntimeError):
        model.merge_adapter()
    assert torch.equal(run(model, FIXTURE.inputs()).logits, expected)

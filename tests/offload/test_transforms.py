"""Transforms of `torch.func` and recordings of a call: weights that are present for a call only are not kept beyond it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import torchwrap as tw
from tests.weights.budgets import streamed

Call = Callable[[nn.Module, torch.Tensor], Any]


def _squares(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: model(x).square().sum()


def _grad_of_weights(model: nn.Module, x: torch.Tensor) -> Any:
    weights = {name: torch.ones(parameter.shape) for name, parameter in model.named_parameters()}
    return torch.func.grad(lambda values: torch.func.functional_call(model, values, (x,)).sum())(weights)


KEEPING: dict[str, Call] = {
    "grad": lambda model, x: torch.func.grad(_squares(model))(x),
    "weights": _grad_of_weights,
    "hessian": lambda model, x: torch.func.hessian(_squares(model))(x[:1]),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "linearize": lambda model, x: torch.func.linearize(model, x)[1](x),
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
    "make_fx": lambda model, x: make_fx(model)(x)(x),
    "trace": lambda model, x: torch.jit.trace(model, (x,))(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
}


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    return streamed(copy.deepcopy(model)), model


@pytest.mark.parametrize("kind", KEEPING)
@pytest.mark.parametrize("part", [False, True], ids=["whole", "block"])
def test_what_keeps_weights_is_refused(pair: tuple[nn.Module, nn.Module], kind: str, part: bool) -> None:
    """`torch.func.grad` in a second call ended in a damaged heap, `linearize` and the recordings in other numbers."""
    model, plain = pair
    x = torch.randn(3, 64)
    assert torch.equal(model(x), plain(x))
    KEEPING[kind](plain, x)
    with pytest.raises(tw.ConflictError, match="unwrap"):
        KEEPING[kind](model[2] if part else model, x)  # type: ignore[index]
    for _ in range(2):
        assert torch.equal(model(x), plain(x))
    tw.unwrap(model)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_vmap_and_autograd_work(pair: tuple[nn.Module, nn.Module]) -> None:
    model, plain = pair
    x = torch.randn(3, 64)
    for net in pair:
        torch.vmap(net)(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))  # type: ignore[arg-type]
    found, expected = (torch.autograd.functional.jacobian(net, x[:1]) for net in pair)
    assert torch.equal(found, expected)

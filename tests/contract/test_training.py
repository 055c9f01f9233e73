"""Training through a wrapped model: optimizers, checkpointing with dropout, parametrized and frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.contract.cases import Case, every_model, every_technique, models_named
from tests.contract.compare import equal, within
from tests.models import ModelFixture
from torchwrap.core.tensors import is_placeholder


def _loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    tensor = output if isinstance(output, torch.Tensor) else next(v for v in output.values() if isinstance(v, torch.Tensor))
    return tensor.float().square().mean()


@every_technique
@every_model
@pytest.mark.parametrize("built", ["before", "after"], ids=["optimizer-before-wrapping", "optimizer-after-wrapping"])
def test_three_steps_equal_those_of_the_unwrapped_model(case: Case, fixture: ModelFixture, built: str) -> None:
    model, twin = fixture.build().train(), fixture.build().train()
    # Adam makes a step of full length from a gradient that is rounding noise (the biases of keys have no other), whatever its size.
    kind: Any = torch.optim.SGD if case.tolerance else torch.optim.AdamW
    optimizers = [kind(each.parameters(), lr=1e-2) for each in (twin, model)]
    if case.passes("training") and not case.passes(case.training(fixture.has_dropout)):
        pytest.skip(case.exempt["dropout"].reason)
    case.apply(model)
    if built == "after":
        optimizers[1] = kind(model.parameters(), lr=1e-2)
    expected = _three_steps(twin, fixture, optimizers[0])
    away = any(is_placeholder(parameter) for parameter in model.parameters())  # a technique may leave a small model alone
    with case.expects("stepping") if away else nullcontext():
        equal(_three_steps(model, fixture, optimizers[1]), expected)
        tw.unwrap(model)
        equal(list(model.state_dict().items()), list(twin.state_dict().items()))


def _three_steps(model: nn.Module, fixture: ModelFixture, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        loss = _loss(model, fixture.inputs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@every_technique
@models_named("llama-tied", "gpt2", "opt", "t5", "bert", "vit")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # transformers 5.23 renames it; 4.56 has this name only
@pytest.mark.parametrize("enabled", ["before", "after"], ids=["enabled-before-wrapping", "enabled-after-wrapping"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_gradients_are_equal_with_dropout(case: Case, fixture: ModelFixture, reentrant: bool, enabled: str) -> None:
    model, twin = fixture.build().train(), fixture.build().train()
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if enabled == "before":
        model.gradient_checkpointing_enable(**settings)
    case.apply(model)
    if enabled == "after":
        model.gradient_checkpointing_enable(**settings)
    twin.gradient_checkpointing_enable(**settings)
    for each in (twin, model):
        torch.manual_seed(13)
        if each is twin:
            _loss(each, fixture.inputs()).backward()
        else:
            with case.expects(case.training(fixture.has_dropout)):
                _loss(each, fixture.inputs()).backward()
    if case.passes(case.training(fixture.has_dropout)):
        _equal_gradients(model, twin)


class _Checkpointed(nn.Module):
    """Runs the children of a sequence, each under torch's own checkpointing."""

    def __init__(self, blocks: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant = blocks, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def _convolutions(fixture: ModelFixture) -> nn.Module:
    return fixture.build().blocks


def _encoder_layers(fixture: ModelFixture) -> nn.Module:
    return fixture.build().layers


@every_technique
@pytest.mark.parametrize(
    ("fixture", "blocks", "shape"),
    [
        pytest.param("convnet", _convolutions, (2, 16, 8, 8), id="convnet"),
        pytest.param("encoder", _encoder_layers, (2, 7, 32), id="encoder"),
    ],
)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_torch_checkpoint_of_wrapped_blocks_gives_equal_gradients(
    case: Case, fixture: str, blocks: Callable[[ModelFixture], nn.Module], shape: tuple[int, ...], reentrant: bool
) -> None:
    from tests.models import by_name

    model, twin = (_Checkpointed(blocks(by_name(fixture)), reentrant).train() for _ in range(2))
    case.apply(model)
    check = case.training(by_name(fixture).has_dropout)
    x = torch.randn(shape)
    torch.manual_seed(3)
    twin(x.clone().requires_grad_()).square().mean().backward()
    torch.manual_seed(3)
    with case.expects(check):
        model(x.clone().requires_grad_()).square().mean().backward()
    if case.passes(check):
        _equal_gradients(model, twin)


@every_technique
@models_named("llama-tied", "albert", "convnet")
def test_frozen_parameters_get_no_gradient(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build().train(), fixture.build().train()
    for each in (model, twin):
        each.get_submodule(fixture.block).requires_grad_(False)
    case.apply(model)
    torch.manual_seed(1)
    _loss(twin, fixture.inputs()).backward()
    torch.manual_seed(1)
    with case.expects(case.training(fixture.has_dropout)):
        _loss(model, fixture.inputs()).backward()
    if case.passes(case.training(fixture.has_dropout)):
        _equal_gradients(model, twin)


@every_technique
@models_named("llama", "gpt2", "convnet")
def test_gradients_under_autocast_are_equal(case: Case, fixture: ModelFixture) -> None:
    coarse = {dtype: max(case.tolerance.values()) for dtype in case.tolerance}  # float32 gradients of bfloat16 products
    model, twin = case.apply(fixture.build().train()), fixture.build().train()
    for each in (twin, model):
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if each is twin:
                loss = _loss(each, fixture.inputs())
            else:
                with case.expects(case.training(fixture.has_dropout)):
                    loss = _loss(each, fixture.inputs())
        if each is twin or case.passes(case.training(fixture.has_dropout)):
            loss.backward()
    if case.passes(case.training(fixture.has_dropout)):
        with within(coarse):
            _equal_gradients(model, twin)


def _equal_gradients(model: nn.Module, twin: nn.Module) -> None:
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert any(gradient is not None for gradient in expected.values())
    equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)

"""`model.to(...)` of a model whose weights are away: the same bits, nothing shown in full, whatever the device is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.core.tensors import is_placeholder

WIDTH = 64
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))

WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "offload": lambda model: tw.offload(model, params="disk"),
    "superpipeline": lambda model: tw.superpipeline(model, k=2, k_prime=1),
    "composed": lambda model: tw.apply(model, [tw.Offload(params="disk"), tw.Trace()]),
    "device cpu:0": lambda model: tw.offload(model, params="disk", device="cpu:0"),
}
MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "cpu": lambda model: model.to("cpu"),
    "cpu:0": lambda model: model.to("cpu:0"),
    "device": lambda model: model.to(torch.device("cpu", 0)),
    "device and dtype": lambda model: model.to(device="cpu:0", dtype=torch.bfloat16),
    "tensor": lambda model: model.to(torch.empty(0, device="cpu:0")),
    "part": lambda model: model.get_submodule("2").to("cpu:0") and model,
    "twice": lambda model: model.to("cpu:0").to("cpu:0", torch.float64).to("cpu:0"),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def _away(model: nn.Module) -> int:
    return sum(is_placeholder(parameter.detach()) for parameter in model.parameters())


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_move_to_where_the_model_is(wrap: Callable[[nn.Module], nn.Module], move: Callable[[nn.Module], nn.Module]) -> None:
    plain, model = move(_model()), wrap(_model())
    before = _away(model)
    assert move(model) is model
    assert _away(model) == before >= 3
    x = X.to(plain.get_parameter("0.weight").dtype)
    for _ in range(2):
        assert torch.equal(model(x), plain(x))
    for each in (plain, model):
        each(x).sum().backward()
    with tw.core.tensors(model) as real:
        for (name, parameter), mine in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(real[name], parameter) and parameter.grad is not None and mine.grad is not None
            assert torch.equal(mine.grad, parameter.grad)
    tw.unwrap(model)
    assert torch.equal(model(x), plain(x))
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}


def test_streamed_weights_refuse_another_memory_format() -> None:
    plain, model = (nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3))) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    tw.offload(model, params="disk", units=("0", "1", "2"))
    with pytest.raises(tw.UnsupportedModelError, match=r"offload: streamed weights of 4 dimensions.*Unwrap, convert"):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(model(x), plain(x))


def test_the_device_is_called_as_its_tensors_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.weights.blueprint import device_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    found: list[Any] = [device_of(_model(), tw.Offload(device=name), from_folder=False) for name in ("cuda", "cuda:1", "cpu:0", "cpu")]
    assert found == [torch.device(name) for name in ("cuda:3", "cuda:1", "cpu", "cpu")]
    assert device_of(_model(), tw.Offload(), from_folder=True) == torch.device("cuda:3")

"""What an error about memory tells to set is what was in the way: a user who does that, and nothing else, is served."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.weights import budget
from torchwrap.weights.budget import Budget

HUGE = 10**15
GIVEN: dict[str, dict[str, Any]] = {
    "device": {"device_memory": "1KiB"},
    "host": {"host_memory": "1KiB"},
    "both": {"device_memory": "1KiB", "host_memory": "2KiB"},
    "host-less-than-device": {"device_memory": "1GiB", "host_memory": "2KiB"},
    "reserve": {"reserve": HUGE},
    "reserve-and-device": {"reserve": HUGE, "device_memory": "1KiB"},
    "everything": {"reserve": HUGE, "device_memory": "1KiB", "host_memory": "1KiB"},
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of which nobody else takes memory between an error and the call that follows its advice."""
    monkeypatch.setattr(budget, "memory_available", lambda: 8 << 30)


class Model(nn.Module):
    """Blocks between two layers that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(16, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = layer(x)
        return x


def made() -> Model:
    torch.manual_seed(3)
    return Model().eval()


def advice(error: tw.BudgetError) -> dict[str, int]:
    """The settings that the message names."""
    return {name: int(size) for name, size in re.findall(r"\b(device_memory|host_memory|reserve|k|k_prime)=(\d+)", error.fix)}


def wrapped_by_the_message(technique: Any, model: nn.Module, fields: dict[str, Any]) -> dict[str, int]:
    """Wrap a model that needs more, doing what the error says; the settings it named."""
    with pytest.raises(tw.BudgetError) as caught:
        technique(model, **fields)
    named = advice(caught.value)
    technique(model, **{**fields, **named})
    return named


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("goal", ["infer", "train"])
def test_offload_names_what_is_in_the_way(goal: str, given: dict[str, Any]) -> None:
    model, x = made(), torch.ones(2, 16)
    expected = model(x)
    named = wrapped_by_the_message(tw.offload, model, {"goal": goal, **given})
    assert set(named) == {name for name, size in given.items() if size != "1GiB"}
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("knobs", [{}, {"k": 3}, {"k": 3, "k_prime": 3}, {"k": 6}], ids=str)
def test_superpipeline_names_what_is_in_the_way(knobs: dict[str, int], given: dict[str, Any]) -> None:
    model, x = made(), torch.ones(2, 16)
    expected = model(x)
    named = wrapped_by_the_message(tw.superpipeline, model, {**knobs, **given})
    assert set(named) == {name for name, size in given.items() if size != "1GiB"}
    assert torch.equal(model(x), expected)


def test_a_smaller_window_is_named_only_where_it_would_do() -> None:
    with pytest.raises(tw.BudgetError) as caught:
        tw.superpipeline(made(), k=5, device_memory=330_000)
    assert advice(caught.value) == {"device_memory": caught.value.needed, "k": 3}
    tw.superpipeline(made(), k=3, device_memory=330_000)
    with pytest.raises(tw.BudgetError) as caught:
        tw.superpipeline(made(), k=5, k_prime=4, device_memory=330_000)
    assert "k" not in advice(caught.value)
    with pytest.raises(tw.BudgetError) as caught:
        tw.superpipeline(made(), k_prime=4, device_memory=330_000)
    assert advice(caught.value)["k_prime"] == 3
    tw.superpipeline(made(), k_prime=3, device_memory=330_000)


@pytest.mark.parametrize("params", ["disk", "host"])
def test_a_model_without_units_is_refused_for_that(params: str) -> None:
    model = nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 7))
    with pytest.raises(tw.UnsupportedModelError, match=r"nothing in Sequential can be streamed.*units="):
        tw.offload(model, params=params, device_memory="10KiB")  # type: ignore[arg-type]
    tw.offload(model, params="disk", units=("0",))


def test_memory_that_no_setting_can_give_has_to_be_freed() -> None:
    assert Budget(0, 0, 0, {}, -5).remedy(100) == "Free 105 B of memory"
    assert Budget(0, 0, 0, {"device_memory": 7}, 90).remedy(100) == "Set device_memory=100 or more, and free 10 B of memory"
    assert Budget(0, 0, 0, {"device_memory": 107}, 90).remedy(100) == "Free 10 B of memory"


def test_a_model_whose_weights_cannot_leave_is_told_why() -> None:
    model = nn.Sequential(nn.Linear(64, 300, bias=False), nn.ReLU(), nn.Linear(300, 64, bias=False))
    weights = torch.zeros(2 * 300 * 64)
    for number, layer in enumerate((model[0], model[2])):
        layer.weight.data = weights[number * 19200 :][:19200].view(layer.weight.shape)
    with pytest.raises(tw.UnsupportedModelError, match=r"nothing in Sequential can be streamed; 2\.weight shares memory"):
        tw.offload(model, params="disk", units=("Linear",))

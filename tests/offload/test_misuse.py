"""What users do although they should not: refused by name, and the next call works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.weights.budgets import streamed
from torchwrap.offload.handle import OffloadHandle
from torchwrap.superpipeline.handle import SuperpipelineHandle

Wrap = Callable[[nn.Module], nn.Module]


def _window(model: nn.Module, **fields: Any) -> nn.Module:
    return tw.superpipeline(model, k=2, k_prime=1, **fields)


both = pytest.mark.parametrize("wrap", [streamed, _window], ids=["offload", "superpipeline"])


class Limited(nn.Linear):
    """Keeps its own weight below a limit, in its forward."""

    writes: Callable[[Limited], object] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes is not None:
            self.writes()
        return super().forward(x)


def clamp_data(self: Limited) -> None:
    self.weight.data.clamp_(-0.01, 0.01)


def rebind(self: Limited) -> None:
    self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.01)


def clamp(self: Limited) -> None:
    with torch.no_grad():
        self.weight.clamp_(-0.01, 0.01)


def clamp_in_training(self: Limited) -> None:
    if self.training:
        clamp_data(self)


def _stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Limited(64, 64) for _ in range(6))).eval()


@both
@pytest.mark.parametrize("writes", [clamp_data, rebind, clamp], ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_module_that_writes_to_its_weight(wrap: Wrap, writes: Callable[[Limited], object], grad: bool) -> None:
    model, x = _stack(), torch.randn(3, 64)
    expected = model(x)
    wrapped = wrap(copy.deepcopy(model))
    wrapped[3].writes = writes.__get__(wrapped[3])
    for _ in range(2):  # a second call would write again
        with torch.set_grad_enabled(grad), pytest.raises(tw.UnsupportedModelError, match=r"3\.weight") as raised:
            wrapped(x)
        assert raised.value.where == "3.weight" and 'pin=("3.weight",)' in raised.value.fix
    wrapped[3].writes = None
    assert torch.equal(wrapped(x), expected)
    assert torch.equal(wrapped.state_dict()["3.weight"], model[3].weight)
    tw.unwrap(wrapped)
    assert torch.equal(wrapped[3].weight, model[3].weight)


@both
def test_it_is_seen_in_the_first_call_in_training_mode_too(wrap: Wrap) -> None:
    wrapped, x = wrap(_stack()), torch.randn(3, 64)
    wrapped[2].writes = clamp_in_training.__get__(wrapped[2])
    expected = wrapped(x)
    assert torch.equal(wrapped(x), expected)
    wrapped.train()
    with pytest.raises(tw.UnsupportedModelError, match=r"2\.weight"):
        wrapped(x)
    assert torch.equal(wrapped.eval()(x), expected)


@pytest.mark.parametrize("writes", [rebind, clamp], ids=lambda f: f.__name__)
def test_counted_writes_are_seen_in_every_call(writes: Callable[[Limited], object]) -> None:
    wrapped, x = streamed(_stack()), torch.randn(3, 64)
    expected = wrapped(x)
    wrapped(x)
    wrapped[1].writes = writes.__get__(wrapped[1])
    with pytest.raises(tw.UnsupportedModelError, match=r"1\.weight"):
        tw.handle_of(wrapped, "offload").forward_many([x, x])
    wrapped[1].writes = None
    assert torch.equal(wrapped(x), expected)


def test_what_the_message_says_works() -> None:
    model, x = _stack(), torch.randn(3, 64)
    wrapped = streamed(copy.deepcopy(model), pin=("3.weight",))
    for each in (model, wrapped):
        each[3].writes = clamp_data.__get__(each[3])
    assert torch.equal(wrapped(x), model(x))
    assert torch.equal(wrapped.state_dict()["3.weight"], model[3].weight)


def test_an_equal_copy_in_its_place_is_no_write() -> None:
    model, x = _stack(), torch.randn(3, 64)
    wrapped = streamed(copy.deepcopy(model))

    def laid_out_anew() -> None:
        wrapped[3].weight.data = wrapped[3].weight.data.clone()

    wrapped[3].writes = laid_out_anew
    assert torch.equal(wrapped(x), model(x))


def test_a_model_made_in_inference_mode() -> None:
    x = torch.randn(3, 64)
    with torch.inference_mode():
        wrapped = streamed(_stack())
        assert torch.equal(wrapped(x), _stack()(x))


@both
def test_an_embedding_that_scales_its_rows_stays(wrap: Wrap) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Embedding(50, 64, max_norm=0.5), nn.Linear(64, 1)) for _ in range(4))).eval()
    wrapped = wrap(copy.deepcopy(model))
    ids = torch.arange(9)
    for before, after in zip(model, wrapped, strict=True):
        assert torch.equal(after(ids), before(ids))
    for name, value in model.state_dict().items():
        assert torch.equal(wrapped.state_dict()[name], value)
    assert any("max_norm" in note for name in tw.wrappers_of(wrapped) for note in tw.handle_of(wrapped, name).notes)


@pytest.mark.parametrize("inputs", [5, None, "ab", torch.ones(2, 64), {"x": torch.ones(2, 64)}], ids=lambda v: type(v).__name__)
def test_inputs_that_are_not_several(inputs: Any) -> None:
    handle: OffloadHandle = tw.handle_of(streamed(_stack()), "offload")
    with pytest.raises(tw.ConfigError, match="inputs"):
        handle.forward_many(inputs)


def test_inputs_from_a_generator() -> None:
    model = streamed(_stack())
    handle: OffloadHandle = tw.handle_of(model, "offload")
    batches = [torch.randn(n, 64) for n in (1, 3)]
    outputs = handle.forward_many(batch for batch in batches)  # type: ignore[arg-type]
    assert all(torch.equal(output, model(batch)) for output, batch in zip(outputs, batches, strict=True))


@pytest.mark.parametrize("limit", ["x", 0, -1, 1.5, True])
def test_limits_of_batches_in_flight(limit: Any) -> None:
    handle: OffloadHandle = tw.handle_of(streamed(_stack()), "offload")
    with pytest.raises(tw.ConfigError, match="max_batches_in_flight"):
        handle.forward_many([torch.ones(1, 64)], max_batches_in_flight=limit)


@pytest.mark.parametrize("seeds", [5, [1], [1, 2, 3], ["a", "b"], "ab", [1.5, 2], [2**64, 0], [None, None]], ids=str)
def test_seeds(seeds: Any) -> None:
    handle: OffloadHandle = tw.handle_of(streamed(_stack()), "offload")
    with pytest.raises(tw.ConfigError, match="seeds"):
        handle.forward_many([torch.ones(1, 64), torch.ones(2, 64)], seeds=seeds)


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda handle: handle.turn("a", 1), "k"),
        (lambda handle: handle.turn(None, None), "k"),
        (lambda handle: handle.turn(2, "a"), "k_prime"),
        (lambda handle: handle.turn(2, True), "k_prime"),
        (lambda handle: handle.predict(tokens="x"), "tokens"),
        (lambda handle: handle.predict(batch=-1), "batch"),
        (lambda handle: handle.predict(k="a"), "k"),
        (lambda handle: handle.predict(k_prime=1.5), "k_prime"),
    ],
)
def test_knobs_that_are_no_numbers(call: Callable[[SuperpipelineHandle], object], where: str) -> None:
    handle: SuperpipelineHandle = tw.handle_of(_window(_stack()), "superpipeline")
    before = handle.knobs
    with pytest.raises(tw.ConfigError) as raised:
        call(handle)
    assert raised.value.where == where
    assert handle.knobs == before

"""Exceptions in the middle of a call, from the model, from the user or from a layer: the next call is right and undo works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_model, every_technique, models_named
from tests.contract.compare import equal, model_difference
from tests.contract.neutral import Inner, Outer, note_layers, notes
from tests.models import ModelFixture, run

INTERRUPTIONS = [ValueError("bad numbers"), KeyboardInterrupt(), SystemExit(3), torch.OutOfMemoryError("no memory")]


def _interrupt(block: nn.Module, error: BaseException) -> torch.utils.hooks.RemovableHandle:
    """Make the last leaf with weights below `block` raise: the middle of a call, with every layer above it entered."""
    leaf = [module for module in block.modules() if not list(module.children()) and list(module.parameters())][-1]

    def hook(*_: Any) -> None:
        raise error

    return leaf.register_forward_pre_hook(hook)


@every_technique
@every_model
@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_next_call_is_right_after_an_interruption(case: Case, fixture: ModelFixture, error: BaseException) -> None:
    model, twin = fixture.build(), fixture.build()
    expected = run(twin, fixture.inputs())
    case.apply(model)
    handle = _interrupt(model.get_submodule(fixture.block), error)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            run(model, fixture.inputs())
        assert caught.value is error
    handle.remove()
    equal(run(model, fixture.inputs()), expected)
    tw.unwrap(model)
    equal(run(model, fixture.inputs()), expected)
    assert model_difference(model, twin) is None


@every_technique
@every_model
def test_unwrap_works_straight_after_an_interruption(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    expected = run(twin, fixture.inputs())
    case.apply(model)
    run(model, fixture.inputs())
    handle = _interrupt(model.get_submodule(fixture.block), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(model, fixture.inputs())
    tw.unwrap(model)
    handle.remove()
    assert model_difference(model, twin) is None
    equal(run(model, fixture.inputs()), expected)


@every_technique
@models_named("llama", "t5", "albert", "convnet", "encoder", "mlp")
def test_failed_runs_exactly_once_for_each_layer_entered(case: Case, fixture: ModelFixture) -> None:
    model = tw.apply(fixture.build(), [Outer(), case.config(fixture.build()), Inner()])
    handle = _interrupt(model.get_submodule(fixture.block), ValueError("bad numbers"))
    with pytest.raises(ValueError, match="bad numbers"):
        run(model, fixture.inputs())
    handle.remove()
    for name in ("test_outer", "test_inner"):
        events = notes(model, name)
        assert events.count("failed") >= 2, "the block and the root"
        for layer in note_layers(model, name):
            entered, left, failed = (layer.journal.count(event) for event in ("before", "after", "failed"))
            assert entered == left + failed, layer.journal
            assert failed <= 1


@every_technique
@models_named("llama", "t5")
def test_generation_after_an_interrupted_generation(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    expected = twin.generate(**fixture.prompt(), max_new_tokens=5)
    calls = 0

    def on_third_step(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    handle = model.get_submodule(fixture.block).register_forward_pre_hook(on_third_step)
    repeat = {"num_beams": 2} if fixture.encoder_decoder else {}
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):  # the encoder of T5 runs once per generation
            model.generate(**fixture.prompt(), max_new_tokens=5, **repeat)
    handle.remove()
    equal(model.generate(**fixture.prompt(), max_new_tokens=5), expected)

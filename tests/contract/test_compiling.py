"""torch.compile beside wrapping: never stale, never wrong, one graph where the technique is traceable."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_technique, models
from tests.contract.compare import equal, model_difference
from tests.contract.neutral import Outer
from tests.models import SHORT_LLAMA, ModelFixture, by_name, run

pytestmark = pytest.mark.slow

small = models(SHORT_LLAMA, by_name("convnet"), by_name("mlp"))


def _inputs(fixture: ModelFixture) -> dict[str, Any]:
    return fixture.inputs() | ({"use_cache": False} if fixture.generates else {})


@every_technique
@small
def test_compiled_model_is_equal_and_does_not_recompile(case: Case, fixture: ModelFixture, fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounter

    model, twin, graphs = case.apply(fixture.build()), fixture.build(), CompileCounter()
    compiled = torch.compile(model, backend=graphs)
    expected = run(twin, _inputs(fixture))
    equal(run(compiled, _inputs(fixture)), expected)
    equal(run(compiled, _inputs(fixture)), expected)  # a placement technique watches its first call in a mode of its own
    after_two_calls = graphs.frame_count
    for _ in range(4):
        equal(run(compiled, _inputs(fixture)), expected)
    assert graphs.frame_count == after_two_calls >= 1
    if case.passes("fullgraph"):
        assert graphs.frame_count == 1
    equal(run(model, _inputs(fixture)), expected)


@every_technique
@small
def test_wrap_and_unwrap_after_compile_are_never_stale(case: Case, fixture: ModelFixture, fresh_dynamo: None) -> None:
    model, twin = fixture.build(), fixture.build()
    expected = run(twin, _inputs(fixture))
    compiled = torch.compile(model, backend="eager")
    equal(run(compiled, _inputs(fixture)), expected)
    for _ in range(2):
        assert tw.apply(compiled, case.config(model)) is compiled
        assert list(tw.wrappers_of(model)) == [case.technique]
        equal(run(compiled, _inputs(fixture)), expected)
        tw.unwrap(compiled)
        equal(run(compiled, _inputs(fixture)), expected)
    torch.compile(twin, backend="eager")  # leaves a mark of its own in the model
    assert model_difference(model, twin) is None


@every_technique
@models(SHORT_LLAMA, by_name("convnet"))
def test_regionally_compiled_blocks_are_equal(case: Case, fixture: ModelFixture, fresh_dynamo: None) -> None:
    model, twin = fixture.build(), fixture.build()
    expected = run(twin, _inputs(fixture))
    container = model.get_submodule(fixture.block.rpartition(".")[0])
    for index, block in enumerate(container):
        if index % 2:  # compiled before wrapping
            block.compile(backend="eager")
    case.apply(model)
    for index, block in enumerate(container):
        if not index % 2:  # and after
            block.compile(backend="eager")
    for _ in range(3):
        equal(run(model, _inputs(fixture)), expected)
    tw.unwrap(model)
    equal(run(model, _inputs(fixture)), expected)


@every_technique
@small
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_layers_stay_hidden_when_dynamo_gives_up(case: Case, fixture: ModelFixture, grad: bool, fresh_dynamo: None) -> None:
    """Past its recompile limit Dynamo runs a frame as it is, and looks into what it calls: a layer must be kept from it there too."""
    with torch._dynamo.config.patch(recompile_limit=1), torch.set_grad_enabled(grad):
        for _ in range(2):
            model, twin = fixture.build(), fixture.build()
            expected = run(twin, _inputs(fixture))
            for block in model.get_submodule(fixture.block.rpartition(".")[0]):
                block.compile(backend="eager")
            case.apply(model)
            equal(run(model, _inputs(fixture)), expected)
            whole = case.apply(fixture.build())
            compiled = torch.compile(whole, backend="eager")
            for _ in range(3):
                equal(run(compiled, _inputs(fixture)), expected)
            equal(run(whole, _inputs(fixture)), expected)


@every_technique
@models(SHORT_LLAMA)
def test_generation_with_a_static_cache_compiles_once_for_prompt_and_once_for_steps(
    case: Case, fixture: ModelFixture, fresh_dynamo: None
) -> None:
    """A layer that reads a changing Python number would recompile every step."""
    expected, alone = _with_a_static_cache(fixture)
    tokens, beside = _generated(tw.apply(model := fixture.build(), [case.config(model), Outer()]), fixture)
    equal(tokens, expected)
    if case.passes("fullgraph"):
        assert beside == alone


def _generated(model: nn.Module, fixture: ModelFixture) -> tuple[torch.Tensor, int]:
    """Tokens of the compiled model, and how many graphs were made for them."""
    from torch._dynamo.testing import CompileCounter

    graphs = CompileCounter()
    model.forward = torch.compile(model.forward, backend=graphs)
    tokens = model.generate(**fixture.prompt(), max_new_tokens=8, cache_implementation="static", disable_compile=True)
    torch._dynamo.reset()
    return tokens, graphs.frame_count


@functools.cache  # the same for every technique
def _with_a_static_cache(fixture: ModelFixture) -> tuple[torch.Tensor, int]:
    """Tokens of the model, and how many graphs it takes alone."""
    expected = fixture.build().generate(**fixture.prompt(), max_new_tokens=8, cache_implementation="static", disable_compile=True)
    tokens, graphs = _generated(fixture.build(), fixture)
    equal(tokens, expected)
    return expected, graphs


@every_technique
@models(by_name("convnet"))
def test_inductor_is_close_and_gradients_flow(case: Case, fixture: ModelFixture, fresh_dynamo: None) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    expected = run(twin, fixture.inputs())
    compiled: nn.Module = torch.compile(model, backend="inductor")
    # inductor fuses and reorders float32 sums: 1e-5 is ten times what the unwrapped model shows
    torch.testing.assert_close(run(compiled, fixture.inputs()), expected, rtol=1e-5, atol=1e-5)
    tw.unwrap(model)
    torch.testing.assert_close(run(compiled, fixture.inputs()), expected, rtol=1e-5, atol=1e-5)

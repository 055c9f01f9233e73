"""Numbers: logits, hidden states, attentions, gradients and generated tokens equal those of the unwrapped model bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_model, every_technique, models_named, models_with
from tests.contract.compare import difference, equal, within
from tests.contract.neutral import Outer, notes
from tests.models import ModelFixture, run, select


@every_technique
@every_model
def test_outputs_are_equal_call_after_call(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    expected = run(twin, fixture.inputs())
    for _ in range(3):
        equal(run(model, fixture.inputs()), expected)


@every_technique
@every_model
def test_outputs_are_equal_under_inference_mode(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    with torch.inference_mode():
        equal(model(**fixture.inputs()), twin(**fixture.inputs()))
    equal(run(model, fixture.inputs()), run(twin, fixture.inputs()))


@every_technique
@every_model
def test_outputs_follow_changing_shapes(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    for inputs in (fixture.inputs(), _first_of_batch(fixture.inputs()), fixture.inputs()):
        equal(run(model, inputs), run(twin, inputs))


def _first_of_batch(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:1] for name, value in inputs.items()}


@every_technique
@every_model
def test_outputs_are_equal_in_bfloat16(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build().to(torch.bfloat16)), fixture.build().to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in fixture.inputs().items()}
    equal(run(model, inputs), run(twin, inputs))


@every_technique
@every_model
def test_dtype_change_after_wrapping_equals_the_change_without(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    assert model.to(torch.bfloat16) is model
    twin.to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in fixture.inputs().items()}
    equal(run(model, inputs), run(twin, inputs))
    equal(model.state_dict(), twin.state_dict())
    tw.unwrap(model)
    equal(run(model, inputs), run(twin, inputs))


@every_technique
@models_with(has_hidden_states=True)
def test_hidden_states_and_attentions_are_captured(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    for each in (model, twin):
        each.set_attn_implementation("eager")
    flags = {"output_hidden_states": True, "output_attentions": True}
    expected = run(twin, fixture.inputs(), **flags)
    captured = [name for name in expected if name.endswith(("hidden_states", "attentions"))]
    assert len(captured) >= 2
    equal(run(model, fixture.inputs(), **flags), expected)


@every_technique
@models_with(has_hidden_states=True)
def test_hidden_states_captured_before_wrapping_and_after_unwrapping(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    expected = run(twin, fixture.inputs(), output_hidden_states=True)
    equal(run(model, fixture.inputs(), output_hidden_states=True), expected)
    case.apply(model)
    equal(run(model, fixture.inputs(), output_hidden_states=True), expected)
    tw.unwrap(model)
    equal(run(model, fixture.inputs(), output_hidden_states=True), expected)


@every_technique
@every_model
def test_torch_hooks_of_the_user_fire_as_before(case: Case, fixture: ModelFixture) -> None:
    events: dict[str, list[str]] = {"wrapped": [], "plain": []}
    for label, model in (("wrapped", case.apply(fixture.build())), ("plain", fixture.build())):
        block = model.get_submodule(fixture.block)
        block.register_forward_pre_hook(lambda *_, to=events[label]: to.append("pre"))
        block.register_forward_hook(lambda *_, to=events[label]: to.append("post"))
        run(model, fixture.inputs())
    assert events["wrapped"] == events["plain"] != []


@every_technique
@every_model
def test_gradients_are_equal_in_eval_mode(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    _backward(twin, fixture)
    case.apply(model)
    with case.expects("gradients"):
        _backward(model, fixture)
    if case.passes("gradients"):
        _equal_gradients(model, twin)
        tw.unwrap(model)
        _equal_gradients(model, twin)


@every_technique
@every_model
def test_gradients_are_equal_in_training_mode(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build().train(), fixture.build().train()
    expected = _backward(twin, fixture)
    case.apply(model)
    check = case.training(fixture.has_dropout)
    with case.expects(check):
        equal(_backward(model, fixture), expected)
    if case.passes(check):
        _equal_gradients(model, twin)
        assert difference(dict(model.named_buffers()), dict(twin.named_buffers())) is None
    else:
        model.eval()
        equal(run(model, fixture.inputs()), run(fixture.build(), fixture.inputs()))


def _backward(model: nn.Module, fixture: ModelFixture) -> torch.Tensor:
    torch.manual_seed(5)
    output = model(**fixture.inputs())
    tensor = output if isinstance(output, torch.Tensor) else next(v for v in output.values() if isinstance(v, torch.Tensor))
    tensor.float().square().mean().backward()
    return tensor.detach()


def _equal_gradients(model: nn.Module, twin: nn.Module) -> None:
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert any(gradient is not None for gradient in expected.values())
    equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@every_technique
@models_named("llama", "gpt2", "bert", "vit", "convnet", "encoder", "mlp")
@pytest.mark.parametrize("cache", [True, False], ids=["autocast-cache", "no-autocast-cache"])
def test_outputs_are_equal_under_autocast(case: Case, fixture: ModelFixture, cache: bool) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    if case.tolerance and fixture.name == "encoder":
        pytest.skip("torch's native path returns bfloat16 under autocast on the CPU, its own slow path and ours float32")
    coarse = {dtype: max(case.tolerance.values()) for dtype in case.tolerance}  # float32 outputs of bfloat16 products
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache), within(coarse):
        expected = run(twin, fixture.inputs())
        for _ in range(2):
            equal(run(model, fixture.inputs()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        equal(run(model, fixture.inputs()), run(twin, fixture.inputs()))
    equal(run(model, fixture.inputs()), run(twin, fixture.inputs()))


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3},
    "beam": {"num_beams": 3},
    "beam-sampled": {"num_beams": 2, "do_sample": True},
    "static-cache": {"cache_implementation": "static", "disable_compile": True},
    "no-cache": {"use_cache": False},
}


@every_technique
@models_with(generates=True)
@pytest.mark.parametrize("how", GENERATION)
def test_generated_tokens_are_equal(case: Case, fixture: ModelFixture, how: str) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    tokens = []
    for each in (model, twin):
        torch.manual_seed(11)
        tokens.append(each.generate(**fixture.prompt(), max_new_tokens=6, **GENERATION[how]))
    assert tokens[0].shape[1] >= 6
    equal(tokens[0], tokens[1])


@every_technique
@models_named("llama", "qwen2")
def test_assisted_generation_is_equal_with_the_wrapped_model_in_either_role(case: Case, fixture: ModelFixture) -> None:
    expected = fixture.build().generate(**_one_prompt(fixture), max_new_tokens=8)
    wrapped, plain = case.apply(fixture.build()), fixture.build()
    equal(wrapped.generate(**_one_prompt(fixture), max_new_tokens=8, assistant_model=plain), expected)
    equal(plain.generate(**_one_prompt(fixture), max_new_tokens=8, assistant_model=wrapped), expected)


def _one_prompt(fixture: ModelFixture) -> dict[str, Any]:
    return {name: value[1:] for name, value in fixture.prompt().items()}


@every_technique
@models_with(generates=True)
def test_logits_of_every_generated_step_are_equal(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    flags = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, "use_cache": True}
    ours, theirs = (each.generate(**fixture.prompt(), **flags) for each in (model, twin))
    equal(ours.logits, theirs.logits)
    equal(ours.sequences, theirs.sequences)


@every_technique
@every_model
def test_disabled_runs_the_original_and_restores_on_error(case: Case, fixture: ModelFixture) -> None:
    model, twin = tw.apply(case.apply(fixture.build()), Outer()), fixture.build()
    expected = run(twin, fixture.inputs())
    with tw.disabled(model):
        equal(run(model, fixture.inputs()), expected)
    assert notes(model, "test_outer") == []
    with pytest.raises(ZeroDivisionError), tw.disabled(model, "test_outer"):
        equal(run(model, fixture.inputs()), expected)
        raise ZeroDivisionError
    assert notes(model, "test_outer") == []
    equal(run(model, fixture.inputs()), expected)
    assert "before" in notes(model, "test_outer")


def test_there_are_enough_fixtures_of_each_kind() -> None:
    kinds = ("generates", "encoder_decoder", "vision", "tied", "shared", "batchnorm", "has_dropout", "has_attentions")
    counts = {kind: len(select(**{kind: True})) for kind in kinds}
    assert min(counts.values()) >= 1, counts

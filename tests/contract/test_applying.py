"""What a wrapped model still is: the same object, of the same kind, with the same weights under the same names, in every call form."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_model, every_technique, every_two, model_bytes, models_named
from tests.contract.compare import equal, model_difference, state_difference
from tests.contract.forms import FORMS, Form
from tests.contract.neutral import Failing, Outer
from tests.models import ModelFixture, run


@every_two("form", FORMS)
def test_every_call_form_gives_the_same_outputs_and_undoes(case: Case, fixture: ModelFixture, form: Form) -> None:
    twin = fixture.build()
    expected = run(twin, fixture.inputs())
    with form(case, fixture) as model:
        name = case.technique
        assert list(tw.wrappers_of(model)) == [name]
        assert isinstance(tw.wrappers_of(model)[name], tw.Config)
        equal(run(model, fixture.inputs()), expected)
        if form.__name__ != "_applied":
            tw.unwrap(model, name)
    assert tw.wrappers_of(model) == {}
    assert model_difference(model, twin) is None


@every_technique
@every_model
def test_wrapped_model_keeps_identity_class_name_and_signature(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    wrapped = case.apply(model)
    assert wrapped is model
    for (name, ours), (_, theirs) in zip(model.named_modules(), twin.named_modules(), strict=True):
        cls = type(theirs)
        assert isinstance(ours, cls), name
        assert (type(ours).__name__, type(ours).__qualname__, type(ours).__module__) == (cls.__name__, cls.__qualname__, cls.__module__)
        assert str(type(ours)) == str(cls)
        assert type(ours).__doc__ == cls.__doc__
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
        assert inspect.signature(type(ours).forward) == inspect.signature(cls.forward)
        assert ours.extra_repr() == theirs.extra_repr()
    assert repr(model) == repr(twin)


@every_technique
@every_model
def test_state_dict_is_the_same_before_during_and_after(case: Case, fixture: ModelFixture) -> None:
    model = fixture.build()
    before = copy.deepcopy(model.state_dict())
    case.apply(model)
    assert state_difference(model.state_dict(), before) is None
    run(model, fixture.inputs())
    assert state_difference(model.state_dict(), before) is None
    assert state_difference(model.state_dict(prefix="a.b."), {f"a.b.{key}": value for key, value in before.items()}) is None
    tw.unwrap(model)
    assert state_difference(model.state_dict(), before) is None


@every_technique
@every_model
def test_parameters_are_the_same_objects_in_the_same_order(case: Case, fixture: ModelFixture) -> None:
    model = fixture.build()
    before = [(name, id(parameter), parameter.shape, parameter.dtype, parameter.requires_grad) for name, parameter in _named(model)]
    case.apply(model)
    during = [(name, id(parameter), parameter.shape, parameter.dtype, parameter.requires_grad) for name, parameter in _named(model)]
    run(model, fixture.inputs())
    tw.unwrap(model)
    after = [(name, id(parameter), parameter.shape, parameter.dtype, parameter.requires_grad) for name, parameter in _named(model)]
    assert during == before
    assert after == before


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


@every_technique
@every_model
def test_load_state_dict_into_a_wrapped_model_takes_effect(case: Case, fixture: ModelFixture) -> None:
    reference = _shifted(fixture.build())
    model = case.apply(fixture.build())
    run(model, fixture.inputs())
    result = model.load_state_dict(reference.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    equal(run(model, fixture.inputs()), run(reference, fixture.inputs()))
    tw.unwrap(model)
    equal(run(model, fixture.inputs()), run(reference, fixture.inputs()))
    assert state_difference(model.state_dict(), reference.state_dict()) is None


@every_technique
@models_named("llama-tied", "convnet", "mlp")
def test_load_state_dict_with_assign_takes_effect(case: Case, fixture: ModelFixture) -> None:
    reference = _shifted(fixture.build())
    plain = fixture.build()
    plain.load_state_dict(reference.state_dict(), assign=True)
    model = case.apply(fixture.build())
    model.load_state_dict(reference.state_dict(), assign=True)
    equal(run(model, fixture.inputs()), run(plain, fixture.inputs()))
    tw.unwrap(model)
    equal(run(model, fixture.inputs()), run(plain, fixture.inputs()))


@every_technique
@models_named("llama", "mlp")
def test_strict_load_reports_the_same_message(case: Case, fixture: ModelFixture) -> None:
    plain, model = fixture.build(), case.apply(fixture.build())
    state = dict(plain.state_dict())
    state.pop(next(reversed(state)))
    state["not.there"] = torch.zeros(1)
    messages = []
    for each in (plain, model):
        with pytest.raises(RuntimeError) as caught:
            each.load_state_dict(state)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def _shifted(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


@every_technique
@every_model
def test_double_application_names_both_configs_and_changes_nothing(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), case.apply(fixture.build())
    name = case.technique
    config = tw.wrappers_of(model)[name]
    with pytest.raises(tw.ConflictError) as caught:
        case.apply(model)
    message = str(caught.value)
    assert name in message
    assert message.count(type(config).__name__) >= 2, message
    assert tw.wrappers_of(model) == {name: config}
    equal(run(model, fixture.inputs()), run(twin, fixture.inputs()))
    tw.unwrap(model)
    plain = fixture.build()
    run(plain, fixture.inputs())
    assert model_difference(model, plain) is None


@every_technique
@models_named("llama", "t5", "albert", "convnet", "mlp")
def test_a_failure_while_applying_a_list_leaves_the_model_untouched(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    with pytest.raises(OSError, match="the disk went away"):
        tw.apply(model, [Outer(), case.config(model), Failing()])
    assert tw.wrappers_of(model) == {}
    assert model_difference(model, twin) is None
    equal(run(model, fixture.inputs()), run(twin, fixture.inputs()))


@every_technique
@every_model
def test_check_touches_nothing_and_says_what_would_be_attached(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    report = tw.check(model, configs=[case.config(model)])
    assert case.technique in str(report)
    assert model_difference(model, twin) is None


@every_technique
@every_model
def test_describe_of_a_wrapped_model_is_readable_and_json_able(case: Case, fixture: ModelFixture) -> None:
    import json

    model = case.apply(fixture.build())
    report = tw.describe(model)
    json.dumps(report.to_dict())
    assert case.technique in str(report)
    assert max(map(len, str(report).splitlines())) <= 100


@every_technique
@every_model
def test_core_tensors_gives_the_real_weights(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    expected = dict(twin.named_parameters(remove_duplicate=False))
    with tw.core.tensors(model) as real:
        assert list(real) == list(expected)
        for name, tensor in real.items():
            assert torch.equal(tensor, expected[name]), name
    assert model_bytes(model) == model_bytes(twin)


@every_technique
@models_named("llama", "t5", "albert", "convnet")
def test_core_tensors_written_to_are_used_by_the_next_call(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), _shifted(fixture.build())
    run(model, fixture.inputs())
    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        seen_already = {id(parameter) for _, parameter in _before(model, prefix)}
        names = [name for name in names if id(getattr(module, name)) not in seen_already]
        if names:
            with tw.core.tensors(module, *names, write=True) as real:
                for tensor in real.values():
                    tensor.mul_(1.25)
    equal(run(model, fixture.inputs()), run(twin, fixture.inputs()))
    tw.unwrap(model)
    assert state_difference(model.state_dict(), twin.state_dict()) is None


def _before(model: nn.Module, stop: str) -> list[tuple[str, nn.Parameter]]:
    found: list[tuple[str, nn.Parameter]] = []
    for prefix, module in model.named_modules():
        if prefix == stop:
            return found
        found += list(module.named_parameters(recurse=False))
    return found


@every_technique
@every_model
def test_unwrap_of_something_not_applied_lists_what_is(case: Case, fixture: ModelFixture) -> None:
    model = fixture.build()
    assert tw.unwrap(model) is model
    case.apply(model)
    with pytest.raises(tw.NotAppliedError, match=case.technique):
        tw.unwrap(model, "no_such_technique")
    with pytest.raises(tw.NotAppliedError, match=case.technique):
        tw.unwrap(model, Outer)
    tw.unwrap(model, type(case.config(model)))
    assert tw.wrappers_of(model) == {}

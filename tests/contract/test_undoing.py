"""Undo leaves nothing: any order, any nesting, below other people's wrappers, many times over, and no object is kept alive."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_model, every_technique, every_two, models_named
from tests.contract.compare import equal, model_difference
from tests.contract.neutral import Inner, Outer
from tests.models import ModelFixture, run

ORDERS = list(itertools.permutations(("technique", "outer", "inner")))


@every_two("order", {"-".join(order): order for order in ORDERS})
def test_three_techniques_come_off_in_any_order(case: Case, fixture: ModelFixture, order: tuple[str, ...]) -> None:
    model, twin = fixture.build(), fixture.build()
    names = {"technique": case.technique, "outer": "test_outer", "inner": "test_inner"}
    expected = run(twin, fixture.inputs())
    tw.apply(model, [Outer(), case.config(model), Inner()])
    equal(run(model, fixture.inputs()), expected)
    left = set(names.values())
    for each in order:
        tw.unwrap(model, names[each])
        left.remove(names[each])
        assert set(tw.wrappers_of(model)) == left
        equal(run(model, fixture.inputs()), expected)
    assert model_difference(model, twin) is None


@every_technique
@models_named("llama", "t5", "albert", "convnet", "mlp")
@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
def test_the_order_of_application_does_not_change_the_order_of_calls(case: Case, fixture: ModelFixture, order: tuple[str, ...]) -> None:
    model = fixture.build()
    configs = {"technique": case.config(model), "outer": Outer(), "inner": Inner()}
    reference = tw.apply(fixture.build(), list(configs.values()))
    for each in order:
        tw.apply(model, configs[each])
    assert list(tw.wrappers_of(model)) == list(tw.wrappers_of(reference))
    tw.unwrap(model)
    twin = fixture.build()
    assert model_difference(model, twin) is None


@every_technique
@every_model
def test_unwrap_equals_a_twin_that_ran_the_same_calls(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    case.apply(model)
    flags = {"output_hidden_states": True} if fixture.has_hidden_states else {}
    for each in (model, twin):
        run(each, fixture.inputs(), **flags)
        run(each, fixture.inputs())
        each.eval()
        each.requires_grad_(False).requires_grad_(True)
        each.zero_grad()
        if fixture.generates:
            each.generate(**fixture.prompt(), max_new_tokens=2)
        each.state_dict()
    tw.unwrap(model)
    assert model_difference(model, twin) is None


@every_technique
@every_model
def test_applied_nests_and_exits_in_any_order(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    expected = run(twin, fixture.inputs())
    first, second = tw.applied(model, case.config(model)), tw.applied(model, [Outer(), Inner()])
    first.__enter__()
    second.__enter__()
    equal(run(model, fixture.inputs()), expected)
    first.__exit__(None, None, None)
    assert set(tw.wrappers_of(model)) == {"test_outer", "test_inner"}
    equal(run(model, fixture.inputs()), expected)
    second.__exit__(None, None, None)
    assert model_difference(model, twin) is None


@every_technique
@every_model
def test_applied_undoes_on_error(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    with pytest.raises(ZeroDivisionError), tw.applied(model, [Outer(), case.config(model)]):
        raise ZeroDivisionError
    assert model_difference(model, twin) is None


@every_technique
@models_named("llama", "convnet")
def test_applied_decorates_functions(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()

    @tw.applied(model, case.config(model))
    def names() -> list[str]:
        return list(tw.wrappers_of(model))

    assert [names(), names()] == [[case.technique]] * 2
    assert model_difference(model, twin) is None


@every_technique
@every_model
def test_captured_bound_method_stays_valid_after_undo(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    case.apply(model)
    captured = [model.forward, model.__call__, model.get_submodule(fixture.block).forward]
    expected = run(twin, fixture.inputs())
    with torch.no_grad():
        equal(captured[0](**fixture.inputs()), expected)
        tw.unwrap(model)
        equal(captured[0](**fixture.inputs()), expected)
        equal(captured[1](**fixture.inputs()), expected)
    # As accelerate and parametrizations do: the method caught while wrapped becomes the instance's forward.
    block = model.get_submodule(fixture.block)
    block.forward = captured[2]
    equal(run(model, fixture.inputs()), expected)


@every_technique
@every_model
def test_an_instance_forward_set_while_wrapped_survives_undo(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    calls: list[str] = []
    inner = model.forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        calls.append("patched")
        return inner(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    expected = run(twin, fixture.inputs())
    equal(run(model, fixture.inputs()), expected)
    tw.unwrap(model)
    equal(run(model, fixture.inputs()), expected)
    assert calls == ["patched", "patched"]
    assert isinstance(model, type(twin))


# --- growth ----------------------------------------------------------------------------------------------------------------------


def _figures() -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
        "resident": process.memory_info().rss,
    }


@every_technique
@models_named("mlp")  # tests/memory repeats it with a language model, in a process of its own
@pytest.mark.slow
def test_200_cycles_of_wrap_call_unwrap_grow_nothing(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    expected, config = run(twin, fixture.inputs()), case.config(model)

    def cycle() -> None:
        tw.apply(model, config)
        run(model, fixture.inputs())
        tw.unwrap(model)

    for _ in range(40):  # allocator pools and caches fill
        cycle()
    before = _figures()
    for _ in range(200):
        cycle()
    after = _figures()
    assert after["descriptors"] <= before["descriptors"]
    assert after["threads"] <= before["threads"]
    assert after["objects"] <= before["objects"] + 50, (before, after)
    assert after["resident"] <= before["resident"] + 8 * 2**20, (before, after)
    equal(run(model, fixture.inputs()), expected)
    assert model_difference(model, twin) is None


@every_technique
@models_named("llama-tied", "convnet")
@pytest.mark.slow
def test_200_forwards_grow_nothing(case: Case, fixture: ModelFixture) -> None:
    model = case.apply(fixture.build())
    for _ in range(20):
        run(model, fixture.inputs())
    before = _figures()
    for _ in range(200):
        run(model, fixture.inputs())
    after = _figures()
    assert after["descriptors"] <= before["descriptors"]
    assert after["threads"] <= before["threads"]
    assert after["objects"] <= before["objects"] + 50, (before, after)
    assert after["resident"] <= before["resident"] + 8 * 2**20, (before, after)


def _leave_wrapped(case: Case, model: nn.Module, fixture: ModelFixture) -> None:
    case.apply(model)
    run(model, fixture.inputs())


def _leave_unwrapped(case: Case, model: nn.Module, fixture: ModelFixture) -> None:
    _leave_wrapped(case, model, fixture)
    tw.unwrap(model)


def _leave_after_an_error(case: Case, model: nn.Module, fixture: ModelFixture) -> None:
    case.apply(model)
    with pytest.raises(Exception):  # noqa: B017 - each model complains in its own way
        run(model, {name: value.flatten()[:3].reshape(3, 1, 1, 1, 1) for name, value in fixture.inputs().items()})


@every_technique
@every_model
@pytest.mark.parametrize("leave", [_leave_wrapped, _leave_unwrapped, _leave_after_an_error], ids=["wrapped", "unwrapped", "after-an-error"])
def test_model_is_collected(case: Case, fixture: ModelFixture, leave: Callable[[Case, nn.Module, ModelFixture], None]) -> None:
    model = fixture.build()
    leave(case, model, fixture)
    alive = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert [ref().__class__.__name__ for ref in alive if ref() is not None] == []


@every_technique
@models_named("llama", "convnet")
def test_nothing_is_left_in_the_temporary_folder(
    case: Case, fixture: ModelFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, collected = case.apply(fixture.build()), case.apply(fixture.build())
    run(model, fixture.inputs())
    run(collected, fixture.inputs())
    tw.unwrap(model)
    del collected
    gc.collect()
    assert os.listdir(tmp_path) == []


@every_technique
@every_model
def test_the_library_is_silent(case: Case, fixture: ModelFixture, capfd: pytest.CaptureFixture[str]) -> None:
    model = fixture.build()
    run(model, fixture.inputs())
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error", tw.TorchwrapWarning)
        case.apply(model)
        run(model, fixture.inputs())
        tw.unwrap(model)
    assert capfd.readouterr() == ("", "")

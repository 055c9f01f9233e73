"""Call forms, the transaction, undo, and the registry."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.unit.parts import Block, Net, Times
from torchwrap.core import technique as registry
from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.integration import Integration
from torchwrap.core.layer import Layer
from torchwrap.core.swap import layers_of
from torchwrap.core.technique import Handle, Prepared, Technique, register, technique_named

X = torch.ones(2, 4)


@dataclass(frozen=True, kw_only=True)
class Far(tw.Config):
    """Multiplies by two, in an outer phase."""

    technique: ClassVar[str] = "unit_far"
    fails: str = ""


@dataclass(frozen=True, kw_only=True)
class Near(tw.Config):
    """Multiplies by two, in an inner phase."""

    technique: ClassVar[str] = "unit_near"
    fails: str = ""


class _Owner(Handle):
    def __init__(self) -> None:
        self.held = 0
        self.closed = False
        self.events: list[str] = []

    @contextmanager
    def call_lock(self) -> Iterator[None]:
        self.held += 1
        yield
        self.held -= 1

    def close(self) -> None:
        assert self.held > 0, "layers change only while no forward runs"
        self.closed = True


class _Doubling(Technique[Any]):
    def __init__(self, name: str, phase: int, config_class: type[tw.Config]) -> None:
        self.name, self.phase, self.config_class = name, phase, config_class  # type: ignore[misc]
        self.detaching_fails = False

    def prepare(self, model: nn.Module, config: Any, integration: Integration) -> Prepared[Any]:
        if config.fails == "prepare":
            raise UnsupportedModelError("not for this model")
        return Prepared(config=config, layers=[("", model, Times(2.0)), ("blocks.0", model.get_submodule("blocks.0"), Times(2.0))])

    def attach(self, model: nn.Module, prepared: Prepared[Any]) -> Handle:
        if prepared.config.fails == "attach":
            raise OSError("no room")
        handle = _Owner()
        for _, _, layer in prepared.layers:
            layer.owner = handle  # type: ignore[assignment]
        if prepared.config.fails == "layers":
            prepared.layers.append(prepared.layers[0])
        return handle

    def detach(self, model: nn.Module, handle: Handle) -> None:
        if self.detaching_fails:
            raise OSError("cannot read back")
        super().detach(model, handle)


far = _Doubling("unit_far", 15, Far)
near = _Doubling("unit_near", 45, Near)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registry, "unit_far", far)
    monkeypatch.setitem(registry._registry, "unit_near", near)
    monkeypatch.setattr(far, "detaching_fails", False)


def _state(model: nn.Module) -> list[Any]:
    return [(type(module), list(module.__dict__)) for module in model.modules()]


# --- call forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fields", "config", "apply", "apply list", "plan", "decorator of a model"])
def test_every_form_on_an_instance_returns_the_same_object(form: str) -> None:
    model = Net()
    result = {
        "fields": lambda: tw.trace(model, where="inside"),
        "config": lambda: tw.trace(model, tw.Trace(where="inside")),
        "apply": lambda: tw.apply(model, tw.Trace(where="inside")),
        "apply list": lambda: tw.apply(model, [tw.Trace(where="inside")]),
        "plan": lambda: tw.Plan(configs=(tw.Trace(where="inside"),)).apply(model),
        "decorator of a model": lambda: tw.trace(where="inside")(model),
    }[form]()
    assert result is model and tw.wrappers_of(model) == {"trace": tw.Trace(where="inside")}


def test_fields_and_config_together_are_refused() -> None:
    with pytest.raises(tw.ConfigError, match="where"):
        tw.trace(Net(), tw.Trace(), where="inside")


def test_unknown_field_names_the_closest() -> None:
    with pytest.raises(tw.ConfigError, match="Did you mean 'where'"):
        tw.trace(Net(), wher="inside")


def test_config_of_another_technique_is_refused() -> None:
    with pytest.raises(tw.ConfigError, match="class Trace, not of class Far"):
        tw.trace(Net(), Far())  # type: ignore[call-overload]


@pytest.mark.parametrize("target", [3, "model", dict, int], ids=str)
def test_target_that_is_neither_module_nor_maker_is_a_type_error(target: Any) -> None:
    with pytest.raises(TypeError):
        tw.trace(target)


@pytest.mark.parametrize("none", [None, [None]], ids=str)
def test_no_model_is_refused_and_does_not_make_a_decorator(none: Any) -> None:
    """`model = build()` of a function that forgot its `return`."""
    with pytest.raises(TypeError, match="not a NoneType" if none is None else "not a list"):
        tw.trace(none)


def test_name_in_place_of_a_model_is_told_how_to_load_it() -> None:
    with pytest.raises(tw.UnsupportedModelError, match=r"offload\.from_pretrained\('gpt2'\)"):
        tw.offload("gpt2", device_memory="1GiB")
    with pytest.raises(tw.UnsupportedModelError, match="Load the model first"):
        tw.trace("gpt2")


def test_setting_without_its_name_is_told_the_form() -> None:
    with pytest.raises(tw.ConfigError, match=r"class Offload, not of class str.*offload\(model, device=\.\.\., device_memory=\.\.\.\)"):
        tw.offload(Net(), "1GiB")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("configs", "shown", "fix"),
    [
        ("offload", "'offload'", r"Give Offload\(\)"),
        (["offload"], "'offload'", r"Give Offload\(\)"),
        ("nonsense", "'nonsense'", r"such as torchwrap\.Trace\(\)"),
        (tw.Offload, "the class Offload", r"Offload\(\)"),
        ([tw.Offload], "the class Offload", r"Offload\(\)"),
        (tw.offload, "<technique offload>", r"Give Offload\(\)"),
        ([tw.trace], "<technique trace>", r"Give Trace\(\)"),
        (None, "None", r"such as torchwrap\.Trace\(\)"),
        (3, "3", r"such as torchwrap\.Trace\(\)"),
    ],
)
def test_configs_that_are_no_configs_are_refused_with_what_was_meant(configs: Any, shown: str, fix: str) -> None:
    with pytest.raises(tw.ConfigError, match=f"{shown} is not a config.*{fix}"):
        tw.apply(Net(), configs)


def test_model_and_config_the_wrong_way_round_are_told_apart() -> None:
    with pytest.raises(tw.UnsupportedModelError, match=r"Trace is no nn\.Module"):
        tw.apply(tw.Trace(), Net())  # type: ignore[type-var, arg-type]


def test_dry_run_refuses_what_is_no_config_as_the_application_does() -> None:
    with pytest.raises(tw.ConfigError, match=r"'offload' is not a config.*Offload\(\)"):
        tw.check(Net(), configs="offload")  # type: ignore[arg-type]


@pytest.mark.parametrize("named", ["trace", tw.Trace, tw.Trace(), tw.trace], ids=["name", "class", "config", "technique"])
def test_technique_is_named_in_any_form(named: Any) -> None:
    model = tw.trace(Net())
    with tw.disabled(model, named):
        model(X)
    assert tw.handle_of(model, named).stats()[""]["calls"] == 0
    assert tw.wrappers_of(tw.unwrap(model, named)) == {}


@pytest.mark.parametrize("asked", [tw.unwrap, tw.handle_of, lambda model, name: tw.disabled(model, name).__enter__()])
def test_what_names_no_technique_is_refused_with_the_form(asked: Any) -> None:
    model = tw.trace(Net())
    with pytest.raises(tw.ConfigError, match=r"3 names no technique.*'trace'"):
        asked(model, 3)


@pytest.mark.parametrize("kind", ["module", "tuple", "dict"])
def test_factory_results_are_wrapped(kind: str) -> None:
    @tw.trace
    def build(kind: str) -> Any:
        """Makes one."""
        model = Net()
        return {"module": model, "tuple": (model, 3), "dict": {"model": model, "n": 3}}[kind]

    made = build(kind)
    model = {"module": lambda: made, "tuple": lambda: made[0], "dict": lambda: made["model"]}[kind]()
    assert list(tw.wrappers_of(model)) == ["trace"] and build.__doc__ == "Makes one."


@pytest.mark.parametrize("result", [None, 3, (), (Net(), Net()), {}], ids=lambda value: type(value).__name__)
def test_factory_without_exactly_one_module_is_a_type_error(result: Any) -> None:
    with pytest.raises(TypeError, match="returned a"):
        tw.trace(lambda: result)()


# --- the transaction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[Far(), Near()], [Near(), Far()]], ids=["far-near", "near-far"])
@pytest.mark.parametrize("steps", [1, 2])
def test_phase_decides_the_order_of_layers_not_the_user(order: list[tw.Config], steps: int) -> None:
    model = Net()
    if steps == 1:
        tw.apply(model, order)
    else:
        for config in order:
            tw.apply(model, config)
    assert [layer.name for layer in layers_of(model)] == ["unit_far", "unit_near"] == list(tw.wrappers_of(model))


@pytest.mark.parametrize("fails", ["prepare", "attach", "layers"])
@pytest.mark.parametrize("first", [True, False])
def test_failure_leaves_the_model_as_it_was(fails: str, first: bool) -> None:
    model = Net()
    before, plain = _state(model), model(X)
    configs = [Far(fails=fails), Near()] if first else [Far(), Near(fails=fails)]
    with pytest.raises((OSError, tw.TorchwrapError)):
        tw.apply(model, [tw.Trace(), *configs])
    assert _state(model) == before and torch.equal(model(X), plain)


def test_not_strict_leaves_out_what_does_not_fit_and_says_so() -> None:
    model = Net()
    before = _state(model)
    tw.apply(model, [Far(fails="prepare"), Near()], strict=False)
    assert list(tw.wrappers_of(model)) == ["unit_near"]
    assert "not for this model" in str(tw.describe(model)) and tw.describe(model).skipped.keys() == {"unit_far"}
    tw.unwrap(model)
    assert _state(model) == before
    with pytest.raises(OSError):
        tw.apply(model, [Far(fails="attach")], strict=False)


def test_twice_is_a_conflict_with_both_configs_also_within_one_list_and_below() -> None:
    model = tw.trace(Net(), where="inside")
    for configs in ([tw.Trace()], [Far(), tw.Trace()]):
        with pytest.raises(tw.ConflictError) as caught:
            tw.apply(model, configs)
        # What was set, and not the defaults: some configs have more than twenty fields.
        assert caught.value.what == "trace is there already: Trace(where='inside'); asked for now: Trace()"
    with pytest.raises(tw.ConflictError, match="there already"):
        tw.apply(Net(), [Near(), Near()])
    part = Net()
    tw.trace(part.blocks[0])
    with pytest.raises(tw.ConflictError, match=r"blocks\.0"):
        tw.trace(part)
    with pytest.raises(tw.ConflictError, match="around"):
        tw.trace(model.blocks[0])


@pytest.mark.parametrize("order", list(itertools.permutations(["unit_far", "unit_near", "trace"])))
def test_unwrap_in_any_order_leaves_nothing(order: tuple[str, ...]) -> None:
    model = Net()
    before, plain = _state(model), model(X)
    tw.apply(model, [Near(), tw.Trace(), Far()])
    handles = [tw.handle_of(model, Near), tw.handle_of(model, "unit_far")]
    for name in order:
        assert tw.unwrap(model, name) is model
    assert _state(model) == before and torch.equal(model(X), plain)
    assert all(handle.closed and handle.held == 0 for handle in handles)


def test_unwrap_by_class_and_of_nothing() -> None:
    model = tw.apply(Net(), [tw.Trace(), Near()])
    tw.unwrap(model, tw.Trace)
    assert list(tw.wrappers_of(model)) == ["unit_near"]
    with pytest.raises(tw.NotAppliedError, match="unit_near"):
        tw.unwrap(model, "trace")
    tw.unwrap(model)
    assert tw.unwrap(model) is model
    with pytest.raises(tw.NotAppliedError, match="nothing"):
        tw.handle_of(model, "trace")


def test_unwrap_of_a_technique_on_a_part_says_where_it_is() -> None:
    model = Net()
    tw.trace(model.blocks[2])
    with pytest.raises(tw.NotAppliedError, match=r"unwrap\(model\.blocks\.2, 'trace'\)"):
        tw.unwrap(model, "trace")


def test_unwrap_that_fails_leaves_the_technique_applied_and_can_be_repeated() -> None:
    model = Net()
    before, plain = _state(model), model(X)
    tw.apply(model, [tw.Trace(where="inside"), Far(), Near()])
    places, wrapped = [layers_of(module) for module in model.modules()], model(X)
    far.detaching_fails = True
    with pytest.raises(OSError, match="cannot read back"):
        tw.unwrap(model, "unit_far")
    assert [layers_of(module) for module in model.modules()] == places and torch.equal(model(X), wrapped)
    far.detaching_fails = False
    tw.unwrap(model)
    assert _state(model) == before and torch.equal(model(X), plain)


def test_applied_nests_and_is_undone_in_any_order_and_on_error() -> None:
    model = Net()
    before = _state(model)
    outer, inner = tw.applied(model, Far()), tw.applied(model, [Near(), tw.Trace()])
    outer.__enter__()
    assert inner.__enter__() is model
    outer.__exit__(None, None, None)
    assert list(tw.wrappers_of(model)) == ["trace", "unit_near"]
    tw.unwrap(model, "trace")
    inner.__exit__(None, None, None)
    assert _state(model) == before
    with pytest.raises(KeyboardInterrupt), tw.applied(model, Far()):
        raise KeyboardInterrupt
    assert _state(model) == before


def test_applied_decorates_a_function() -> None:
    model = Net()

    @tw.applied(model, Far())
    def names() -> list[str]:
        return list(tw.wrappers_of(model))

    assert names() == names() == ["unit_far"] and tw.wrappers_of(model) == {}


def test_disabled_gives_the_models_own_behaviour_in_this_thread_only() -> None:
    model = Net()
    plain = model(X)
    tw.apply(model, [Far(), Near()])
    both = model(X)
    seen: list[torch.Tensor] = []
    with tw.disabled(model):
        assert torch.equal(model(X), plain)
        thread = threading.Thread(target=lambda: seen.append(model(X)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], both) and torch.equal(model(X), both)
    with tw.disabled(model, "unit_far"):
        one = model(X)
    with tw.applied(Net(), Far()) as twin:
        twin.load_state_dict(model.state_dict())
        assert torch.equal(one, twin(X))
    with pytest.raises(tw.NotAppliedError), tw.disabled(model, "trace"):
        pass


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_records_travel_with_copies_and_are_independent(clone: Any) -> None:
    model = tw.apply(Net(), [Far(), Near(), tw.Trace()])
    twin = clone(model)
    twin(X)
    assert tw.handle_of(twin, "trace").stats()[""]["calls"] == 1 and tw.handle_of(model, "trace").stats()[""]["calls"] == 0
    assert layers_of(twin)[1].owner is tw.handle_of(twin, "unit_far") is not tw.handle_of(model, "unit_far")
    tw.unwrap(twin)
    assert type(twin) is Net and len(tw.wrappers_of(model)) == 3


def test_parallel_and_compiled_wrappers_are_looked_through() -> None:
    model = Net()
    for outer in (nn.DataParallel(model), torch.compile(model, backend="eager"), nn.DataParallel(torch.compile(model, backend="eager"))):
        assert tw.trace(outer) is outer
        assert list(tw.wrappers_of(model)) == list(tw.wrappers_of(outer)) == ["trace"]
        assert tw.unwrap(outer) is outer and type(model) is Net


# --- registry ---------------------------------------------------------------------------------------------------------


def test_technique_is_found_by_name_and_survives_pickle() -> None:
    assert technique_named("trace") is tw.trace is pickle.loads(pickle.dumps(tw.trace))
    with pytest.raises(tw.NotAppliedError, match="Did you mean 'trace'"):
        technique_named("tracee")


def test_name_belongs_to_one_technique() -> None:
    class Other(Technique[Any]):
        name, phase, config_class = "trace", 0, tw.Trace

    with pytest.raises(tw.ConfigError, match="belongs to"):
        register(Other())


def test_handle_defaults_know_nothing() -> None:
    handle = Handle()
    assert (handle.stats(), handle.tiers(), handle.bytes_moved(), handle.predict(), handle.explain()) == ({}, None, None, None, "")
    handle.trim()


def test_layer_base_changes_nothing() -> None:
    from torchwrap.core.swap import attach

    module, twin = Block(), Block()
    twin.load_state_dict(module.state_dict())
    attach(module, Layer())
    assert torch.equal(module(X), twin(X))


@pytest.mark.parametrize("call", [tw.unwrap, tw.describe, tw.wrappers_of, tw.plan_of, lambda model: tw.handle_of(model, "trace")])
def test_what_is_no_model_is_refused_by_name(call: Any) -> None:
    with pytest.raises(tw.UnsupportedModelError, match=r"int is no nn\.Module"):
        call(3)

"""Properties over random models and random sequences of what users do, against a reference model that is never wrapped."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import nn

import torchwrap as tw
from tests.contract.cases import TECHNIQUES, Case, every_technique
from tests.contract.compare import difference, model_difference, state_difference
from tests.contract.neutral import Inner, Outer, Scaled
from tests.models import run
from torchwrap.core.config import parse_size

# --- random models ---------------------------------------------------------------------------------------------------------------------

WIDTH = 6
EXAMPLES = settings.default.max_examples * 2 // 5  # models cost more than numbers; HYPOTHESIS_PROFILE=search raises it


class Residual(nn.Module):
    """Adds what its inner module computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Chain(nn.Module):
    """Calls the members of a `ModuleList` in turn."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for member in self.members:
            x = member(x)
        return x


Recipe = tuple[Any, ...]

recipes: st.SearchStrategy[Recipe] = st.recursive(
    st.tuples(st.sampled_from(["linear", "norm"])),
    lambda inner: st.one_of(
        st.tuples(st.just("residual"), inner),
        st.tuples(st.sampled_from(["chain", "sequence"]), st.lists(inner, min_size=1, max_size=4)),
    ),
    max_leaves=8,
)


def build(recipe: Recipe, share: list[tuple[int, int]], tie: list[tuple[int, int]]) -> nn.Module:
    """The model of a recipe; `share` lets one place hold the module of another, `tie` lets two linear maps share a weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(_part(recipe), nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))).eval()
    for first, second in share:
        places = [
            (parent, name) for parent in model.modules() if isinstance(parent, nn.Sequential | nn.ModuleList) for name in parent._modules
        ]
        (source, name), (target, other) = places[first % len(places)], places[second % len(places)]
        shared = source._modules[name]
        if not any(module is target for module in shared.modules()):  # a module cannot hold itself
            target._modules[other] = shared
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for first, second in tie if linears else []:
        linears[first % len(linears)].weight = linears[second % len(linears)].weight
    return model


def _part(recipe: Recipe) -> nn.Module:
    kind, *rest = recipe
    if kind == "linear":
        return nn.Linear(WIDTH, WIDTH)
    if kind == "norm":
        return nn.LayerNorm(WIDTH)
    if kind == "residual":
        return Residual(_part(rest[0]))
    members = [_part(each) for each in rest[0]]
    return Chain(members) if kind == "chain" else nn.Sequential(*members)


pairs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=2)


# --- the state machine -----------------------------------------------------------------------------------------------------------------


class WrappedModel(RuleBasedStateMachine):
    """A model that is wrapped, unwrapped, called, copied and changed at random, beside one that is only called, copied and changed."""

    case: Case = TECHNIQUES[0]

    @initialize(recipe=recipes, share=pairs, tie=pairs)
    def start(self, recipe: Recipe, share: list[tuple[int, int]], tie: list[tuple[int, int]]) -> None:
        self.model, self.twin = build(recipe, share, tie), build(recipe, share, tie)
        self.dtype = torch.float32
        self.applied: set[str] = set()

    def _configs(self) -> dict[str, tw.Config]:
        config = self.case.config(self.twin)
        return {config.technique: config, "test_outer": Outer(), "test_inner": Inner(), "test_scaled": Scaled()}

    @rule(index=st.integers(0, 3))
    def apply(self, index: int) -> None:
        name, config = list(self._configs().items())[index]
        if name in self.applied:
            with pytest.raises(tw.ConflictError):
                tw.apply(self.model, config)
        else:
            try:
                assert tw.apply(self.model, config) is self.model
            except tw.UnsupportedModelError:  # a tree without repeated blocks; the invariants see that it was left alone
                return
            self.applied.add(name)

    @precondition(lambda self: self.applied)
    @rule(data=st.data())
    def unwrap_one(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.applied)))
        tw.unwrap(self.model, name)
        self.applied.remove(name)

    @rule()
    def unwrap_all(self) -> None:
        tw.unwrap(self.model)
        self.applied.clear()

    @rule(batch=st.integers(0, 3))
    def call(self, batch: int) -> None:
        inputs = {"input": torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(batch)).to(self.dtype)}
        found = difference(run(self.model, inputs), run(self.twin, inputs))
        assert found is None, found

    @rule()
    def call_that_fails(self) -> None:
        for model in (self.model, self.twin):
            with pytest.raises(RuntimeError):
                run(model, {"input": torch.zeros(2, WIDTH + 1, dtype=self.dtype)})

    @rule(keep_copy=st.booleans())
    def deepcopy(self, keep_copy: bool) -> None:
        model = copy.deepcopy(self.model)
        assert set(tw.wrappers_of(model)) == self.applied
        if keep_copy:
            self.model, self.twin = model, copy.deepcopy(self.twin)

    @rule()
    def pickle(self) -> None:
        self.model, self.twin = pickle.loads(pickle.dumps(self.model)), pickle.loads(pickle.dumps(self.twin))
        assert set(tw.wrappers_of(self.model)) == self.applied

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def to(self, dtype: torch.dtype) -> None:
        assert self.model.to(dtype) is self.model
        self.twin.to(dtype)
        self.dtype = dtype

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def load_state_dict(self, factor: float) -> None:
        # Values come from the names in order, so that tied names do not get different ones.
        state = {name: value * factor for name, value in self.twin.state_dict().items()}
        self.model.load_state_dict(state)
        self.twin.load_state_dict(state)

    @rule(flag=st.booleans())
    def requires_grad(self, flag: bool) -> None:
        self.model.requires_grad_(flag)
        self.twin.requires_grad_(flag)

    @invariant()
    def state_is_equal(self) -> None:
        if hasattr(self, "model"):
            found = state_difference(self.model.state_dict(), self.twin.state_dict())
            assert found is None, found

    @invariant()
    def names_and_records_are_equal(self) -> None:
        if hasattr(self, "model"):
            assert [name for name, _ in self.model.named_parameters()] == [name for name, _ in self.twin.named_parameters()]
            assert set(tw.wrappers_of(self.model)) == self.applied

    def teardown(self) -> None:
        if hasattr(self, "model"):
            tw.unwrap(self.model)
            found = model_difference(self.model, self.twin)
            assert found is None, found


@every_technique
@pytest.mark.slow
def test_random_use_of_random_models_equals_a_model_never_wrapped(case: Case) -> None:
    machine = type("Machine", (WrappedModel,), {"case": case})
    chosen = settings(max_examples=EXAMPLES, stateful_step_count=12, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=chosen)


@every_technique
@given(recipe=recipes, share=pairs, tie=pairs)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_wrapping_any_module_tree_changes_nothing_and_undoes(
    case: Case, recipe: Recipe, share: list[tuple[int, int]], tie: list[tuple[int, int]]
) -> None:
    model, twin = build(recipe, share, tie), build(recipe, share, tie)
    inputs = {"input": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))}
    expected = run(twin, inputs)
    with contextlib.suppress(tw.UnsupportedModelError):  # a tree without repeated blocks
        case.apply(model)
    assert difference(run(model, inputs), expected) is None
    assert state_difference(model.state_dict(), twin.state_dict()) is None
    tw.unwrap(model)
    assert model_difference(model, twin) is None


# --- configs and sizes -----------------------------------------------------------------------------------------------------------------

CONFIG_CLASSES = sorted({case.callable.config_class for case in TECHNIQUES} | {Outer, Inner, Scaled}, key=lambda c: c.__name__)


@st.composite
def _configs(draw: st.DrawFn, cls: type[tw.Config]) -> tw.Config:
    """A valid config of this class: each field at its default or at another value its metadata allows."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.init and draw(st.booleans()):
            value = draw(_values(field))
            if value is not None:
                values[field.name] = value
    try:
        return cls(**values)
    except tw.ConfigError:  # a rule over several fields
        return cls()


def _values(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    rules, kind = field.metadata, str(field.type)
    if rules.get("choices"):
        return st.sampled_from(rules["choices"])
    low, high = rules.get("low"), rules.get("high")
    if rules.get("size"):
        return st.one_of(st.integers(int(low or 0), 2**45), st.sampled_from(["1GiB", "500MB", "1.5 GiB", "4096"]))
    if kind == "bool":
        return st.booleans()
    if kind.startswith("tuple[str"):
        return st.lists(st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1), unique=True, max_size=3).map(tuple)
    if kind.startswith("int"):
        return st.integers(int(low or 0), int(high if high is not None else 2**31))
    if kind.startswith("float"):
        return st.floats(low if low is not None else -1e6, high if high is not None else 1e6, allow_nan=False)
    if kind.startswith("str"):
        return st.text(st.characters(codec="utf-8", categories=["L", "N"]), max_size=12) if low is None else st.none()
    return st.none()


@pytest.mark.parametrize("cls", CONFIG_CLASSES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_config_survives_json(cls: type[tw.Config], data: st.DataObject) -> None:
    config = data.draw(_configs(cls))
    stored = json.loads(json.dumps(config.to_dict(machine=True), allow_nan=False))
    again = cls.from_dict(stored)
    assert again == config
    assert again.to_dict(machine=True) == config.to_dict(machine=True)
    assert hash(again) == hash(config)


@pytest.mark.parametrize("cls", CONFIG_CLASSES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_config_for_another_machine_leaves_out_exactly_the_machine_fields(cls: type[tw.Config], data: st.DataObject) -> None:
    config = data.draw(_configs(cls))
    marked = {field.name for field in dataclasses.fields(cls) if field.metadata.get("machine")}
    assert set(config.to_dict(machine=True)) - set(config.to_dict()) == marked


@pytest.mark.parametrize("cls", CONFIG_CLASSES, ids=lambda cls: cls.__name__)
def test_config_documents_every_field_and_refuses_unknown_ones(cls: type[tw.Config]) -> None:
    if cls.__module__.startswith("torchwrap."):
        assert all(field.metadata.get("doc") for field in dataclasses.fields(cls))
    with pytest.raises(tw.ConfigError, match="nonsense"):
        cls.from_dict({"nonsense": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().anything = 1  # type: ignore[attr-defined]


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@given(number=st.integers(0, 999), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " ", "  "]))
def test_parse_size_of_whole_units(number: int, unit: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}") == number * UNITS[unit]
    assert parse_size(f" {number}{space}{unit.lower()} ") == number * UNITS[unit]


@given(tenths=st.integers(0, 9999), unit=st.sampled_from(sorted(UNITS)))
def test_parse_size_of_fractions_is_exact(tenths: int, unit: str) -> None:
    assert parse_size(f"{tenths // 10}.{tenths % 10}{unit}") == tenths * UNITS[unit] // 10


@given(number=st.integers(0, 2**62))
def test_parse_size_of_bare_bytes(number: int) -> None:
    assert parse_size(number) == parse_size(str(number)) == number


@given(text=st.text(max_size=12))
def test_parse_size_gives_bytes_or_a_config_error_that_names_field_and_units(text: str) -> None:
    try:
        size = parse_size(text, field="budget")
    except tw.ConfigError as error:
        assert "budget" in str(error)
        assert "GiB" in str(error)
    else:
        assert 0 <= size < 2**63


@pytest.mark.parametrize("wrong", [-1, "-1GiB", "1.5.2GB", "GiB", "", "1 XB", "1e3", True, None, 1.5, "nan", "inf", b"1GB"], ids=repr)
def test_parse_size_refuses(wrong: Any) -> None:
    with pytest.raises(tw.ConfigError):
        parse_size(wrong, field="budget")

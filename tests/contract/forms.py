"""Every way to apply a technique, as context managers that yield the wrapped model and undo what the form left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

import torchwrap as tw
from tests.contract.cases import Case
from tests.models import ModelFixture

__all__ = ["FORMS", "Form", "fields_of"]

Form = Callable[[Case, ModelFixture], AbstractContextManager[nn.Module]]


def fields_of(config: tw.Config) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, as keywords of the technique."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    default = type(config)()
    return {name: value for name, value in values.items() if value != getattr(default, name)}


@contextmanager
def _call_with_fields(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    model = fixture.build()
    result = case.callable(model, **fields_of(case.config(model)))
    assert result is model
    yield result


@contextmanager
def _call_with_config(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    model = fixture.build()
    result = case.callable(model, case.config(model))
    assert result is model
    yield result


@contextmanager
def _apply_config(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    model = fixture.build()
    result = tw.apply(model, case.config(model))
    assert result is model
    yield result


@contextmanager
def _apply_list(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    model = fixture.build()
    result = tw.apply(model, [case.config(model)])
    assert result is model
    yield result


@contextmanager
def _apply_plan(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    planned = case.apply(fixture.build())
    plan = tw.plan_of(planned)
    tw.unwrap(planned)
    model = fixture.build()
    assert plan.apply(model) is model
    yield model


@contextmanager
def _applied(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    model = fixture.build()
    with tw.applied(model, case.config(model)) as inner:
        assert inner is model
        yield model
    assert tw.wrappers_of(model) == {}


@contextmanager
def _bare_class_decorator(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    plain = fixture.build()
    with _decorated(type(plain), case.callable):
        yield fixture.construct()


@contextmanager
def _configured_class_decorator(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    plain = fixture.build()
    with _decorated(type(plain), case.callable(**fields_of(case.config(plain)))):
        yield fixture.construct()


@contextmanager
def _decorated(cls: type[nn.Module], decorate: Callable[[type[nn.Module]], type[nn.Module]]) -> Iterator[None]:
    before = dict(vars(cls))
    assert decorate(cls) is cls
    try:
        yield
    finally:
        tw.unwrap(cls)
    assert dict(vars(cls)) == before


@contextmanager
def _factory_decorator(case: Case, fixture: ModelFixture) -> Iterator[nn.Module]:
    plain = fixture.build()

    @case.callable(**fields_of(case.config(plain)))
    def build() -> nn.Module:
        return fixture.build()

    yield build()


FORMS: dict[str, Form] = {
    "function-fields": _call_with_fields,
    "function-config": _call_with_config,
    "apply-config": _apply_config,
    "apply-list": _apply_list,
    "apply-plan": _apply_plan,
    "applied": _applied,
    "class-bare": _bare_class_decorator,
    "class-configured": _configured_class_decorator,
    "factory": _factory_decorator,
}

"""Decorated classes: the same object, subclasses, loaders, and taking the decoration off."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.unit.parts import Block, Net
from torchwrap.core.decorate import PENDING
from torchwrap.core.swap import layers_of

X = torch.ones(2, 4)


def _model_class() -> Any:
    class Model(nn.Module):
        """A model."""

        def __init__(self, count: int = 2, *, scale: float = 1.0) -> None:
            super().__init__()
            assert tw.wrappers_of(self) == {}
            self.blocks = nn.ModuleList([Block() for _ in range(count)])
            self.scale = scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x * self.scale

    return Model


@pytest.mark.parametrize("form", ["bare", "called", "with config"])
def test_decoration_returns_the_same_class_with_its_signature(form: str) -> None:
    plain = _model_class()
    signature = inspect.signature(plain)
    decorated = {"bare": tw.trace, "called": tw.trace(where="outside"), "with config": tw.trace(tw.Trace())}[form](plain)
    assert decorated is plain and inspect.signature(decorated) == signature and decorated.__doc__ == "A model."
    model = decorated(3, scale=2.0)
    assert isinstance(model, plain) and tw.wrappers_of(model) == {"trace": tw.Trace()} and len(model.blocks) == 3


def test_subclass_is_wrapped_once_after_its_own_init_whenever_it_was_defined() -> None:
    base = _model_class()

    class Early(base):
        def __init__(self) -> None:
            super().__init__()
            assert tw.wrappers_of(self) == {}
            self.late = nn.Linear(4, 4)

    tw.trace(base)

    class Late(Early):
        def __init__(self) -> None:
            super().__init__()
            assert tw.wrappers_of(self) == {}

    class Silent(Late):
        pass

    class Mixin:
        def __init__(self) -> None:
            super().__init__()
            assert tw.wrappers_of(self) == {}  # type: ignore[arg-type]
            self.extra = 1

    class Mixed(Mixin, base):
        pass

    for cls in (Early, Late, Silent, Mixed):
        model = cls()
        assert list(tw.wrappers_of(model)) == ["trace"]
        model(X)
        assert tw.handle_of(model, "trace").stats()[""]["calls"] == 1


def test_unwrapping_the_class_leaves_no_trace_and_existing_instances_alone() -> None:
    base = _model_class()

    class Sub(base):
        def __init__(self) -> None:
            super().__init__()

    class Silent(base):
        pass

    before = [dict(cls.__dict__) for cls in (base, Sub, Silent)]
    tw.trace(base)
    model = Sub()
    assert tw.unwrap(base) is base
    assert [dict(cls.__dict__) for cls in (base, Sub, Silent)] == before
    assert list(tw.wrappers_of(model)) == ["trace"] and tw.wrappers_of(Sub()) == {}
    with pytest.raises(tw.NotAppliedError):
        tw.unwrap(base, "trace")


def test_decorating_twice_with_one_technique_is_a_conflict() -> None:
    base = tw.trace(_model_class())
    with pytest.raises(tw.ConflictError, match="Trace"):
        tw.trace(base, where="inside")


def test_subclass_may_be_decorated_with_other_settings() -> None:
    base = tw.trace(_model_class())
    sub = tw.trace(where="inside")(type("Sub", (base,), {}))
    assert tw.wrappers_of(sub())["trace"] == tw.Trace(where="inside")
    assert tw.wrappers_of(base())["trace"] == tw.Trace()
    tw.unwrap(base)
    assert tw.wrappers_of(base()) == {} and list(tw.wrappers_of(sub())) == ["trace"]


def test_instance_whose_init_raises_leaves_the_next_one_right() -> None:
    base = tw.trace(_model_class())
    with pytest.raises(TypeError):
        base(count="x")
    assert list(tw.wrappers_of(base())) == ["trace"]


def test_loading_class_method_is_waited_for_and_unwrapped_with_the_class() -> None:
    base = _model_class()
    seen: list[dict[str, tw.Config]] = []

    def from_pretrained(cls: Any, tuple_too: bool = False) -> Any:
        with torch.device("meta"):
            model = cls()
        seen.append(tw.wrappers_of(model))
        model.to_empty(device="cpu").load_state_dict({name: torch.zeros(value.shape) for name, value in model.state_dict().items()})
        return (model, {}) if tuple_too else model

    base.from_pretrained = classmethod(from_pretrained)
    original = base.__dict__["from_pretrained"]
    tw.trace(base)
    model = base.from_pretrained()
    assert seen == [{}] and list(tw.wrappers_of(model)) == ["trace"]
    assert [layer.name for layer in layers_of(model)] == ["trace"]
    assert list(tw.wrappers_of(base.from_pretrained(tuple_too=True)[0])) == ["trace"]
    tw.unwrap(base)
    assert base.__dict__["from_pretrained"] is original


def test_unknown_loader_is_waited_for_until_the_first_call() -> None:
    base = tw.trace(_model_class())
    with torch.device("meta"):
        model = base()
    assert tw.wrappers_of(model) == {} and [layer.name for layer in layers_of(model)] == [PENDING]
    with pytest.raises(tw.UnsupportedModelError, match="meta"):
        model(X)
    twin = _model_class()()
    model.to_empty(device="cpu").load_state_dict(twin.state_dict())
    assert torch.equal(model(X), twin(X))
    assert list(tw.wrappers_of(model)) == ["trace"] and tw.handle_of(model, "trace").stats()[""]["calls"] == 1
    assert [layer.name for layer in layers_of(model)] == ["trace"]


def test_unwrap_of_a_waiting_instance_gives_up_waiting() -> None:
    base = tw.trace(_model_class())
    with torch.device("meta"):
        model = base()
    tw.unwrap(model)
    assert type(model) is base


def test_plain_classes_and_other_instances_are_not_touched() -> None:
    init = Net.__init__
    tw.trace(_model_class())
    assert Net.__init__ is init and tw.wrappers_of(Net()) == {}

"""Order of layers in a call, what happens when something raises, and per-call state."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from tests.unit.parts import Block, Instead, Journal, Times
from torchwrap.core.layer import CallState, Layer, suspended
from torchwrap.core.swap import attach

X = torch.ones(2, 4)


class _Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


def _wrapped(module: nn.Module, *layers: Layer) -> nn.Module:
    for layer in layers:
        attach(module, layer)
    return module


def test_before_runs_outermost_first_and_after_innermost_first() -> None:
    notes: list[str] = []
    _wrapped(Block(), Journal(notes, "i"), Journal(notes, "a", "outside"), Journal(notes, "j"), Journal(notes, "b", "outside"))(X)
    assert notes == ["a.before", "b.before", "i.before", "j.before", "j.after", "i.after", "b.after", "a.after"]


def test_index_places_a_layer_outermost() -> None:
    notes: list[str] = []
    module = _wrapped(Block(), Journal(notes, "first"))
    attach(module, Journal(notes, "second"), outermost_index=0)
    module(X)
    assert notes[0] == "second.before"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("traceable", [True, False])
def test_failed_runs_once_per_layer_innermost_first(error: BaseException, where: str, count: int, traceable: bool) -> None:
    notes: list[str] = []
    module = _wrapped(_Raises(error), *(Journal(notes, str(i), where, traceable=traceable) for i in range(count)))  # type: ignore[arg-type]
    with pytest.raises(type(error)) as caught:
        module(X)
    assert caught.value is error
    assert notes == [f"{i}.before" for i in range(count)] + [f"{i}.failed" for i in reversed(range(count))]


@pytest.mark.parametrize("count", [1, 2])
def test_layer_whose_before_raised_gets_neither_after_nor_failed(count: int) -> None:
    notes: list[str] = []
    outer = [Journal(notes, "outer")] if count == 2 else []
    module = _wrapped(Block(), *outer, Journal(notes, "bad", breaks="before"))
    with pytest.raises(RuntimeError, match="bad breaks in before"):
        module(X)
    assert notes == (["outer.before", "bad.before", "outer.failed"] if outer else ["bad.before"])


@pytest.mark.parametrize("count", [1, 2])
def test_after_that_raises_is_followed_by_the_layers_own_failed(count: int) -> None:
    notes: list[str] = []
    inner = [Journal(notes, "inner")] if count == 2 else []
    module = _wrapped(Block(), Journal(notes, "bad", breaks="after"), *inner)
    with pytest.raises(RuntimeError, match="bad breaks in after"):
        module(X)
    assert notes == ["bad.before", *(["inner.before", "inner.after"] if inner else []), "bad.after", "bad.failed"]


def test_failed_that_raises_is_logged_and_the_first_error_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    notes: list[str] = []
    module = _wrapped(_Raises(ValueError("first")), Journal(notes, "outer"), Journal(notes, "bad", breaks="failed"))
    with pytest.raises(ValueError, match="first"):
        module(X)
    assert notes[-2:] == ["bad.failed", "outer.failed"]
    assert "raised in failed()" in caplog.text


def test_call_after_a_failure_is_right() -> None:
    module, twin = Block(), Block()
    twin.load_state_dict(module.state_dict())
    _wrapped(module, Times(2.0), Times(3.0, "outside"))
    with pytest.raises(RuntimeError):
        module(torch.ones(2, 5))
    assert torch.equal(module(X), twin(X) * 2.0 * 3.0)


def test_replace_stands_in_for_forward_inside_the_other_layers() -> None:
    module, twin = Block(), Block()
    twin.load_state_dict(module.state_dict())
    _wrapped(module, Times(2.0), Instead())
    assert torch.equal(module(X, scale=3.0), (twin(X, scale=3.0) + 1) * 2.0)


def test_layer_can_change_arguments_and_output() -> None:
    class Shift(Layer):
        def before(self, module, args, kwargs):  # type: ignore[no-untyped-def]
            return (args[0] + 1,), {**kwargs, "scale": 2.0}

    module, twin = Block(), Block()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(_wrapped(module, Shift())(X), twin(X + 1, scale=2.0))


def test_call_state_nests_and_is_empty_in_a_copy_and_in_another_thread() -> None:
    state = CallState()
    state.push(1)
    state.push(2)
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(state.peek("empty")))
    thread.start()
    thread.join()
    assert seen == ["empty"]
    assert copy.deepcopy(state).peek("empty") == pickle.loads(pickle.dumps(state)).peek("empty") == "empty"
    assert [state.peek(), state.pop(), state.pop(), state.pop()] == [2, 2, 1, None]


def test_suspended_passes_layers_over_in_this_thread_only_and_nests() -> None:
    notes: list[str] = []
    first, second = Journal(notes, "first"), Journal(notes, "second")
    module = _wrapped(Block(), first, second)
    with suspended((first,)):
        with suspended((second,)):
            module(X)
            assert notes == []
            thread = threading.Thread(target=module, args=(X,))
            thread.start()
            thread.join()
            assert len(notes) == 4
        module(X)
        assert notes[4:] == ["second.before", "second.after"]
    module(X)
    assert len(notes) == 10


def test_suspended_is_restored_on_error_and_leaves_essential_layers_running() -> None:
    notes: list[str] = []
    essential = Journal(notes, "weights")
    essential.essential = True
    module = _wrapped(Block(), essential)
    with pytest.raises(RuntimeError), suspended((essential,)):
        module(X)
        raise RuntimeError
    assert notes == ["weights.before", "weights.after"]
    other = Journal(notes, "other")
    attach(module, other)
    module(X)
    assert "other.before" in notes

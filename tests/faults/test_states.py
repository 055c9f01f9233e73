"""Weights that are read or written in unusual ways while they are away: in place, through state dicts, half-way."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.faults.disks import Disk, error
from tests.faults.subjects import at_rest, lean, llama, probe, right_again, tower, twin_of
from tests.faults.tally import Faults, same
from torchwrap.core.errors import TorchwrapError

AWAY = "blocks.1.up.weight"


def shifted(model: nn.Module, by: float = 0.25) -> dict[str, torch.Tensor]:
    """Other weights for a model."""
    return {name: value + by for name, value in model.state_dict().items()}


IN_PLACE: dict[str, Callable[[nn.Parameter], object]] = {
    "add": lambda w: w.add_(1),
    "multiply": lambda w: w.mul_(2),
    "copy": lambda w: w.copy_(torch.ones(w.shape)),
    "zero": lambda w: w.zero_(),
    "fill": lambda w: w.fill_(2),
    "row": lambda w: w.__setitem__(0, 1.0),
    "mask": lambda w: w.__setitem__(torch.zeros(w.shape, dtype=torch.bool).logical_not(), 0.0),
    "data": lambda w: w.data.zero_(),
    "detached": lambda w: w.detach().fill_(1),
    "normal": lambda w: nn.init.normal_(w),
    "zeros": lambda w: nn.init.zeros_(w),
    "uniform": lambda w: w.uniform_(),
    "clamp": lambda w: w.clamp_(0, 1),
}


@pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors is deprecated")
@pytest.mark.parametrize("name", [AWAY, "embed.weight", "head.weight"])
@pytest.mark.parametrize("write", IN_PLACE)
def test_writing_in_place_to_what_is_away(write: str, name: str, faults: Faults) -> None:
    """Refused at once by torch, or by us in the next call; never forgotten without a word."""
    expected, model = twin_of(tower), lean(tower())
    assert same(probe(model), expected)

    def written() -> torch.Tensor:
        with torch.no_grad():
            IN_PLACE[write](model.get_parameter(name))
        return probe(model)

    faults.detected(written, RuntimeError, TorchwrapError)
    with tw.core.tensors(model, name, write=True) as real:
        real[name].add_(0.5)
    plain = tower()
    plain.get_parameter(name).data.add_(0.5)
    right_again(model, probe(plain))


def test_assigning_other_data_to_what_is_away(faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    plain = tower()
    plain.get_parameter(AWAY).data = torch.ones(128, 64)
    model.get_parameter(AWAY).data = torch.ones(128, 64)
    faults.judged(lambda: probe(model), probe(plain), TorchwrapError)
    model.load_state_dict(tower().state_dict())
    right_again(model, expected)


def test_replacing_a_parameter_object_that_is_away(faults: Faults) -> None:
    plain, model = tower(), lean(tower())
    for one in (plain, model):
        one.blocks[1].up.weight = nn.Parameter(torch.ones(128, 64))
    for _ in range(2):
        faults.judged(lambda: probe(model), probe(plain), TorchwrapError)
    tw.unwrap(model)
    faults.survived(lambda: probe(model), probe(plain))


# -- load_state_dict ------------------------------------------------------------------------------------------------------------------


def both(action: Callable[[nn.Module], Any], make: Callable[[], nn.Module] = tower) -> tuple[nn.Module, nn.Module, list[Any]]:
    """(plain, wrapped, what the action gave or raised on each)."""
    models = make(), lean(make())
    assert same(probe(models[0]), probe(models[1]))
    outcomes: list[Any] = []
    for model in models:
        try:
            outcomes.append(action(model))
        except Exception as raised:
            outcomes.append(raised)
    return (*models, outcomes)


def wrong_shape(model: nn.Module) -> Any:
    return model.load_state_dict({**shifted(tower()), AWAY: torch.zeros(3, 3)})


def missing(model: nn.Module) -> Any:
    return model.load_state_dict({name: value for name, value in shifted(tower()).items() if name != AWAY})


def missing_allowed(model: nn.Module) -> Any:
    return model.load_state_dict({name: value for name, value in shifted(tower()).items() if name != AWAY}, strict=False)


def unexpected(model: nn.Module) -> Any:
    return model.load_state_dict({**shifted(tower()), "blocks.9.up.weight": torch.zeros(1)})


def no_tensor(model: nn.Module) -> Any:
    return model.load_state_dict({**shifted(tower()), AWAY: "not a tensor"})


def assigned(model: nn.Module) -> Any:
    return model.load_state_dict(shifted(tower()), assign=True)


def assigned_wrong_shape(model: nn.Module) -> Any:
    return model.load_state_dict({**shifted(tower()), AWAY: torch.zeros(3, 3)}, assign=True)


def other_dtype(model: nn.Module) -> Any:
    return model.load_state_dict({name: value.double() for name, value in shifted(tower()).items()})


def expanded(model: nn.Module) -> Any:
    return model.load_state_dict({**shifted(tower()), AWAY: torch.tensor(0.5).expand(128, 64)})


def twice(model: nn.Module) -> Any:
    model.load_state_dict(shifted(tower()))
    return model.load_state_dict(shifted(tower(), 0.5))


def own(model: nn.Module) -> Any:
    return model.load_state_dict(model.state_dict())


LOADS = (wrong_shape, missing, missing_allowed, unexpected, no_tensor, assigned, assigned_wrong_shape, other_dtype, expanded, twice, own)


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
def test_load_state_dict_ends_as_it_does_without_us(load: Callable[[nn.Module], Any], faults: Faults) -> None:
    plain, model, (theirs, ours) = both(load)
    assert type(ours) is type(theirs) and str(ours) == str(theirs)
    at_rest(model)
    expected = probe(plain)
    for _ in range(2):
        faults.survived(lambda: probe(model), expected)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    right_again(model, expected)


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_load_state_dict_that_fails_half_way(after: int, faults: Faults) -> None:
    """A value that cannot be copied ends the load in the middle; every tensor then is either the old or the new one."""

    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.copy_:
                raise KeyboardInterrupt
            return super().__torch_function__(func, types, args, kwargs or {})

    old, new = tower().state_dict(), shifted(tower())
    name = list(new)[after]
    model = lean(tower())
    assert same(probe(model), twin_of(tower))
    with torch.no_grad():
        spoiled = {**new, name: new[name].as_subclass(Refusing)}
    faults.detected(lambda: model.load_state_dict(spoiled), KeyboardInterrupt)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(torch.equal(value, old[key]) or torch.equal(value, new[key]) for key, value in state.items())
    plain = tower()
    plain.load_state_dict(state)
    faults.survived(lambda: probe(model), probe(plain))
    at_rest(model)
    model.load_state_dict(new)
    plain.load_state_dict(new)
    right_again(model, probe(plain))


@pytest.mark.parametrize("number", range(0, 24, 2))
def test_disk_full_at_each_write_of_load_state_dict(number: int, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    old, new = tower().state_dict(), shifted(tower())
    model = lean(tower())

    def write(call: int) -> None:
        if call >= number:
            raise error(errno.ENOSPC)

    store = tw.handle_of(model, "offload").store
    healthy, store._disk.backend = store._disk.backend, Disk(write=write)
    kept = model.state_dict()
    _, raised = faults.judged(lambda: model.load_state_dict(new), lambda _: True, tw.core.errors.DiskFullError, says=["path="])
    store._disk.backend = healthy
    if raised is not None:
        assert raised.errno is None or raised.needed > 0
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(torch.equal(value, old[key]) or torch.equal(value, new[key]) for key, value in state.items())
    plain = tower()
    plain.load_state_dict(state)
    faults.survived(lambda: probe(model), probe(plain))
    at_rest(model)
    for by in (0.5, 0.75):  # places given up by the failed load are used again
        model.load_state_dict(shifted(tower(), by))
    plain.load_state_dict(shifted(tower(), 0.75))
    faults.judged(lambda: kept, lambda found: never_torn(model, found, old))
    right_again(model, probe(plain))


# -- state dicts kept alive -----------------------------------------------------------------------------------------------------------


def never_torn(model: nn.Module, kept: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> bool:
    """Every tensor handed out holds what it held then, or (as without us) what the parameter holds now; nothing else."""
    now = model.state_dict()
    return all(torch.equal(value, old[name]) or torch.equal(value, now[name]) for name, value in kept.items())


KEPT: dict[str, Callable[[nn.Module], dict[str, torch.Tensor]]] = {
    "as-it-is": lambda model: model.state_dict(),
    "keep-vars": lambda model: model.state_dict(keep_vars=True),
    "detached": lambda model: {name: value.detach() for name, value in model.state_dict().items()},
    "reshaped": lambda model: {name: value.view(value.shape) for name, value in model.state_dict().items()},
    "copied": lambda model: copy.copy(model.state_dict()),
    "numpy": lambda model: {name: torch.from_numpy(value.numpy()) for name, value in model.state_dict().items()},
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_state_dict_keeps_its_values_across_later_writes(kept: str, faults: Faults) -> None:
    old, model = tower().state_dict(), lean(tower())
    state = KEPT[kept](model)
    for by in (1.0, 2.0, 3.0):
        model.load_state_dict(shifted(tower(), by))
        faults.judged(lambda: state, lambda found: never_torn(model, found, old))
    plain = tower()
    plain.load_state_dict(shifted(tower(), 3.0))
    right_again(model, probe(plain))


def test_a_state_dict_outlives_its_model(faults: Faults) -> None:
    model = lean(llama())
    state = model.state_dict()
    del model
    expected = llama().state_dict()
    faults.survived(lambda: [state[name] for name in expected], list(expected.values()))


@pytest.mark.parametrize("name", [AWAY, "embed.weight"])
def test_writing_to_a_state_dict_never_tears_model_and_state_apart(name: str, faults: Faults) -> None:
    """Without us the tensor is the parameter; with us it is a copy: whichever it is, model and state dict must agree."""
    model = lean(tower())
    state = model.state_dict()
    state[name].zero_()
    plain = tower()
    plain.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    faults.survived(lambda: probe(model), probe(plain))
    tw.unwrap(model)
    faults.survived(lambda: probe(model), probe(plain))


def test_lending_for_writing_ends_with_an_exception(faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())

    def spoil() -> None:
        with tw.core.tensors(model, AWAY, write=True) as real:
            real[AWAY].zero_()
            raise KeyboardInterrupt

    faults.detected(spoil, KeyboardInterrupt)
    right_again(model, expected)

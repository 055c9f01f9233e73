"""Calls of a model between backward and step, when some of its weights are updated already: refused, or as in training in memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.optimizer.optimizing import ADAM, batch, differences, loss_of, pair, stepped, trained
from tests.optimizer.test_rules import Broken
from torchwrap import OffloadedOptimizer
from torchwrap.weights.many import forward_many


def _without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        loss_of(model.eval(), 1)


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda model: loss_of(model, 1),
    "evaluation": _without_gradients,
    "many": lambda model: forward_many(model, [batch(1), batch(2)]),
    "block": lambda model: model.get_submodule("blocks.1")(torch.ones(2, 33)),
    "table": lambda model: model.get_submodule("embedding")(batch(1)),
}


RESIDENT = [how for how in CALLS if how not in ("block", "table")]  # parts that are all in memory have no layer that could refuse


@pytest.mark.parametrize(
    ("how", "offload"),
    [*((how, {"params": "disk"}) for how in CALLS), *((how, {}) for how in RESIDENT)],
    ids=[*(f"{how}-streamed" for how in CALLS), *(f"{how}-resident" for how in RESIDENT)],
)
def test_a_call_between_backward_and_step_is_refused_and_changes_nothing(how: str, offload: dict[str, Any]) -> None:
    plain, model = pair(offload=offload)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(plain, reference, range(3))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, 100 * step).backward()
        random = torch.get_rng_state()
        with pytest.raises(tw.ConflictError, match=r"some of its weights are new already.*step\(\) first.*overlap=False"):
            CALLS[how](model)
        assert torch.equal(torch.get_rng_state(), random)
        optimizer.step()
        CALLS[how](model)
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("options", [{"overlap": False}, {"accumulate": 2}, {"max_grad_norm": 1.0}], ids=["late", "accumulate", "clip"])
@pytest.mark.parametrize("how", CALLS)
def test_calls_before_weights_are_updated_are_those_of_training_in_memory(how: str, options: dict[str, Any]) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM, **options)
    for step in range(2):
        reference.zero_grad()
        optimizer.zero_grad()
        for micro in range(options.get("accumulate", 1)):
            if micro:
                CALLS[how](model)
                assert torch.equal(loss_of(model, 7), loss_of(plain, 7))
            for net in (plain, model):
                loss_of(net, 10 * step + micro).backward()
        if "accumulate" not in options:
            CALLS[how](model)
            assert torch.equal(loss_of(model, 7), loss_of(plain, 7))
        if "max_grad_norm" in options:
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
        optimizer.step()
        CALLS[how](model)
        assert torch.equal(loss_of(model, 7), loss_of(plain, 7))
    assert differences(plain, reference, model, optimizer) == []


def test_a_call_after_a_backward_that_raised_half_way_is_refused_until_the_step() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)

    def fail(gradient: torch.Tensor) -> None:
        raise KeyboardInterrupt

    hook = model.get_submodule("blocks.0").register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, 0).backward()
    hook.remove()
    with pytest.raises(tw.ConflictError, match=r"step\(\) first"):
        loss_of(model, 1)
    optimizer.step()
    loss_of(model, 1)


@pytest.mark.parametrize("writes", [0, 60])
def test_after_a_step_that_failed_half_way_it_has_to_be_repeated_first(writes: int) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, **ADAM)
    disk = optimizer._works.store._disk.backend = Broken()
    disk.left = writes
    for net in (plain, model):
        loss_of(net, 0).backward()
    assert torch.equal(loss_of(model, 7), loss_of(plain, 7))
    with pytest.raises(tw.DiskFullError):
        optimizer.step()
    if writes:
        with pytest.raises(tw.ConflictError, match=r"step\(\) first"):
            loss_of(model, 7)
        with pytest.raises(tw.ConflictError, match=r"updated with them already.*step\(\).*rollback"):
            optimizer.zero_grad()
    else:  # no weight is new yet
        assert torch.equal(loss_of(model, 7), loss_of(plain, 7))
    disk.left = None
    optimizer.step()
    reference.step()
    assert torch.equal(loss_of(model, 7), loss_of(plain, 7))


@pytest.mark.parametrize("way_out", ["rollback", "close", "collected", "unwrap"])
def test_the_model_may_be_called_again_when_the_step_was_given_up(way_out: str, tmp_path: Path) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    optimizer.commit()
    before = loss_of(model, 7).detach()
    loss_of(model, 0).backward()
    with pytest.raises(tw.ConflictError):
        loss_of(model, 7)
    if way_out == "rollback":
        optimizer.rollback()
        assert torch.equal(loss_of(model, 7), before)
        return
    if way_out == "close":
        with pytest.warns(tw.TorchwrapWarning, match="half a step ahead"):
            optimizer.close()
    elif way_out == "unwrap":
        with pytest.warns(tw.TorchwrapWarning, match="half a step ahead"):
            tw.unwrap(model)
    ended = way_out == "close"
    with nullcontext() if ended else pytest.warns(tw.TorchwrapWarning, match="was collected in the middle of a step"):
        del optimizer
        gc.collect()
    assert not torch.equal(loss_of(model, 7), before)


def test_between_backward_and_step_a_model_may_be_saved_and_copied() -> None:
    model, optimizer = stepped()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    assert all(torch.equal(value, saved[name]) for name, value in twin.state_dict().items())
    loss_of(twin, 1).backward()
    optimizer.step()

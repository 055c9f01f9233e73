"""Watching optimizer steps: a model that is collected in the middle of somebody's step disturbs nothing."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

import torchwrap
from torchwrap.core.errors import ConflictError


def model_away() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    return torchwrap.offload(model, device_memory=50_000)


def test_a_model_collected_during_a_step() -> None:
    held = [model_away()]
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    parameter.grad = torch.ones(3)

    def collect(*_: object) -> None:
        held.clear()
        gc.collect()

    first = register_optimizer_step_pre_hook(collect)
    try:
        optimizer.step()
    finally:
        first.remove()
    assert torch.equal(parameter, torch.full((3,), 0.5))


def test_hooks_of_collected_models_do_not_pile_up() -> None:
    torchwrap.unwrap(model_away())
    before = len(_global_optimizer_pre_hooks)
    for _ in range(5):
        model_away()
        gc.collect()
    assert len(_global_optimizer_pre_hooks) <= before + 1


def test_unwrapping_ends_the_watch() -> None:
    model = model_away()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 64)).sum().backward()
    with pytest.raises(ConflictError, match="OffloadedOptimizer"):
        optimizer.step()
    torchwrap.unwrap(model)
    optimizer.step()

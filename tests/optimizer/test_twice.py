"""Weights that a step uses twice: through reentrant checkpointing, through graphs built beforehand, in averages over steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.optimizer.optimizing import ADAM, differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer
from torchwrap.optimizer.standin import StandIn


class Shared(nn.Module):
    """A table tied to the head, and blocks of which the first is used again after the others; `apart` says what is recomputed."""

    def __init__(self, apart: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(512, 128)
            self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
            self.head = nn.Linear(128, 512, bias=False)
        self.head.weight = self.table.weight
        self.apart = apart

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for number, block in enumerate((*self.blocks, self.blocks[0])):
            apart = torch.is_grad_enabled() and (
                self.apart == "all" or (self.apart == "first" and number == 0) or (self.apart == "last" and number == 3)
            )
            x = torch.tanh(checkpoint(block, x, use_reentrant=True) if apart else block(x))
        logits: torch.Tensor = checkpoint(self.head, x, use_reentrant=True) if self.apart == "head" and x.requires_grad else self.head(x)
        return logits.square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("apart", ["all", "first", "last", "head"])
def test_a_weight_whose_gradient_comes_in_several_backwards_waits_for_the_last(apart: str, accumulate: int) -> None:
    plain, model = Shared(apart), Shared(apart)
    tw.offload(model, params="disk", units=("blocks.0", "blocks.1", "blocks.2"))
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, accumulate=accumulate, **ADAM)
    for step in range(3):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            for micro in range(accumulate):
                net(torch.arange(12) + step + micro).backward()
            if net is model:
                used = net.blocks[1].weight.grad  # of one that is used once
                assert isinstance(used, StandIn)
            opt.step()
            with torch.no_grad():
                net(torch.arange(12))  # what is only evaluated counts for nothing
    assert differences(plain, reference, model, optimizer) == []


class Headless(nn.Module):
    """The last weights are those of a streamed block."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(self.through(block, x))
        return x.square().mean()

    def through(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)


class Checkpointed(Headless):
    """Every block runs under reentrant checkpointing, also where no gradient is wanted."""

    def through(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=True)


def test_an_evaluation_with_checkpointing_is_no_use_that_a_gradient_waits_for() -> None:
    plain, model = Checkpointed(), tw.offload(Checkpointed(), params="disk")
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    for step in range(3):
        for net, opt in ((plain, reference), (model, optimizer)):
            with torch.no_grad():
                net(torch.ones(2, 128).requires_grad_())
            net((torch.ones(2, 128) + step).requires_grad_()).backward()
            if net is model:
                assert all(isinstance(block.weight.grad, StandIn) for block in net.blocks)  # used during backward
            opt.step()
            opt.zero_grad()
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("pin", [(), ("blocks.2",)], ids=["streamed", "in-memory"])
def test_a_second_graph_built_before_the_step_is_refused_and_the_step_goes_on(pin: tuple[str, ...]) -> None:
    plain, model = Headless(), tw.offload(Headless(), params="disk", pin=pin)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    for step in range(2):
        first, second = model(torch.ones(2, 128)), model(torch.ones(2, 128) * 2)
        first.backward()
        with pytest.raises(tw.ConflictError, match=r"second backward before step\(\).*accumulate=N"):
            second.backward()
        optimizer.step()
        plain(torch.ones(2, 128)).backward()
        reference.step()
        for opt in (optimizer, reference):
            opt.zero_grad()
        assert differences(plain, reference, model, optimizer) == [], step


def test_an_average_of_weights_that_are_away_is_refused_and_the_way_out_has_its_bits() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    expected = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected.update_parameters(plain)
    averages = [AveragedModel(model), AveragedModel(plain)]  # the first is streamed, too
    before = [{name: value.clone() for name, value in each.state_dict().items()} for each in averages]
    for average, kept in zip(averages, before, strict=True):
        with pytest.raises(tw.ConflictError, match=r"AveragedModel would average .* away.*core\.tensors"):
            average.update_parameters(model)
        assert all(torch.equal(value, kept[name]) for name, value in average.state_dict().items())
    trained(plain, reference, range(1))
    trained(model, optimizer, range(1))
    expected.update_parameters(plain)
    for average in averages:
        for name, _ in model.named_parameters():
            real: Any = tw.core.tensors
            with real(model, name) as new, real(average.module, name, write=True) as old, torch.no_grad():
                old[name].lerp_(new[name], 1 - 0.9)
        got = average.module.state_dict()
        assert all(torch.equal(got[name], value) for name, value in expected.module.state_dict().items())
    assert loss_of(averages[0].module, 3).item() == loss_of(expected.module, 3).item()

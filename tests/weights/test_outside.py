"""What torch does to weights outside of any forward is refused while they are away, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import torchwrap as tw
from tests.optimizer.optimizing import loss_of, pair
from torchwrap.weights.outside import look_at_reads

Change = Callable[[nn.Module], Any]


class _Double(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class _Halved(_Double):
    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def _everywhere(net: nn.Module) -> None:
    blocks = net.get_submodule("blocks")
    prune.global_unstructured([(block.up, "weight") for block in blocks], prune.L1Unstructured, amount=0.5)  # type: ignore[union-attr]


def _up(change: Change) -> Change:
    return lambda net: change(net.get_submodule("blocks.1.up"))


CHANGES: dict[str, Change] = {
    "weight_norm": _up(parametrizations.weight_norm),
    "spectral_norm": _up(parametrizations.spectral_norm),
    "parametrization": _up(lambda layer: parametrize.register_parametrization(layer, "weight", _Halved())),
    "weight_norm of old": _up(weight_norm),
    "smallest": _up(partial(prune.l1_unstructured, name="weight", amount=0.5)),
    "smallest rows": _up(partial(prune.ln_structured, name="weight", amount=0.5, n=2, dim=0)),
    "smallest of all": _everywhere,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_are_away_are_not_taken_apart_or_pruned(change: Change) -> None:
    plain, model = pair(wide=False)
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(tw.ConflictError, match="which is away"):
        change(model)
    assert {name for name, _ in model.named_parameters()} == names
    assert loss_of(model, 0).item() == loss_of(plain, 0).item()
    other = copy.deepcopy(plain)
    change(other)  # another model is none of ours
    tw.unwrap(model)
    for net in (plain, model):
        torch.manual_seed(0)
        change(net)
    model = tw.offload(model, params="disk", units=("Linear",))
    assert loss_of(model, 0).item() == loss_of(plain, 0).item()


def test_a_parametrization_that_keeps_the_weight_is_that_in_memory() -> None:
    """Its weight is saved and loaded, too, though it has another owner than when the model was wrapped."""
    plain, model = pair(wide=False)
    for net in (plain, model):
        parametrize.register_parametrization(net.get_submodule("blocks.1.up"), "weight", _Double())
        loss_of(net, 0).backward()
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True))  # type: ignore[arg-type]
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = {name: value + 1 for name, value in theirs.items()}
    for net in (plain, model):
        net.load_state_dict(other)
    assert loss_of(model, 1).item() == loss_of(plain, 1).item()
    tw.unwrap(model)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_pruning_that_does_not_look_at_weights_is_that_in_memory() -> None:
    plain, model = pair(wide=False)
    for net in (plain, model):
        torch.manual_seed(0)
        prune.random_unstructured(net.blocks[1].up, "weight", amount=0.5)
        prune.custom_from_mask(net.blocks[0].up, "weight", mask=torch.arange(168 * 33).view(168, 33) % 2)
    for net in (plain, model):
        loss_of(net, 0).backward()
    gradients = [[parameter.grad for parameter in net.parameters()] for net in (plain, model)]
    assert all(map(torch.equal, *gradients))


def test_methods_of_torch_are_put_back() -> None:
    before = prune.L1Unstructured.compute_mask
    for look, module in ((True, "torchwrap.weights.outside"), (False, "torch.nn.utils.prune")):
        look_at_reads(look)
        assert prune.L1Unstructured.compute_mask.__module__ == module
    look_at_reads(before.__module__ == "torchwrap.weights.outside")

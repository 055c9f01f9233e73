"""What is in a gradient's place once it was used or put on the disk: no number can be had from it, and zero is zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.optimizer.optimizing import Net, differences, loss_of, pair, stepped

ADAM: dict[str, Any] = {"lr": 1e-2}
TIMINGS: dict[str, dict[str, Any]] = {"overlap": {}, "disk": {"overlap": False, "gradients": "disk"}, "kept": {"overlap": False}}
NAME = "blocks.0.up.weight"

READINGS: dict[str, Callable[[torch.Tensor], object]] = {
    "norm of its own": lambda g: g.norm(1),
    "norm by rows": lambda g: g.norm(dim=0),
    "squares": lambda g: (g**2).sum(),
    "data": lambda g: g.data.abs().max(),
    "detached": lambda g: g.detach().mean(),
    "flat": lambda g: torch.cat([g.view(-1), torch.zeros(2)]),
    "finite": torch.isfinite,
    "comparison": lambda g: g > 0,
    "clone": lambda g: g.clone(),
    "half": lambda g: g * 0.5,
    "fill": lambda g: g.fill_(1.0),
    "elsewhere": lambda g: torch.zeros_like(g, dtype=torch.float64).add_(g),
}


@pytest.mark.parametrize("kind", READINGS)
def test_computing_with_it_is_refused(kind: str) -> None:
    """NaN is below no limit: `if norm > limit` would not clip."""
    model, optimizer = stepped()
    gradient = model.get_parameter(NAME).grad
    assert gradient is not None
    with pytest.raises(tw.ConflictError, match=r"has been used during backward.*overlap=False") as caught:
        READINGS[kind](gradient)
    assert caught.value.where == NAME
    optimizer.step()
    optimizer.close()


def test_it_can_be_shown_copied_and_asked_for_its_shape() -> None:
    model, optimizer = stepped()
    gradient = model.get_parameter(NAME).grad
    assert gradient is not None and gradient.shape == model.get_parameter(NAME).shape and gradient.dtype == torch.float32
    assert "nan" in repr(gradient) and gradient.untyped_storage().nbytes() == 4
    copied = copy.deepcopy(model)
    optimizer.step()
    optimizer.close()
    tw.unwrap(copied)


def test_clipping_by_hand_on_the_disk_has_the_bits_of_memory() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), **ADAM)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="disk", **ADAM)
    for step in range(3):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            loss_of(net, step).backward()
            gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
            norm = sum(gradient.detach().data.norm(2).item() ** 2 for gradient in gradients) ** 0.5
            for gradient in gradients:
                gradient.data.mul_(min(1.0, 0.01 / norm))
            opt.step()
    assert differences(plain, reference, model, optimizer) == []


def _skipping(net: Net, number: int, left_out: int | None) -> torch.Tensor:
    """The loss without one of the blocks."""
    kept, net.blocks = net.blocks, nn.ModuleList(block for i, block in enumerate(net.blocks) if i != left_out)
    try:
        return loss_of(net, number)
    finally:
        net.blocks = kept


@pytest.mark.parametrize(
    ("timing", "clip"), [(timing, clip) for timing in TIMINGS for clip in (False, True) if timing != "overlap" or not clip]
)
@pytest.mark.parametrize("who", ["optimizer", "model"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["streamed", "plain"])
def test_gradients_of_zero_step_like_gradients_of_zero(timing: str, who: str, clip: bool, wrapped: bool) -> None:
    """`zero_grad(set_to_none=False)`: a block that the next step leaves out moves on by its momentum, as in memory."""
    plain, model = pair()
    model = model if wrapped else copy.deepcopy(plain)
    reference = torch.optim.AdamW(plain.parameters(), **ADAM)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, **TIMINGS[timing], **ADAM)
    for step, left_out in enumerate((None, 1, 1, None, 0)):
        norms = []
        for net, opt in ((plain, reference), (model, optimizer)):
            (opt if who == "optimizer" else net).zero_grad(set_to_none=False)
            _skipping(net, step, left_out).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.01) if clip else torch.zeros(()))
            opt.step()
        assert torch.equal(*norms)
    assert differences(plain, reference, model, optimizer) == []

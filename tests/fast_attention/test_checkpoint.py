"""Attention that a checkpoint computes again, perhaps where another attention serves: the gradients of what was computed, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

import torchwrap as tw


class Own(nn.Module):
    """A module of a user's that checkpoints its attention."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, *tensors: Tensor) -> Tensor:
        out: Any = checkpoint(F.scaled_dot_product_attention, *tensors, use_reentrant=self.reentrant)
        return out.square()


def gradients(module: Any, tensors: list[Tensor]) -> list[Tensor | None]:
    for tensor in tensors:
        tensor.grad = None
    module(*tensors).sum().backward()
    return [tensor.grad for tensor in tensors]


def inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("check", ["default", "none"])
def test_what_is_computed_again_outside_of_the_block_is_an_error_and_no_wrong_gradient(check: str, length: int) -> None:
    tensors = inputs(length)
    with tw.fast_attention.scope():
        out: Any = checkpoint(F.scaled_dot_product_attention, *tensors, use_reentrant=False, determinism_check=check)
    with pytest.raises((CheckpointError, tw.UnsupportedModelError), match=r"different (metadata|number)|something else again"):
        out.square().sum().backward()
    assert not any(tensor.grad is not None for tensor in tensors)


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_module_checkpoints_inside_of_itself_has_the_gradients_of_what_was_computed(reentrant: bool, length: int) -> None:
    tensors = inputs(length)
    expected = gradients(Own(reentrant), tensors)
    model = tw.fast_attention(Own(reentrant), fallback="silent")
    for _ in range(2):  # a call that is known as well
        torch.testing.assert_close(gradients(model, tensors), expected, atol=1e-5, rtol=1e-5)
    calls = tw.handle_of(model, "fast_attention").stats()
    assert bool(calls["served"]) == reentrant and bool(calls["left"]) != reentrant


def test_a_module_that_is_checkpointed_around_is_served_both_times() -> None:
    class Plain(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*tensors).square()

    tensors = inputs(5)
    expected = torch.autograd.grad(Plain()(*tensors).sum(), tensors)
    model = tw.fast_attention(Plain())
    found = torch.autograd.grad(checkpoint(model, *tensors, use_reentrant=False).sum(), tensors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 2

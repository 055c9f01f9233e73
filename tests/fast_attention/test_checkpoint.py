"""Attention that a checkpoint computes again, perhaps where another attention serves: the gradients of what was computed, or an error."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torchwrap as tw
from torchwrap.attention import prepared
from torchwrap.attention.attend import attend
from torchwrap.attention.masks.mask import TileMask


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


def keep_all(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("how", ["module", "block", "function", "booleans"])
def test_what_selective_checkpointing_keeps_is_no_memory_of_ours(how: str, length: int) -> None:
    prepared.forget()
    tensors = inputs(length)
    mask = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True

    class Plain(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors)  # as models have them
            if how == "function":
                return attend(q, k, v, mask=TileMask.causal(1, length, length)).square()
            given: dict[str, Any] = {"attn_mask": mask} if how == "booleans" else {"is_causal": True}
            return F.scaled_dot_product_attention(q, k, v, **given).square()

    def computed(module: Any, **options: Any) -> list[Tensor | None]:
        return gradients(lambda *tensors: checkpoint(module, *tensors, use_reentrant=False, **options), tensors)

    module = Plain() if how in ("block", "function") else tw.fast_attention(Plain())
    with tw.fast_attention.scope() if how == "block" else nullcontext():
        found = [computed(module, context_fn=partial(create_selective_checkpoint_contexts, keep_all)) for _ in range(2)]
        expected = computed(module)
    for one in found:
        torch.testing.assert_close(one, expected, atol=0, rtol=0)

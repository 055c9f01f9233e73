"""What autograd keeps of a call may come back otherwise: in another layout, in another dtype, or mapped over by its caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchwrap.attention.attend import attend
from torchwrap.core import errors

HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "columns first": (lambda tensor: tensor.mT.contiguous(), lambda kept: kept.mT),
    "contiguous": (lambda tensor: tensor.contiguous(), lambda kept: kept),
    "heads innermost": (lambda tensor: tensor.transpose(1, -2).contiguous(), lambda kept: kept.transpose(1, -2)),
    "double": (lambda tensor: tensor if tensor.dtype == torch.bool else tensor.double(), lambda kept: kept),
}
CALLS: dict[str, tuple[int, int, Any]] = {
    "one query": (1, 20, None),
    "few queries": (3, 8, None),
    "rows of a group beyond few": (12, 20, None),
    "many queries": (40, 40, None),
    "many, a mask of booleans": (40, 40, torch.bool),
    "many, an added mask": (40, 40, torch.float32),
    "one, an added mask": (1, 20, torch.float32),
}


def inputs(queries: int, keys: int) -> list[Tensor]:
    """As models have them: heads innermost; values are one head for both."""
    made = [torch.randn(2, length, heads, 16) for length, heads in ((queries, 4), (keys, 2), (keys, 1))]
    q, k, v = (tensor.transpose(1, 2) for tensor in made)
    return [q.requires_grad_(), k.requires_grad_(), v.expand(-1, 2, -1, -1).requires_grad_()]


def mask_of(dtype: torch.dtype | None, queries: int, keys: int) -> Tensor | None:
    if dtype is None:
        return None
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.bool:
        return (torch.rand(2, keys, 1, queries, generator=generator) > 0.2).permute(0, 2, 3, 1)
    return torch.randn(2, 1, queries, keys, generator=generator)


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("how", CALLS)
def test_gradients_do_not_depend_on_how_hooks_lay_out_what_they_kept(how: str, hooks: str) -> None:
    queries, keys, dtype = CALLS[how]
    tensors, mask = inputs(queries, keys), mask_of(dtype, queries, keys)
    upstream = torch.randn(2, 4, queries, 16)
    for _ in range(2):  # a call that is known as well
        expected = torch.autograd.grad(attend(*tensors, mask=mask), tensors, upstream)
        with saved_tensors_hooks(*HOOKS[hooks]):
            out = attend(*tensors, mask=mask)
        assert "_Prepared" in out.grad_fn.name()
        for ours, theirs in zip(torch.autograd.grad(out, tensors, upstream), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_gradients_that_are_mapped_over_are_refused_by_name(queries: int) -> None:
    tensors = inputs(queries, 40)
    for bias in (None, torch.zeros(1, 4, queries, 40, requires_grad=True)):
        out = attend(*tensors, bias=bias)
        with pytest.raises(errors.UnsupportedModelError, match="is_grads_batched"):
            torch.autograd.grad(out, tensors, torch.ones(3, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_call_without_gradients_before_takes_none_from_one_with(queries: int) -> None:
    tensors = inputs(queries, 40)
    with torch.no_grad():
        attend(*tensors)
    attend(*(tensor.detach() for tensor in tensors))
    assert attend(*tensors).requires_grad


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_gradients_may_be_mapped_over_by_torch_func(queries: int) -> None:
    tensors = inputs(queries, 40)
    out = attend(*tensors)
    each = torch.randn(3, *out.shape)
    found = torch.func.vmap(lambda one: torch.autograd.grad(out, tensors, one, retain_graph=True))(each)
    for index, one in enumerate(each):
        for ours, theirs in zip(found, torch.autograd.grad(out, tensors, one, retain_graph=True), strict=True):
            assert torch.equal(ours[index], theirs)


@pytest.mark.parametrize("which", range(3))
def test_what_is_no_tensor_is_refused_by_name_after_a_call_that_is_known(which: int) -> None:
    given: list[Any] = [tensor.detach() for tensor in inputs(3, 40)]
    attend(*given)
    given[which] = given[which].tolist()
    with pytest.raises(errors.ConfigError, match="is a list"):
        attend(*given)

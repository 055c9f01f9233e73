"""Partial results put together: the algebra, and what the partials of one call must give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.merge import grad_of_sinks, merge, merge_all, merge_into, merge_stack, with_sinks
from torchwrap.attention.reference import attention


def partial(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, 8, generator=generator, dtype=dtype), torch.randn(2, 3, 5, generator=generator, dtype=dtype) * 4


def test_merge_is_commutative() -> None:
    one, two = merge(*partial(0), *partial(1)), merge(*partial(1), *partial(0))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_merge_is_associative_up_to_rounding() -> None:
    a, b, c = (partial(seed) for seed in range(3))
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-6)


def test_a_partial_without_keys_changes_nothing() -> None:
    out, lse = partial(0)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    merged = merge(out, lse, *nothing)
    assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)


def test_two_partials_without_keys_give_zero_and_minus_infinity() -> None:
    out, lse = partial(0)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    merged = merge(*nothing, *nothing)
    assert torch.equal(merged[0], torch.zeros_like(out)) and torch.equal(merged[1], torch.full_like(lse, -math.inf))


def test_nan_in_a_partial_stays() -> None:
    out, lse = partial(0)
    lse[0, 0, 0] = math.nan
    merged = merge(out, lse, *partial(1))
    assert merged[0][0, 0, 0].isnan().all() and merged[1][0, 0, 0].isnan() and not merged[1][1].isnan().any()


def test_stack_all_and_in_place_forms_agree() -> None:
    parts = [partial(seed) for seed in range(4)]
    stacked = merge_stack(torch.stack([out for out, _ in parts], 2), torch.stack([lse for _, lse in parts], 2), 2)
    one_by_one = merge_all(parts)
    torch.testing.assert_close(stacked, one_by_one, atol=1e-6, rtol=1e-6)
    out, lse = (tensor.clone() for tensor in parts[0])
    merge_into(out, lse, *parts[1])
    assert torch.equal(out, merge(*parts[0], *parts[1])[0]) and torch.equal(lse, merge(*parts[0], *parts[1])[1])


def test_half_outputs_are_merged_in_float32() -> None:
    out, lse = partial(0)
    merged, _ = merge(out.bfloat16(), lse, out.bfloat16(), lse)
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("cut", range(0, 18))
def test_parts_of_the_keys_merge_to_the_whole_at_every_cut(cut: int) -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 17, 8), torch.randn(2, 2, 17, 6)
    whole = attention(Call(q=q, k=k, v=v, scale=0.3))
    left = attention(Call(q=q, k=k[:, :, :cut], v=v[:, :, :cut], scale=0.3))
    right = attention(Call(q=q, k=k[:, :, cut:], v=v[:, :, cut:], scale=0.3))
    torch.testing.assert_close(merge(*left, *right), whole, atol=1e-6, rtol=1e-6)


def test_a_sink_is_a_partial_of_zeros() -> None:
    (out, lse), sinks = partial(0), torch.randn(3)
    as_partial = merge(out, lse, torch.zeros_like(out), sinks[:, None].expand_as(lse))
    torch.testing.assert_close(with_sinks(out, lse, sinks), as_partial, atol=1e-6, rtol=1e-6)


def test_gradient_of_the_sinks_is_that_of_autograd() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(3, dtype=torch.float64, requires_grad=True)
    out, lse = attention(Call(q=q, k=k, v=v, scale=0.3, sinks=sinks))
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    (expected,) = torch.autograd.grad((out, lse), sinks, (grad_out, grad_lse))
    delta = (grad_out * out).sum(-1) - grad_lse
    torch.testing.assert_close(grad_of_sinks(sinks, lse.detach(), delta.detach()), expected)

"""Rows whose keys are all hidden by a large number: their gradients are those of the softmax, whatever computes the others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.attention.cases import distance
from torchwrap.attention import drowned
from torchwrap.attention.attend import attend

LEAST = torch.finfo(torch.float32).min


def leaves(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, heads, rows, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    return q, k, v


def hiding(rows: int, number: float) -> Tensor:
    """Padding on the left as models write it, rows in the middle of another sequence, and a key that nobody sees."""
    mask = torch.zeros(2, 1, rows, rows).masked_fill_(torch.ones(rows, rows).triu(1).bool(), number)
    mask[0, :, :5], mask[1, :, 7:9], mask[..., -1] = number, number, -math.inf
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [LEAST, -1e9, -1e5])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_gradients_of_rows_hidden_by_a_number_are_those_of_the_definition(backend: str, number: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given, mask = leaves(dtype, 20), hiding(20, number)
    gradient, of_lse = torch.randn(2, 4, 20, 8, dtype=dtype), torch.randn(2, 4, 20)

    def gradients(backend: str, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, lse = attend(*given[:3], mask=mask, backend=backend, return_lse=True)
        return torch.autograd.grad((out, lse), given, (gradient.to(out.dtype), of_lse.to(lse.dtype)))

    ours, same = gradients(backend, given), gradients("eager", given)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(ours, same, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_weights_of_such_rows_sum_to_one_in_their_gradients(rows: int) -> None:
    q, k, v = leaves(torch.float32, rows)
    attend(q, k, v, mask=torch.full((rows, rows), LEAST)).sum().backward()
    assert v.grad is not None and distance(v.grad, torch.full_like(v.grad, 2.0).double()) < 1e-5


def test_a_bias_that_learns_dropout_and_compiled_code_have_them_too() -> None:
    q, k, v = leaves(torch.float32, 20)
    bias = hiding(20, LEAST).requires_grad_()

    def gradients(backend: str, compiled: bool) -> tuple[Tensor, ...]:
        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return attend(q, k, v, bias=bias, dropout=0.3, backend=backend)

        torch._dynamo.reset()
        torch.manual_seed(3)
        found = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(q, k, v, bias)
        return torch.autograd.grad(found.square().sum(), (q, k, v, bias))

    expected = gradients("eager", False)
    torch.testing.assert_close(gradients("auto", False), expected, atol=1e-5, rtol=1e-5)
    assert all(grad.isfinite().all() for grad in gradients("auto", True))  # draws another seed


def test_autocast_around_the_backward_alone_rounds_nothing() -> None:
    given, gradients = leaves(torch.float32, 20), []
    for around in (False, True):
        out = attend(*given, mask=hiding(20, LEAST))
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            gradients.append(torch.autograd.grad(out.square().sum(), given))
    assert all(map(torch.equal, *gradients))


def test_what_has_no_gradient_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = leaves(torch.float32, 20)
    monkeypatch.setattr(drowned, "_add", lambda *given: pytest.fail("rows of padding have no gradient here"))
    out = attend(q, k, v, mask=hiding(20, LEAST))
    torch.cat([out[0, :, 5:].flatten(), out[1, :, 10:].flatten()]).sum().backward()


def test_many_such_rows_take_memory_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = leaves(torch.float32, 20)
    expected = torch.autograd.grad(attend(q, k, v, mask=hiding(20, LEAST)).square().sum(), (q, k, v))
    monkeypatch.setattr(drowned, "_AT_ONCE", 2 * 4 * 20 * 2)  # two rows
    torch.testing.assert_close(torch.autograd.grad(attend(q, k, v, mask=hiding(20, LEAST)).square().sum(), (q, k, v)), expected)

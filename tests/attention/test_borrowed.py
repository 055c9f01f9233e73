"""Short calls that torch's kernel computes as it is: which they are, that they obey the law of errors, and that they keep the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchwrap.attention import prepared
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu import borrowed, decode, prefill
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention

pytestmark = pytest.mark.skipif(decode.native_library() is not None, reason="no native kernels to choose between")


@pytest.fixture(params=[True, False], ids=["faster", "slower"])
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine on which torch's kernel is the faster one, and one on which it is not."""
    monkeypatch.setattr(borrowed, "_is_faster_here", lambda: request.param)
    prepared.forget()
    yield request.param
    prepared.forget()


def tensors(rows: int, keys: int, heads: tuple[int, int] = (4, 4), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows + keys)
    q = torch.randn(2, rows, heads[0], 24).transpose(1, 2).to(dtype)
    return (q, *(torch.randn(2, heads[1], keys, 24).to(dtype) for _ in range(2)))


def call(rows: int, keys: int, heads: tuple[int, int] = (4, 4), dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    return checked(*tensors(rows, keys, heads, dtype), **options)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [16, 32, 48])
def test_results_and_gradients_obey_the_law(faster: bool, length: int, causal: bool, heads: tuple[int, int]) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors(length, length, heads))
    mask = TileMask.causal(1, length, length) if causal else None
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    exact, lse = attention(checked(*wide, mask=mask))
    plain = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    definition, _ = attention(checked(*plain, mask=mask))
    grad = torch.randn_like(exact)
    wanted = [exact, *torch.autograd.grad(exact, wide, grad)]
    theirs = [definition, *torch.autograd.grad(definition, plain, grad.float())]
    for _ in range(2):  # the second call is one that is known
        out, found_lse = attend(q, k, v, mask=mask, return_lse=True)
        ours = [out, *torch.autograd.grad(out, (q, k, v), grad.float())]
        for mine, other, right in zip(ours, theirs, wanted, strict=True):
            assert (mine - right).abs().max() <= 2 * (other - right).abs().max() + 1e-6
        torch.testing.assert_close(found_lse, lse.float(), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, mask=mask), exact.detach().float())


def test_a_gradient_of_lse_is_not_lost(faster: bool) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors(32, 32))
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    exact, exact_lse = attention(checked(*wide))
    wanted = torch.autograd.grad(exact.square().sum() + exact_lse.square().sum(), wide)
    for _ in range(2):
        out, lse = attend(q, k, v, return_lse=True)
        found = torch.autograd.grad(out.square().sum() + lse.square().sum(), (q, k, v))
        torch.testing.assert_close(found, [tensor.float() for tensor in wanted], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(32, 40), (4, 32, 40), (2, 1, 32, 40)])
def test_a_bias_and_rows_that_it_hides(faster: bool, shape: tuple[int, ...]) -> None:
    q, k, v = tensors(32, 40)
    bias = torch.randn(shape)
    bias[..., 3, :] = -math.inf
    bias[..., 5, 7:] = -math.inf
    exact, lse = attention(checked(*(tensor.double() for tensor in (q, k, v)), bias=bias.double()))
    assert borrowed.takes(call(32, 40, bias=bias, wants_lse=False)) == faster
    for name in ("bias", "mask"):
        for _ in range(2):
            out, found_lse = attend(q, k, v, **{name: bias}, return_lse=True)
            torch.testing.assert_close(out, exact.float(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found_lse, lse.float(), atol=1e-5, rtol=1e-4)
            assert (out[:, :, 3] == 0).all() and (found_lse[:, :, 3] == -math.inf).all()
            torch.testing.assert_close(attend(q, k, v, **{name: bias}), out)


def test_gradients_of_any_strides(faster: bool) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors(32, 32))
    for grad in (torch.ones(()).expand(2, 4, 32, 24), torch.randn(2, 4, 24, 32).mT):
        found = torch.autograd.grad(attend(q, k, v), (q, k, v), grad)
        wanted = torch.autograd.grad(attend(q, k, v, backend="eager"), (q, k, v), grad.contiguous())
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        call(64, 64), call(15, 32), call(32, 96), call(32, 33), call(32, 32, dtype=torch.bfloat16), call(32, 32, softcap=3.0),
        call(32, 32, dropout=0.1), call(32, 32, scale=-1.0), call(32, 32, bias=torch.zeros(32, 32)), call(32, 32, sinks=torch.zeros(4)),
        call(32, 32, bias=torch.zeros(32, 1), wants_lse=False), call(32, 32, mask=TileMask.window(1, 32, 32, 8)),
        call(16, 32, mask=TileMask.causal(1, 16, 32)),
    ],
)  # fmt: skip
def test_what_its_kernel_lacks_or_is_slower_at_is_not_taken(monkeypatch: pytest.MonkeyPatch, other: Call) -> None:
    monkeypatch.setattr(borrowed, "_is_faster_here", lambda: True)
    assert borrowed.takes(call(32, 32))
    assert not borrowed.takes(other)
    assert "as it is" in Composed().describe(call(32, 32)) and "as it is" not in Composed().describe(other)


def test_another_machine_takes_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(borrowed, "_is_faster_here", lambda: False)
    assert not borrowed.takes(call(32, 32))
    assert "native" in Composed().describe(call(32, 32))


@pytest.mark.parametrize(("rows", "keys", "gradients", "kernel"), [(12, 12, False, "few"), (16, 200, True, "few"), (17, 200, True, "many")])
def test_keys_are_packed_for_more_than_sixteen_rows(rows: int, keys: int, gradients: bool, kernel: str) -> None:
    if prefill.refuses(call(rows, keys)) is not None:
        pytest.skip("this processor packs for no call")
    found = call(rows, keys, dtype=torch.bfloat16, wants_lse=gradients)
    assert kernel in Composed().describe(found).split("queries")[0]

"""What torch's fused CPU kernel leaves to its caller: each test fails when torch changes it, and shows that `kernel` mends it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu import kernel, prefill
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention

raw = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def inputs(sq: int = 5, sk: int = 7, width: int = 8, values: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 4, sq, width), torch.randn(1, 2, sk, width), torch.randn(1, 2, sk, values)


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention(Call(q=q, k=k, v=v, scale=0.3))


def test_a_row_without_keys_has_lse_zero_in_torch_and_minus_infinity_here() -> None:
    q, k, v = inputs()
    added = torch.zeros(5, 7)
    added[3] = -math.inf
    assert not raw(q, k, v, attn_mask=added)[1][..., 3].any()
    live = torch.tensor([True, True, True, False, True])
    out, lse = kernel.forward(q, k, v, 0.3, added=added, live=live)
    assert bool((lse[..., 3] == -math.inf).all()) and not out[:, :, 3].any() and bool(lse[..., :3].isfinite().all())


def test_torch_ignores_a_last_stride_other_than_one() -> None:
    q, k, v = inputs()
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert not torch.allclose(raw(q, k, v, scale=0.3)[0], exact(q, k, v)[0], atol=1e-2)
    torch.testing.assert_close(kernel.forward(q, k, v, 0.3), exact(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("widths", [(8, 5), (5, 8)])
def test_torch_refuses_values_of_another_width(widths: tuple[int, int]) -> None:
    q, k, v = inputs(width=widths[0], values=widths[1])
    with pytest.raises(RuntimeError, match="same head size"):
        raw(q, k, v)
    torch.testing.assert_close(kernel.forward(q, k, v, 0.3), exact(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [1, 7, 15])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_loses_a_nan_among_few_keys(keys: int, causal: bool) -> None:
    q, k, v = inputs(sk=keys)
    whole = kernel.forward(q, k, v, 0.3, causal=causal)
    torch.testing.assert_close(whole, tuple(raw(q, k, v, 0.0, causal, scale=0.3)), atol=1e-6, rtol=1e-6)
    q[0, 1, 2, 0] = math.nan
    assert not raw(q, k, v, 0.0, causal, scale=0.3)[0].isnan().any()
    out, lse = kernel.forward(q, k, v, 0.3, causal=causal)
    assert bool(out[0, 1, 2].isnan().all()) and bool(lse[0, 1, 2].isnan())
    torch.testing.assert_close(out[:, 2:], whole[0][:, 2:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [7, 24, 300])
def test_torch_loses_an_infinite_score_in_bfloat16(keys: int, causal: bool) -> None:
    q, k, v = (tensor.bfloat16() for tensor in inputs(sq=keys, sk=keys))
    whole, _ = kernel.forward(q, k, v, 0.3, causal=causal)
    q[0, 1, 3], k[0, 0, 2] = 1.0, 1.0
    k[0, 0, 2, 0] = math.inf
    assert not raw(q, k, v, 0.0, causal, scale=0.3)[0][0, 1, 3].any() or keys < 16
    out, lse = kernel.forward(q, k, v, 0.3, causal=causal)
    expected, _ = attention(Call(q=q, k=k, v=v, scale=0.3, mask=TileMask.causal(1, keys, keys) if causal else None))
    # Rows before see the key hidden by a mask that is added: an infinite score and -inf make NaN.
    assert torch.equal(out[:, :, 2:].isnan(), expected[:, :, 2:].isnan()) and bool(out[0, 1, 3].isnan().all())
    assert not bool(lse[0, 1, 3] < math.inf)
    assert torch.equal(out[:, 2:], whole[:, 2:])


def test_torch_ends_the_process_where_there_is_no_key() -> None:
    code = (
        "import torch; q = torch.zeros(1, 1, 2, 8); torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q[:, :, :0], q[:, :, :0])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0
    q, k, v = inputs()
    out, lse = kernel.forward(q, k[:, :, :0], v[:, :, :0], 0.3)
    assert not out.any() and bool((lse == -math.inf).all())
    assert all(not grad.any() for grad in kernel.backward(out, q, k[:, :, :0], v[:, :, :0], out, lse, 0.3))


def test_gradients_of_shared_heads_are_sums_over_their_group() -> None:
    q, k, v = (tensor.double().requires_grad_() for tensor in inputs())
    out, lse = exact(q, k, v)
    grad = torch.randn_like(out)
    found = kernel.backward(grad, q.detach(), k.detach(), v.detach(), out.detach(), lse.detach(), 0.3)
    torch.testing.assert_close(found, torch.autograd.grad(out, (q, k, v), grad))


def test_lse_and_gradients_may_have_any_strides() -> None:
    q, k, v = (tensor.double() for tensor in inputs())
    out, lse = kernel.forward(q, k, v, 0.3)
    grad = torch.randn(5, 8, 1, 4, dtype=torch.float64).permute(2, 3, 0, 1)
    expected = kernel.backward(grad.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), 0.3)
    other = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(kernel.backward(grad, q, k, v, out, other, 0.3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_lse_of_half_inputs_is_approximate_but_better_than_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 96, 64).to(dtype) for heads in (4, 2, 2))
    visible = torch.rand(2, 96) > 0.3
    visible[:, 0] = True
    mask = TileMask.causal(2, 96, 96, key_mask=visible)  # padding with holes, which the native kernels leave to torch's

    def by_definition(as_dtype: torch.dtype) -> Tensor:
        scores = (q.to(as_dtype) @ k.to(as_dtype).repeat_interleave(2, 1).transpose(-1, -2) * 0.125).double()
        return scores.masked_fill(~mask.rectangles((0, 96), (0, 96)), -math.inf).logsumexp(-1)

    _, lse = attend(q, k, v, mask=mask, return_lse=True, backend="cpu")
    torchs = kernel.forward(q, k, v, 0.125)[1]
    reference, own = by_definition(torch.float64), (by_definition(dtype) - by_definition(torch.float64)).abs().max()
    error = (lse - reference).abs().max()
    assert error <= 2 * own and error < 1e-4
    full = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.125).logsumexp(-1)
    assert (torchs - full).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_torch_shows_hidden_keys_where_the_scale_is_not_positive(dtype: torch.dtype, scale: float) -> None:
    q, k, v = (part.to(dtype).requires_grad_() for part in inputs(40, 40))
    assert raw(q, k, v, is_causal=True, scale=scale)[0].isnan().any()
    out, lse = kernel.forward(q, k, v, scale, causal=True)
    call = Call(q=q.double(), k=k.double(), v=v.double(), scale=scale, mask=TileMask.causal(1, 40, 40))
    true, true_lse = attention(call)
    close = {"atol": 3e-2, "rtol": 3e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.double(), true, **close)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-4, rtol=1e-5)
    found = kernel.backward(torch.ones_like(out), q, k, v, out, lse, scale, causal=True)
    for ours, exactly in zip(found, torch.autograd.grad(true.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, exactly, **close)


def test_torch_does_not_hide_a_key_of_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "refuses", lambda call: "torch's kernel is under test")
    q, k, v = inputs(sk=20)
    shown = torch.arange(20) != 3
    k[:, :, 3] = math.nan
    assert bool(raw(q, k, v, attn_mask=torch.zeros(5, 20).masked_fill(~shown, -math.inf))[0].isnan().all())
    call = checked(q, k, v, mask=shown.expand(1, 1, 5, 20))
    out, lse = Composed().forward(call)
    _, dk, dv, _, _ = Composed().backward(call, out, lse, torch.ones_like(out), None)
    assert all(bool(tensor.isfinite().all()) for tensor in (out, lse, dk, dv))


def test_results_without_numbers_are_not_looked_at() -> None:
    mask = TileMask.causal(1, 40, 40)
    with FakeTensorMode():
        q = torch.empty(2, 2, 40, 8, requires_grad=True)
        attend(q, q, q, mask=mask).sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape

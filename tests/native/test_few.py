"""Few rows: a bias in `decode`, and the gradients of few rows, which keep the law where scores are so large that weights are 0 and 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import assert_correct
from tests.native.test_bias import FORMS
from tests.native.test_prefill import SETS, Native, in_every_type, limits_of
from torchwrap import native
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, Gradients, checked
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.cpu.decode import by_group, one_bias
from torchwrap.attention.cpu.prefill import is_few
from torchwrap.attention.masks.mask import TileMask
from torchwrap.native.decode import run

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


class Few(Native):
    """Forward by `decode`, gradients by the kernel for few rows."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        if call.q_length > 1:
            return super().forward(call)
        bias = one_bias(call)
        q = call.q.reshape(call.batch, call.kv_heads, call.group, call.width)
        seen = None if call.mask is None or bias is not None else limits_of(call.mask)
        limits = None if seen is None else seen.expand(call.batch, call.group, 2).int().contiguous()
        bias = None if bias is None else by_group(bias, call)
        out, lse = run(q, call.k, call.v, None, None, limits, call.scale, 0.0, bias=bias, **self.how)
        return out.reshape(*call.q.shape[:3], -1).to(call.q.dtype), lse.reshape(call.q.shape[:3])

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        bias = one_bias(call) if call.q_length == 1 else call.bias
        seen = None if call.mask is not None and bias is not None and call.bias is None else limits_of(call.mask)
        # Neither is read.
        out, lse = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
        how: dict[str, Any] = {"bias": bias, "scale": call.scale, "few": True, **self.how}
        return *native.gradients(call.q, call.k, call.v, out, lse, grad_out, grad_lse, seen, **how)[:3], None, None


def call_of(
    heads: tuple[int, int], q_length: int, kv_length: int, width: int, dtype: torch.dtype, *, times: float = 1, seed: int = 0, **more: Any
) -> Call:
    torch.manual_seed(seed)
    lengths = (heads[0], q_length), (heads[1], kv_length), (heads[1], kv_length)
    q, k, v = (torch.randn(2, *sizes, width) for sizes in lengths)
    return checked((q * times).to(dtype), (k * times).to(dtype), v.to(dtype), **more)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("width", [1, 5, 16, 33, 64, 80, 128, 200, 512])
@in_every_type
def test_every_width(width: int, instruction_set: str, dtype: torch.dtype) -> None:
    call = call_of((6, 2), 1, 37, width, dtype)
    assert_correct(Few(instruction_set), call, str(width), with_lse=True)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("heads", "q_length"), [((1, 1), 1), ((2, 1), 1), ((3, 1), 1), ((5, 1), 1), ((8, 1), 1), ((4, 2), 3), ((2, 2), 7)])
@pytest.mark.parametrize("kv_length", [1, 2, 63, 64, 65, 300])
def test_every_number_of_rows_and_keys(heads: tuple[int, int], q_length: int, kv_length: int, instruction_set: str) -> None:
    for dtype in (torch.float32, torch.float16):
        for mask in (None, TileMask.window(1, q_length, kv_length, 20)):
            call = call_of(heads, q_length, kv_length, 24, dtype, mask=mask)
            assert_correct(Few(instruction_set), call, f"{heads} {q_length} over {kv_length}")


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("form", FORMS)
@in_every_type
def test_every_form_of_a_bias(form: str, instruction_set: str, dtype: torch.dtype) -> None:
    sizes = {"B": 2, "H": 4, "Q": 1, "K": 137}
    bias = torch.randn([sizes.get(str(size), 1) for size in FORMS[form]])
    for of_dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_correct(Few(instruction_set), call_of((4, 2), 1, 137, 24, dtype, bias=bias.to(of_dtype)), form, with_lse=True)


LAYOUTS: dict[str, Any] = {
    "keys outermost": lambda: torch.randn(70, 1, 4, 2).permute(3, 2, 1, 0),
    "every second key": lambda: torch.randn(2, 4, 1, 140)[..., ::2],
    "a part": lambda: torch.randn(2, 4, 3, 77)[:, :, 1:2, 3:73],
    "hidden": lambda: torch.randn(2, 1, 1, 70).masked_fill(torch.rand(2, 1, 1, 70) < 0.5, -math.inf),
}


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_bias_of_any_strides_and_dtype(layout: str, dtype: torch.dtype, instruction_set: str) -> None:
    torch.manual_seed(0)
    assert_correct(Few(instruction_set), call_of((4, 2), 1, 70, 16, torch.float32, bias=LAYOUTS[layout]().to(dtype)), layout)


@pytest.mark.parametrize("instruction_set", SETS)
@in_every_type
def test_keys_hidden_one_by_one(instruction_set: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    holes, dense = torch.rand(2, 137) < 0.5, torch.rand(2, 4, 1, 137) < 0.5
    dense[1, 2] = False  # a row that sees nothing
    for mask in (TileMask(2, 1, 137, key_mask=holes), dense):
        assert_correct(Few(instruction_set), call_of((4, 2), 1, 137, 24, dtype, mask=mask), "hidden")
        assert_correct(Few(instruction_set), call_of((4, 2), 1, 137, 24, dtype, mask=mask, bias=torch.randn(4, 1, 137)), "hidden, bias")


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("times", "kv_length", "width"), [(30, 1, 64), (30, 2, 128), (16, 2, 16), (8, 2, 16), (30, 64, 257), (16, 17, 2)])
@in_every_type
def test_large_scores_keep_the_law(times: int, kv_length: int, width: int, instruction_set: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        for heads in ((4, 4), (8, 2)):
            call = call_of(heads, 1, kv_length, width, dtype, times=times**0.5, seed=seed)
            assert_correct(Few(instruction_set), call, f"{heads} {seed}")


def test_one_key_has_no_gradient_of_its_score() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (tensor.requires_grad_() for tensor in vars_of(call_of((8, 2), 1, 1, 64, dtype, times=30)))
        dq, dk = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k))
        assert not dq.any() and not dk.any()


def vars_of(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return call.q, call.k, call.v


@in_every_type
def test_threads_and_strides_change_no_bit(dtype: torch.dtype) -> None:
    call = call_of((8, 2), 1, 700, 64, dtype, bias=torch.randn(8, 1, 700))
    out, lse = Few(threads=1).forward(call)
    grad = torch.randn_like(out)
    expected = Few(threads=1).backward(call, out, lse, grad, None)[:3]
    for threads in (2, 5):
        assert all(map(torch.equal, Few(threads=threads).backward(call, out, lse, grad, None)[:3], expected))
    other = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in vars_of(call)]
    strided = checked(*other, bias=call.bias)
    assert all(map(torch.equal, Few().backward(strided, out, lse, grad.mT.contiguous().mT, None)[:3], expected))


@in_every_type
def test_what_nobody_sees_may_hold_anything(dtype: torch.dtype) -> None:
    mask = TileMask(2, 1, 90, kv_start=torch.tensor([20, 89]).int(), kv_end=torch.tensor([60, 80]).int())
    call = call_of((4, 2), 1, 90, 40, dtype, mask=mask)
    grad = torch.randn(2, 4, 1, 40).to(dtype)

    def found() -> list[Tensor]:
        out, lse = Composed().forward(call)
        return [out, lse, *(tensor for tensor in Composed().backward(call, out, lse, grad, None) if tensor is not None)]

    assert is_few(call)
    expected = found()
    for tensor in (call.k, call.v):
        tensor[0, :, :20], tensor[0, :, 60:], tensor[1] = math.nan, math.inf, math.nan
    call.q[1], grad[1] = math.nan, math.nan
    assert all(map(torch.equal, found(), expected))
    assert not expected[0][1].any() and not any(tensor[1].any() for tensor in expected[2:])


@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "grad"])
def test_what_is_no_number_stays_none(where: str) -> None:
    call = call_of((4, 2), 1, 40, 16, torch.float32, bias=torch.zeros(2, 4, 1, 40))
    grad = torch.randn(2, 4, 1, 16)
    {"q": call.q, "k": call.k, "v": call.v, "bias": call.bias, "grad": grad}[where][0, 0, 0, 3] = math.nan  # type: ignore[index]
    tensors = [tensor.requires_grad_() for tensor in vars_of(call)]
    for mine, other in zip(
        torch.autograd.grad(attend(*tensors, bias=call.bias), tensors, grad),
        torch.autograd.grad(attend(*tensors, bias=call.bias, backend="eager"), tensors, grad),
        strict=True,
    ):
        assert torch.equal(mine.isnan(), other.isnan())


@in_every_type
@pytest.mark.parametrize("lengths", [(1, 40), (9, 40), (70, 70)])
@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
def test_masks_that_are_tensors_have_gradients_around_them_by_what_is_prepared(kind: str, lengths: Any, dtype: torch.dtype) -> None:
    call = call_of((4, 2), *lengths, 16, dtype)
    tensors = [tensor.requires_grad_() for tensor in vars_of(call)]
    mask = torch.rand(2, 1, *lengths) < 0.7
    mask[..., 0] = True
    given: Any = mask if kind == "bool" else torch.randn(2, 4, *lengths).masked_fill(~mask, -math.inf)
    grad = torch.randn_like(call.q)
    name = "bias" if kind == "bias" else "mask"
    for _ in range(2):
        mine = attend(*tensors, **{name: given})
        assert "_Prepared" in type(mine.grad_fn).__name__
        assert torch.equal(mine, attend(*(tensor.detach() for tensor in tensors), **{name: given}))
        theirs = attend(*tensors, **{name: given}, backend="eager")
        tolerance = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
        torch.testing.assert_close(mine, theirs, **tolerance)
        for one, other in zip(torch.autograd.grad(mine, tensors, grad), torch.autograd.grad(theirs, tensors, grad), strict=True):
            torch.testing.assert_close(one, other, **tolerance)
        given = given.flip(-1).contiguous()


def test_a_mask_that_was_written_to_before_backward_is_noticed() -> None:
    call = call_of((4, 2), 1, 40, 16, torch.float32)
    q, bias = call.q.requires_grad_(), torch.zeros(1, 4, 1, 40)
    out = attend(q, call.k, call.v, mask=bias)
    bias.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

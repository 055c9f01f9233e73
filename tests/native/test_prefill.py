"""`prefill` and `gradients` compute what the definition does, for every kind of mask, instruction set and number of threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import MASKS, assert_correct, make
from torchwrap import native
from torchwrap.attention.contract import Call, Gradients, checked
from torchwrap.attention.cpu.prefill import hidden, refuses
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.merge import grad_of_sinks
from torchwrap.native.prefill import gradients, prefill

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

SETS = list(native.instruction_sets())
IRREGULAR = ("segments that return", "holes", "dense", "function")
INTERVALS = [name for name in MASKS if name not in IRREGULAR]


def limits_of(mask: TileMask | None) -> Tensor | None:
    if mask is None:
        return None
    return torch.stack([mask.spans().first, mask.spans().end], -1)


class Native:
    """As a back end, by one instruction set."""

    def __init__(self, instruction_set: str | None = None, threads: int | None = None) -> None:
        self.how: dict[str, Any] = {"instruction_set": instruction_set, "threads": threads}

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        return native.prefill(call.q, call.k, call.v, limits_of(call.mask), call.sinks, **self._options(call))

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        seen, wants_bias = limits_of(call.mask), call.bias is not None and call.bias.requires_grad
        options = self._options(call) | {"wants_bias": wants_bias}
        *found, delta, dbias = native.gradients(call.q, call.k, call.v, out, lse, grad_out, grad_lse, seen, **options)
        return *found, None if call.sinks is None else grad_of_sinks(call.sinks, lse, delta), dbias

    def _options(self, call: Call) -> dict[str, Any]:
        seed = 0 if call.seed is None else int(call.seed)
        numbers = {"scale": call.scale, "softcap": call.softcap, "dropout": call.dropout, "seed": seed}
        return {"bias": call.bias, "hidden": hidden(call), **numbers, **self.how}


def bfloat16(seed: int, **given: Any) -> tuple[Call, str]:
    return make(seed, dtype=torch.bfloat16, **given)


TYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
in_every_type = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
in_both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("mask", MASKS)
@in_both_types
def test_every_mask(mask: str, instruction_set: str, dtype: torch.dtype) -> None:
    for seed in range(2 if dtype == torch.float32 else 1):
        call, what = make(seed, mask=mask, extra="plain", dtype=dtype)
        assert_correct(Native(instruction_set), call, what)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    "extra", ["softcap", "sinks", "bias with gradient", "dropout", "gradient of lse", "wide values", "strided", "scale"]
)
@in_both_types
def test_every_extra(extra: str, instruction_set: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        call, what = make(300 + seed, mask=INTERVALS[seed * 4], extra=extra, dtype=dtype)
        assert_correct(Native(instruction_set), call, what, with_lse=extra == "gradient of lse")


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("width", [1, 5, 16, 48, 72, 96, 128, 200, 512])
@in_every_type
def test_every_width(width: int, instruction_set: str, dtype: torch.dtype) -> None:
    call, what = make(width, width=width, q_length=127, past=0, heads=(4, 2), mask="window 7", extra="plain", dtype=dtype)
    assert_correct(Native(instruction_set), call, what)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 1), (1, 700), (63, 65), (65, 63), (129, 513), (600, 600)])
@in_both_types
def test_every_length(queries: int, keys: int, dtype: torch.dtype) -> None:
    for causal in (None, TileMask.causal(1, queries, keys)):
        q, k, v = (torch.randn(2, heads, length, 24).to(dtype) for heads, length in ((6, queries), (2, keys), (2, keys)))
        assert_correct(Native(), checked(q, k, v, mask=causal), f"{queries} over {keys}")


@in_both_types
def test_gradients_of_many_parts_keep_the_law_where_torch_does_not(dtype: torch.dtype) -> None:
    call, what = make(0, heads=(8, 1), batch=1, q_length=300, past=333, width=64, mask="causal", extra="plain", dtype=dtype)
    assert_correct(Native(), call, what)


@in_both_types
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("times", "width", "q_length", "heads"), [(30, 64, 300, (9, 3)), (8, 257, 64, (2, 1)), (8, 512, 300, (2, 1))])
def test_large_scores_and_wide_heads_keep_the_law(
    times: int, width: int, q_length: int, heads: tuple[int, int], instruction_set: str, dtype: torch.dtype
) -> None:
    call, what = make(0, heads=heads, batch=1, q_length=q_length, past=0, width=width, mask="causal", extra="plain", dtype=dtype)
    large = checked(call.q * times, call.k * times, call.v, mask=call.mask)
    assert_correct(Native(instruction_set), large, what)


@pytest.mark.parametrize("mask", ["causal", "packed", "padded window"])
@in_every_type
def test_threads_and_strides_change_no_bit(mask: str, dtype: torch.dtype) -> None:
    call, _ = make(3, heads=(8, 2), batch=3, q_length=300, past=333, mask=mask, extra="sinks", dtype=dtype)
    out, lse = Native(threads=1).forward(call)
    grad = torch.randn_like(out)
    grads = Native(threads=1).backward(call, out, lse, grad, None)
    for threads in (2, 5):
        assert all(map(torch.equal, Native(threads=threads).forward(call), (out, lse)))
        assert all(map(torch.equal, Native(threads=threads).backward(call, out, lse, grad, None)[:3], grads[:3]))
    other = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (call.q, call.k, call.v)]
    strided = checked(*other, mask=call.mask, scale=call.scale, sinks=call.sinks)
    found, found_lse = Native().forward(strided)
    assert torch.equal(found, out) and torch.equal(found_lse, lse) and found.stride() == strided.q.stride()
    again = Native().backward(strided, found, found_lse, grad, None)
    assert all(map(torch.equal, again[:3], grads[:3])) and again[0].stride() == strided.q.stride()


@in_every_type
def test_what_nobody_sees_may_hold_anything(dtype: torch.dtype) -> None:
    call, _ = make(4, batch=2, q_length=128, past=0, width=40, heads=(4, 2), mask="none", extra="plain", dtype=dtype)
    limits = torch.tensor([[20, 90]]).expand(2, 128, 2).int().contiguous()
    limits[:, 7] = 0

    def run(call: Call, grad: Tensor) -> list[Tensor]:
        out, lse = native.prefill(call.q, call.k, call.v, limits, scale=0.2)
        return [out, lse, *native.gradients(call.q, call.k, call.v, out, lse, grad, limits=limits, scale=0.2)[:4]]

    grad = torch.randn(2, 4, 128, 40).to(dtype)
    expected = run(call, grad)
    for tensor in (call.k, call.v):
        tensor[:, :, :20], tensor[:, :, 90:] = math.nan, math.inf
    call.q[:, :, 7] = math.nan
    grad[:, :, 7] = math.nan
    found = run(call, grad)
    assert all(map(torch.equal, found, expected)) and all(bool(tensor.isfinite().all()) for tensor in found[2:])
    assert not found[0][:, :, 7].any() and bool((found[1][:, :, 7] == -math.inf).all()) and not found[2][:, :, 7].any()
    assert not found[3][:, :, :20].any() and not found[4][:, :, 90:].any()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=["heads", "groups"])
def test_few_rows_write_gradients_of_every_key_where_it_lies(heads: tuple[int, int], instruction_set: str) -> None:
    # Of at most 64 rows kernels write gradients of keys straight to the tensors.
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, 300 if n else 20, h, 40 + 5 * (n == 2), generator=generator).transpose(1, 2)
        for n, h in enumerate((*heads, heads[1]))
    )
    seen = torch.tensor([[130, 171], [140, 141], [0, 0]], dtype=torch.int32).repeat(7, 1)[None, :20]
    how: dict[str, Any] = {"scale": 0.2, "instruction_set": instruction_set}
    out, lse = prefill(q, k, v, seen, **how)
    grad = torch.ones_like(out)
    torch.use_deterministic_algorithms(True)  # and memory that is not written to holds no numbers
    try:
        assert torch.empty_like(k).isnan().all()
        _, dk, dv, *_ = gradients(q, k, v, out, lse, grad, None, seen, **how)
    finally:
        torch.use_deterministic_algorithms(False)
    columns = torch.arange(300)
    shown = (columns >= seen[..., :1]) & (columns < seen[..., 1:])
    inputs = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    keys, values = (tensor.repeat_interleave(heads[0] // heads[1], 1) for tensor in inputs[1:])
    weights = (0.2 * inputs[0] @ keys.transpose(-1, -2)).masked_fill(~shown, -math.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.autograd.grad((weights @ values).sum(), inputs[1:])
    for found, wanted in zip((dk, dv), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        assert not found[:, :, :130].any() and not found[:, :, 171:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_reference_is_the_same_function(dtype: torch.dtype, tolerance: float) -> None:
    call, _ = make(5, heads=(8, 2), q_length=64, past=333, mask="padded left", extra="sinks", dtype=dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (call.q, call.k, call.v)]
    exact, exact_lse = native.prefill_reference(*leaves, limits_of(call.mask), call.sinks, scale=call.scale)
    out, lse = Native().forward(call)
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(exact)
    live = torch.where(exact_lse.detach()[..., None] == -math.inf, 0.0, exact)
    for found, true in zip(Native().backward(call, out, lse, grad.to(dtype), None), torch.autograd.grad(live, leaves, grad), strict=False):
        assert found is not None
        torch.testing.assert_close(found.double(), true, atol=tolerance, rtol=tolerance)


@in_every_type
def test_marks_instead_of_memory_are_resolved(dtype: torch.dtype) -> None:
    q, k, v, grad = (torch.randn(1, 2, 9, 16).to(dtype) for _ in range(4))
    minus, plain = torch._neg_view(q), torch.neg(q)
    nothing, zeros = torch._efficientzerotensor(*v.shape, dtype=dtype), torch.zeros_like(v)
    for marked, usual in (((minus, k, v), (plain, k, v)), ((q, minus, v), (q, plain, v)), ((q, k, nothing), (q, k, zeros))):
        for one, other in zip(native.prefill(*marked, scale=0.25), native.prefill(*usual, scale=0.25), strict=True):
            assert torch.equal(one, other)
    out, lse = native.prefill(q, k, v, scale=0.25)
    for mark, number in ((torch._neg_view(grad), torch.neg(grad)), (nothing, zeros)):
        found, wanted = (native.gradients(q, k, v, out, lse, each, scale=0.25)[:4] for each in (mark, number))
        assert all(map(torch.equal, found, wanted))


def test_other_calls_are_refused_with_the_reason() -> None:
    call, _ = bfloat16(6, mask="causal", extra="plain")
    assert refuses(call) is None or "AVX2" in str(refuses(call))
    assert "float64" in str(refuses(make(6, mask="causal", extra="plain", dtype=torch.float64)[0]))
    wide = torch.zeros(1, 1, 2, 520, dtype=torch.bfloat16)
    assert "520" in str(refuses(checked(wide, wide, wide)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_over_some_of_the_keys_add_up(dtype: torch.dtype) -> None:
    """As the processes of a ring and the steps over a cache in host memory ask for them: out and lse are of all keys."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, heads, rows, 32).to(dtype) for heads, rows in ((4, 9), (2, 40), (2, 40), (4, 9)))
    out, lse = prefill(q, k, v, scale=0.3)
    whole = gradients(q, k, v, out, lse, grad, scale=0.3)
    parts = [gradients(q, k[:, :, part], v[:, :, part], out, lse, grad, scale=0.3, some_keys=True) for part in (slice(15), slice(15, 40))]
    found = sum(part[0].float() for part in parts), *(torch.cat([part[i] for part in parts], 2).float() for i in (1, 2))
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(found, whole, strict=False):
        torch.testing.assert_close(one, other.float(), rtol=allowed, atol=allowed)

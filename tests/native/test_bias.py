"""A bias and hidden keys in the native kernels: every form of each, for every instruction set, against float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import assert_correct
from tests.native.test_prefill import SETS, TYPES, Native, in_both_types, in_every_type
from tests.pairs import every_two
from torchwrap import native
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu import prefill
from torchwrap.attention.masks.mask import TileMask

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


def tensors(batch: int, heads: tuple[int, int], q_length: int, kv_length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(q_length + kv_length)
    sizes = (heads[0], q_length), (heads[1], kv_length), (heads[1], kv_length)
    return tuple(torch.randn(batch, many, length, width).to(dtype) for many, length in sizes)


FORMS: dict[str, tuple[int | str, ...]] = {
    "whole": ("B", "H", "Q", "K"),
    "all batch entries": (1, "H", "Q", "K"),
    "all heads": ("B", 1, "Q", "K"),
    "all rows": ("B", "H", 1, "K"),
    "all but keys": (1, 1, 1, "K"),
    "one of a batch": ("B", 1, 1, "K"),
}
LENGTHS = {f"{queries}-{keys}": (queries, keys) for queries, keys in [(1, 1), (3, 40), (49, 49), (64, 64), (129, 513)]}
SHIFTS: dict[str, tuple[int | str, ...]] = {"all columns": (1, "H", "Q", 1), "one number": (1, 1, 1, 1)}


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("form", FORMS)
@in_both_types
def test_every_form_of_a_bias(form: str, instruction_set: str, dtype: torch.dtype) -> None:
    assert_correct(Native(instruction_set, 2), biased(FORMS[form], dtype), form, with_lse=True)


@pytest.mark.parametrize("form", SHIFTS)
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "out"])
@in_every_type
def test_a_bias_that_is_the_same_for_all_keys_moves_lse_alone(form: str, with_lse: bool, dtype: torch.dtype) -> None:
    call = biased(SHIFTS[form], dtype, mask=TileMask.padded([0, 90], 150, 137))  # the first entry sees nothing
    assert_correct(SimpleNamespace(forward=prefill.forward, backward=prefill.backward), call, form, with_lse=with_lse)
    out, lse = prefill.forward(call)
    *_, dbias = prefill.backward(call, out, lse, torch.randn_like(out), torch.ones_like(lse))
    assert dbias is not None and 0 < dbias.float().sum() == (lse > -math.inf).sum()


def biased(form: tuple[int | str, ...], dtype: torch.dtype, **given: Any) -> Call:
    q, k, v = tensors(2, (4, 2), 150, 137, 24, dtype)
    sizes = {"B": 2, "H": 4, "Q": 150, "K": 137}
    return checked(q, k, v, bias=torch.randn([sizes.get(str(size), 1) for size in form]).to(dtype).requires_grad_(), **given)


@every_two(lengths=LENGTHS, instruction_set={name: name for name in SETS}, dtype=TYPES)
def test_every_length_with_a_mask_and_a_bias(lengths: tuple[int, int], instruction_set: str, dtype: torch.dtype) -> None:
    q_length, kv_length = lengths
    q, k, v = tensors(3, (6, 2), q_length, kv_length, 32, dtype)
    bias = torch.randn(1, 6, q_length, kv_length).to(dtype).requires_grad_()
    for mask in (TileMask.window(1, q_length, kv_length, 20), torch.rand(3, 1, q_length, kv_length) < 0.4):
        assert_correct(Native(instruction_set), checked(q, k, v, mask=mask, bias=bias, softcap=3.0), f"{q_length} over {kv_length}")


LAYOUTS: dict[str, Any] = {
    "transposed": lambda: torch.randn(1, 4, 70, 90).transpose(2, 3),
    "heads innermost": lambda: torch.randn(90, 70, 4).permute(2, 0, 1)[None],
    "every second column": lambda: torch.randn(2, 1, 90, 140)[..., ::2],
    "expanded": lambda: torch.randn(1, 1, 1, 70).expand(2, 4, 90, 70),
    "a part": lambda: torch.randn(2, 4, 99, 77)[:, :, 4:94, 3:73],
    "negative view": lambda: torch._neg_view(torch.randn(1, 4, 90, 70)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bias_of_any_strides_and_dtype(layout: str, bias_dtype: torch.dtype) -> None:
    q, k, v = tensors(2, (4, 4), 90, 70, 16, torch.float32)
    bias = LAYOUTS[layout]().to(bias_dtype) if layout != "negative view" else torch._neg_view(torch.randn(1, 4, 90, 70).to(bias_dtype))
    out, lse = native.prefill(q, k, v, bias=bias, scale=0.25)
    exact, exact_lse = native.prefill_reference(q.double(), k.double(), v.double(), bias=bias.double(), scale=0.25)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("instruction_set", SETS)
@in_both_types
def test_infinities_in_a_bias_hide_keys_and_rows(instruction_set: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(2, (4, 2), 80, 200, 40, dtype)
    finite, seen = torch.randn(2, 1, 80, 200).to(dtype), torch.rand(2, 1, 80, 200) < 0.5
    seen[1, :, :, :150] = False  # the first blocks of all rows
    call = checked(q, k, v, bias=finite.masked_fill(~seen, -math.inf).requires_grad_())
    assert_correct(Native(instruction_set), call, "infinities", with_lse=True)
    seen[:, :, 7] = False
    call = checked(q, k, v, bias=finite.masked_fill(~seen, -math.inf).requires_grad_())
    masked = checked(q, k, v, bias=finite.requires_grad_(), mask=seen)
    out, lse = Native(instruction_set).forward(call)
    assert not out[:, :, 7].any() and bool((lse[:, :, 7] == -math.inf).all()) and bool(lse[:, :, 8].isfinite().all())
    assert all(map(torch.equal, (out, lse), Native(instruction_set).forward(masked)))
    grad = torch.randn_like(out), torch.randn_like(lse)
    for found, wanted in zip(*(Native(instruction_set).backward(each, out, lse, *grad) for each in (call, masked)), strict=True):
        assert found is wanted is None or (found is not None and wanted is not None and torch.equal(found, wanted))


@in_both_types
def test_least_numbers_in_a_bias_are_numbers(dtype: torch.dtype) -> None:
    q, k, v = tensors(1, (2, 2), 20, 50, 16, dtype)
    bias = torch.zeros(1, 1, 20, 50, dtype=dtype).masked_fill(torch.rand(20, 50) < 0.5, torch.finfo(dtype).min)
    bias[:, :, 3] = torch.finfo(dtype).min
    out, _ = native.prefill(q, k, v, bias=bias, scale=0.25)
    exact = torch.softmax(q.double() @ k.double().transpose(2, 3) * 0.25 + bias, -1) @ v.double()
    exact[:, :, 3] = v.double().mean(2)  # in float64 its scores still differ
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, atol=close, rtol=close)


MASKED: dict[str, Any] = {
    "a part of a dictionary": lambda: TileMask.from_dense(torch.rand(2, 4, 400, 500) < 0.3).sub((37, 337), (45, 445)),
    "small tiles": lambda: TileMask.from_dense(torch.rand(2, 1, 20, 400) < 0.3).sub((3, 20)),
    "blocks that nobody sees": lambda: TileMask.from_function(
        lambda b, h, i, j: ((i // 64) * 7 + j // 64) % 5 == b, batch=2, q_length=300, kv_length=400
    ),
    "holes in a window": lambda: TileMask.window(2, 300, 400, 90, key_mask=torch.rand(2, 400) < 0.6),
    "all conditions": lambda: TileMask.from_function(
        lambda b, h, i, j: (i + 3 * j + h) % 7 != 0, batch=2, heads=4, q_length=300, kv_length=400, right=0,
        key_mask=torch.rand(2, 400) < 0.8, q_segments=(torch.arange(300).int() // 9 % 4)[None],
        k_segments=(torch.arange(400).int() // 7 % 4)[None],
    ),
    "nothing": lambda: TileMask(2, 300, 400, key_mask=torch.zeros(2, 400, dtype=torch.bool)),
}  # fmt: skip


@every_two(
    mask={name: name for name in MASKED},
    instruction_set={name: name for name in SETS},
    dtype={str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)},
)
def test_every_way_to_hide_keys(mask: str, instruction_set: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    seen = MASKED[mask]()
    q, k, v = tensors(2, (4, 2), *seen.shape[2:], 24, dtype)
    bias = torch.randn(1, 4, 1, seen.shape[3]).to(dtype).requires_grad_()
    assert_correct(Native(instruction_set), checked(q, k, v, mask=seen, bias=bias), mask)


@pytest.mark.parametrize("form", ["all batch entries", "all heads", "one of a batch", "one number"])
@in_every_type
def test_threads_change_no_bit_of_the_gradient_of_a_bias(form: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(3, (6, 2), 300, 400, 32, dtype)
    sizes = {"B": 3, "H": 6, "Q": 300, "K": 400}
    bias = torch.randn([sizes.get(str(size), 1) for size in (FORMS | SHIFTS)[form]]).to(dtype).requires_grad_()
    seen = TileMask.from_dense(torch.rand(3, 1, 300, 400) < torch.tensor([0.0, 0.3, 0.9])[:, None, None, None])
    call = checked(q, k, v, mask=seen, bias=bias)
    out, lse = Native(threads=1).forward(call)
    grad = torch.randn_like(out)
    once = Native(threads=1).backward(call, out, lse, grad, None)
    for threads in (2, 5):
        again = Native(threads=threads).backward(call, out, lse, grad, None)
        assert all(torch.equal(one, other) for one, other in zip(again, once, strict=True) if one is not None and other is not None)

"""Rows, keys and widths that fill no whole tile or vector, wherever their memory begins: nothing around them is read, nothing left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import assert_correct
from tests.native.test_prefill import SETS, Native, in_every_type
from torchwrap import native
from torchwrap.attention.contract import checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.native.prefill import Forward, Hidden, prefill

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

ROWS = (1, 2, 3, 5, 8, 9, 12, 15, 49)
KEYS = (1, 2, 15, 16, 17, 31, 33, 48, 49, 97, 129, 145)
WIDTHS = (1, 7, 16, 17, 24, 33, 40)


def amid(tensor: Tensor) -> Tensor:
    """The same numbers in the middle of what is no number, from an address that is no multiple of anything."""
    batch, heads, length, width = tensor.shape
    around = torch.full((1 + batch * (length + 2) * heads * (width + 3),), math.nan, dtype=tensor.dtype)
    inside = around[1:].view(batch, length + 2, heads, width + 3).transpose(1, 2)[:, :, 1:-1, 2:-1]
    return inside.copy_(tensor)


def tensors(rows: int, keys: int, width: int, dtype: torch.dtype, heads: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(rows * 1000 + keys)
    return tuple(amid(torch.randn(2, heads, length, width).to(dtype)) for length in (rows, keys, keys))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("keys", KEYS)
@in_every_type
def test_every_end_of_rows_keys_and_widths(keys: int, instruction_set: str, dtype: torch.dtype) -> None:
    for number, rows in enumerate(ROWS):
        width = WIDTHS[(number + keys) % len(WIDTHS)]
        if dtype == torch.bfloat16 and width <= 8:  # widened by the caller (`is_narrow`)
            width += 8
        q, k, v = tensors(rows, keys, width, dtype)
        bias = torch.randn(1, 2, rows, keys + 3)[..., 1:-2] if number % 2 else None
        assert_correct(Native(instruction_set), checked(q, k, v, bias=bias), f"{rows} rows over {keys} keys of width {width}")


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("keys", [17, 49, 145])
def test_rows_that_see_nothing_among_those_of_a_short_group(keys: int, instruction_set: str) -> None:
    for rows in ROWS:
        q, k, v = tensors(rows, keys, 24, torch.float32)
        seen = torch.rand(2, 1, rows, keys) < 0.5
        seen[:, :, rows // 2] = False
        call = checked(q, k, v, mask=seen)
        out, lse = Native(instruction_set).forward(call)
        assert not out[:, :, rows // 2].any() and lse[:, :, rows // 2].isneginf().all()
        assert_correct(Native(instruction_set), call, f"{rows} rows over {keys} keys")


@pytest.mark.parametrize("instruction_set", SETS)
def test_windows_of_segments_with_a_bias(instruction_set: str) -> None:
    q, k, v = tensors(49, 49, 32, torch.float32, heads=3)
    segments = torch.randint(0, 3, (2, 49), dtype=torch.int32)
    call = checked(q, k, v, mask=TileMask(2, 49, 49, q_segments=segments, k_segments=segments), bias=torch.randn(1, 3, 49, 49))
    assert_correct(Native(instruction_set), call, "a shifted window")


@pytest.mark.parametrize("instruction_set", SETS)
@in_every_type
def test_lse_that_is_not_wanted_changes_nothing_else(instruction_set: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(49, 49, 32, dtype)
    work = Forward(q, k, v, scale=0.2, instruction_set=instruction_set)
    out, lse = work(q, k, v)
    again, none = work(q, k, v, wants_lse=False)
    assert lse is not None and none is None and torch.equal(out, again)


@pytest.fixture
def _no_zeros_by_chance() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # then new memory is filled with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("instruction_set", SETS)
@in_every_type
def test_keys_that_nobody_sees_have_gradients_of_zero(instruction_set: str, dtype: torch.dtype, _no_zeros_by_chance: None) -> None:
    q, k, v = (torch.randn(2, heads, length, 24).to(dtype) for heads, length in ((4, 40), (2, 500), (2, 500)))
    limits = torch.tensor([[300, 310], [0, 0]], dtype=torch.int32)[:, None].repeat(1, 40, 1)
    out, lse = prefill(q, k, v, limits, scale=0.2, instruction_set=instruction_set)
    dq, dk, dv, *_ = native.gradients(q, k, v, out, lse, torch.ones_like(out), None, limits, scale=0.2, instruction_set=instruction_set)
    unseen = torch.ones(2, 500, dtype=torch.bool)
    unseen[0, 300:310] = False
    for grad in (dk, dv):
        assert not grad.transpose(1, 2)[unseen].any() and grad[0, :, 300:310].abs().sum() > 0 and grad.isfinite().all()
    assert not dq[1].any()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF - (1 << 32)], ids=["quiet", "signalling", "all bits"])
def test_a_row_that_is_no_number_stays_none_whatever_its_bits_and_spoils_no_other(bits: int, instruction_set: str) -> None:
    q, k, v = (torch.randn(1, 2, length, 32) for length in (9, 49, 49))
    q[:, :, 3, 5] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    out, lse = prefill(q, k, v, scale=0.2, instruction_set=instruction_set)
    assert out[:, :, 3].isnan().all() and lse[:, :, 3].isnan().all()
    rest: Any = [row for row in range(9) if row != 3]
    exact, exact_lse = native.prefill_reference(q[:, :, rest].double(), k.double(), v.double(), scale=0.2)
    torch.testing.assert_close(out[:, :, rest].double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, :, rest].double(), exact_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("instruction_set", SETS)
def test_weights_below_the_least_number_are_zero_and_the_largest_is_one(instruction_set: str) -> None:
    # Differences of -80 and -1000 add nothing that float32 holds; one key alone gives its value to the bit.
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -80.0, -1000.0]).view(1, 1, 3, 1)
    v = torch.tensor([2.0, 0.5, 7.0]).view(1, 1, 3, 1)
    out, lse = prefill(q, k, v, scale=1.0, instruction_set=instruction_set)
    assert out.item() == 2.0 and lse.item() == 0.0
    hidden = Hidden(shown=torch.tensor([True, False, False]).view(1, 1, 1, 3))
    alone, _ = prefill(q * 0.1, k, v / 3, scale=1.0, hidden=hidden, instruction_set=instruction_set)
    assert torch.equal(alone, v[:, :, :1] / 3)


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_byte_but_zero_of_a_mask_shows_a_key(instruction_set: str) -> None:
    q, k, v = (torch.randn(1, 2, length, 16) for length in (9, 49, 49))
    said = torch.randint(0, 3, (1, 1, 9, 49), dtype=torch.uint8) * 2
    found, same = (
        prefill(q, k, v, scale=0.25, hidden=Hidden(shown=shown.expand(1, 2, 9, 49)), instruction_set=instruction_set)
        for shown in (said.view(torch.bool), said != 0)
    )
    assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])

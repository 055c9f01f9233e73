"""Attention where vectors have four lanes, as on aarch64 and x86-64 before AVX2: the same kernels, by the same choice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.attention.cases import assert_correct, make
from torchwrap import native
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu import backend
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.masks.mask import TileMask
from torchwrap.native import library

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())
CPU = Composed()


@pytest.fixture(autouse=True)
def four_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TORCHWRAP_INSTRUCTION_SET=baseline has it."""
    number = library.number_of("baseline")
    monkeypatch.setattr(library, "_sets", lambda loaded: {"baseline": number})
    monkeypatch.setattr(backend, "_multiplies_halves", lambda: False)
    assert native.describe()["instruction_set"] == "baseline"


def call_of(queries: int, keys: int, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 2), **more: Any) -> Call:
    lengths = (heads[0], queries), (heads[1], keys), (heads[1], keys)
    q, k, v = (torch.randn(2, *sizes, 16, dtype=dtype) for sizes in lengths)
    return checked(q, k, v, **more)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_hidden_key_of_no_numbers_changes_no_gradient_of_keys_and_values(
    dtype: torch.dtype, heads: tuple[int, int], value: float
) -> None:
    shown = torch.arange(20) % 5 != 3
    for bias in (None, torch.randn(1, 4, 1, 20)):
        call = call_of(1, 20, dtype, heads, mask=shown.expand(2, 1, 1, 20), bias=bias)
        grad_out = torch.randn_like(call.q)
        with_numbers = CPU.backward(call, *CPU.forward(call), grad_out, None)
        call.k[0, :, 3] = value
        out, lse = CPU.forward(call)
        _, dk, dv, _, _ = CPU.backward(call, out, lse, grad_out, None)
        assert bool(out.isfinite().all() & lse.isfinite().all())
        for found, expected in zip((dk, dv), with_numbers[1:3], strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", [25, 80])
def test_the_law_holds_for_heads_of_width_one(seed: int) -> None:
    call, what = make(seed, heads=(1, 1), q_length=30, past=0, width=1, dtype=torch.bfloat16, mask="causal", extra="plain")
    assert_correct(CPU, call, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_law_holds_for_large_scores_of_few_keys(dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        q, k, v = torch.randn(2, 4, 2 + seed, 32) * 8, torch.randn(2, 2, 2 + seed, 32), torch.randn(2, 2, 2 + seed, 32)
        assert_correct(CPU, checked(q.to(dtype), k.to(dtype), v.to(dtype)), f"{seed} {dtype}")


CALLS: dict[str, tuple[int, int, Any]] = {
    "one query": (1, 40, lambda: {}),
    "few queries": (3, 20, lambda: {}),
    "few, causal": (8, 8, lambda: {"mask": TileMask.causal(1, 8, 8)}),
    "many queries": (70, 70, lambda: {}),
    "many in a window": (70, 90, lambda: {"mask": TileMask.window(1, 70, 90, 11)}),
    "many with dropout": (40, 40, lambda: {"dropout": 0.3}),
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_calls_are_prepared_with_gradients_as_without(dtype: torch.dtype, kind: str) -> None:
    queries, keys, more = CALLS[kind]
    call = call_of(queries, keys, dtype, **more())
    work, plain = CPU.prepare(call, True, None), CPU.prepare(call, False, None)
    assert work is not None and plain is not None and type(work) is type(plain)
    given: dict[str, Any] = {} if call.seed is None else {"seed": int(call.seed)}
    out, lse = CPU.forward(call)
    for prepared in (work, plain):
        assert all(map(torch.equal, prepared.forward(call.q, call.k, call.v, None, True, **given), (out, lse)))
    grad_out = torch.randn_like(out)
    found = work.backward(call.q, call.k, call.v, out, lse, grad_out, None, **given)
    assert all(map(torch.equal, found, CPU.backward(call, out, lse, grad_out, None)[:3]))


@pytest.mark.parametrize(
    ("queries", "dtype"), [(1, torch.bool), (40, torch.bool), (1, torch.float32), (3, torch.float32), (40, torch.float32)]
)
def test_masks_that_are_tensors_are_prepared(queries: int, dtype: torch.dtype) -> None:
    call = call_of(queries, 40)
    mask = (torch.rand(2, 1, queries, 40) < 0.8) if dtype == torch.bool else torch.randn(2, 1, queries, 40)
    work, plain = CPU.prepare(call, True, mask), CPU.prepare(call, False, mask)
    assert work is not None and plain is not None and type(work) is type(plain)
    assert torch.equal(work.forward(call.q, call.k, call.v, mask, True)[0], plain.forward(call.q, call.k, call.v, mask, False)[0])

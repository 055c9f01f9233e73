"""The CPU back end against the definition in float64: out, lse and gradients of every kind of call."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from tests.attention.cases import DTYPES, EXTRAS, MASKS, WIDTHS, assert_correct, largest_tensor, make
from torchwrap import native
from torchwrap.attention.contract import checked
from torchwrap.attention.cpu import backend, decode, prefill
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.dispatch import choose
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import Eager, attention

CPU = Composed()
NATIVE = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_is_as_exact_as_the_definition(mask: str, dtype: torch.dtype) -> None:
    for seed in range(3 if dtype == torch.float32 else 1):
        call, what = make(seed, mask=mask, extra="plain", dtype=dtype)
        assert_correct(CPU, call, what)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mask_without_native_kernels(mask: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((prefill, "refuses"), (decode, "native_refuses")):
        monkeypatch.setattr(module, name, lambda call: "the compositions are under test")
    call, what = make(2, mask=mask, extra="plain", dtype=dtype)
    assert not re.search("(?<!not the )native", CPU.describe(call))
    assert_correct(CPU, call, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_intervals_of_keys_are_for_the_native_kernel(dtype: torch.dtype) -> None:
    call, _ = make(2, mask="causal", extra="plain", dtype=dtype, q_length=300)
    reason = prefill.refuses(call)
    if reason is not None:
        pytest.skip(reason)
    assert prefill.describe(call) in choose(call).reason and "native" in CPU.describe(call)
    assert "native" in CPU.describe(make(2, mask="holes", extra="bias", dtype=dtype, q_length=300)[0])


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("by", ["native", "composed"])
def test_every_extra_is_as_exact_as_the_definition(extra: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "composed":
        monkeypatch.setattr(prefill, "refuses", lambda call: "the compositions are under test")
    for seed in range(5):
        call, what = make(100 + seed, extra=extra)
        assert_correct(CPU, call, what, with_lse=extra == "gradient of lse")


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_extra_in_half_dtypes(extra: str, dtype: torch.dtype) -> None:
    call, what = make(200, extra=extra, dtype=dtype, width=64)
    assert_correct(CPU, call, what, with_lse=extra == "gradient of lse")


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width: int) -> None:
    call, what = make(width, width=width, q_length=64, past=0, mask="window 7", extra="plain")
    assert_correct(CPU, call, what)


@pytest.mark.parametrize("mask", ["none", "causal", "padded left", "window 7", "chunks"])
@pytest.mark.parametrize("keys", [1, 300, 4096, 17000])
def test_one_query_over_pieces_of_the_keys(mask: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "native_refuses", lambda call: "the pieces are under test")
    call, what = make(keys, heads=(8, 2), width=16, q_length=1, past=keys - 1, mask=mask, extra="sinks")
    assert decode.form(call) == (None if mask in ("padded left", "chunks") and call.batch > 1 and 1 < keys < 17000 else "pieces")
    assert_correct(CPU, call, what)


@pytest.mark.parametrize(
    "mask", ["none", "causal", "top left", "window 1", "window 128", "both ways", "chunks", "padded left", "padded right"]
)
@pytest.mark.parametrize("queries", [1, 5])
def test_few_queries_by_the_native_kernel(mask: str, queries: int) -> None:
    call, what = make(queries, heads=(8, 2), q_length=queries, past=333, mask=mask, extra="softcap")
    reason = decode.native_refuses(call)
    if reason is not None:
        pytest.skip(reason)
    assert decode.form(call) == "native"
    assert_correct(CPU, call, what)


def test_gradients_of_few_queries_are_of_one_order_of_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, n, 257, generator=generator) for n in (2, 16, 16, 2))
    call = checked(40 * q, k, v)
    if decode.form(call) != "native" or prefill.refuses(call) is not None:
        pytest.skip("needs both native kernels")
    found = Composed().backward(call, *Composed().forward(call), grad, None)
    wanted = prefill.backward(call, *prefill.forward(call), grad, None)
    assert all(torch.equal(one, other) for one, other in zip(found[:3], wanted[:3], strict=True) if one is not None and other is not None)


def test_few_queries_whose_sign_is_a_mark() -> None:
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    found, _ = Composed().forward(checked(torch._neg_view(q), torch._neg_view(k), v))
    wanted, _ = Composed().forward(checked(-q, -k, v))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0), (2, 0, 3, 5)], ids=["B=0", "Sq=0", "Sk=0", "H=0"])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"sinks": True}, {"bias": True}], ids=str)
def test_nothing_to_attend_to(shape: tuple[int, int, int, int], options: dict[str, Any]) -> None:
    batch, heads, sq, sk = shape
    q, k = torch.randn(batch, heads, sq, 8), torch.randn(batch, heads, sk, 8)
    made: dict[str, Any] = {**options}
    if "sinks" in options:
        made["sinks"] = torch.ones(heads)
    if "bias" in options:
        made["bias"] = torch.zeros(sq, sk)
    call = checked(q, k, k, **made)
    out, lse = CPU.forward(call)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == q.shape[:3] and bool((lse == (1.0 if "sinks" in options else -math.inf)).all())
    dq, dk, dv, _, _ = CPU.backward(call, out, lse, torch.ones_like(out), None)
    assert not dq.any() and not dk.any() and not dv.any() and dk.shape == k.shape


@pytest.mark.parametrize("mask", ["none", "causal", "window 7", "padded left", "dense"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["native", "composed"])
def test_what_is_no_number_reaches_the_result_where_it_is_seen(
    mask: str, where: str, value: float, dtype: torch.dtype, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "composed":
        monkeypatch.setattr(prefill, "refuses", lambda call: "the compositions are under test")
    call, _ = make(7, mask=mask, extra="plain", q_length=64, past=0, batch=3, dtype=dtype)
    getattr(call, where)[0, 0, 40, 3] = value
    expected, _ = attention(call)
    out, _ = CPU.forward(call)
    # Keys that nobody sees are not read, where the definition multiplies them by 0 and gets NaN.
    hidden = ~attention_without(call, where)
    assert torch.equal(out.isfinite() | hidden, expected.isfinite() | hidden)
    assert (~out.isfinite()).any()


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("mask", ["causal", "window 7", "padded left", "dense", "holes", "segments that return"])
@pytest.mark.parametrize("extra", ["plain", "bias", "bias with gradient"])
@pytest.mark.parametrize("queries", [1, 64])
def test_a_hidden_key_of_no_numbers_is_hidden_from_the_compositions_too(
    queries: int, mask: str, extra: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((prefill, "refuses"), (decode, "native_refuses")):
        monkeypatch.setattr(module, name, lambda call: "the compositions are under test")
    for dtype, value in ((torch.float32, math.nan), (torch.bfloat16, math.inf), (torch.float64, -math.inf)):
        call, _ = make(7, mask=mask, extra=extra, q_length=queries, past=20, batch=3, dtype=dtype)
        getattr(call, where)[:, :, 2:5] = value
        grad_out = torch.randn_like(call.q)
        exact = (*attention(call), *Eager().backward(call, *Eager().forward(call), grad_out, None)[:3])
        out, lse = CPU.forward(call)
        found = (out, lse, *CPU.backward(call, out, lse, grad_out, None)[:3])
        for kind, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, exact, strict=True):
            # What hidden values of the definition reach by a product with 0 may be a number here.
            assert bool((ours.isfinite() | ~theirs.isfinite()).all()), f"{kind} {dtype}"


def attention_without(call: Any, where: str) -> torch.Tensor:
    """bool as out: rows that see key 40 of the first batch row, or are row 40."""
    from torchwrap.attention.reference import visible

    seen = torch.zeros(call.batch, call.heads, call.q_length, dtype=torch.bool)
    if where == "q":
        return torch.ones_like(seen)[..., None].expand(-1, -1, -1, call.value_width)
    mask = visible(call)
    column = torch.ones(1, 1, call.q_length, dtype=torch.bool) if mask is None else mask[..., 40]
    return (seen | column)[..., None].expand(-1, -1, -1, call.value_width)


BIG = 2048
LARGE: dict[str, Any] = {
    "none": None,
    "causal": TileMask.causal(1, BIG, BIG),
    "window": TileMask.window(1, BIG, BIG, 200),
    "padded": TileMask.padded([BIG, 700], BIG, BIG),
    "padded window": TileMask.padded([BIG, 700], BIG, BIG, left=100),
    "packed": TileMask.from_cu_seqlens(torch.tensor([0, 500, 1400, BIG], dtype=torch.int32)),
    "chunks": TileMask(1, BIG, BIG, chunk=300, right=0),
    "holes": TileMask(1, BIG, BIG, right=0, key_mask=torch.arange(BIG)[None] % 7 != 0),
    "function": TileMask.from_function(lambda b, h, q, k: (k <= q) & (k % 5 != 0), batch=1, q_length=BIG, kv_length=BIG),
}


OPTIONS: list[dict[str, Any]] = [{"softcap": 3.0}, {"sinks": True}, {"bias": True}, {"dropout": 0.1}]


@pytest.mark.parametrize(
    ("mask", "options"),
    [(mask, {}) for mask in LARGE] + [(mask, options) for mask in ("causal", "padded window") for options in OPTIONS],
    ids=str,
)
@pytest.mark.parametrize("by", ["native", "composed"])
def test_nothing_grows_with_the_square_of_the_length(mask: str, options: dict[str, Any], by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "composed":
        monkeypatch.setattr(prefill, "refuses", lambda call: "the compositions are under test")
    made: dict[str, Any] = {**options}
    if "sinks" in options:
        made["sinks"] = torch.zeros(2)
    if "bias" in options:
        made["bias"] = torch.zeros(2, 1, BIG)
    batch = 2 if mask.startswith("padded") else 1
    q, k = torch.randn(batch, 2, BIG, 16), torch.randn(batch, 1, BIG, 16)
    call = checked(q, k, k, mask=LARGE[mask], **made)
    with largest_tensor() as forward:
        out, lse = CPU.forward(call)
    grad = torch.randn_like(out)
    with largest_tensor() as backward:
        CPU.backward(call, out, lse, grad, None)
    assert 0 < forward.elements < BIG * BIG // 2, forward.operation
    assert 0 < backward.elements < BIG * BIG // 2, backward.operation


def test_the_watch_sees_the_definition_make_squares() -> None:
    call = checked(torch.randn(1, 1, 256, 8), torch.randn(1, 1, 256, 8), torch.randn(1, 1, 256, 8))
    with largest_tensor() as seen:
        attention(call)
    assert seen.elements >= 256 * 256


@pytest.mark.parametrize("seed", [25, 39, 57, 80])
def test_the_law_holds_for_heads_of_width_one_in_halves(seed: int) -> None:
    call, what = make(seed, heads=(1, 1), q_length=30, past=0, width=1, dtype=torch.bfloat16, mask="causal", extra="plain")
    assert_correct(CPU, call, what)


@NATIVE
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("rows", "kv_heads", "biased", "kernel"),
    [(8, 4, True, "few"), (9, 4, True, "many"), (4, 2, True, "many"), (12, 4, False, "few"), (6, 2, False, "few"), (13, 4, False, "many")],
)
def test_few_rows_in_float32_are_fewer_with_a_bias(rows: int, kv_heads: int, biased: bool, kernel: str, learned: bool) -> None:
    q, k, v = (torch.randn(2, heads, length, 24) for heads, length in ((4, rows), (kv_heads, 70), (kv_heads, 70)))
    bias = torch.randn(1, 4, rows, 70).requires_grad_(learned) if biased else None
    for mask in (None, TileMask.window(1, rows, 70, 30)):
        call = checked(q, k, v, bias=bias, mask=mask)
        assert kernel in CPU.describe(call).split("queries")[0]
        assert_correct(CPU, call, f"{rows} rows, {kernel}")


@NATIVE
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys", "halves", "kernel"),
    [(12, 12, False, "few"), (16, 200, False, "few"), (17, 200, False, "many"), (17, 200, True, "few"), (17, 17, True, "many")],
)
def test_keys_are_packed_for_more_than_sixteen_rows(
    monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, halves: bool, kernel: str, lse: bool
) -> None:
    q, k, v = (torch.zeros(1, 2, length, 24, dtype=torch.bfloat16) for length in (rows, keys, keys))
    call = checked(q, k, v, wants_lse=lse)
    monkeypatch.setattr(backend, "_multiplies_halves", lambda: halves)
    assert kernel in CPU.describe(call).split("queries")[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hole_beside_a_bias_hides_a_key_of_no_numbers_from_one_query(dtype: torch.dtype, heads: tuple[int, int], value: float) -> None:
    q, k, v = (torch.randn(2, count, length, 16, dtype=dtype) for count, length in ((heads[0], 1), (heads[1], 20), (heads[1], 20)))
    shown, bias = torch.ones(2, 1, 1, 20, dtype=torch.bool), torch.randn(1, heads[0], 1, 20)
    shown[..., [3, 7]] = False
    expected, _ = attention(checked(q, k, v, mask=shown, bias=bias))
    k[0, :, 3] = value
    call = checked(q, k, v, mask=shown, bias=bias)
    out, lse = CPU.forward(call)
    torch.testing.assert_close(out, expected, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    _, dk, dv, _, _ = CPU.backward(call, out, lse, torch.ones_like(out), None)
    assert bool(lse.isfinite().all() & dk.isfinite().all() & dv.isfinite().all())

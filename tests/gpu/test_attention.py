"""Attention in Triton on a real card: the law of errors at real sizes, memory that grows with the length, nothing read back.

Law: against float64 at most twice the error of the textbook formula in the dtype of the inputs, plus 1e-6, for out, lse and gradients. The
interpreter (tests/attention) covers every kind of mask and feature at small sizes; here are the ones whose code differs on a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.attention.triton_cases import NAMES, assert_law, textbook
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.triton import Blocks, Triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def call(
    rows: int = 500, columns: int = 500, *, batch: int = 2, heads: int = 6, kv_heads: int = 2, width: int = 64,
    dtype: torch.dtype = torch.float16, **options: Any,
) -> Call:  # fmt: skip
    source = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device="cuda").to(dtype)

    if options.get("sinks"):
        options["sinks"] = random(heads)
    if "bias" in options:
        options["bias"] = random(*options["bias"]).requires_grad_()
    q, k, v = random(batch, heads, rows, width), random(batch, kv_heads, columns, width), random(batch, kv_heads, columns, width)
    return checked(q, k, v, **options)


def check(given: Call, backend: Triton | None = None) -> None:
    backend = backend or Triton()
    assert backend.refuses(given) is None
    out, lse = backend.forward(given)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    exact = textbook(given, torch.float64, grad_out, grad_lse)
    usual = textbook(given, given.q.dtype, grad_out, grad_lse)
    assert_law("out", out, usual[0], exact[0])
    assert_law("lse", lse, usual[1], exact[1])
    ours = dict(zip(NAMES, backend.backward(given, out, lse, grad_out, grad_lse), strict=True))
    for name, expected in exact[2].items():
        assert_law(f"gradient of {name}", ours[name], usual[2][name], expected)


def packed() -> TileMask:
    segments = (torch.arange(500, dtype=torch.int32, device="cuda") // 130).expand(2, -1).contiguous()
    return TileMask(2, 500, 500, right=0, q_segments=segments, k_segments=segments)


MASKS: dict[str, Callable[[], TileMask | None]] = {
    "none": lambda: None,
    "causal": lambda: TileMask.causal(2, 500, 500, device="cuda"),
    "window": lambda: TileMask.window(2, 500, 500, 90, device="cuda"),
    "padded": lambda: TileMask.padded([333, 0], 500, 500, device="cuda"),
    "packed": packed,
    "holes": lambda: TileMask(2, 500, 500, right=0, key_mask=torch.rand(2, 500, device="cuda") < 0.7),
    "function": lambda: TileMask.from_function(lambda b, h, q, k: (k <= q) | (k < 77), 1, 500, 500, device="cuda"),
}
FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "bias": {"bias": (1, 6, 500, 500)},
    "bias of keys": {"bias": (2, 1, 1, 500)},
    "dropout": {"dropout": 0.2},
    "decode": {"rows": 1, "columns": 5000},
    "chunk": {"rows": 37, "columns": 3000},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_law_holds_for_masks(mask: str, dtype: str) -> None:
    check(call(dtype=DTYPES[dtype], mask=MASKS[mask]()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_law_holds_for_features(feature: str, dtype: str) -> None:
    options = dict(FEATURES[feature])
    mask = TileMask.causal(2, options.get("rows", 500), options.get("columns", 500), device="cuda")
    check(call(dtype=DTYPES[dtype], mask=mask, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 80, 96, 128, 256])
def test_every_width_fits_the_shared_memory(width: int, dtype: str) -> None:
    check(call(rows=200, columns=264, width=width, dtype=DTYPES[dtype], mask=TileMask.causal(2, 200, 264, device="cuda")))


def test_tiles_too_large_for_the_card_shrink() -> None:
    check(call(), Triton(Blocks(queries=128, keys=128, warps=8, stages=6)))


def test_tf32_is_used_only_where_torch_may() -> None:
    given = call(dtype=torch.float32)
    exact, _ = attend(given.q.double(), given.k.double(), given.v.double(), backend="eager", return_lse=True)
    fine, _ = Triton().forward(given)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        coarse, _ = Triton().forward(given)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (fine - exact).abs().max() < 5e-6 < (coarse - exact).abs().max()


def test_gradients_are_the_same_bits_every_time() -> None:
    given = call(mask=TileMask.causal(2, 500, 500, device="cuda"))
    backend = Triton()
    out, lse = backend.forward(given)
    first, second = (backend.backward(given, out, lse, out, None) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first[:3], second[:3], strict=True))


def test_memory_grows_with_the_length_not_its_square() -> None:
    peaks = []
    for length in (4096, 8192, 16384):
        given = call(length, length, batch=1, dtype=torch.bfloat16, mask=TileMask.causal(1, length, length, device="cuda"))
        leaves = [tensor.detach().requires_grad_() for tensor in (given.q, given.k, given.v)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        attend(*leaves, mask=given.mask, backend="triton").sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    exponent = math.log(peaks[-1] / peaks[0]) / math.log(4)
    assert exponent <= 1.1


@pytest.mark.parametrize("rows", [1, 300], ids=["decode", "prefill"])
def test_nothing_waits_for_the_card(rows: int) -> None:
    """Positions of a static cache and lengths of padding stay on the card: neither forward nor backward reads them back."""
    ends = torch.tensor([700, 512], dtype=torch.int32, device="cuda")
    mask = TileMask(2, rows, 1024, right=0, kv_end=ends, q_offset=torch.tensor(700 - rows, device="cuda"))
    given = call(rows, 1024, mask=mask)
    backend = Triton()
    out, lse = backend.forward(given)
    backend.backward(given, out, lse, out, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.forward(given)
        backend.backward(given, out, lse, out, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recorded_decode_follows_the_position_on_the_card() -> None:
    mask = TileMask(1, 1, 4096, right=0, q_offset=torch.tensor(100, device="cuda"))
    given = call(1, 4096, batch=1, mask=mask)
    backend = Triton()
    backend.forward(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = backend.forward(given)
    for position in (100, 2000, 4095):
        assert isinstance(mask.q_offset, Tensor)
        mask.q_offset.fill_(position)
        graph.replay()
        expected = attend(given.q, given.k[:, :, : position + 1], given.v[:, :, : position + 1], backend="eager")
        assert torch.allclose(out, expected, atol=2e-3)


def test_long_cache_is_cut_and_merged() -> None:
    given = call(1, 1 << 18, batch=1, heads=8, kv_heads=1, width=128, dtype=torch.bfloat16)
    out, lse = Triton().forward(given)
    wide = replace(given, q=given.q.float(), k=given.k.float(), v=given.v.float())
    exact, exact_lse = attend(wide.q, wide.k, wide.v, backend="eager", return_lse=True)
    assert (out - exact).abs().max() <= 1e-3 and (lse - exact_lse).abs().max() < 1e-3


def test_a_compiled_function_has_one_graph() -> None:
    given = call(mask=TileMask.causal(2, 500, 500, device="cuda"))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v, mask=given.mask, backend="triton") + 1

    expected = function(given.q, given.k, given.v)
    found = torch.compile(function, fullgraph=True)(given.q, given.k, given.v)
    assert torch.allclose(found, expected, atol=2e-3)

"""The Volta and Turing kernels on a card, under the law of the host tests.

On 7.0 and 7.2 the family is Volta, on 7.5 Turing. Later cards run Turing's instruction natively and Volta's as the compiler emulates it,
which checks its numbers and says nothing about its speed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cuda.backend import CudaMma, run_backward, run_forward
from torchwrap.attention.cuda.driver import Card
from torchwrap.attention.cuda.variants import Family
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention

FAMILIES: tuple[Family, ...] = ("volta", "turing")


@pytest.fixture
def card() -> Card:
    if torch.cuda.get_device_capability() < (7, 0):
        pytest.skip("needs compute capability 7.0")
    return Card(torch.device("cuda", torch.cuda.current_device()))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def call_of(width: int, shape: tuple[int, int, int, int, int], **options: Any) -> Call:
    batch, heads, kv_heads, q_length, kv_length = shape
    random = torch.Generator("cuda").manual_seed(3)
    q = torch.randn(batch, heads, q_length, width, generator=random, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(batch, kv_heads, kv_length, width, generator=random, device="cuda", dtype=torch.float16) for _ in "kv")
    return checked(q, k, v, **options)


CASES: dict[str, Any] = {
    "causal": ((2, 8, 2, 700, 700), lambda: {"mask": TileMask.causal(2, 700, 700, device="cuda")}),
    "everything": ((1, 3, 3, 130, 515), lambda: {}),
    "window and ranges": (
        (2, 4, 4, 300, 300),
        lambda: {"mask": TileMask.window(2, 300, 300, 65, kv_start=int32(0, 100), kv_end=int32(233, 300)), "sinks": torch.randn(4).cuda()},
    ),
    "decoding": ((2, 8, 2, 1, 3001), lambda: {"mask": TileMask.full(2, 1, 3001, kv_start=int32(0, 2000))}),
    "softcap": ((1, 2, 1, 257, 257), lambda: {"mask": TileMask.causal(1, 257, 257, device="cuda"), "softcap": 4.0}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_result_and_gradients_obey_the_error_law(card: Card, family: Family, width: int, case: Any) -> None:
    if family == "turing" and card.arch < 75:
        pytest.skip("Turing's instruction needs compute capability 7.5")
    shape, options = case
    call = call_of(width, shape, **options())
    out, lse = run_forward(call, card, family)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    made = run_backward(call, out, lse, grad_out, torch.where(lse == -torch.inf, 0, grad_lse), card, family)

    results = []
    for dtype in (torch.float64, torch.float16):
        leaves = {name: getattr(call, name).to(dtype, copy=True).requires_grad_() for name in "qkv"}
        by_definition, sums = attention(replace(call, **leaves))
        live = torch.isfinite(sums)
        loss = (by_definition.double() * grad_out).sum() + (sums[live].double() * grad_lse[live]).sum()
        results.append([by_definition.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    for ours, exact, rounded in zip((out, *made[:3]), *results, strict=True):
        law = 2 * float((rounded.double() - exact).abs().max()) + 1e-6
        assert ours is not None and float((ours.double() - exact).abs().max()) <= law


@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_give_the_same_bits(card: Card, family: Family) -> None:
    if family == "turing" and card.arch < 75:
        pytest.skip("Turing's instruction needs compute capability 7.5")
    call = call_of(64, (2, 4, 2, 333, 333), mask=TileMask.causal(2, 333, 333, device="cuda"))
    runs = []
    for _ in range(2):
        out, lse = run_forward(call, card, family)
        runs.append([out, lse, *run_backward(call, out, lse, out, None, card, family)[:3]])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_attend_takes_it_by_name_with_gradients(card: Card) -> None:
    call = call_of(64, (1, 4, 2, 100, 100))
    assert CudaMma().refuses(call) is None
    leaves = [tensor.clone().requires_grad_() for tensor in (call.q, call.k, call.v)]
    out = attend(*leaves, mask=TileMask.causal(1, 100, 100, device="cuda"), backend="cuda_mma")
    out.float().square().sum().backward()
    assert all(leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()) for leaf in leaves)


def test_another_stream_is_respected(card: Card) -> None:
    call = call_of(128, (1, 2, 2, 400, 400))
    expected, _ = run_forward(call, card, "turing" if card.arch >= 75 else "volta")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out, _ = run_forward(call, card, "turing" if card.arch >= 75 else "volta")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)

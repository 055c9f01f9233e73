"""The Volta and Turing kernels, run on the host from the same source, against a float64 reference.

The law: our error is at most twice that of the definition computed in fp16, plus 1e-6. Sizes cross the edges of every tile (32 to 128 rows,
16 to 64 keys) by little.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.cuda_host import COMPILER, Host
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cuda.backend import run_backward, run_forward
from torchwrap.attention.cuda.variants import Family
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to build the kernels for the host")

TARGETS = [pytest.param(family, width, id=f"{family} {width}") for family in ("volta", "turing") for width in (64, 128)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.getbasetemp()
    return Host(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


def call_of(width: int, shape: tuple[int, int, int, int, int], **options: Any) -> Call:
    """(batch, heads, key heads, queries, keys), fp16."""
    batch, heads, kv_heads, q_length, kv_length = shape
    random = torch.Generator().manual_seed(5)
    q = torch.randn(batch, heads, q_length, width, generator=random).half()
    k, v = (torch.randn(batch, kv_heads, kv_length, width, generator=random).half() for _ in "kv")
    return checked(q, k, v, **options)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def error(given: torch.Tensor, exact: torch.Tensor) -> float:
    return float((given.detach().double() - exact.detach()).abs().max())


def differentiable(call: Call, dtype: torch.dtype) -> tuple[Call, list[torch.Tensor]]:
    names = ["q", "k", "v"] + (["sinks"] if call.sinks is not None else [])
    leaves = {name: getattr(call, name).to(dtype, copy=True).requires_grad_() for name in names}
    return replace(call, **leaves), list(leaves.values())


def gradients(call: Call, dtype: torch.dtype, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """Result and gradients by the definition; a row that sees nothing passes none on."""
    of, leaves = differentiable(call, dtype)
    out, lse = attention(of)
    live = torch.isfinite(lse)
    loss = (out.double() * grad_out).sum() + (lse[live].double() * grad_lse[live]).sum()
    return [out.detach(), lse.detach()], torch.autograd.grad(loss, leaves)


def ragged() -> TileMask:
    return TileMask.window(2, 70, 90, 21, kv_start=int32(0, 40), kv_end=int32(61, 90))


CASES: dict[str, Callable[[int], Call]] = {
    "causal, one key head": lambda width: call_of(width, (1, 2, 1, 130, 150), mask=TileMask.causal(1, 130, 150)),
    "everything, few keys": lambda width: call_of(width, (2, 3, 3, 66, 33)),
    "window, ranges, sinks": lambda width: call_of(width, (2, 4, 2, 70, 90), mask=ragged(), sinks=torch.tensor([0.5, -9.0, 2.0, -1.0])),
    "window, ranges": lambda width: call_of(width, (2, 1, 1, 70, 90), mask=ragged()),
    "both sides of the diagonal": lambda width: call_of(width, (1, 1, 1, 67, 67), mask=TileMask(1, 67, 67, left=9, right=4), scale=0.3),
    "more queries than keys": lambda width: call_of(width, (1, 1, 1, 80, 20), mask=TileMask.causal(1, 80, 20)),
    "a few queries at the end": lambda width: call_of(width, (1, 6, 2, 5, 300), mask=TileMask.causal(1, 5, 300)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("family", "width"), TARGETS)
def test_result_and_gradients_obey_the_error_law(host: Host, family: Family, width: int, case: Callable[[int], Call]) -> None:
    check(case(width), host, family)


@pytest.mark.parametrize(("family", "width"), [("volta", 64), ("turing", 128)])
def test_softcap_obeys_the_error_law(host: Host, family: Family, width: int) -> None:
    check(call_of(width, (1, 2, 1, 66, 70), mask=TileMask.causal(1, 66, 70), softcap=2.0), host, family)


def check(call: Call, host: Host, family: Family) -> None:
    out, lse = run_forward(call, host, family)
    grad_out, grad_lse = torch.randn(out.shape).half(), torch.randn(lse.shape)
    (exact, exact_lse), exact_grads = gradients(call, torch.float64, grad_out, grad_lse)
    (rounded, _), rounded_grads = gradients(call, torch.float16, grad_out, grad_lse)
    grad_lse = grad_lse.where(torch.isfinite(exact_lse), 0.0)

    assert out.dtype == torch.float16 and error(out, exact) <= 2 * error(rounded, exact) + 1e-6
    live = torch.isfinite(exact_lse)
    assert lse.dtype == torch.float32 and error(lse[live], exact_lse[live]) <= 2e-6 * max(1.0, float(exact_lse[live].abs().max()))
    assert bool((lse[~live] == -math.inf).all()) and not out[~live].any()

    made = run_backward(call, out, lse, grad_out, grad_lse, host, family)
    for name, ours, theirs, wanted in zip(("q", "k", "v", "sinks"), made, rounded_grads, exact_grads, strict=False):
        assert ours is not None and error(ours, wanted) <= 2 * error(theirs, wanted) + 1e-6, name
    assert made[4] is None


@pytest.mark.parametrize(("family", "width"), TARGETS)
def test_decoding_over_padded_keys(host: Host, family: Family, width: int) -> None:
    call = call_of(width, (3, 4, 2, 1, 530), mask=TileMask.padded([530, 210, 0], 1, 530), sinks=torch.randn(4))
    host.launched.clear()
    out, lse = run_forward(call, host, family)
    assert [entry for entry, _ in host.launched] == ["attention", "combine"]
    exact, exact_lse = attention(replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double()))
    assert error(out, exact) <= 2 * error(attention(call)[0], exact) + 1e-6
    assert error(lse, exact_lse) <= 5e-6
    assert not out[2].any() and torch.equal(lse[2, :, 0], call.sinks)  # no key: the sink alone


@pytest.mark.parametrize("family", ["volta", "turing"])
@pytest.mark.parametrize("queries", [3, 70])
def test_the_order_in_which_threads_run_changes_no_bit(host: Host, family: Family, queries: int) -> None:
    call = call_of(64, (1, 2, 1, queries, 100), mask=TileMask.causal(1, queries, 100))
    runs = []
    for host.descending in (True, False):
        out, lse = run_forward(call, host, family)
        runs.append([out, lse, *run_backward(call, out, lse, out, None, host, family)[:3]])
    for one, other in zip(*runs, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
def test_the_number_of_splits_changes_rounding_only(host: Host, multiprocessors: int) -> None:
    call = call_of(64, (1, 2, 1, 3, 1000), mask=TileMask.window(1, 3, 1000, 700))
    one, lse = run_forward(call, host, "turing")
    machine = Host(host.folder, multiprocessors)
    other, other_lse = run_forward(call, machine, "turing")
    assert machine.launched[0][1][0] == min(4, 2 * multiprocessors)
    assert error(one, other.double()) <= 2e-4 and error(lse, other_lse.double()) <= 5e-6


@pytest.mark.parametrize("family", ["volta", "turing"])
def test_views_with_other_strides_give_the_same_bits(host: Host, family: Family) -> None:
    call = call_of(64, (2, 4, 2, 70, 70))
    turned = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    odd = torch.empty(call.k.numel() + 1, dtype=torch.float16)[1:].view_as(call.k).copy_(call.k)  # no address of 16 bytes
    for strided in (replace(call, **turned), replace(call, k=odd)):
        assert torch.equal(run_forward(strided, host, family)[0], run_forward(call, host, family)[0])


@pytest.mark.parametrize("q_length", [1, 70])
@pytest.mark.parametrize("family", ["volta", "turing"])
def test_nan_in_padding_stays_there_and_nan_in_a_key_shows(host: Host, family: Family, q_length: int) -> None:
    call = call_of(64, (2, 1, 1, q_length, 70), mask=TileMask.full(2, q_length, 70, kv_start=int32(3, 0), kv_end=int32(70, 70)))
    clean, _ = run_forward(call, host, family)
    call.k[0, :, :3], call.v[0, :, :3] = math.nan, math.nan
    call.k[1, 0, 69, 5] = math.nan
    out, lse = run_forward(call, host, family)
    assert torch.equal(out[0], clean[0])
    assert bool(out[1].isnan().all()) and bool(lse[1].isnan().all())


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 4), (1, 2, 1, 0, 4), (1, 2, 1, 4, 0)], ids=["no batch", "no query", "no key"])
def test_nothing_to_do_launches_nothing(tmp_path: Path, shape: tuple[int, int, int, int, int]) -> None:
    machine, call = Host(tmp_path), call_of(64, shape)
    out, lse = run_forward(call, machine, "volta")
    grads = run_backward(call, out, lse, out, None, machine, "volta")
    assert machine.launched == [] and out.shape == call.q.shape and not out.any() and bool((lse == -math.inf).all())
    assert [grad.shape for grad in grads[:3] if grad is not None] == [call.q.shape, call.k.shape, call.v.shape]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("if (thread_id() != 3) barrier();", "wait for each other"),
        ("if (thread_id() < 16) shfl_xor(1u, 2);", "wait for each other"),
        ("unsigned r[4]; uint4 x{}; if (lane_id() < 16) shfl_xor(1u, 2); else ldmatrix_x4(r, &x);", "different instructions"),
        ("barrier(); shfl_xor(1u, 2);", None),
    ],
    ids=["barrier", "exchange", "mixed", "sound"],
)
def test_the_emulation_notices_threads_that_diverge(tmp_path: Path, body: str, said: str | None) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text('#include "params.cuh"\n#include "shim.cuh"\nKERNEL(32) probe(const Params p) { ' + body + " }\n")
    complaint = Host(tmp_path).run_source(source, "probe", threads=32)
    assert complaint is None if said is None else said in str(complaint)

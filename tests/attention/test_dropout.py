"""Dropout: every way to compute a call takes the same weights, which are a function of the seed and of where a weight stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.attention.cases import DTYPES, assert_correct
from torchwrap import native
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu import prefill
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.dispatch import choose
from torchwrap.attention.dropout import factors
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention

CPU = Composed()
NATIVE = pytest.mark.skipif(not native.available(), reason=native.reason())


def left(call: Call) -> Tensor:
    """Factors of all weights, `[B, Hq, Sq, Sk]`."""
    assert call.seed is not None
    heads = torch.arange(call.batch * call.heads).view(call.batch, call.heads)
    return factors(call.seed, call.dropout, heads, (0, call.q_length), (0, call.kv_length), call.q.device)


def uniform(batch: int, heads: tuple[int, int], queries: int, keys: int, dtype: torch.dtype, **options: Any) -> Call:
    """All weights are 1 / keys; values and gradients that are unit vectors show each weight by itself."""
    q, k = torch.zeros(batch, heads[0], queries, 8, dtype=dtype), torch.zeros(batch, heads[1], keys, 8, dtype=dtype)
    return checked(q, k, torch.eye(keys, dtype=dtype).expand(batch, heads[1], keys, keys), **options)


@NATIVE
@pytest.mark.parametrize("instruction_set", list(native.instruction_sets()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_kernels_take_the_weights_that_factors_names(dtype: torch.dtype, instruction_set: str) -> None:
    call = uniform(2, (4, 2), 333, 300, dtype, dropout=0.3)
    assert call.seed is not None
    how: dict[str, Any] = {"scale": 1.0, "dropout": 0.3, "seed": int(call.seed), "instruction_set": instruction_set}
    out, lse = native.prefill(call.q, call.k, call.v, **how)
    kept = left(call)
    assert torch.equal(out != 0, kept != 0)
    torch.testing.assert_close(out.float() * 300, kept, atol=0.02, rtol=0.02)
    ones = torch.eye(333, 300, dtype=dtype).expand(2, 4, -1, -1)
    dv = native.gradients(call.q, call.k, call.v, out, lse, ones, **how)[2]
    both = kept[:, :, :300].unflatten(1, (2, 2)).sum(2).transpose(2, 3)  # of the heads of a group
    torch.testing.assert_close(dv.float() * 300, both, atol=0.04, rtol=0.02)


@pytest.mark.parametrize("by", ["native", "composed"])
def test_pattern_does_not_depend_on_tiles_or_on_who_computes(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "composed":
        monkeypatch.setattr(prefill, "refuses", lambda call: "the compositions are under test")
    call = uniform(3, (2, 1), 600, 512, torch.float32, dropout=0.6, mask=TileMask.padded([512, 40, 300], 600, 512))
    whole, _ = CPU.forward(call)
    exact, _ = attention(call)
    assert torch.equal(whole != 0, exact != 0)


@NATIVE
def test_calls_with_dropout_are_for_the_native_kernel() -> None:
    call = uniform(1, (2, 2), 70, 70, torch.float32, dropout=0.1)
    assert "native" in choose(call).reason and "native" in choose(call, doing="backward").reason


KINDS: dict[str, dict[str, Any]] = {
    "window and groups": {"heads": (6, 2), "mask": lambda: TileMask.window(1, 200, 260, 90)},
    "padding and softcap": {"mask": lambda: TileMask.padded([260, 100], 200, 260), "softcap": 2.0},
    "sinks": {"mask": lambda: TileMask.causal(1, 200, 260), "sinks": torch.randn(4)},
    "packed": {"mask": lambda: TileMask(1, 200, 260, chunk=61, right=0)},
    "holes": {"mask": lambda: TileMask(2, 200, 260, right=0, key_mask=torch.arange(260).expand(2, -1) % 7 != 0)},
    "bias": {"bias": torch.randn(4, 1, 260)},
    "peaks": {"scale": 12.0},
    "nearly all": {"dropout": 0.98},
    "nearly none": {"dropout": 1e-12},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_keep_the_law(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(len(kind))
    given = dict(KINDS[kind])
    heads, make = given.pop("heads", (4, 2)), given.pop("mask", lambda: None)
    q, k, v = (torch.randn(2, count, length, 40).to(dtype) for count, length in ((heads[0], 200), (heads[1], 260), (heads[1], 260)))
    call = checked(q, k, v, mask=make(), **{"dropout": 0.2, **given})
    assert_correct(CPU, call, kind, with_lse=kind == "sinks")


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn(1, 4, 7, 8)

    def loss() -> Tensor:
        torch.manual_seed(11)
        return (attend(q, k, v, dropout=0.4) * grad).sum()

    found = torch.autograd.grad(loss(), (q, k, v))
    for tensor, slope in zip((q, k, v), found, strict=True):
        step = torch.randn_like(tensor)
        with torch.no_grad():
            tensor += 1e-2 * step
            above = loss()
            tensor -= 2e-2 * step
            below = loss()
            tensor += 1e-2 * step
        torch.testing.assert_close((above - below) / 2e-2, (slope * step).sum(), atol=2e-2, rtol=2e-2)


def test_one_number_of_the_generator_seeds_a_call_and_decides_everything() -> None:
    q, k, v = (torch.randn(2, 4, 90, 16, requires_grad=True) for _ in range(3))

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        out = attend(q, k, v, dropout=0.1)
        return (out.detach(), *torch.autograd.grad(out.sum(), (q, k, v)), torch.rand(3))

    first, again, other = run(5), run(5), run(6)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    torch.manual_seed(5)
    torch.randint(2**62, (), dtype=torch.int64)
    assert torch.equal(torch.rand(3), first[-1])


@pytest.mark.parametrize("length", [9, 130])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_again(length: int, reentrant: bool) -> None:
    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, dropout=0.3)

    found = []
    torch.manual_seed(4)
    values = [torch.randn(1, 2, length, 16) for _ in range(3)]
    for recomputes in (False, True):
        leaves = [value.clone().requires_grad_() for value in values]
        torch.manual_seed(1)
        out = checkpoint(form, *leaves, use_reentrant=reentrant) if recomputes else form(*leaves)
        out.square().sum().backward()
        found.append((out.detach(), *(leaf.grad for leaf in leaves)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rates_of_rows_columns_heads_and_neighbours(p: float) -> None:
    torch.manual_seed(0)
    heads = torch.arange(24).view(2, 12)
    dropped = torch.stack(
        [factors(torch.randint(2**62, ()), p, heads, (0, 256), (0, 256), torch.device("cpu")) == 0 for _ in range(2)]
    ).double()  # seeds, batch rows, heads, rows, columns
    for dims in ((1, 2, 4), (1, 2, 3), (3, 4), (0, 1, 2, 3, 4)):
        rate = dropped.mean(dims)
        count = dropped.numel() / rate.numel()
        # Five standard deviations; the largest of a few hundred normal numbers is about three.
        assert (rate - p).abs().max() < 5 * (p * (1 - p) / count) ** 0.5
    centred = (dropped - p) / (p * (1 - p)) ** 0.5
    for dim in range(5):
        for apart in (1, 2, 16, 128):
            if apart < dropped.shape[dim]:
                one, other = centred.narrow(dim, 0, dropped.shape[dim] - apart), centred.narrow(dim, apart, dropped.shape[dim] - apart)
                assert (one * other).mean().abs() < 5 / one.numel() ** 0.5, (dim, apart)


def test_positions_up_to_two_to_the_31_differ() -> None:
    far, near, seed, cpu = 2**31 - 8, 0, torch.tensor(2**61 + 12345), torch.device("cpu")
    found = [
        factors(seed, 0.5, torch.tensor(head), (row, row + 8), (column, column + 8), cpu)
        for head, row, column in ((near, near, near), (far, near, near), (near, far, near), (near, near, far), (far, far, far))
    ]
    for index, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[index + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_over_seeds_is_attention_without_dropout(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16).to(dtype) for _ in range(3))
    torch.manual_seed(2)
    mean = torch.stack([attend(q, k, v, dropout=0.25).double() for _ in range(400)]).mean(0)
    plain = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    weights = torch.softmax(q.double() @ k.double().mT / 4, -1)
    deviation = ((weights.square() @ v.double().square()) * (0.25 / 0.75) / 400).sqrt()
    assert ((mean - plain).abs() < 6 * deviation + (1e-6 if dtype == torch.float32 else 5e-3)).all()


def test_parts_of_a_batch_can_be_told_apart() -> None:
    call = uniform(2, (2, 2), 64, 64, torch.float32, dropout=0.5)
    out, _ = CPU.forward(call)
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[0, 0], out[0, 1])
    other, _ = CPU.forward(replace(call, seed=torch.tensor(7)))
    assert not torch.equal(out, other)

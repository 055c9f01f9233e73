"""Probabilities of chosen query rows: those of the definition, for every kind of call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention.cases import make
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import visible
from torchwrap.core import errors


def defined(call: Call) -> Tensor:
    """All probabilities in float64, by torch's own softmax."""
    q, k = call.q.detach().double(), call.k.detach().double().repeat_interleave(call.group, 1)
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias.detach().double()
    seen = visible(call)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.nan_to_num(scores.softmax(-1))[..., : call.kv_length]


def asked(call: Call, rows: Any, **options: Any) -> Any:
    given = {"mask": call.mask, "scale": call.scale, "softcap": call.softcap, "sinks": call.sinks, "bias": call.bias, **options}
    return attend(call.q, call.k, call.v, **given, need_rows=rows)


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_the_definition(seed: int) -> None:
    call, what = make(seed)
    call = replace(call, dropout=0.0, seed=None)
    rows = torch.randint(-call.q_length, call.q_length, (5,)).tolist()
    out, found = asked(call, rows)
    expected = defined(call)[:, :, rows]
    assert found.shape == expected.shape and found.dtype == call.q.dtype
    assert torch.allclose(found.double(), expected, atol=2e-6 if call.q.dtype == torch.float32 else 1e-2), what
    assert torch.equal(out, asked(call, None)), what


def test_lse_comes_between_and_rows_of_dropout_are_whole() -> None:
    call, _ = make(3, extra="plain", mask="causal", q_length=17)
    out, lse, found = asked(call, torch.tensor([0, 16]), return_lse=True, dropout=0.5)
    assert out.shape == call.q.shape and lse.shape == call.q.shape[:3]
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)


def test_a_row_that_sees_nothing_has_no_probabilities() -> None:
    q = torch.randn(1, 2, 4, 8)
    _, found = attend(q, q, q, mask=TileMask(1, 4, 4, right=0, kv_start=torch.tensor([2], dtype=torch.int32)), need_rows=[0, 3])
    assert torch.equal(found[:, :, 0], torch.zeros(1, 2, 4))
    assert torch.allclose(found[:, :, 1].sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("sinks", [None, torch.zeros(2)], ids=["alone", "sinks"])
def test_a_row_hidden_by_the_least_number_shares_evenly(sinks: torch.Tensor | None) -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 10, 8)
    mask = torch.full((3, 10), torch.finfo(q.dtype).min)
    _, found = attend(q, k, k, mask=mask, sinks=sinks, need_rows=[0, 2])
    assert torch.allclose(found, torch.full((), 0.1 if sinks is None else 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 4, 6, 16).to(dtype), torch.randn(2, 2, 9, 16).to(dtype)
    _, found = attend(q, k, k, need_rows=[5])
    exact = defined(checked(q, k, k))[:, :, [5]]
    assert found.dtype == dtype and torch.allclose(found.double(), exact, atol=float(torch.finfo(dtype).eps))


def test_gradients_of_the_output_are_there_and_of_the_rows_are_not() -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    out, found = attend(q, q, q, need_rows=[1])
    out.sum().backward()
    assert q.grad is not None and not found.requires_grad


def test_a_graph_of_compiled_code_gives_the_same() -> None:
    q, mask = torch.randn(1, 2, 6, 8), TileMask.causal(1, 6, 6)
    expected = attend(q, q, q, mask=mask, need_rows=[0, -1])
    found = torch.compile(lambda q: attend(q, q, q, mask=mask, need_rows=[0, -1]), backend="aot_eager")(q)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("rows", [[4], [-5], [0.5], [True], "0", 1, torch.tensor([0.5]), torch.tensor([[1]]), torch.tensor([True])])
def test_rows_that_are_none_are_refused(rows: Any) -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(errors.ConfigError, match="need_rows"):
        attend(q, q, q, need_rows=rows)


@pytest.mark.parametrize("rows", [(0, 2), range(0, 3, 2), np.array([0, 2]), [np.int64(0), 2], torch.tensor([0, -2], dtype=torch.int32)])
def test_rows_come_in_any_form_of_integers(rows: Any) -> None:
    q = torch.randn(1, 2, 4, 8)
    assert torch.equal(attend(q, q, q, need_rows=rows)[1], attend(q, q, q, need_rows=[0, 2])[1])


def test_no_rows_are_an_empty_answer() -> None:
    q = torch.randn(1, 2, 4, 8)
    assert attend(q, q, q, need_rows=[])[1].shape == (1, 2, 0, 4)
    assert attend(q[:0], q[:0], q[:0], need_rows=[0])[1].shape == (0, 2, 1, 4)

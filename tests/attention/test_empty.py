"""Calls without queries, keys, rows, heads or width: the shapes of a result, zeros where there is no key, gradients of nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors

# B, Hq, Hkv, Sq, Sk, D
SHAPES = [
    (0, 4, 2, 3, 5, 8), (2, 4, 2, 0, 5, 8), (2, 4, 2, 3, 0, 8), (2, 4, 2, 0, 0, 8), (2, 0, 0, 3, 5, 8), (2, 4, 2, 3, 5, 0),
    (0, 4, 2, 1, 5, 8), (2, 4, 2, 1, 0, 8),
]  # fmt: skip
EXTRAS = ("plain", "sinks", "bias", "softcap", "dropout", "causal", "dense", "rows")


def options(extra: str, shape: tuple[int, ...], grad: bool) -> dict[str, Any]:
    batch, heads, _, sq, sk, _ = shape
    made: dict[str, dict[str, Any]] = {
        "sinks": {"sinks": torch.randn(heads, requires_grad=grad)},
        "bias": {"bias": torch.randn(batch, heads, sq, sk, requires_grad=grad)},
        "softcap": {"softcap": 2.0},
        "dropout": {"dropout": 0.5},
        "causal": {"mask": TileMask.causal(max(batch, 1), sq, sk)},
        "dense": {"mask": torch.ones(batch, 1, sq, sk, dtype=torch.bool)},
        "rows": {"need_rows": [0] if sq else []},
    }
    return made.get(extra, {})


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_gives_nothing(shape: tuple[int, ...], backend: str) -> None:
    batch, heads, kv_heads, sq, sk, width = shape
    for extra in EXTRAS:
        for grad in (False, True):
            q = torch.randn(batch, heads, sq, width, requires_grad=grad)
            k = torch.randn(batch, kv_heads, sk, width, requires_grad=grad)
            v = torch.randn(batch, kv_heads, sk, width + 1, requires_grad=grad)
            given = options(extra, shape, grad)
            try:
                out, lse, *_ = attend(q, k, v, backend=backend, return_lse=True, **given)
            except errors.UnsupportedModelError:
                assert backend == "sdpa"  # which has no softcap, no dropout and no gradients of a bias, of nothing either
                continue
            assert out.shape == (batch, heads, sq, width + 1) and lse.shape == (batch, heads, sq), extra
            if sk == 0:
                sinks = given.get("sinks")
                expected = torch.full_like(lse, -math.inf) if sinks is None else sinks[:, None].expand_as(lse)
                assert not out.any() and torch.equal(lse, expected), extra
            if grad:
                (out.sum() + lse[lse != -math.inf].sum()).backward()
                assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in (q, k, v)), extra

"""What the tests of cooperative caches share: small tokens, one attention over all of them, and the largest difference to it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.virtual import VirtualMachine
from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.heads import HeadRoom
from torchwrap.attention.cooperative.machine import Machine, OneMemory
from torchwrap.attention.cooperative.planner import Rates
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.reference import attention

__all__ = ["DV", "HKV", "HQ", "RATES", "B", "D", "error", "life", "machines", "make", "queries", "tokens", "whole"]

RATES = Rates(device=100.0, host=50.0, link=20.0, wake_s=0.0)
B, HQ, HKV, D, DV = 2, 4, 2, 8, 6


def machines() -> list[Any]:
    return [pytest.param(OneMemory, id="one memory"), pytest.param(lambda: VirtualMachine(RATES), id="virtual")]


def tokens(count: int, batch: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, HKV, count, D), torch.randn(batch, HKV, count, DV)


def queries(count: int, batch: int = B) -> Tensor:
    return torch.randn(batch, HQ, count, D) / 2


def whole(q: Tensor, keys: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """One attention over everything, in float64."""
    out, lse = attention(checked(q, keys, values, **options), torch.float64)
    return out, lse


def error(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The largest difference, relative to the number where that is above 1: a float32 of 5 is only known to 5e-7."""
    assert torch.equal(found[1].isinf(), expected[1].isinf())
    assert not any(bool(one.isnan().any()) for one in found)
    pairs = [(one.nan_to_num(neginf=0.0), other.nan_to_num(neginf=0.0)) for one, other in zip(found, expected, strict=True)]
    return max(float(((one - other).abs() / other.abs().clamp(min=1.0)).max()) for one, other in pairs)


def make(room: Room | HeadRoom, machine: Machine, layers: int = 1, **options: Any) -> TieredCache:
    return TieredCache([room] * layers, machine=machine, chunk_tokens=options.pop("chunk_tokens", 5), **options)


def life(cache: TieredCache, chance: random.Random, deeds: int, *, longest: int = 40, kept: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Appends of all sizes, crops (to no less than the part `kept`) and selections of rows, and after each what layer 0 has to hold now:
    tensors that are simply concatenated."""
    keys, values = tokens(0)
    for _ in range(deeds):
        deed = chance.choice(["append", "append", "append", "one", "one", "crop", "select"])
        if deed in ("append", "one"):
            new = tokens(1 if deed == "one" else chance.randrange(1, longest), keys.shape[0])
            cache.append(0, *new)
            keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        elif deed == "crop":
            length = chance.randrange(int(kept * keys.shape[2]), keys.shape[2] + 1)
            cache.crop(length)
            keys, values = keys[:, :, :length], values[:, :, :length]
        else:
            rows = torch.tensor([chance.randrange(keys.shape[0]) for _ in range(chance.randrange(1, 4))])
            cache.select(rows)
            keys, values = keys[rows], values[rows]
        assert cache.layers[0].length == keys.shape[2]
        if keys.shape[2]:
            yield keys, values

"""Which weights dropout takes, as a function of where they stand: no tile's shape or order can change it, and nothing is stored.

Each weight's number is a hash of (seed, batch row and head, query row, key column): two rounds of a 32-bit integer mixer (multiply and
shift; constants from the search of C. Wellons, "Prospecting for hash functions", 2018). It is dropped where number / 2^32 < p.
This is the definition: the native kernels (native/src/dropout.h) and those of Triton work out the same numbers where they need them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factors"]

_LOW = 0xFFFFFFFF


def factors(seed: Tensor, p: float, heads: Tensor, rows: tuple[int, int], columns: tuple[int, int], device: torch.device) -> Tensor:
    """What to multiply the weights of a rectangle with: 0 or `1 / (1 - p)`.

    Args:
        seed: int64 scalar.
        p: probability of 0.
        heads: int64 `[...]`, batch row * Hq + head of each rectangle.
        rows: first and end of the query rows.
        columns: first and end of the key columns.
        device: of the result.

    Returns:
        float32 `[..., rows, columns]`.

    Cost: two int64 tensors of that shape.
    """
    row = torch.arange(*rows, dtype=torch.int64, device=device)
    column = torch.arange(*columns, dtype=torch.int64, device=device)
    key = seed.to(device)
    state = _mixed((key & _LOW) ^ _mixed(heads.to(device) + ((key >> 32) & _LOW)))
    state = _mixed(state[..., None] + _mixed(row ^ 0x9E3779B9))
    number = _mixed(state[..., None] + column * 0x85EBCA6B)
    return (number >= int(p * 2**32)).to(torch.float32) * (1.0 / (1.0 - p))


def _mixed(x: Tensor) -> Tensor:
    x = x & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)

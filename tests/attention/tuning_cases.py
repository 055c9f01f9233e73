"""Calls whose measurement is made up, for tests of what is done with figures."""

from __future__ import annotations

from typing import Any

import torch

from torchwrap.attention.contract import Call, checked
from torchwrap.attention.tuning import store

__all__ = ["Timed", "call", "new_process"]

Timed = dict[str, float]


def call(rows: int = 6, keys: int = 40, **options: Any) -> Call:
    return checked(torch.randn(1, 4, rows, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8), **options)


def new_process() -> None:
    store._kept.clear()

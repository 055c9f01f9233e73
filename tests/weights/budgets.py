"""Budgets for tests: the smallest a model accepts, and points between it and the whole model."""

from __future__ import annotations

from typing import Any

from torch import nn

import torchwrap as tw

__all__ = ["smallest_budget", "streamed", "total_bytes"]


def smallest_budget(model: nn.Module, **fields: Any) -> int:
    """Bytes of the smallest budget `offload` accepts for this model, as its own error reports it."""
    try:
        tw.offload(model, device_memory=1, **fields)
    except tw.BudgetError as error:
        return error.needed
    raise AssertionError("a budget of one byte was accepted")


def streamed(model: nn.Module, **fields: Any) -> nn.Module:
    """The model with every unit streamed from disk through as few slots as work: the hardest setting, whatever its size."""
    return tw.offload(model, device_memory=smallest_budget(model, params="disk", **fields), params="disk", **fields)


def total_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())

"""Budgets for tests: the smallest a model accepts, and points between it and the whole model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

import torchwrap as tw

__all__ = ["likeness", "once_for_alike", "smallest_budget", "streamed", "total_bytes"]

Answer = TypeVar("Answer")


def likeness(model: nn.Module) -> Hashable:
    """Equal for models that are planned alike: the same classes, hooks and settings at the same places, tensors of the same kind and ties.

    None for a model with tensors of a class of their own, and for one that is wrapped.
    """
    places: dict[int, int] = {}
    tensors = []
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return None
        storage = places.setdefault(tensor.untyped_storage()._cdata, len(places))
        kind = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        tensors.append((name, places.setdefault(id(tensor), len(places)), storage, tensor.storage_offset(), *kind))
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._state_dict_hooks)]
        kind = (type(module).__module__, type(module).__qualname__, module.training, len(vars(module)))
        modules.append((name, places.setdefault(id(module), len(places)), *kind, *hooks))
    return None if tw.wrappers_of(model) else (*modules, *tensors)


def once_for_alike(ask: Callable[..., Answer]) -> Callable[..., Answer]:
    """Remember the answer for all models alike: planning one takes ten times as long as its forward, and the answer is the same."""
    known: dict[Hashable, Answer] = {}

    def answer(model: nn.Module, **fields: Any) -> Answer:
        alike = likeness(model)
        if alike is None:
            return ask(model, **fields)
        key = (alike, *sorted(fields.items()))
        if key not in known:
            known[key] = ask(model, **fields)
        return known[key]

    return answer


@once_for_alike
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

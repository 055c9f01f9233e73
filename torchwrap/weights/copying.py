"""Copying, pickling and moving a model whose weights are away.

A deep copy is offloaded like the original and independent of it: own parameters, own engine, own spill folder; files that are only read
are shared. A pickle (also `torch.save(model)`) holds real values and the setting, which is applied again where it is loaded. A part of a
model that is copied or pickled by itself comes out as an ordinary module with real values.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.config import Config, format_bytes
from torchwrap.core.errors import TorchwrapWarning
from torchwrap.core.swap import detach, layers_of
from torchwrap.core.tensors import bind, data_of, placeholder, tensor_bytes
from torchwrap.core.transaction import apply
from torchwrap.weights.layers import RootLayer
from torchwrap.weights.state import unhook_states

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["before_deepcopy", "convert", "is_root", "reduce"]


def before_deepcopy(handle: WeightsHandle, module: nn.Module, memo: dict[int, Any]) -> None:
    """Put into `memo` what stands for the handle and the model's parameters in the copy."""
    if id(handle) in memo:
        return
    with handle.lock:
        if is_root(handle, module):
            parameters = {}
            for piece in handle.pieces:
                value = handle.resident_copy(piece) if piece.resident else placeholder(piece.shape, piece.dtype, handle.device)
                parameters[piece.index] = memo[id(piece.parameter)] = nn.Parameter(value, piece.parameter.requires_grad)
            memo[id(handle)] = handle.twin(parameters)
        else:
            memo[id(handle)] = handle.inert()
            for parameter in module.parameters():
                owned = handle.piece_of(parameter)
                if owned is not None and not owned.resident:
                    memo[id(parameter)] = nn.Parameter(handle.value(owned), parameter.requires_grad)


def reduce(handle: WeightsHandle, module: nn.Module) -> tuple[Any, ...]:
    """For pickle: a plain module over the stored bytes, and what makes it offloaded again."""
    with handle.lock:
        inert = handle.inert()
        memo: dict[int, Any] = {id(handle): inert}
        for parameter in module.parameters():
            piece = handle.piece_of(parameter)
            if piece is not None:
                value = data_of(parameter) if piece.resident else handle.stored_view(piece)
                memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
        plain = copy.deepcopy(module, memo)
    for part in plain.modules():
        for layer in layers_of(part):
            if layer.owner is inert:
                detach(part, layer)
    unhook_states(plain.modules())
    if not is_root(handle, module):
        return (_same, (plain,))
    applied = plain.__dict__.get("_torchwrap_applied", {})
    applied.pop(handle.config.technique, None)
    if not applied:
        plain.__dict__.pop("_torchwrap_applied", None)
    return (_apply_again, (plain, handle.config))


def convert(
    handle: WeightsHandle, module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool, original: Callable[..., nn.Module]
) -> nn.Module:
    """`module.to(...)`, `.half()`, `.cuda()`: stored weights are converted one by one, where they are."""
    with handle.lock:
        owned = [piece for piece in (handle.piece_of(p) for p in module.parameters()) if piece is not None]
        absent = [piece for piece in owned if not piece.resident]
        after = {dtype: fn(torch.empty(0, dtype=dtype, device=handle.device)) for dtype in {piece.dtype for piece in absent}}
        devices = {result.device for result in after.values()}
        for device in devices:
            if device.type not in ("cpu", "cuda"):
                raise errors.UnsupportedModelError(
                    f"torchwrap: weights cannot be streamed to {device}",
                    where=type(module).__name__,
                    fix="Call torchwrap.unwrap(model) first.",
                )
        _check_growth(handle, {dtype: result.dtype for dtype, result in after.items()})
        if devices - {handle.device}:
            target = next(iter(devices - {handle.device}))
            if not is_root(handle, module):
                raise errors.UnsupportedModelError(
                    f"{handle.config.technique}: a part of the model cannot move to {target} alone",
                    where=type(module).__name__,
                    fix="Move the whole model.",
                )
            handle.rehome(target)
        for piece in absent:
            dtype = after[piece.dtype].dtype
            if dtype != piece.dtype:
                value = fn(handle.value(piece)).cpu()
                piece.dtype, piece.nbytes, piece.residue = dtype, tensor_bytes(value), 0
                piece.absent = placeholder(piece.shape, dtype, handle.device)
                handle.set_value(piece, value)
                bind(piece.parameter, piece.absent)
        result = original(fn, recurse)
        if any(result.dtype != dtype for dtype, result in after.items()):
            handle.replan()
        return result


def _check_growth(handle: WeightsHandle, dtypes: dict[torch.dtype, torch.dtype]) -> None:
    """Refuse a wider type before anything is converted if the weights would then hold more than their budget."""
    factor = max((after.itemsize / before.itemsize for before, after in dtypes.items()), default=1.0)
    held = int(handle.plan.held_bytes * factor)
    if factor > 1 and held > handle.plan.budget:
        allowed = format_bytes(handle.plan.budget)
        raise errors.BudgetError(
            f"{handle.config.technique}: as wide as that, {format_bytes(held)} of weights would be present, the budget is {allowed}",
            needed=held,
            available=handle.plan.budget,
            fix="Unwrap, convert and wrap again with a larger budget, or from_pretrained(folder, dtype=...).",
        )


def is_root(handle: WeightsHandle, module: nn.Module) -> bool:
    """Whether this is the model itself."""
    return any(isinstance(layer, RootLayer) and layer.owner is handle for layer in layers_of(module))


def _same(module: nn.Module) -> nn.Module:
    return module


def _apply_again(module: nn.Module, config: Config) -> nn.Module:
    try:
        return apply(module, config)
    except errors.BudgetError as error:
        # Memory layout is not part of a pickle (views of one storage come apart), so a budget without slack may miss by some pages.
        # Failing here would keep the user from the weights.
        warnings.warn(f"{error} Using {error.needed} bytes.", TorchwrapWarning, stacklevel=2)
        changes: dict[str, Any] = {"device_memory": error.needed, "host_memory": None}
        return apply(module, dataclasses.replace(config, **changes))

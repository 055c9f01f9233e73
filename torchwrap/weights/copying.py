"""Copying, pickling and moving a model whose weights are away.

A deep copy is offloaded like the original and independent of it: own parameters, own engine, own spill folder; files that are only read
are shared. A pickle (also `torch.save(model)`) holds real values and the setting, which is applied again where it is loaded. A part of a
model that is copied or pickled by itself comes out as an ordinary module with real values.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
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
from torchwrap.storage import aio
from torchwrap.storage.generations import GenerationFile
from torchwrap.storage.spill import SpillStore
from torchwrap.stream.arena import arena_for
from torchwrap.stream.engine import Engine
from torchwrap.stream.pieces import copy_of, put_away
from torchwrap.stream.planner import ResidencyPlan, region_bytes
from torchwrap.stream.tiles import copy_tiles, parts, share
from torchwrap.stream.timeline import timeline_of
from torchwrap.stream.units import Home, Piece
from torchwrap.weights.layers import RootLayer
from torchwrap.weights.state import unhook_states

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["before_deepcopy", "convert", "inert", "is_root", "reduce", "rehome", "replan", "twin"]


def before_deepcopy(handle: WeightsHandle, module: nn.Module, memo: dict[int, Any]) -> None:
    """Put into `memo` what stands for the handle and the model's parameters in the copy."""
    if id(handle) in memo:
        return
    with handle.lock:
        if is_root(handle, module):
            parameters = {}
            for piece in handle.pieces:
                shown = data_of(piece.parameter)
                value = copy_of(shown, piece.residue) if piece.resident else placeholder(piece.shape, piece.dtype, handle.device)
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
        owner = handle.inert()
        memo: dict[int, Any] = {id(handle): owner}
        for parameter in module.parameters():
            piece = handle.piece_of(parameter)
            if piece is not None:
                value = data_of(parameter) if piece.resident else handle.stored_view(piece)
                memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
        plain = copy.deepcopy(module, memo)
    for part in plain.modules():
        for layer in layers_of(part):
            if layer.owner is owner:
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
    """`module.to(...)`, `.half()`, `.cuda()`: stored weights are converted one by one, where they are.

    What is shown in their place is left alone: torch copies a tensor on "cpu" that is to go to "cpu:0", and a placeholder to full size.
    """

    def present(tensor: torch.Tensor) -> torch.Tensor:
        piece = handle.piece_of(tensor)
        return fn(tensor) if piece is None or piece.resident else tensor

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
        _check_format(handle, module, fn, absent)
        _check_growth(handle, {dtype: result.dtype for dtype, result in after.items()})
        for dtype in {piece.parameter.dtype for piece in owned}:
            if (wanted := fn(torch.empty(0, dtype=dtype, device=handle.device)).dtype) != dtype:
                _check_undriven(handle, module, dtype, wanted)
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
                handle.handed.forget(piece)
                handle.set_value(piece, value)
                bind(piece.parameter, piece.absent)
        result = original(present, recurse)
        if any(result.dtype != dtype for dtype, result in after.items()):
            handle.replan()
        return result


def _check_format(handle: WeightsHandle, module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], absent: list[Piece]) -> None:
    """Refuse another memory format, which stored weights do not have."""
    for dims in {len(piece.shape) for piece in absent}:
        if not fn(torch.empty((2,) * dims, device=handle.device)).is_contiguous():
            raise errors.UnsupportedModelError(
                f"{handle.config.technique}: streamed weights of {dims} dimensions cannot take on another memory format",
                where=type(module).__name__,
                fix="Unwrap, convert the model, and wrap it again.",
            )


def _check_undriven(handle: WeightsHandle, module: nn.Module, before: torch.dtype, after: torch.dtype) -> None:
    """Refuse another type while an optimizer keeps weights and their state in this one."""
    if handle.driven:
        gc.collect()  # one that is only in a cycle drives nothing
    if handle.driven:
        raise errors.ConflictError(
            f"{handle.config.technique}: conversion from {before} to {after} while an OffloadedOptimizer keeps the weights in {before}",
            where=type(module).__name__,
            fix="Call close() on the optimizer, convert the model, and make a new optimizer.",
        )


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


def inert(handle: WeightsHandle) -> WeightsHandle:
    """A handle that owns nothing, for copies whose weights are all present."""
    made = type(handle)(
        handle.config,
        [],
        [],
        ResidencyPlan(0, 0, frozenset(), 0, 0, 0, 0, 0),
        None,
        _reader(handle),
        store=None,
        device=handle.device,
        origin=handle.origin,
        baseline_bytes=0,
        activation=handle.activation,
        mapped=False,
    )
    made.is_inert = True
    return made


def twin(handle: WeightsHandle, parameters: dict[int, nn.Parameter]) -> WeightsHandle:
    """An independent handle for a copy of the model, whose parameters are given by piece index."""
    store = None
    pieces: dict[int, Piece] = {}
    for piece in handle.pieces:
        parameter = parameters[piece.index]
        replica = dataclasses.replace(piece, parameter=parameter, absent=data_of(parameter), names=list(piece.names))
        if piece.home is not None and _changes(handle, piece.home):
            if store is None:
                store = SpillStore.create(None, needed=sum(p.nbytes for p in handle.pieces if p.home is not None))
            replica.home = put_away(store, replica, handle.value(piece), crc=handle.crc)
        pieces |= {part.index: part for part in (replica, *copy_tiles(replica))}
    units = [dataclasses.replace(unit, pieces=[pieces[p.index] for p in unit.pieces]) for unit in handle.units]
    reader = _reader(handle)
    engine = None
    if handle.engine is not None:
        engine = Engine(
            units,
            handle.plan,
            arena_for(handle.device),
            reader,
            verify=handle.config.verify != "header",
            timeout_s=handle.config.io_timeout_s,
            timeline=timeline_of(handle.config, handle.plan),
        )
        engine.route(handle.engine.groups)
    return type(handle)(
        handle.config,
        units,
        [pieces[piece.index] for piece in handle.pieces],
        handle.plan,
        engine,
        reader,
        store=store,
        device=handle.device,
        origin=handle.origin,
        baseline_bytes=handle.baseline_bytes,
        activation=handle.activation,
        mapped=handle.mapped,
        notes=handle.notes,
    )


def _changes(handle: WeightsHandle, home: Home) -> bool:
    """Whether what lies there is written to: our own file, or that of an optimizer."""
    return isinstance(home.file, GenerationFile) or (handle.store is not None and home.file is handle.store.file)


def _reader(handle: WeightsHandle) -> aio.Reader:
    like = handle.reader
    return aio.Reader(like.threads, like.chunk, handle.config.io_timeout_s, mode=like.mode)


def rehome(handle: WeightsHandle, device: torch.device) -> None:
    """Compute on another device from now on."""
    handle.device = handle.origin = device
    for piece in handle.pieces:
        if not piece.resident:
            piece.absent = placeholder(piece.shape, piece.dtype, device)
            bind(piece.parameter, piece.absent)
            share(piece)
    if handle.engine is not None:
        handle.engine.rehome(arena_for(device))
    handle.renew_activations()


def replan(handle: WeightsHandle) -> None:
    """Dtypes changed: size the slots for what the pieces are now."""
    for piece in handle.pieces:
        piece.dtype, piece.nbytes = piece.parameter.dtype, tensor_bytes(piece.parameter)
    slotted = [unit for unit in handle.units if unit.kind != "rows"]
    streamed = {p.index: p.nbytes for unit in slotted for p in unit.pieces if not p.resident}
    handle.plan = dataclasses.replace(
        handle.plan,
        slot_bytes=max((region_bytes(p.nbytes for p in unit.pieces if not p.resident) for unit in slotted), default=0),
        resident_bytes=sum(p.nbytes for p in parts(handle.pieces) if p.resident) - handle.plan.fixed_bytes,
        streamed_bytes=sum(streamed.values()),
    )
    if handle.engine is not None:
        handle.engine.resize(handle.plan)


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

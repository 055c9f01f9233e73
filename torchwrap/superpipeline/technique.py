"""`torchwrap.superpipeline`: at most k blocks present, handed on in batches of k'.

A policy of the streaming engine: the model is divided into its repeated blocks, everything outside them stays, and the engine has k slots
and hands them on in batches. Files, slots, copies and layers are those of torchwrap/weights; its own is the division (whole blocks, nothing
resident but what is outside), the knobs, and their choice by measurement.

Source: "Superpipeline: A Universal Approach for Reducing GPU Memory Usage in Large Models", 2024 (the two knobs). Where we differ: frozen
weights are dropped, not copied back, which halves the traffic; blocks that come up again before others are kept at the turn from forward
to backward and in large batches; the knobs follow from a law instead of trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from torchwrap.activations.expected import recomputes_itself
from torchwrap.activations.modes import check_tier
from torchwrap.activations.rehearsal import Rehearsal
from torchwrap.core import errors
from torchwrap.core.config import format_bytes
from torchwrap.core.integration import Integration
from torchwrap.core.order import PHASES
from torchwrap.core.technique import Handle, Place, Prepared, register
from torchwrap.stream.arena import arena_for
from torchwrap.stream.planner import ResidencyPlan, region_bytes
from torchwrap.stream.units import Home, UnitMap, find_units
from torchwrap.superpipeline.config import Superpipeline
from torchwrap.superpipeline.handle import SuperpipelineHandle
from torchwrap.superpipeline.layers import WindowLayer
from torchwrap.superpipeline.policy import Knobs
from torchwrap.superpipeline.room import Room
from torchwrap.weights.blueprint import Blueprint, blocks_of, device_of, refuse_uninitialised
from torchwrap.weights.budget import Budget, weight_budget
from torchwrap.weights.copies import Copies
from torchwrap.weights.folder import SOURCES
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.layers import UnitLayer
from torchwrap.weights.technique import StreamingTechnique, activation_layers
from torchwrap.weights.training import training_of
from torchwrap.weights.trial import trial_of

__all__ = ["SuperpipelineTechnique", "superpipeline"]

_FIRST_K = 2
"""Blocks present until "auto" has measured (chosen: the least that overlaps)."""


@dataclass(slots=True, kw_only=True)
class Window(Blueprint):
    """A blueprint with knobs, and how far they can be turned."""

    knobs: Knobs
    room: Room


class SuperpipelineTechnique(StreamingTechnique[Superpipeline]):
    """Keeps at most k of a model's blocks where it computes and brings the next ones in meanwhile.

    Args:
        target: a module, a class or a factory of modules; nothing makes a decorator.
        config: a `Superpipeline`, or its fields as keywords.

    Raises:
        ConfigError: not 1 <= k_prime <= k <= number of blocks, or store="host" without a separate device.
        BudgetError: k blocks are more than `device_memory` or memory, with `train=True` beside a training step, or all are more than host
            memory.
        UnsupportedModelError: there are no repeated blocks, or parameters are on several devices or on meta.

    Exactness: bit-identical to the unwrapped model on the same device and dtype.
    Cost: what is outside the blocks and k slots of the largest block, on the device; see `handle.predict()`. `train=True` leaves room for
        a backward and an `OffloadedOptimizer` beside them.

    Example:
        >>> import torch, torchwrap
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))).eval()
        >>> x = torch.ones(1, 64)
        >>> before = model(x)
        >>> model = torchwrap.superpipeline(model, k=3, k_prime=1)
        >>> torch.equal(model(x), before)
        True
        >>> torchwrap.unwrap(model) is model
        True
    """

    name = "superpipeline"
    phase: ClassVar[int] = PHASES["superpipeline"]
    config_class = Superpipeline
    handle_class: ClassVar[type[WeightsHandle]] = SuperpipelineHandle

    @torch.inference_mode(False)
    def prepare(self, model: nn.Module, config: Superpipeline, integration: Integration) -> Prepared[Superpipeline]:
        """Divide the model and set the knobs to begin with; touches nothing."""
        homes: dict[str, Home] | None = model.__dict__.get(SOURCES)
        refuse_uninitialised(model)
        device = device_of(model, config, from_folder=homes is not None)
        check_tier(config, device)
        separate = arena_for(device).separate
        if config.store == "host" and not separate:
            raise errors.ConfigError(
                f'superpipeline: store="host", but the model computes on {device}, which is that very memory',
                where="store",
                fix='Use store="disk", or leave it out.',
            )
        division = _into_blocks(find_units(model, blocks_of(model, config, integration), split_above=1 << 62, pin=config.pin))
        if not division.units:
            raise errors.UnsupportedModelError(
                f"superpipeline: {type(model).__name__} has no blocks to stream",
                where=type(model).__name__,
                fix="Name the modules that are one block each: units=(...).",
            )
        if device.type != "cpu":
            for piece in division.pieces:
                piece.residue = 0  # a device allocator's alignment, whatever the host's was
        fixed = sum(piece.nbytes for piece in division.fixed) + division.buffer_bytes
        slot_bytes = max(region_bytes(piece.nbytes for piece in unit.pieces) for unit in division.units)
        block_bytes = sum(unit.nbytes for unit in division.units)
        scratch = max(piece.nbytes for piece in division.pieces)
        mode = "recompute" if recomputes_itself(model.modules()) else config.activations
        rehearsal = Rehearsal.of(model, division.units, device, integration) if config.train else None
        training = training_of(division.units, division.pieces, config, mode, rehearsal)
        trial = trial_of(config, model, division.units, device, integration, rehearsal)
        room = Room(
            units=len(division.units),
            fixed_bytes=fixed,
            slot_bytes=slot_bytes,
            block_bytes=block_bytes,
            gradient_bytes=sum(p.nbytes for unit in division.units for p in unit.pieces if p.parameter.requires_grad),
            forward=weight_budget(config, model, integration, device, scratch, None, trial),
            step=weight_budget(config, model, integration, device, scratch, training, trial),
            optimizer=training.optimizer if config.reserve is None else 0,
            shared=device.type == "cpu",
        )
        budget = room.step if config.train else room.forward
        knobs = _first_knobs(config, room, budget)
        plan = _plan(division, knobs, room, budget)
        layers: list[Place] = [*activation_layers(config, division.units), ("", model, WindowLayer(None))]
        for unit in division.units if plan.slots else ():
            assert unit.module is not None
            layers += [(unit.name, unit.module, UnitLayer(None, unit.index, where)) for where in ("outside", "inside")]
        notes = [
            *division.notes,
            f"k={knobs.k}, k_prime={knobs.k_prime} of {knobs.units} blocks; {format_bytes(plan.held_bytes)} present at most"
            + (', until "auto" has measured a pass' if config.chooses and plan.slots else ""),
            *([f"left to a training step: {room.reserved()}"] if config.train else []),
        ]
        origin = next((p.device for p in model.parameters()), device)
        window = Window(
            division=division,
            plan=plan,
            budget=budget,
            device=device,
            origin=origin,
            copies=Copies.of(division.pieces, scratch),
            homes=homes,
            integration=integration,
            tier=config.store or ("host" if separate else "disk"),
            rehearsal=rehearsal,
            trial=trial,
            knobs=knobs,
            room=room,
        )
        return Prepared(config=config, layers=layers, notes=notes, data=window)

    def attach(self, model: nn.Module, prepared: Prepared[Superpipeline]) -> Handle:
        """Store the blocks, then hide them; an error leaves the model as it was."""
        window: Window = prepared.data
        handle = super().attach(model, prepared)
        assert isinstance(handle, SuperpipelineHandle)
        handle.configure(window.knobs, window.room)
        return handle


def _into_blocks(found: UnitMap) -> UnitMap:
    """The division with whole blocks as the only units: experts go with their block, everything else stays."""
    blocks = [unit for unit in found.units if unit.kind == "block" and unit.parent is None]
    by_index = {unit.index: unit for unit in blocks}
    for unit in found.units:
        if unit.kind == "expert" and unit.parent in by_index:
            by_index[unit.parent].pieces.extend(unit.pieces)
    for index, unit in enumerate(blocks):
        unit.index = index
    free = {piece.index for unit in blocks for piece in unit.pieces}
    fixed = [piece for piece in found.pieces if piece.index not in free]
    return UnitMap(blocks, fixed, found.buffer_bytes, found.notes)


def _first_knobs(config: Superpipeline, room: Room, budget: Budget) -> Knobs:
    """The knobs until "auto" has measured."""
    units, allowed = room.units, room.allowed(trains=bool(config.train))
    batch = config.k_prime if isinstance(config.k_prime, int) else 1
    if isinstance(config.k, int):
        k = Knobs(config.k, batch, units).k
    else:
        least = Knobs(units, batch, units).k_prime  # whatever k will be, the batch is not larger
        wanted = max(least, min(_FIRST_K, units - 1))
        k = min((other for other in allowed if other >= least), key=lambda other: abs(other - wanted), default=least)
    if k not in allowed:
        needed = room.needed(k, trains=bool(config.train))
        beside = f", beside {room.reserved()}" if config.train else ""
        raise errors.BudgetError(
            f"superpipeline: {k} block(s) and what is outside them take {format_bytes(needed)}, "
            f"and {format_bytes(budget.device)} are allowed{beside}",
            needed=needed,
            available=budget.device,
            where="k",
            fix=f"{budget.remedy(needed)}{_fewer(config, allowed)}.",
        )
    return Knobs(k, batch, units)


def _fewer(config: Superpipeline, allowed: tuple[int, ...]) -> str:
    """The other way out of too small a budget, if there is one: a knob with which it would do."""
    batch = config.k_prime if isinstance(config.k_prime, int) else 1
    if isinstance(config.k, int):
        return f", or k={allowed[-1]}" if allowed and allowed[-1] >= batch else ""
    return f", or k_prime={allowed[-1]}" if allowed else ""


def _plan(division: UnitMap, knobs: Knobs, room: Room, budget: Budget) -> ResidencyPlan:
    if knobs.k == knobs.units:
        everything = frozenset(piece.index for piece in division.pieces)
        return ResidencyPlan(budget.device, room.fixed_bytes, everything, room.block_bytes, 0, 0, 0, 0)
    return ResidencyPlan(budget.device, room.fixed_bytes, frozenset(), 0, knobs.k, room.slot_bytes, room.block_bytes, 0)


superpipeline: SuperpipelineTechnique = register(SuperpipelineTechnique())

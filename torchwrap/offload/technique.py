"""`torchwrap.offload`: weights on disk or host memory, present only while they are used.

Here is the division of the budget; how weights are stored, hidden and brought back is in torchwrap/weights.

Sources: Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", 2021 (units streamed in the
order of use, prefetch across the pass); Liao et al., "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU",
2024 (the disk as a tier of its own at full bandwidth). Where we differ: any module instead of a fixed script, the model's own files read
in place, residency planned per parameter, and every result bit-identical.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
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
from torchwrap.core.technique import Place, Prepared, register
from torchwrap.offload.config import Offload
from torchwrap.offload.handle import OffloadHandle
from torchwrap.stream.planner import PlannedUnit, ResidencyPlan, plan_residency
from torchwrap.stream.routed import ExpertGroup
from torchwrap.stream.tiles import CutWeight, cut_weights, make_whole, parts
from torchwrap.stream.units import Home, UnitMap, find_units
from torchwrap.weights.blueprint import Blueprint, blocks_of, device_of, refuse_uninitialised
from torchwrap.weights.budget import Budget, weight_budget
from torchwrap.weights.copies import Copies
from torchwrap.weights.experts import ExpertsLayer, groups_of
from torchwrap.weights.folder import SOURCES
from torchwrap.weights.footprint import scratch_bytes, waiting
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.layers import RootLayer, RowLayer, UnitLayer
from torchwrap.weights.technique import StreamingTechnique, activation_layers
from torchwrap.weights.tiled import TiledLayer
from torchwrap.weights.training import training_of
from torchwrap.weights.trial import trial_of

__all__ = ["OffloadTechnique", "offload"]

_TILES = tuple(1 << power for power in range(26, 13, -2))
"""Tile sizes that are tried before one is recommended, in bytes; larger ones cost less per byte (chosen)."""


class OffloadTechnique(StreamingTechnique[Offload]):
    """Streams weights from disk or host memory while the model runs.

    Args:
        target: a module, a class or a factory of modules; nothing makes a decorator.
        config: an `Offload`, or its fields as keywords.

    Raises:
        BudgetError: the budget is below what one unit needs; carries the smallest that works.
        UnsupportedModelError: parameters on several devices or on meta, or no unit to stream.
        StorageError: weights could not be stored; the model is as it was.

    Exactness: bit-identical to the unwrapped model on the same device and dtype; with `tile_above` equal up to rounding.
    Cost: `held_bytes` of `handle.stats()` in memory; `streamed_bytes` read in each pass.

    Example:
        >>> import torch, torchwrap
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))).eval()
        >>> x = torch.ones(1, 64)
        >>> before = model(x)
        >>> model = torchwrap.offload(model, device_memory=50_000)
        >>> torch.equal(model(x), before)
        True
        >>> torchwrap.unwrap(model) is model
        True
    """

    name = "offload"
    phase: ClassVar[int] = PHASES["offload"]
    config_class = Offload
    handle_class: ClassVar[type[WeightsHandle]] = OffloadHandle

    @torch.inference_mode(False)
    def prepare(self, model: nn.Module, config: Offload, integration: Integration) -> Prepared[Offload]:
        """Divide the model and the budget; touches nothing."""
        homes: dict[str, Home] | None = model.__dict__.get(SOURCES)
        refuse_uninitialised(model)
        device = device_of(model, config, from_folder=homes is not None)
        check_tier(config, device)
        division, cut = _divide(model, config, integration)
        if device.type != "cpu":
            for piece in division.pieces:
                piece.residue = 0  # a device allocator's alignment, whatever the host's was
        origin = next((p.device for p in model.parameters()), device)
        planned = _planned(division)
        fixed = sum(piece.nbytes for piece in division.fixed) + division.buffer_bytes
        inside, alone = scratch_bytes(division.units, division.pieces)
        scratch = max(inside, alone)
        mode = "recompute" if recomputes_itself(model.modules()) else config.activations
        rehearsal = Rehearsal.of(model, division.units, device, integration) if config.goal == "train" else None
        training = training_of(division.units, division.pieces, config, mode, rehearsal) if config.goal == "train" else None
        trial = trial_of(config, model, division.units, device, integration, rehearsal)
        budget = weight_budget(config, model, integration, device, scratch, training, trial)
        whole = fixed + sum({index: nbytes for unit in planned for index, nbytes in unit.pieces}.values())
        keep_resident = config.params in ("auto", "device")
        if not planned and not keep_resident:
            raise _nothing_to_stream(model, division.notes)

        def planned_for(budget: Budget) -> ResidencyPlan:
            limit = whole if config.params == "device" else budget.device
            divide = partial(
                plan_residency,
                planned,
                fixed_bytes=fixed,
                slots=config.k,
                keep_resident=keep_resident,
                even=training is not None,
                remedy=budget.remedy,
            )
            plan = divide(budget=limit)
            if training is None or config.params == "device" or config.device_memory is not None or config.host_memory is not None:
                return plan
            # In training weights that stay have gradients that wait longer.
            none = waiting(division.units, division.pieces, 0, 0, ()).blocks
            while plan.resident_bytes:
                more = waiting(division.units, division.pieces, 0, 0, plan.resident).blocks - none
                if (over := plan.held_bytes + more - budget.device) <= 0:
                    break
                limit -= -(-over // 2)
                plan = divide(budget=limit)
            return plan

        try:
            plan = planned_for(budget)
        except errors.BudgetError as error:
            raise self._with_tiles(error, model, config, integration) from None
        for _ in range(3):
            # While a leaf outside the blocks runs (the head), slots that hold nothing in use give their memory to its reordered copy
            # (see Engine.acquire), so that much need not be reserved beside them. Fewer reserved bytes mean smaller slots: settle.
            idle = max(0, plan.slots - 1) * plan.slot_bytes if device.type == "cpu" else 0
            shared = max(inside, alone - idle)
            if shared == scratch:
                break
            scratch = shared
            budget = weight_budget(config, model, integration, device, scratch, training, trial)
            plan = planned_for(budget)
        layers: list[Place] = [("", model, RootLayer(None))]
        for weight in cut:
            if plan.resident.issuperset(tile.index for tile in weight.piece.tiles):
                make_whole(weight.piece, division.units)
                plan = dataclasses.replace(plan, resident=plan.resident | {weight.piece.index})
            else:
                layers.append((weight.name, weight.module, TiledLayer(None, weight.units)))
        for unit in division.units:
            away = [piece for piece in unit.pieces if piece.index not in plan.resident]
            roomy = unit.kind == "leaf" and max(piece.nbytes for piece in unit.pieces) > inside
            if unit.module is None or not (away or (roomy and plan.slots)):
                continue
            if unit.kind == "rows":
                layers.append((unit.name, unit.module, RowLayer(None, unit.index)))
            else:
                # Outside as well, because torch hooks on the module itself (weight norm, say) may read its weights.
                layers += [(unit.name, unit.module, UnitLayer(None, unit.index, where)) for where in ("outside", "inside")]
        groups: list[ExpertGroup] = []
        if config.expert_streaming and config.verify != "always":  # a CRC is that of a whole parameter
            for group, ref in groups_of(integration.experts(model), division, plan.resident):
                layers.append((ref.fqn, ref.module, ExpertsLayer(None, len(groups), ref.count, ref.routed)))
                groups.append(group)
        if config.params in ("host", "disk") and len(layers) == 1:
            raise _nothing_to_stream(model, division.notes)
        layers[:0] = activation_layers(config, division.units)
        notes = [
            *division.notes,
            *(f"{weight.name} is computed in {len(weight.units)} tiles: equal up to rounding" for weight in cut if weight.piece.tiles),
            f"{format_bytes(plan.held_bytes)} present at most, {format_bytes(plan.streamed_bytes)} streamed per pass",
        ]
        return Prepared(
            config=config,
            layers=layers,
            notes=notes,
            data=Blueprint(
                division=division,
                plan=plan,
                budget=budget,
                device=device,
                origin=origin,
                copies=Copies.of(division.pieces, scratch),
                homes=homes,
                integration=integration,
                tier="auto" if config.params == "device" else config.params,
                rehearsal=rehearsal,
                trial=trial,
                groups=groups,
            ),
        )

    def _with_tiles(self, error: errors.BudgetError, model: nn.Module, config: Offload, integration: Integration) -> errors.BudgetError:
        """The same error, its fix naming tiles with which the budget would do, if there are such."""
        for size in _TILES if config.tile_above is None else ():
            with suppress(errors.TorchwrapError):
                tried = self.prepare(model, dataclasses.replace(config, tile_above=size), integration)
                name, module = next(((name, module) for name, module, layer in tried.layers if isinstance(layer, TiledLayer)), ("", model))
                if name:
                    advice = f"Or compute {name} in tiles, equal up to rounding: tile_above={size}."
                    if config.goal == "train" and any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                        advice = (
                            f"Tiles do not help: to train {name} takes its whole gradient, which is as large as its weight. "
                            f"Or freeze it, {name}.requires_grad_(False), and compute it in tiles, equal up to rounding: tile_above={size}."
                        )
                    return errors.BudgetError(
                        error.what,
                        needed=error.needed,
                        available=error.available,
                        largest=error.largest,
                        where=error.where,
                        fix=f"{error.fix} {advice}",
                    )
        return error


def _nothing_to_stream(model: nn.Module, notes: Sequence[str]) -> errors.UnsupportedModelError:
    more = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
    return errors.UnsupportedModelError(
        f"offload: nothing in {type(model).__name__} can be streamed{f'; {notes[0]}{more}' if notes else ''}",
        where=type(model).__name__,
        fix="Name the modules to stream: units=(...), or leave the model as it is.",
    )


def _divide(model: nn.Module, config: Offload, integration: Integration) -> tuple[UnitMap, list[CutWeight]]:
    division = find_units(
        model,
        blocks_of(model, config, integration),
        gather_only=integration.gather_only(model),
        split_above=int(config.max_unit_bytes),
        pin=config.pin,
    )
    return division, cut_weights(model, division, int(config.tile_above)) if config.tile_above is not None else []


def _planned(division: UnitMap) -> list[PlannedUnit]:
    return [
        PlannedUnit(
            unit.name,
            tuple((piece.index, piece.nbytes) for piece in parts(unit.pieces)),
            conditional=unit.kind == "expert",
            nested=unit.parent is not None,
            table=unit.kind == "rows",
        )
        for unit in division.units
    ]


offload: OffloadTechnique = register(OffloadTechnique())

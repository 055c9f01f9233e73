"""`torchwrap.offload`: weights on disk or host memory, present only while they are used.

Planning (`prepare`) touches nothing; `attach` stores what has to leave and only then hides it; `detach` brings everything back. From a
folder the same happens without the weights ever having been in memory: see folder.py.

Sources: Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", 2021 (units streamed in the
order of use, prefetch across the pass); Liao et al., "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU",
2024 (the disk as a tier of its own at full bandwidth). Where we differ: any module instead of a fixed script, the model's own files read
in place, residency planned per parameter, and every result bit-identical.
"""

from __future__ import annotations

import os
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from torchwrap.core import errors
from torchwrap.core.config import format_bytes
from torchwrap.core.integration import Integration
from torchwrap.core.order import PHASES
from torchwrap.core.technique import Handle, Place, Prepared, Technique, register
from torchwrap.offload.activations import ActivationLayer, RecomputeLayer, check_tier
from torchwrap.offload.budget import Budget, check_room, process_bytes, weight_budget, working_bytes
from torchwrap.offload.config import Offload
from torchwrap.offload.experts import ExpertsLayer, groups_of
from torchwrap.offload.folder import SOURCES, open_folder
from torchwrap.offload.handle import OffloadHandle
from torchwrap.offload.layers import RootLayer, RowLayer, UnitLayer
from torchwrap.offload.place import Placed, place, take_back
from torchwrap.offload.state import hook_states, unhook_states
from torchwrap.offload.training import training_of
from torchwrap.storage import aio
from torchwrap.storage.limits import memory_available
from torchwrap.stream.arena import arena_for
from torchwrap.stream.engine import Engine
from torchwrap.stream.planner import PlannedUnit, ResidencyPlan, plan_residency
from torchwrap.stream.routed import ExpertGroup
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Home, UnitMap, find_units

__all__ = ["Blueprint", "OffloadTechnique", "blocks_of", "device_of", "offload", "refuse_uninitialised"]

_THREADS, _CHUNK = 4, 4 << 20  # measured: two or three requests keep the disk busy, the rest cover the time spent on checksums


@dataclass(slots=True)
class Blueprint:
    """What `prepare` worked out for `attach`."""

    division: UnitMap
    plan: ResidencyPlan
    budget: Budget
    device: torch.device
    origin: torch.device
    scratch: int
    homes: dict[str, Home] | None
    integration: Integration
    groups: list[ExpertGroup] = field(default_factory=list)


class OffloadTechnique(Technique[Offload]):
    """Streams weights from disk or host memory while the model runs.

    Args:
        target: a module, a class or a factory of modules; nothing makes a decorator.
        config: an `Offload`, or its fields as keywords.

    Raises:
        BudgetError: the budget is below what one unit needs; carries the smallest that works.
        UnsupportedModelError: parameters on several devices or on meta, or no unit to stream.
        StorageError: weights could not be stored; the model is as it was.

    Exactness: bit-identical to the unwrapped model on the same device and dtype.
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
    exactness = "bit-identical"
    handle_class: ClassVar[type[OffloadHandle]] = OffloadHandle

    @torch.inference_mode(False)
    def prepare(self, model: nn.Module, config: Offload, integration: Integration) -> Prepared[Offload]:
        """Divide the model and the budget; touches nothing."""
        homes: dict[str, Home] | None = model.__dict__.get(SOURCES)
        refuse_uninitialised(model)
        device = device_of(model, config, from_folder=homes is not None)
        check_tier(config, device)
        division = find_units(
            model,
            blocks_of(model, config, integration),
            gather_only=integration.gather_only(model),
            split_above=int(config.max_unit_bytes),
            pin=config.pin,
        )
        if device.type != "cpu":
            for piece in division.pieces:
                piece.residue = 0  # a device allocator's alignment, whatever the host's was
        origin = next((p.device for p in model.parameters()), device)
        planned = [
            PlannedUnit(
                unit.name,
                tuple((piece.index, piece.nbytes) for piece in unit.pieces),
                conditional=unit.kind == "expert",
                nested=unit.parent is not None,
                table=unit.kind == "rows",
            )
            for unit in division.units
        ]
        fixed = sum(piece.nbytes for piece in division.fixed) + division.buffer_bytes
        inside, alone = _scratch(division)
        scratch = max(inside, alone)
        training = training_of(division.units, division.pieces) if config.goal == "train" else None
        budget = weight_budget(config, model, integration, device, scratch, training)
        whole = fixed + sum({p.index: p.nbytes for u in division.units for p in u.pieces}.values())
        keep_resident = config.params in ("auto", "device")

        def planned_for(budget: Budget) -> ResidencyPlan:
            limit = whole if config.params == "device" else budget.device
            plan = plan_residency(planned, fixed_bytes=fixed, budget=limit, slots=config.k, keep_resident=keep_resident)
            if training is None or config.params == "device" or config.device_memory is not None or config.host_memory is not None:
                return plan
            # In training each byte that stays has a gradient that stays until the backward is over.
            while (over := plan.held_bytes + plan.resident_bytes - budget.device) > 0 and plan.resident_bytes:
                limit -= -(-over // 2)
                plan = plan_residency(planned, fixed_bytes=fixed, budget=limit, slots=config.k, keep_resident=keep_resident)
            return plan

        plan = planned_for(budget)
        for _ in range(3):
            # While a leaf outside the blocks runs (the head), slots that hold nothing in use give their memory to its reordered copy
            # (see Engine.acquire), so that much need not be reserved beside them. Fewer reserved bytes mean smaller slots: settle.
            idle = max(0, plan.slots - 1) * plan.slot_bytes if device.type == "cpu" else 0
            shared = max(inside, alone - idle)
            if shared == scratch:
                break
            scratch = shared
            budget = weight_budget(config, model, integration, device, scratch, training)
            plan = planned_for(budget)
        layers: list[Place] = [("", model, RootLayer(None))]
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
            raise errors.UnsupportedModelError(
                f"offload: nothing in {type(model).__name__} can be streamed",
                where=type(model).__name__,
                fix="Name the modules to stream: units=(...), or leave the model as it is.",
            )
        if config.activations != "keep":
            swaps = config.activations in ("host", "disk")
            for unit in division.units:
                if unit.kind == "block" and unit.parent is None and unit.module is not None:
                    around = ActivationLayer(None, unit.index) if swaps else RecomputeLayer(None, unit.index)
                    layers.insert(0, (unit.name, unit.module, around))  # outside of what replaces weights: it gets the rest
        notes = [*division.notes, f"{format_bytes(plan.held_bytes)} present at most, {format_bytes(plan.streamed_bytes)} streamed per pass"]
        return Prepared(
            config=config,
            layers=layers,
            notes=notes,
            data=Blueprint(division, plan, budget, device, origin, scratch, homes, integration, groups),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def attach(self, model: nn.Module, prepared: Prepared[Offload]) -> Handle:
        """Store what has to leave, then hide it; an error leaves the model as it was."""
        blueprint: Blueprint = prepared.data
        config, plan, device = prepared.config, blueprint.plan, blueprint.device
        reader = aio.Reader(
            config.io_threads or _THREADS,
            int(config.io_chunk) or _CHUNK,
            config.io_timeout_s,
            mode=config.io_backend,
        )
        pieces = blueprint.division.pieces
        for piece in pieces:
            piece.resident = piece.index in plan.resident or piece in blueprint.division.fixed
        placed: Placed | None = None
        try:
            placed = place(model, config, blueprint.division, blueprint.budget, device, blueprint.homes, blueprint.integration, reader)
            arena = arena_for(device)
            engine = None
            if any(not piece.resident for piece in pieces):
                timeline = Timeline(plan.fixed_bytes + plan.resident_bytes) if config.record else None
                engine = Engine(
                    blueprint.division.units,
                    plan,
                    arena,
                    reader,
                    verify=config.verify != "header",
                    timeout_s=config.io_timeout_s,
                    timeline=timeline,
                )
                engine.route(blueprint.groups)
            integration = blueprint.integration
            working = _Working(integration, model, blueprint.scratch)
            handle = self.handle_class(
                config,
                blueprint.division.units,
                pieces,
                plan,
                engine,
                reader,
                store=placed.store,
                device=device,
                origin=blueprint.origin,
                baseline_bytes=process_bytes(),
                activation=working,
                mapped=blueprint.homes is not None,
                notes=prepared.notes,
            )
            if placed.locked is not None:
                handle.on_close = weakref.finalize(handle, arena.release_host, placed.locked)
            for _, _, layer in prepared.layers:
                layer.owner = handle
            handle.hooked = hook_states(model, handle)
            handle.root = weakref.ref(model)
        except BaseException:
            unhook_states(model.modules())
            if placed is not None:
                placed.undo()
            reader.close()
            raise
        placed.keep()
        for unit in blueprint.division.units:
            unit.module = None  # layers know their modules; the handle must not keep parts of a model alive that the user replaces
        model.__dict__.pop(SOURCES, None)
        return handle

    @torch.inference_mode(False)
    @torch.no_grad()
    def detach(self, model: nn.Module, handle: Handle) -> None:
        """Bring all weights back and remove what was stored.

        Raises:
            BudgetError: there is not enough memory for them; nothing is changed then.
        """
        assert isinstance(handle, OffloadHandle)
        if not handle.mapped:
            needed = sum(piece.nbytes for piece in handle.pieces if not piece.resident)
            check_room(needed, memory_available() if handle.device.type == "cpu" else None, "unwrapping")
        handle.backward.settle()
        with handle.engine.exclusive() if handle.engine is not None else nullcontext():
            take_back(handle)
            unhook_states([*model.modules(), *handle.hooked])
            handle.close()

    def from_pretrained(
        self, folder: str | os.PathLike[str], config: Offload | None = None, *, dtype: torch.dtype | None = None, **options: Any
    ) -> nn.Module:
        """The model stored in a folder, offloaded, without ever having all of its weights in memory.

        Args:
            folder: a checkpoint with safetensors files that an installed integration can build.
            config: an `Offload`, or its fields as keywords.
            dtype: of the weights; None is what the folder says. Another one is written once to `path`.

        Raises:
            UnsupportedModelError: no integration can build the model, or weights are missing.
            CorruptDataError: a file breaks a rule of its format.
            BudgetError: the budget is below what one unit needs.

        Cost: headers and resident weights are read; nothing is written unless the checkpoint has to be converted.
        """
        return open_folder(Path(folder), self._settings(config, options), dtype)


class _Working:
    """`working_bytes` of one model, by batch and tokens; remembers the estimate, not the model."""

    def __init__(self, integration: Integration, model: nn.Module, scratch: int) -> None:
        self._known: dict[tuple[int, int], int] = {}
        self._integration, self._scratch, self._model = integration, scratch, weakref.ref(model)

    def __call__(self, batch: int, tokens: int) -> int:
        key = (batch, tokens)
        model = self._model()
        if model is not None:
            self._known[key] = working_bytes(model, self._integration, batch=batch, tokens=tokens, scratch=self._scratch)
        return self._known.get(key, self._scratch)


def _scratch(division: UnitMap) -> tuple[int, int]:
    """Bytes of the largest parameter inside a block (or anywhere but in a leaf outside the blocks), and of the largest such leaf."""
    alone = {piece.index for unit in division.units if unit.kind == "leaf" for piece in unit.pieces}
    tables = {piece.index for unit in division.units if unit.kind == "rows" for piece in unit.pieces}
    inside = [piece.nbytes for piece in division.pieces if piece.index not in alone | tables]
    return max(inside, default=0), max((piece.nbytes for piece in division.pieces if piece.index in alone), default=0)


def refuse_uninitialised(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if a parameter has no shape yet."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise errors.UnsupportedModelError(
                f"offload: {name} is uninitialized, it has no shape yet (a lazy module)",
                where=name,
                fix="Run the model once, then wrap it.",
            )


def device_of(model: nn.Module, config: Offload, *, from_folder: bool) -> torch.device:
    """The device that computes: the one asked for, else the one the model is on.

    Raises:
        ConfigError: the device asked for is none, or not there.
        UnsupportedModelError: parameters are on meta or on several devices.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices):
        name = next(name for name, parameter in model.named_parameters() if parameter.device.type == "meta")
        raise errors.UnsupportedModelError(
            f"offload: {name} is on meta, so it has no values to offload",
            where=name,
            fix="Load the model from its folder: torchwrap.offload.from_pretrained(folder).",
        )
    if config.device is not None:
        try:
            asked = torch.device(config.device)
        except RuntimeError as error:
            raise errors.ConfigError(f"offload: {config.device!r} is no device", where="device", fix='Use "cpu" or "cuda".') from error
        if asked.type not in ("cpu", "cuda"):
            raise errors.ConfigError(f"offload: computing on {asked} is not supported", where="device", fix='Use "cpu" or "cuda".')
        if asked.type == "cuda" and not torch.cuda.is_available():
            raise errors.ConfigError(f"offload: there is no {asked}", where="device", fix='Leave device out, or use device="cpu".')
        return asked
    if from_folder:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len(devices) > 1:
        raise errors.UnsupportedModelError(
            f"offload: the parameters are on {', '.join(sorted(map(str, devices)))}",
            where="parameters",
            fix='Say which device computes: device="cuda".',
        )
    return next(iter(devices), torch.device("cpu"))


def blocks_of(model: nn.Module, config: Offload, integration: Integration) -> list[tuple[str, nn.Module]]:
    """Names and modules of the blocks: those the config names, else those the integration knows.

    Raises:
        ConfigError: the config names one that is not there.
    """
    if not config.units:
        return [(block.fqn, block.module) for block in integration.blocks(model) or ()]
    found = [
        (name, module) for name, module in model.named_modules() if name and (name in config.units or type(module).__name__ in config.units)
    ]
    for wanted in config.units:
        if not any(name == wanted or type(module).__name__ == wanted for name, module in found):
            raise errors.ConfigError(
                f"offload: units names {wanted!r}, which is neither a module nor a class of {type(model).__name__}",
                where="units",
                fix="Take names from [name for name, _ in model.named_modules()].",
            )
    return found


offload: OffloadTechnique = register(OffloadTechnique())

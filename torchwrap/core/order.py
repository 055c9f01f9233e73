"""Which technique stands outside which, which may not meet, and which foreign mechanisms they can live with. All of it is data.

The order in which a user lists techniques has no meaning: each has a phase, and a lower phase stands further outside. Two rows of
names that may not meet give the reason that the error quotes. Mechanisms of other libraries are recognised by what they leave on
modules and parameters, without importing those libraries; each has a verdict per phase and the exact call that removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from torchwrap.core.errors import ConflictError

__all__ = [
    "FOREIGN",
    "PAIRS",
    "PHASES",
    "PHASE_NAMES",
    "PLACEMENT",
    "Foreign",
    "Pair",
    "Sighting",
    "check_foreign",
    "check_pair",
    "foreign_mechanisms",
]

PHASE_NAMES = {0: "observe", 10: "rewrite", 20: "tokens", 30: "neurons", 40: "attention", 50: "placement"}
"""From outermost to innermost. Within a phase the user's list order holds."""

PLACEMENT = 50

PHASES = {
    "trace": 0,
    "early_convert": 10,
    "hired": 20,
    "core_sparse": 30,
    "fast_attention": 40,
    "offload": PLACEMENT,
    "superpipeline": PLACEMENT,
}
"""Phase of each technique of this library; one from elsewhere chooses a number."""


@dataclass(frozen=True)
class Pair:
    """Two techniques that may not meet.

    Attributes:
        first: a technique's name.
        second: the other's.
        scope: `model` if they may not meet anywhere in a model, `module` if only not on one module.
        reason: quoted by the error.
    """

    first: str
    second: str
    scope: Literal["model", "module"]
    reason: str


PAIRS = (
    Pair("offload", "superpipeline", "module", "both decide where a module's weights are; on disjoint parts of a model they may meet"),
    Pair("early_convert", "hired", "model", "the converter leaves inputs early, so the vision tower's tokens are not there to be dropped"),
)


def check_pair(first: str, second: str, scope: Literal["model", "module"], where: str = "") -> None:
    """Refuse two techniques that may not meet in this scope.

    Raises:
        ConflictError: with the reason, both names, and which to remove.
    """
    for pair in PAIRS:
        if pair.scope == scope and {pair.first, pair.second} == {first, second}:
            raise ConflictError(
                f"{first} and {second} exclude each other on one {scope}: {pair.reason}",
                where=where,
                fix=f"Remove one: torchwrap.unwrap(model, {first!r}), or leave {second} out.",
            )


@dataclass(frozen=True)
class Foreign:
    """A mechanism of another library.

    Attributes:
        name: of the mechanism.
        on_module: recognises it on a module.
        on_parameter: recognises it on a parameter.
        placement: verdict for techniques that move weights.
        others: verdict for all others.
        reason: why, for the error or the note.
        removal: the call that removes it.
    """

    name: str
    on_module: Callable[[nn.Module], bool] | None
    on_parameter: Callable[[torch.Tensor], bool] | None
    placement: Literal["allowed", "note", "refused"]
    others: Literal["allowed", "note", "refused"]
    reason: str
    removal: str


def _comes_from(entry: object, *packages: str) -> bool:
    return any(cls.__module__.startswith(packages) for cls in type(entry).__mro__)


def _places_elsewhere(module: nn.Module) -> bool:
    """`hf_device_map` as accelerate and transformers leave it; a map that puts all on the CPU is no offload."""
    places = getattr(module, "hf_device_map", None)
    if not isinstance(places, dict):
        return False
    tiers = {str(place) for place in places.values()}
    return "disk" in tiers or ("cpu" in tiers and len(tiers) > 1)


def _has_group_offloading(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    return any("group_offloading" in str(name) for name in getattr(registry, "hooks", ()))


def _is_fully_sharded(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}".startswith("torch.distributed.fsdp.fully_sharded_data_parallel.")
               for cls in type(module).__mro__)


# The attribute names were read in accelerate 1.15, diffusers 0.42, peft 0.19, DeepSpeed 0.16, bitsandbytes 0.48 and torchao 0.14;
# tests/unit/test_order.py builds the marks of each, and the real ones where the library is installed.
FOREIGN = (
    Foreign(
        "accelerate hook", lambda module: "_hf_hook" in module.__dict__, None, "refused", "note",
        "its hook moves the same weights and stands before the class of the module",
        "accelerate.hooks.remove_hook_from_module(model, recurse=True)",
    ),
    Foreign(
        "device_map with cpu or disk", _places_elsewhere, None, "refused", "note",
        "parts of the model are placed by accelerate",
        "model = type(model).from_pretrained(folder)  # without device_map",
    ),
    Foreign(
        "diffusers group offloading", _has_group_offloading, None, "refused", "note",
        "it moves the same weights",
        'for m in model.modules(): hasattr(m, "_diffusers_hook") and m._diffusers_hook.remove_hook("group_offloading", recurse=False)',
    ),
    Foreign(
        "bitsandbytes weights", lambda module: _comes_from(module, "bitsandbytes."), lambda p: _comes_from(p, "bitsandbytes."),
        "refused", "note",
        "packed weights carry their scales outside the tensor",
        "model = model.dequantize()",
    ),
    Foreign(
        "torchao tensors", None, lambda parameter: _comes_from(parameter, "torchao."), "refused", "note",
        "a tensor subclass is several tensors that cannot be moved as one run of bytes",
        "model = type(model).from_pretrained(folder)  # without quantization_config, or before quantize_()",
    ),
    Foreign(
        "peft tuner", lambda module: _comes_from(module, "peft.tuners."), None, "note", "note",
        "parameter names are those with the adapter; merging or unloading it later replaces wrapped modules",
        "model = peft_model.merge_and_unload()",
    ),
    Foreign(
        "DeepSpeed ZeRO-3", None, lambda parameter: hasattr(parameter, "ds_id"), "refused", "refused",
        "parameters are partitioned and gathered by DeepSpeed around each module",
        "model = type(model).from_pretrained(folder)  # outside deepspeed.zero.Init, after engine.save_16bit_model(folder)",
    ),
    Foreign(
        "FSDP2 parameters (DTensor)", None, lambda p: _comes_from(p, "torch.distributed.tensor", "torch.distributed._tensor"),
        "refused", "allowed",
        "each process holds a shard, which FSDP gathers and frees itself and tensor-parallel layers compute with",
        "build the model without torch.distributed.fsdp.fully_shard(model), or without a tp_plan",
    ),
    Foreign(
        "FSDP1", _is_fully_sharded, None, "refused", "allowed",
        "each process holds a flat shard that FSDP gathers and frees itself",
        "model = model.module  # before FullyShardedDataParallel(model)",
    ),
)


@dataclass(frozen=True)
class Sighting:
    """A foreign mechanism found in a model.

    Attributes:
        mechanism: its row.
        fqn: first place where it was seen (module or parameter name; empty for the root).
        count: number of such places.
    """

    mechanism: Foreign
    fqn: str
    count: int


def foreign_mechanisms(model: nn.Module) -> list[Sighting]:
    """Every mechanism of the table that is present in `model`, in table order."""
    modules = list(model.named_modules())
    parameters = list(model.named_parameters())
    sightings = []
    for row in FOREIGN:
        places = _where(modules, row.on_module) + _where(parameters, row.on_parameter)
        if places:
            sightings.append(Sighting(row, places[0], len(places)))
    return sightings


def _where(entries: Iterable[tuple[str, Any]], recognise: Callable[[Any], bool] | None) -> list[str]:
    return [] if recognise is None else [name for name, entry in entries if recognise(entry)]


def check_foreign(sightings: Sequence[Sighting], technique: str, phase: int) -> list[str]:
    """Notes on the foreign mechanisms that `technique` can live with.

    Raises:
        ConflictError: one that it cannot; the message has the call that removes it.
    """
    notes = []
    for seen in sightings:
        row = seen.mechanism
        verdict = row.placement if phase == PLACEMENT else row.others
        if verdict == "refused":
            raise ConflictError(
                f"{technique} cannot be applied to a model with {row.name} ({seen.count} places): {row.reason}",
                where=seen.fqn or "the model itself",
                fix=f"Remove it first: {row.removal}",
            )
        if verdict == "note":
            notes.append(f"{row.name} at {seen.fqn or 'the model itself'} ({seen.count} places): {row.reason}")
    return notes

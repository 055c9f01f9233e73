"""The arguments of `OffloadedOptimizer`, checked, and what follows from them for when gradients are used."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.config import parse_size
from torchwrap.storage.limits import memory_available
from torchwrap.storage.pool import BLOCK

__all__ = ["Asked", "Timing", "asked_for", "check_arguments", "check_model", "timing_of"]


def check_arguments(
    path: object, max_grad_norm: float | None, accumulate: int, gradients: str, durability: str, chunk: int | str, overlap: object = True
) -> None:
    """Raise `ConfigError` for an argument of another kind or out of range."""
    wrong: tuple[str, str, str] | None = None
    if path is not None and not isinstance(path, str | os.PathLike):
        wrong = ("path", f"{path!r} is no folder", "Pass a path, or None.")
    elif path is not None and not str(path):
        wrong = ("path", "a folder without a name", "Pass a path, or None.")
    elif path is not None and "\0" in str(path):
        wrong = ("path", f"no system has a folder with the name {str(path)!r}", "Pass a path without a null character, or None.")
    elif not isinstance(overlap, bool):
        wrong = ("overlap", f"{overlap!r} is neither True nor False", "Pass overlap=True or overlap=False.")
    elif max_grad_norm is not None and (isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, numbers.Real)):
        wrong = ("max_grad_norm", f"clipping to {max_grad_norm!r}", "Use a positive number, or None.")
    elif max_grad_norm is not None and not max_grad_norm > 0:
        wrong = ("max_grad_norm", f"clipping to {max_grad_norm}", "Use a positive number, or None.")
    elif isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        wrong = ("accumulate", f"{accumulate!r} backwards per step", "Use 1 or more.")
    elif gradients not in ("auto", "host", "disk"):
        wrong = ("gradients", f"{gradients!r} is no place", 'Use "auto", "host" or "disk".')
    elif durability not in ("save", "step", "none"):
        wrong = ("durability", f"{durability!r} is no durability", 'Use "save", "step" or "none".')
    elif durability == "step" and path is None:
        wrong = ("durability", "every step is to be kept, but there is no folder", "Pass path=.")
    elif parse_size(chunk, field="chunk") < BLOCK:
        wrong = ("chunk", f"chunks of {chunk} bytes", "Use 4096 bytes or more; 16MiB is a good size.")
    if wrong is not None:
        raise errors.ConfigError(f"OffloadedOptimizer: {wrong[1]}", where=wrong[0], fix=wrong[2])


def check_model(model: object) -> None:
    """Raise `ConfigError` if it is none, `UnsupportedModelError` if it has no numbers."""
    if not isinstance(model, nn.Module):
        raise errors.ConfigError(
            f"OffloadedOptimizer: {type(model).__name__} is no model", where="model", fix="Pass the module first, then the optimizer class."
        )
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta and parameter.requires_grad), None)
    if empty is not None:
        raise errors.UnsupportedModelError(
            f"OffloadedOptimizer: {empty} is on meta, so there is nothing to update", where=empty, fix="Load the weights first."
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for.

    Attributes:
        take: use gradients during backward, as far as possible.
        backwards: per step.
        where: gradients wait: "auto", "host" or "disk".
        norms: gradients that are used during backward tell their norm.
    """

    take: bool
    backwards: int
    where: str
    norms: bool = False


def asked_for(overlap: bool, max_grad_norm: float | None, accumulate: int, gradients: str) -> Asked:
    """What the arguments come to.

    Raises:
        ConfigError: gradients on the disk, where `DistributedDataParallel` averages them in memory.
    """
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if grouped else 0
    if not processes or (processes == 1 and gradients == "disk"):
        return Asked(overlap and max_grad_norm is None, accumulate, gradients)
    if gradients == "disk":
        raise errors.ConfigError(
            "OffloadedOptimizer: gradients cannot wait on the disk where several processes average them",
            where="gradients",
            fix='Use gradients="host", or shard the model with FSDP2 instead of offloading it.',
        )
    # DistributedDataParallel averages the gradients of all processes at the end of backward, in memory, even if there is one process.
    return Asked(False, accumulate, "host")


@dataclass(frozen=True, slots=True)
class Timing:
    """When gradients are used.

    Attributes:
        take: hand them to the worker during the last backward of a step.
        park: put those that have to wait on the disk.
        backwards: per step.
        room: bytes of taken gradients that may wait before the backward does.
        beside: folder for parked ones; `None` means the system's.
        norms: find out the norm of what is taken, for a training loop that wants to log it.
    """

    take: bool
    park: bool
    backwards: int
    room: int
    beside: Path | None
    norms: bool = False


def timing_of(asked: Asked, trained_bytes: int, room: int, beside: Path | None) -> Timing:
    """When gradients are used, and where they wait.

    Args:
        asked: by the user, or by a training loop.
        trained_bytes: of all gradients together.
        room: bytes that may wait for the worker.
        beside: folder for gradients on the disk.
    """
    fits = trained_bytes <= (memory_available() or trained_bytes) // 2
    waits = not asked.take or asked.backwards > 1
    park = waits and (asked.where == "disk" or (asked.where == "auto" and not fits))
    return Timing(asked.take, park, asked.backwards, room, beside, asked.norms)

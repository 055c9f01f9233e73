"""How much memory the weights may take: what the user allows, and never more than the machine has left; and what an optimizer takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.config import format_bytes
from torchwrap.core.integration import Integration
from torchwrap.core.tensors import data_of, held_bytes, is_placeholder, storage_key
from torchwrap.storage.limits import group_usage, is_limited, memory_available
from torchwrap.stream.settings import Streaming, load_compiler
from torchwrap.weights.training import Training
from torchwrap.weights.trial import Trial

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["RESERVE_TOKENS", "Budget", "check_room", "count_libraries", "optimizer_rows", "process_bytes", "weight_budget", "working_bytes"]

RESERVE_TOKENS = 256
"""Tokens per call that the default reserve provides for (chosen: a chat prompt and its answer; longer inputs set `reserve`)."""

_MARGIN = 24 << 20
"""Bytes left to the allocator, threads and compiled kernels that appear during the first passes (chosen; a
first forward of a process was measured at 14 MiB)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of weights that may be present on the execution device, and on the host if that is separate.

    Attributes:
        asked: the settings that bound `device`, by name.
        left: what the machine leaves for the device's weights after `reserve`; negative if it does not even leave that.
        otherwise: another way to a smaller `reserve`, if there is one.
    """

    device: int
    host: int
    reserve: int
    asked: Mapping[str, int] = field(default_factory=dict)
    left: int = 1 << 62
    otherwise: str = ""

    def remedy(self, needed: int) -> str:
        """What to change for `needed` bytes on the device: every setting that is in the way, and no other."""
        return (self.otherwise if needed > self.left else "") + self._changes(needed)

    def _changes(self, needed: int) -> str:
        raised = [name for name, size in self.asked.items() if size < needed]
        short = needed - self.left
        if short <= 0:
            return f"Set {' and '.join(f'{name}={needed}' for name in raised or ['device_memory'])} or more"
        steps = [f"{name}={needed} or more" for name in raised]
        # What is free changes by the second: advice with less than the margin to spare would be out of date at once.
        if short + _MARGIN <= self.reserve:
            steps.append(f"reserve={self.reserve - short - _MARGIN} or less")
            return f"Set {' and '.join(steps)}"
        return f"Set {' and '.join(steps)}, and free {format_bytes(short)} of memory" if steps else f"Free {format_bytes(short)} of memory"


def weight_budget(
    config: Streaming,
    model: nn.Module,
    integration: Integration,
    device: torch.device,
    scratch: int,
    training: Training | None = None,
    trial: Trial | None = None,
) -> Budget:
    """The budget for one model.

    Args:
        training: what steps of an optimizer take besides; None for inference.
        scratch: bytes of the largest parameter that a matrix product may keep a reordered copy of while everything else is present.
        trial: of calls like the example in the settings, if there is one.
    """
    total = sum(p.numel() * p.element_size() for p in model.parameters())

    def working(batch: int, tokens: int) -> int:
        return working_bytes(model, integration, batch=batch, tokens=tokens, scratch=scratch)

    on_host, otherwise = 0, ""
    if config.reserve is not None:
        reserve = int(config.reserve)
    elif training is not None:
        if trial is not None:
            reserve = scratch + trial.step_bytes(trial.example, training.choice)
        else:
            reserve = training.working(working, 1, RESERVE_TOKENS)
        on_host = training.beside(reserve, scratch) if device.type == "cpu" else training.optimizer
        otherwise = 'Pass activations="auto" or "recompute". Or: ' if training.kept else ""
    else:
        reserve = working(1, RESERVE_TOKENS) if trial is None else scratch + trial.forward_bytes(trial.example)
    available = memory_available()
    # Weights that are in private memory now will be streamed from disk instead, so their memory counts as free.
    left = total if available is None else available + min(_private_bytes(model), total) - on_host - reserve - _MARGIN
    if device.type == "cpu":
        asked = _asked(device_memory=config.device_memory, host_memory=config.host_memory)
        return Budget(max(0, min([*asked.values(), left])), 0, reserve, asked, left, otherwise)
    free, _ = torch.cuda.mem_get_info(device)
    held = sum(held_bytes(data_of(p)) for p in model.parameters() if p.device.type == device.type)
    device_left = int(0.95 * free) + held - reserve
    asked = _asked(device_memory=config.device_memory)
    host = min(int(config.host_memory), left) if config.host_memory is not None else left
    return Budget(max(0, min([*asked.values(), device_left])), max(0, host), reserve, asked, device_left, otherwise)


def _asked(**sizes: int | str | None) -> dict[str, int]:
    return {name: int(size) for name, size in sizes.items() if size is not None}


def working_bytes(model: nn.Module, integration: Integration, *, batch: int, tokens: int, scratch: int) -> int:
    """Memory a forward pass takes besides the weights: activations, caches, and the reordered copy of one weight."""
    estimate = integration.activation_bytes(model, batch=batch, tokens=tokens)
    if estimate is None:
        estimate = (16 << 20) + batch * tokens * 4096 * 16  # an unknown model: sixteen activations of width 1024 in float32 at a time
    # Matrix products with more than one row, or with a row cut out of a larger tensor (the last token of a prompt), keep a reordered
    # copy of their weight while they run (measured: torch 2.13, bfloat16, 125 MiB for a head of 125 MiB; none for one fresh row).
    return estimate + (scratch if batch * tokens > 1 else 0)


def process_bytes() -> int:
    """Memory in use by this process as limits count it: that of its control group without file cache, else its resident set.

    The former leaves out libraries that others loaded first. Where it is more than the latter, others are in the group too.
    """
    resident, group = _status("VmRSS"), group_usage() if is_limited() else None
    return resident if group is None else min(resident, group)


def count_libraries(handle: WeightsHandle | None) -> None:
    """Load what torch's first optimizer will, and count it as there before training."""
    if handle is not None and "torch._dynamo" not in sys.modules:
        before = process_bytes()
        load_compiler()
        handle.baseline_bytes += max(0, process_bytes() - before)


def _private_bytes(model: nn.Module) -> int:
    """Bytes of weights in memory of this process's own; weights mapped from a file cost none."""
    storages = {}
    for parameter in model.parameters():
        data = data_of(parameter)
        if data.device.type == "cpu" and not is_placeholder(data):
            storages[storage_key(data)] = held_bytes(data)
    return min(sum(storages.values()), _status("RssAnon"))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


_UNWRAP = "Free memory, or save the model with save_pretrained() or torch.save(model.state_dict(), file), which needs no more."


def check_room(needed: int, available: int | None, what: str, fix: str = _UNWRAP) -> None:
    """Raise `BudgetError` when `needed` bytes of host memory are not there."""
    if available is not None and needed > available:
        raise errors.BudgetError(
            f"torchwrap: {what} needs {format_bytes(needed)} of memory, and {format_bytes(available)} are left",
            needed=needed,
            available=available,
            fix=fix,
        )


def optimizer_rows(handle: WeightsHandle) -> list[tuple[str, int]]:
    """What the model's open `OffloadedOptimizer` takes and moves, as (label, bytes) for `explain`; empty if there is none."""
    optimizer = handle.optimizer() if handle.driven else None
    if optimizer is None:
        return []
    needs = optimizer.footprint()
    return [
        ("optimizer: chunks under way", needs.ring),
        ("gradients at once", needs.gradients),
        ("freed and used again", needs.kept),
        ("optimizer reads per step", needs.read),
        ("optimizer writes per step", needs.written),
    ]

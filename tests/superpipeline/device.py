"""A model on the simulated device, whose blocks take virtual time to compute and whose link is throttled."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.stream.fake_arena import FakeArena, Machine, stand_in
from tests.stream.simulated_cuda import WatchedCuda, simulate
from torchwrap.core.tensors import data_of, is_placeholder
from torchwrap.superpipeline import technique
from torchwrap.superpipeline.handle import SuperpipelineHandle

__all__ = [
    "BLOCK_BYTES",
    "WIDTH",
    "Blocks",
    "SlotCount",
    "counted_slots",
    "handle_of",
    "on_device",
    "pass_seconds",
    "separate",
    "step_seconds",
    "weights_present",
]

WIDTH = 64
BLOCK_BYTES = WIDTH * WIDTH * 4


class _Block(nn.Module):
    def __init__(self, machine: Machine, seconds: float, width: int, backward_s: float) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)
        self.machine, self.seconds, self.backward_s = machine, seconds, backward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.machine.work(self.machine.compute, self.seconds)
        mapped = self.map(x)
        if mapped.requires_grad:  # called between the engine's hook on the output and the gradient of the weight
            mapped.register_hook(lambda _: self.machine.work(self.machine.compute, self.backward_s))
        return torch.tanh(mapped)


class Blocks(nn.Module):
    """Equal blocks and a head; a block takes `compute_s`, bringing one in `transfer_s`, the head `rest_s` virtual seconds.

    The backward of a block takes `backward_s`, that of the head `2 * rest_s`.
    """

    def __init__(
        self, machine: Machine, depth: int, compute_s: float, rest_s: float = 0.0, width: int = WIDTH, backward_s: float = 0.0
    ) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(_Block(machine, compute_s, width, backward_s) for _ in range(depth))
        self.head = _Block(machine, rest_s, width, 2 * rest_s)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def on_device(
    patch: pytest.MonkeyPatch,
    *,
    depth: int,
    compute_s: float,
    transfer_s: float,
    rest_s: float = 0.0,
    order: Any = "late",
    width: int = WIDTH,
    backward_s: float = 0.0,
    training: bool = False,
    **fields: Any,
) -> tuple[Blocks, SuperpipelineHandle, Machine]:
    """The model under `superpipeline` with its blocks in host memory; the handle's clock is the simulated one."""
    machine = Machine(order, bandwidth=4 * width * width / transfer_s)
    separate(patch, machine)
    torch.manual_seed(1)
    model = Blocks(machine, depth, compute_s, rest_s, width, backward_s).train(training)
    tw.superpipeline(model, **fields)
    handle: SuperpipelineHandle = tw.handle_of(model, "superpipeline")
    if handle.meter is not None:
        handle.meter.settle = lambda: [machine.synchronize(machine.record(queue)) for queue in machine._queues]
        handle.meter.clock = lambda: machine._host_time
    return model, handle, machine


def separate(patch: pytest.MonkeyPatch, machine: Machine, make: Any = FakeArena) -> None:
    """Let `superpipeline` compute on this simulated device."""
    if issubclass(make, WatchedCuda):
        simulate(patch, machine)
    arenas = stand_in(patch, machine, make)

    def arena_for(_: torch.device) -> Any:
        arenas.append(make(machine))
        return arenas[-1]

    patch.setattr(technique, "arena_for", arena_for)
    plain = technique.weight_budget
    patch.setattr(technique, "weight_budget", lambda *args: dataclasses.replace(plain(*args), host=1 << 40))


@dataclasses.dataclass(slots=True)
class SlotCount:
    """Bytes of slots that exist, now and at most, where the model computes."""

    live: int = 0
    peak: int = 0


def counted_slots(patch: pytest.MonkeyPatch, arena: Any) -> SlotCount:
    """Count what arenas of this class make and give back."""
    count, make_slot, free_slot = SlotCount(), arena.make_slot, arena.free_slot

    def make(self: Any, index: int, nbytes: int) -> Any:
        slot = make_slot(self, index, nbytes)
        count.live += slot.device.numel()
        count.peak = max(count.peak, count.live)
        return slot

    def free(self: Any, slot: Any) -> None:
        count.live -= slot.device.numel()
        free_slot(self, slot)

    patch.setattr(arena, "make_slot", make)
    patch.setattr(arena, "free_slot", free)
    return count


def pass_seconds(model: Blocks, machine: Machine, passes: int) -> float:
    """Virtual seconds of a pass, over several, after as many others."""
    x = torch.ones(1, model.width)
    ends = []
    with torch.no_grad():
        for _ in range(2):
            for _ in range(passes):
                model(x)
            ends.append(machine.compute.time)
    return (ends[1] - ends[0]) / passes


def step_seconds(model: Blocks, machine: Machine, steps: int) -> float:
    """Virtual seconds of a forward with its backward, over several, after as many others."""
    ends = []
    for _ in range(2):
        for _ in range(steps):
            model(torch.ones(1, model.width)).square().mean().backward()
        ends.append(machine.compute.time)
    return (ends[1] - ends[0]) / steps


def weights_present(model: nn.Module) -> int:
    """Bytes of memory under what parameters and buffers show between passes, and of the slots, each counted once."""
    handle = tw.handle_of(model, "superpipeline")
    shown = [data_of(p) for p in model.parameters() if not is_placeholder(data_of(p))] + list(model.buffers())
    slots = handle.engine._slots if handle.engine is not None else []
    shown += [slot.device for slot in slots]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in shown}.values())


def handle_of(model: nn.Module) -> SuperpipelineHandle:
    """The model's handle."""
    handle: SuperpipelineHandle = tw.handle_of(model, "superpipeline")
    return handle

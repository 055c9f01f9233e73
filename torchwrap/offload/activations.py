"""What a block's backward needs besides weights: kept, computed again, or moved out and back.

One layer around each block, outside of everything else on it, decides for each call. Recomputing is `torch.utils.checkpoint` around the
block. Swapping is a pair of saved-tensor hooks (swap.py); the hooks that replace weights lie inside of it and pass on what is no weight.
With "auto" the first step is recomputed and measured, and choose.py then decides block by block.

Whoever takes care of a block's activations already goes on doing so: saved-tensor hooks or checkpointing around the block, and a model's
own checkpointing, which is not doubled. Swapping then moves what that keeps, the inputs of the blocks.
"""

from __future__ import annotations

import enum
import numbers
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchwrap.core import errors
from torchwrap.core.config import format_bytes
from torchwrap.core.tensors import data_of
from torchwrap.offload.budget import RESERVE_TOKENS
from torchwrap.offload.choose import Choice, Cost, choose, idle_bytes
from torchwrap.offload.config import Offload
from torchwrap.offload.layers import OffloadLayer
from torchwrap.offload.saved import Kept
from torchwrap.offload.swap import Swap, Use
from torchwrap.offload.tiers import DiskTier, HostTier, Tier
from torchwrap.storage.heap import keep_heap_small
from torchwrap.storage.limits import memory_available
from torchwrap.stream.arena import arena_for
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Unit

if TYPE_CHECKING:
    from torchwrap.offload.handle import OffloadHandle

__all__ = ["ActivationLayer", "Activations", "RecomputeLayer", "check_tier"]

_PROBE = 8 << 20  # bytes; chosen: a few hundredths of a second
_SHARE = 0.7  # chosen: gradients, what is outside of blocks, and temporaries need memory too
_MOST = 4096  # chosen: calls of blocks in a pass


def check_tier(config: Offload, device: torch.device) -> None:
    """Raise `ConfigError` if activations are to be moved to the memory they are in."""
    if config.activations == "host" and device.type == "cpu":
        raise errors.ConfigError(
            f'offload: activations="host", but the model computes on {device}, which is that very memory',
            where="activations",
            fix='Use activations="disk" or "recompute".',
        )


class Activations:
    """The activations of one model's blocks.

    Args:
        config: which mode; time-out, path and memory.
        units: of the model.
        device: where it computes.
        timeline: where writes, reads and stalls are recorded, if anywhere.
        plan: of the weights; "auto" gives activations what it leaves of the budget and of the disk's time.
        working: bytes of activations by batch and tokens: what `reserve` is estimated with.

    Attributes:
        choices: with "auto", the mode of each block by unit index; empty until the first step was measured.
        allowed: the bytes they were chosen for.
    """

    def __init__(
        self,
        config: Offload,
        units: list[Unit],
        device: torch.device,
        timeline: Timeline | None,
        plan: ResidencyPlan,
        working: Callable[[int, int], int],
    ) -> None:
        self.config, self.units, self.device, self.plan, self.working = config, units, device, plan, working
        self.choices: dict[int, Choice] = {}
        self.allowed = 0
        self.timeline = timeline or (Timeline() if config.record and config.activations not in ("keep", "recompute") else None)
        self._swap: Swap | None = None
        self._costs: list[_Measured] | None = [] if config.activations == "auto" else None
        self._warned = False
        self._pid = os.getpid()
        if config.activations != "keep" and device.type == "cpu":
            keep_heap_small()

    @property
    def swap(self) -> Swap:
        """What is moved out; made when first needed."""
        if self._swap is None:
            self._swap = Swap(self._tier, self.device, self.config.io_timeout_s, self.timeline)
        return self._swap

    def _tier(self) -> Tier:
        on_host = self.config.activations == "host" or (self.config.activations == "auto" and self.device.type != "cpu")
        return HostTier(arena_for(self.device), _check_host) if on_host else DiskTier(self.config, self.device)

    def pass_begins(self) -> None:
        """A forward through the whole model begins."""
        if self._swap is not None:
            self._swap.pass_begins()
        if self._costs is not None:
            if any(cost.again for cost in self._costs):
                self._choose(self._costs)
                self._costs = None
            else:
                self._costs = []

    def mode(self, unit: int) -> Choice:
        """What becomes of a block's activations."""
        wanted = self.config.activations
        if wanted == "auto":
            return self.choices.get(unit, "recompute")
        return "swap" if wanted in ("host", "disk") else "recompute" if wanted == "recompute" else "keep"

    def enter(self, unit: int, module: nn.Module) -> _Swapping | _Recomputing | None:
        """Take over a call of a block; None leaves it alone."""
        mode = self.mode(unit)
        # Hooks outside belong to somebody who takes care of this block, or to the block around it; in a backward it is being recomputed
        # and what it saves is needed at once; a forked child has no writing thread.
        elsewhere = not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1 or os.getpid() != self._pid
        if mode == "keep" or elsewhere or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        if mode == "swap":
            return _Swapping(self.swap, self.units[unit])
        # transformers 5.23: the flag of GradientCheckpointingLayer; see test_a_model_that_checkpoints_itself_is_not_checkpointed_twice
        if getattr(module, "gradient_checkpointing", False) and module.training:
            return None
        return _Recomputing(self, unit)

    def warn_of(self, foreign: object, unit: int) -> None:
        """Say once that a block was handed something that it would change twice."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"offload: {self.units[unit].name} was given a {type(foreign).__name__}, which computing it again would write to again, so "
                "its activations are kept. If that is a cache of keys and values, pass use_cache=False while training.",
                errors.TorchwrapWarning,
                stacklevel=2,
            )

    # -- "auto" --------------------------------------------------------------------------------------------------------------------

    def measured(self, unit: int) -> _Measured | None:
        """Where to write down what a call costs, in the first step."""
        if self._costs is None or len(self._costs) == _MOST:  # blocks called by themselves: no pass ever ends
            return None
        self._costs.append(_Measured(unit, self.device, {_storage(piece.parameter) for piece in self.units[unit].pieces}))
        return self._costs[-1]

    def _choose(self, measured: list[_Measured]) -> None:
        uses = [Cost(each.unit, each.found.nbytes, each.input_bytes, each.seconds) for each in measured]
        write, read = self.swap.bandwidth(_PROBE)
        streamed = self.plan.streamed_bytes
        swappable = idle_bytes(sum(use.seconds for use in uses), streamed, read=read, write=write)
        self.allowed = self._allowed()
        self.choices = choose(uses, allowed=self.allowed, swappable=swappable)

    def _allowed(self) -> int:
        """Bytes of activations that may be present at once, asked for while none are."""
        config = self.config
        if config.activation_memory is None and config.device_memory is None and config.reserve is None:
            free = memory_available() if self.device.type == "cpu" else torch.cuda.mem_get_info(self.device)[0]
            if free is not None:
                return int(free * _SHARE)
        if config.activation_memory is not None:
            return int(config.activation_memory)
        reserve = int(config.reserve) if config.reserve is not None else self.working(1, RESERVE_TOKENS)
        return reserve + max(0, self.plan.budget - self.plan.held_bytes)

    # -- figures and end -----------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Counters by name, bytes and seconds."""
        if self.config.activations in ("keep", "recompute"):
            return {}
        counters = self._swap.counters if self._swap is not None else dict.fromkeys(("saved", "written", "read", "forwarded"), 0)
        found = {f"activation_bytes_{name}": int(counters[name]) for name in ("saved", "written", "read", "forwarded")}
        return {**found, "activation_stalls": int(counters.get("stalls", 0)), "activation_stall_s": float(counters.get("stall_s", 0.0))}

    def explain(self) -> list[str]:
        """Lines for the table of the handle."""
        wanted = self.config.activations
        if wanted == "keep":
            return []
        if wanted != "auto":
            return [f"activations of each block: {wanted}"]
        if not self.choices:
            return ["activations: recomputed until a step was measured"]
        counts = {mode: list(self.choices.values()).count(mode) for mode in ("keep", "swap", "recompute")}
        kept = f"{counts['keep']} kept, {counts['swap']} swapped, {counts['recompute']} recomputed"
        return [f"activations of blocks: {kept}, in {format_bytes(self.allowed)}"]

    def close(self) -> None:
        """Remove what was stored. Idempotent."""
        if self._swap is not None:
            self._swap.close()


class ActivationLayer(OffloadLayer):
    """Swaps what a block saves, if its mode says so."""

    where: Literal["inside", "outside"] = "outside"

    def __init__(self, handle: OffloadHandle | None, unit: int) -> None:
        super().__init__(handle)
        self.unit = unit

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._calls.push(self.handle.activations.enter(self.unit, module))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._leave()
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        call = self._calls.pop()
        if isinstance(call, _Swapping):
            call.__exit__()


class RecomputeLayer(ActivationLayer):
    """Recomputes or swaps. A layer of its own, because what it stands in for is hidden from `torch.compile`."""

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block now and again in the backward, if its mode says so."""
        running = self._calls.peek()
        return running.run(call, args, kwargs) if isinstance(running, _Recomputing) else call(*args, **kwargs)


class _Swapping(torch.autograd.graph.saved_tensors_hooks):
    """One call of a block whose activations move."""

    def __init__(self, swap: Swap, unit: Unit) -> None:
        weights = {_storage(piece.parameter) for piece in unit.pieces if piece.resident}
        super().__init__(_Pack(swap, swap.begin(unit.name), weights), _unpack)
        self.__enter__()


class _Pack:
    """Called by autograd with every tensor it saves, weights in slots excepted."""

    __slots__ = ("_swap", "_use", "_weights")

    def __init__(self, swap: Swap, use: Use, weights: set[int]) -> None:
        self._swap, self._use, self._weights = swap, use, weights

    def __call__(self, tensor: torch.Tensor) -> Any:
        if (tensor.is_leaf and tensor.requires_grad) or tensor.untyped_storage().data_ptr() in self._weights:
            return Kept(tensor)
        return self._swap.pack(self._use, tensor)


class _Recomputing:
    """One call of a block that will be called again in the backward."""

    def __init__(self, activations: Activations, unit: int) -> None:
        self._activations, self._unit = activations, unit

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        foreign = next(_changeable((args, kwargs)), None)
        if foreign is not None:
            self._activations.warn_of(foreign, self._unit)
            return call(*args, **kwargs)
        measured = self._activations.measured(self._unit)
        if measured is not None:
            measured.input_bytes = sum({_storage(x): x.untyped_storage().nbytes() for x in args if isinstance(x, torch.Tensor)}.values())
            call = partial(measured.run, call)
        return checkpoint(partial(call, **kwargs), *args, use_reentrant=False)


class _Measured:
    """What one use of a block in the first step takes.

    Attributes:
        found: bytes of what autograd wanted to save, each piece of memory once.
        seconds: of the faster one of forward and recomputation; the first forward also warms up.
        again: it was recomputed.
    """

    def __init__(self, unit: int, device: torch.device, weights: set[int]) -> None:
        self.unit, self._device, self._weights = unit, device, weights
        self.found = _Counter()
        self.input_bytes = 0
        self.seconds = float("inf")
        self.again = False
        self._begun = False

    def run(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.again, self._begun = self._begun, True
        began = self._now()
        try:
            with torch.autograd.graph.saved_tensors_hooks(_Counting(_Counter() if self.again else self.found, self._weights), _passed):
                return call(*args, **kwargs)
        finally:  # a recomputation is ended by an exception when everything needed is there
            self.seconds = min(self.seconds, self._now() - began)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()


class _Counter:
    """Bytes of distinct storages. Their addresses do not tell, because what is recomputed is freed at once and its memory used again."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        seen = self._seen.get(storage._cdata)
        if seen is None or seen() is not storage:
            self._seen[storage._cdata] = weakref.ref(storage)
            self.nbytes += storage.nbytes()


class _Counting:
    """Counts what is saved and passes it on to the hooks outside."""

    def __init__(self, found: _Counter, weights: set[int]) -> None:
        self._found, self._weights = found, weights
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __call__(self, tensor: torch.Tensor) -> tuple[Callable[[Any], torch.Tensor] | None, Any]:
        if _storage(tensor) not in self._weights:
            self._found.add(tensor.untyped_storage())
        return (self._outer[1], self._outer[0](tensor)) if self._outer is not None else (None, Kept(tensor))


def _passed(packed: tuple[Callable[[Any], torch.Tensor] | None, Any]) -> torch.Tensor:
    unpack, inner = packed
    tensor: torch.Tensor = unpack(inner) if unpack is not None else inner.restore()
    return tensor


def _unpack(packed: Any) -> torch.Tensor:
    tensor: torch.Tensor = packed.restore()
    return tensor


def _storage(tensor: torch.Tensor) -> int:
    return int(data_of(tensor).untyped_storage().data_ptr())


_PLAIN = (torch.Tensor, numbers.Number, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, numpy.ndarray, type, range, slice)


def _changeable(value: object) -> Iterator[object]:
    """Objects among a call's arguments that it may change in a way that a second call would see."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _changeable(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _changeable(item)
    elif not isinstance(value, _PLAIN) and not callable(value):
        yield value


def _check_host(nbytes: int) -> None:
    available = memory_available()
    if available is not None and nbytes > available:
        raise errors.BudgetError(
            f"offload: activations need {format_bytes(nbytes)} more of host memory, and {format_bytes(available)} are left",
            needed=nbytes,
            available=available,
            where="activations",
            fix='Use activations="disk" or "recompute".',
        )

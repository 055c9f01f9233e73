"""What a block's backward needs besides weights: kept, computed again, or moved out and back.

One layer around each block, outside of everything else on it, decides for each call. Recomputing is `torch.utils.checkpoint` around the
block. Swapping is a pair of saved-tensor hooks (swap.py); the hooks that replace weights lie inside of it and pass on what is no weight.
With "auto" the first step is recomputed and measured, and choose.py then decides block by block.

Whoever takes care of a block's activations already goes on doing so: saved-tensor hooks or checkpointing around the block, and a model's
own checkpointing, which is not doubled. Swapping then moves what that keeps, the inputs of the blocks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from torchwrap.activations.buffers import Buffers
from torchwrap.activations.calls import Recomputing, Swapping
from torchwrap.activations.choose import Choice, Cost, choose, idle_bytes, peak_bytes
from torchwrap.activations.expected import choice_for, expected_costs, over_recomputed, recomputes_itself
from torchwrap.activations.measured import Measured, storage_address
from torchwrap.activations.swap import Swap
from torchwrap.activations.tiers import DiskTier, HostTier, Tier
from torchwrap.core import errors
from torchwrap.core.config import format_bytes
from torchwrap.storage.heap import keep_heap_small
from torchwrap.storage.limits import memory_available
from torchwrap.stream.arena import arena_for
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.settings import Streaming
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Unit

__all__ = ["Activations", "StepToCome", "check_tier"]

_PROBE = 8 << 20  # bytes; chosen: a few hundredths of a second
_SHARE = 0.7  # chosen: gradients, what is outside of blocks, and temporaries need memory too
_MOST = 4096  # chosen: calls of blocks in a pass


def check_tier(config: Streaming, device: torch.device) -> None:
    """Raise `ConfigError` if activations are to be moved to the memory they are in."""
    if config.activations == "host" and device.type == "cpu":
        raise errors.ConfigError(
            f'{config.technique}: activations="host", but the model computes on {device}, which is that very memory',
            where="activations",
            fix='Use activations="disk" or "recompute".',
        )


class StepToCome(Protocol):
    """What a training step takes and moves besides activations; nothing where no optimizer streams its state."""

    @property
    def driver(self) -> object:
        """Stands for the optimizer; another object for another one, None for none."""
        ...

    def needed(self, batch: int, tokens: int) -> int:
        """Bytes that are not taken yet when a step begins and will be, if blocks are recomputed; by sequences and tokens of each."""
        ...

    def moved(self) -> tuple[int, int]:
        """Bytes that the optimizer reads and writes while a backward runs."""
        ...


class Activations:
    """The activations of one model's blocks.

    Args:
        config: which mode; time-out, path and memory.
        units: of the model.
        device: where it computes.
        timeline: where writes, reads and stalls are recorded, if anywhere.
        plan: of the weights; "auto" gives activations what it leaves of the budget and of the disk's time.
        reserve: bytes of activations that `reserve` is estimated to be.
        step: what a step takes and moves besides.

    Attributes:
        choices: with "auto", the mode of each block by unit index; empty until the first step was measured.
        allowed: the bytes they were chosen for.
    """

    def __init__(
        self,
        config: Streaming,
        units: list[Unit],
        device: torch.device,
        timeline: Timeline | None,
        plan: ResidencyPlan,
        reserve: Callable[[], int],
        step: StepToCome,
    ) -> None:
        self.config: Streaming = config
        self.units: list[Unit] = units
        self.device: torch.device = device
        self.plan: ResidencyPlan = plan
        self._reserve, self._step = reserve, step
        self._driver: object = None  # of the step that was chosen for
        self.choices: dict[int, Choice] = {}
        self.buffers: Buffers = Buffers()
        self.allowed: int = 0
        self._timeline = timeline
        self._swap: Swap | None = None
        self._costs: list[Measured] | None = [] if config.activations == "auto" else None
        self._uses: list[Cost] = []  # what was measured
        self._inputs = (0, 0)  # sequences and tokens that it was measured with
        self._rates: tuple[float, float] | None = None  # bytes per second written and read
        self._outdated = False
        self._warned = False
        self._pid = os.getpid()
        if config.activations != "keep" and device.type == "cpu":
            keep_heap_small()

    @property
    def swap(self) -> Swap:
        """What is moved out; made when first needed."""
        if self._swap is None:
            self._swap = Swap(self._tier, self.device, self.config.io_timeout_s, self._timeline)
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
                self._uses = [Cost(each.unit, each.found.nbytes, each.input_bytes, each.seconds, each.rows) for each in self._costs]
                batch, rows = max((each.batch, each.rows) for each in self._costs)
                self._inputs = (batch, rows // max(1, batch))
                self._costs, self._outdated = None, True
            else:
                self._costs = []
        if self._outdated or (self._uses and self._driver is not self._step.driver):
            self._choose()

    def replan(self, plan: ResidencyPlan) -> None:
        """Weights take another share of the budget from now on; "auto" chooses again when the next pass begins."""
        self.plan, self._outdated = plan, bool(self._uses)

    def mode(self, unit: int) -> Choice:
        """What becomes of a block's activations."""
        wanted = self.config.activations
        return self.choices[unit] if unit in self.choices else choice_for(self.units[unit], wanted)

    def over_recomputed(self, rows: int, gradients: Mapping[int, int]) -> int:
        """Bytes that a step takes more than one whose blocks are all computed again: of what was measured, else as expected.

        Args:
            rows: tokens of all sequences together.
            gradients: see `expected.over_recomputed`.
        """
        uses = [use.at(rows) for use in self._uses] or expected_costs(self.units, rows)
        return over_recomputed(uses, {use.unit: self.mode(use.unit) for use in uses}, gradients)

    def swapped(self, rows: int) -> int:
        """Bytes that leave in a forward and come back in its backward: as measured, else as expected. `rows`: as above."""
        uses = [use.at(rows) for use in self._uses] or expected_costs(self.units, rows)
        return sum(use.nbytes for use in uses if self.mode(use.unit) == "swap")

    def enter(self, unit: int, module: nn.Module) -> Swapping | Recomputing | None:
        """Take over a call of a block; None leaves it alone."""
        mode = self.mode(unit)
        # Hooks outside belong to somebody who takes care of this block, or to the block around it; in a backward it is being recomputed
        # and what it saves is needed at once; a forked child has no writing thread.
        elsewhere = not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1 or os.getpid() != self._pid
        if mode == "keep" or elsewhere or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        if mode == "swap":
            return Swapping(self.swap, self.units[unit])
        if recomputes_itself([module]) and module.training:
            return None
        return Recomputing(self, unit, module)

    def warn_of(self, foreign: object, unit: int) -> None:
        """Say once that a block was handed something that it would change twice."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"torchwrap: {self.units[unit].name} was given a {type(foreign).__name__}, which computing it again would write to again, "
                "so its activations are kept. If that is a cache of keys and values, pass use_cache=False while training.",
                errors.TorchwrapWarning,
                stacklevel=2,
            )

    # -- "auto" --------------------------------------------------------------------------------------------------------------------

    def measured(self, unit: int) -> Measured | None:
        """Where to write down what a call costs, in the first step."""
        if self._costs is None or len(self._costs) == _MOST:  # blocks called by themselves: no pass ever ends
            return None
        self._costs.append(Measured(unit, self.device, {storage_address(piece.parameter) for piece in self.units[unit].pieces}))
        return self._costs[-1]

    def _choose(self) -> None:
        self._rates = self._rates or self.swap.bandwidth(_PROBE)
        write, read = self._rates
        self._driver = self._step.driver
        compute_s = sum(use.seconds for use in self._uses)
        # Beside a separate device activations go to host memory, and an optimizer's state by another way.
        update_read, update_written = self._step.moved() if self.device.type == "cpu" else (0, 0)
        swappable = idle_bytes(
            compute_s, self.plan.streamed_bytes, read=read, write=write, update_read=update_read, update_written=update_written
        )
        self.allowed = self._allowed()
        self.choices = choose(self._uses, allowed=self.allowed, swappable=swappable)
        self._outdated = False

    def _allowed(self) -> int:
        """Bytes of activations that may be present at once, asked for while none are."""
        config = self.config
        if config.activation_memory is None and config.device_memory is None and config.reserve is None:
            free = memory_available() if self.device.type == "cpu" else torch.cuda.mem_get_info(self.device)[0]
            if free is not None:
                least = peak_bytes(self._uses, {use.unit: "recompute" for use in self._uses})
                return min(int(free * _SHARE), free - self._step.needed(*self._inputs) + least)
        if config.activation_memory is not None:
            return int(config.activation_memory)
        reserve = int(config.reserve) if config.reserve is not None else self._reserve()
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


def _check_host(nbytes: int) -> None:
    available = memory_available()
    if available is not None and nbytes > available:
        raise errors.BudgetError(
            f"torchwrap: activations need {format_bytes(nbytes)} more of host memory, and {format_bytes(available)} are left",
            needed=nbytes,
            available=available,
            where="activations",
            fix='Use activations="disk" or "recompute".',
        )

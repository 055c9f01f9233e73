"""Watching gradients become complete, and taking them out of the way.

A gradient is complete when autograd has accumulated it, and may be used once nothing of this backward needs the old weight any more: when
its unit is done. It is then handed to the worker at once (*taken*), or put on the disk until the step (*parked*: clipping and several
backwards per step need all of them first), or left where it is. What is taken or parked leaves a stand-in behind (see standin.py), so that
code which expects gradients to wait for `step()` fails loudly; clipping by total norm works on what is parked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchwrap.core import errors
from torchwrap.offload.chunks import Parked, Update
from torchwrap.offload.elementwise import settings_of
from torchwrap.offload.targets import Target
from torchwrap.offload.updates import Job, Updater
from torchwrap.storage.spill import SpillStore
from torchwrap.stream.units import Unit

if TYPE_CHECKING:
    from torchwrap.offload.handle import OffloadHandle

__all__ = ["Gradients", "Timing"]


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


class Gradients:
    """Hooks on the parameters of one optimizer, and the gradients it has in its care between two steps.

    Args:
        groups: the optimizer's parameter groups, as they are when asked.
        handle: of the offloaded model, if it is one.

    Attributes:
        timing: may be replaced between two steps.
        norms: of parked gradients.
        settings: of all groups when the first gradient was taken, `None` before.
    """

    def __init__(
        self, groups: Callable[[], Sequence[Mapping[str, Any]]], handle: OffloadHandle | None, updater: Updater, timing: Timing
    ) -> None:
        self._groups, self._handle, self._updater = groups, handle, updater
        self.timing: Timing = timing
        self._hooks: dict[Target, list[Any]] = {}
        self._waiting: dict[int, list[Update]] = {}  # taken, by the unit that is not done yet
        self._units: dict[int, Unit] = {}
        self._parked: dict[Target, Parked] = {}
        self._used: set[Target] = set()  # taken since the last step
        self._store: SpillStore | None = None
        self._backwards = 0  # since the last step
        self._queued = False
        self._deferred = False
        self.norms: dict[Target, torch.Tensor] = {}
        self.settings: list[dict[str, Any]] | None = None
        if handle is not None:
            handle.backward.listeners.append(self)

    def watch(self, targets: Sequence[Target]) -> None:
        """Put hooks on the parameters that are trained and have none yet."""
        for target in targets:
            parameter = target.parameter
            if target not in self._hooks and parameter.requires_grad and parameter.numel() > 1:
                before = parameter.register_hook(functools.partial(self._before, target))
                after = parameter.register_post_accumulate_grad_hook(functools.partial(self._after, target))
                self._hooks[target] = [before, after]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Take nothing in this block: a closure may run several backwards."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    # -- called by autograd and by the model ------------------------------------------------------------------------------------------

    def unit_done(self, unit: Unit) -> None:
        """Hand over what was taken of this unit; wait if too much waits already."""
        updates = self._waiting.pop(unit.index, None)
        if updates:
            self._updater.submit(Job(unit, updates))
            self._updater.wait_for_room(self.timing.room)

    def backward_done(self, error: BaseException | None) -> None:
        """Hand over the rest, and wait, so that no forward sees some weights of before and some of after."""
        if error is not None:
            return  # what was taken waits for step() or rollback()
        self._backwards += 1
        for index in list(self._waiting):
            self._updater.submit(Job(self._units[index], self._waiting.pop(index)))
        self._updater.wait()

    def _before(self, target: Target, gradient: torch.Tensor) -> None:
        """Another gradient is about to be added to a parameter's."""
        if not target.is_taken():
            self.drop_cleared(target)
            if target in self._used and target.parameter.grad is None:
                raise errors.ConflictError(
                    f"OffloadedOptimizer: the gradient of {target.name} was cleared after an update had used it",
                    where=target.name,
                    fix="Call step() after backward, or pass overlap=False to be able to give gradients up.",
                )
            return
        standin = target.parameter.grad
        zeroed = standin is not None and not bool(standin.flatten()[0].isnan())  # zero_grad(set_to_none=False)
        if zeroed or target in self._parked:
            target.parameter.grad = None
            if zeroed:
                self.drop_cleared(target)
            return
        raise errors.ConflictError(
            f"OffloadedOptimizer: a backward would add to the gradient of {target.name}, which an update has used already",
            where=target.name,
            fix="Call optimizer.zero_grad() after each step; with several backwards per step, pass accumulate=N or overlap=False.",
        )

    def _after(self, target: Target, parameter: torch.Tensor) -> None:
        """A parameter's gradient of this backward is complete."""
        if parameter.grad is None:
            return
        if self._deferred:
            self._add_parked(target)
            return
        if parameter.grad.layout != torch.strided:
            raise errors.UnsupportedModelError(
                f"OffloadedOptimizer: the gradient of {target.name} is sparse",
                where=target.name,
                fix="Build the embedding with sparse=False.",
            )
        following = self._handle is not None and self._handle.backward.running
        if not following and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._over)
        last = self._backwards == self.timing.backwards - 1 and (following or self.timing.backwards == 1)
        if self.timing.take and last:
            self._take(target)
        elif self.timing.park and (not self.timing.take or not last):
            self._park(target)

    def _over(self) -> None:
        """The end of a backward that goes through no wrapped model."""
        self._queued = False
        self.backward_done(None)

    # -- taking and parking --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, target: Target) -> None:
        if self.settings is None:
            self.settings = [settings_of(group) for group in self._groups()]
        self._add_parked(target)
        self._used.add(target)
        known = torch.nn.utils.get_total_norm([target.parameter.grad]) if self.timing.norms else None  # type: ignore[list-item]
        gradient = target.take_gradient(known, parked=False).detach()
        update = Update(target, gradient, self.settings[target.group], torch.get_num_threads())
        if target.unit is None or not target.away:
            self._updater.submit(Job(None, [update]))
            self._updater.wait_for_room(self.timing.room)
        else:
            self._units[target.unit.index] = target.unit
            self._waiting.setdefault(target.unit.index, []).append(update)

    @torch.no_grad()
    def _park(self, target: Target) -> None:
        self._add_parked(target)
        gradient = target.parameter.grad
        assert gradient is not None
        # On the whole tensor and by the same call, because a sum of parts has other last bits.
        self.norms[target] = torch.nn.utils.get_total_norm([gradient.detach()])
        if self._store is None:
            self._store = SpillStore.create(self.timing.beside, needed=0)
        self._store.put(target.name, gradient.detach())
        self._parked[target] = Parked(self._store.file, target.name)
        target.take_gradient(self.norms[target], parked=True)

    @torch.no_grad()
    def _add_parked(self, target: Target) -> None:
        """Add what was parked in earlier backwards; a sum of two has the same bits either way round."""
        if self._parked.pop(target, None) is not None:
            self.norms.pop(target, None)
            assert self._store is not None and target.parameter.grad is not None
            target.parameter.grad.add_(self._store.get(target.name).to(target.parameter.grad.device))
            self._store.remove(target.name)

    # -- for the step ----------------------------------------------------------------------------------------------------------------------

    @property
    def began(self) -> bool:
        """Whether gradients were taken since the last step: parameters are new already."""
        return self.settings is not None

    def drop_cleared(self, target: Target) -> None:
        """Forget a parked gradient that was cleared through the parameter (`model.zero_grad()`)."""
        if target in self._parked and not target.is_taken() and target.parameter.grad is None:
            del self._parked[target]
            self.norms.pop(target, None)
            if self._store is not None:
                self._store.remove(target.name)

    def scaled(self) -> Target | None:
        """A target whose parked gradient was scaled by others than this optimizer."""
        return next((t for t in self._parked if t.standin is not None and t.standin.factor is not None), None)

    def is_parked(self, target: Target) -> bool:
        """Whether the gradient is on the disk."""
        return target in self._parked

    def collect(self, targets: Sequence[Target], scale: torch.Tensor | None) -> list[Update]:
        """What is left to do of a step: taken and not handed over, parked, and everything still in `param.grad`."""
        found = [update for updates in self._waiting.values() for update in updates]
        self._waiting.clear()
        settings, threads = [settings_of(group) for group in self._groups()], torch.get_num_threads()
        for target in targets:
            parked = self._parked.get(target)
            if parked is not None:
                factor = scale if scale is not None or target.standin is None else target.standin.factor
                found.append(Update(target, parked, settings[target.group], threads, factor))
            elif (gradient := target.gradient()) is not None:
                found.append(Update(target, gradient.detach(), settings[target.group], threads))
        return found

    def forget(self) -> None:
        """The step is over, or its gradients are given up."""
        for target in self._parked:
            if self._store is not None:
                self._store.remove(target.name)
        self._parked.clear()
        self._used.clear()
        self._waiting.clear()
        self.norms.clear()
        self.settings = None
        self._backwards = 0

    def close(self) -> None:
        """Take the hooks off, and the stand-ins: whoever trains the model next begins with no gradients."""
        for target, hooks in self._hooks.items():
            for hook in hooks:
                hook.remove()
            if target.is_taken():
                target.parameter.grad = None
        self._hooks.clear()
        if self._handle is not None and self in self._handle.backward.listeners:
            self._handle.backward.listeners.remove(self)
        if self._store is not None:
            self._store.close()

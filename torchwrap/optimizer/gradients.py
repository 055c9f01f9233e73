"""Watching gradients become complete, and taking them out of the way.

A gradient is complete when autograd has accumulated it. It is then handed to the worker (*taken*; handover.py says when the update may
begin), or put on the disk until the step (*parked*: clipping and several backwards per step need all of them first), or left where it is.
What is taken or parked leaves a stand-in behind (see standin.py), so that code which expects gradients to wait for `step()` fails loudly;
clipping by total norm works on what is parked.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from torchwrap.core import errors
from torchwrap.core.tensors import is_placeholder
from torchwrap.optimizer import refused
from torchwrap.optimizer.arguments import Timing
from torchwrap.optimizer.chunks import Parked, Update
from torchwrap.optimizer.elementwise import settings_of
from torchwrap.optimizer.handover import Handover
from torchwrap.optimizer.targets import Target
from torchwrap.optimizer.updates import Updater
from torchwrap.storage.spill import SpillStore
from torchwrap.stream.backward import Run, is_nested
from torchwrap.stream.units import Unit
from torchwrap.weights.stepping import refuse_calls, refuse_others

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["Gradients"]


class Gradients:
    """Hooks on the parameters of one optimizer, and the gradients it has in its care between two steps.

    Args:
        groups: the optimizer's parameter groups, as they are when asked.
        handle: of the offloaded model, if it is one.

    Attributes:
        timing: may be replaced between two steps.
        norms: of parked gradients.
        handover: of what is taken.
        adapt: called before the first gradient of a step is used, when the settings of the step are known.
        settings: of all groups when the first gradient was taken, `None` before.
    """

    def __init__(
        self, groups: Callable[[], Sequence[Mapping[str, Any]]], handle: WeightsHandle | None, updater: Updater, timing: Timing
    ) -> None:
        self._groups, self._handle, self._updater = groups, handle, updater
        self.timing: Timing = timing
        self.adapt: Callable[[], object] = lambda: None
        self.handover: Handover = Handover(updater, handle.engine if handle is not None else None)
        self._hooks: dict[Target, list[Any]] = {}
        self._parked: dict[Target, Parked] = {}
        self._used: set[Target] = set()  # taken since the last step
        self._given: list[Update] = []  # of the running backward
        self._versions: dict[Target, int] = {}  # of weights in memory that a backward has updated, as torch counts
        self._store: SpillStore | None = None
        self._backwards = 0  # since the last step
        self._run: Run | None = None
        self._arrived = False  # a gradient, in the running backward: `torch.autograd.grad` brings none
        self._taking = False  # the running backward has updated weights
        self._lifted: set[Target] = set()  # parked, and out of the way of another gradient
        self._mixed: str | None = None  # parameter whose gradient came in two parts, of which one was used
        self._deferred = False
        self.norms: dict[Target, torch.Tensor] = {}
        self.settings: list[dict[str, Any]] | None = None
        self._units: dict[int, list[int]] = {}  # that use a piece, by its index
        if handle is not None:
            handle.backward.listeners.append(self)
            for unit in handle.units:
                for piece in unit.pieces:
                    self._units.setdefault(piece.index, []).append(unit.index)

    def watch(self, targets: Sequence[Target], others: Sequence[Target]) -> None:
        """Put hooks on the parameters that are trained and have none yet; `others` are updated as a whole, and only guarded."""
        for target in (*targets, *others):
            parameter = target.parameter
            if target not in self._hooks and parameter.requires_grad and parameter.numel() > 1 and target.streamed:
                before = parameter.register_hook(functools.partial(self._before, target))
                after = parameter.register_post_accumulate_grad_hook(functools.partial(self._after, target))
                self._hooks[target] = [before, after]
            elif target not in self._hooks and parameter.requires_grad:
                self._hooks[target] = [parameter.register_hook(functools.partial(self._guard, target))]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Take nothing in this block: a closure may run several backwards."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    # -- called by autograd and by the model ------------------------------------------------------------------------------------------

    def backward_begun(self) -> None:
        """Refuse what needs weights that the backward before has replaced, before autograd does in its words."""
        if self._used and not self._taking and not is_nested():
            cleared = next((used for used in self._used if used.parameter.grad is None), None)
            raise refused.replaced(next(iter(self._used))) if cleared is None else refused.cleared(cleared)

    def unit_done(self, unit: Unit) -> None:
        """Hand over what was taken of this unit; wait if too much waits already."""
        self.handover.unit_done(unit.index)
        self._updater.wait_for_room(self.timing.room)

    def table_reached(self, nbytes: int) -> None:
        """Wait until the gradient of a table has room among those that wait."""
        if self.timing.take:
            self._updater.wait_for_room(max(0, self.timing.room - nbytes))
            self._updater.set_aside(nbytes)

    def backward_done(self, error: BaseException | None) -> None:
        """Hand over the rest, and wait. Until the step is over, some weights are those of before and some those of after."""
        self._taking = False
        self._updater.set_aside(0)
        for target in self._lifted:
            if target in self._parked and target.parameter.grad is None:
                target.parameter.grad = target.standin
        self._lifted.clear()
        arrived, self._arrived = self._arrived, False
        if error is not None:
            return  # what was taken waits for step() or rollback()
        self._backwards += arrived
        self.handover.backward_over()
        for update in self._given:
            if update.done and not update.target.away:
                self._versions[update.target] = update.target.parameter._version
        self._given.clear()

    def _before(self, target: Target, gradient: torch.Tensor) -> None:
        """Another gradient is about to be added to a parameter's."""
        self._follow()
        if not target.is_taken():
            self.drop_cleared(target)
            if target in self._used:
                self._mix(target)
                raise refused.cleared(target)
            return
        zeroed = target.is_zeroed()  # zero_grad(set_to_none=False)
        if (zeroed or target in self._parked) and target not in self._used:
            if not zeroed:
                self._check_shown(target)
            target.parameter.grad = None
            if zeroed:
                self.drop_cleared(target)
            else:
                self._lifted.add(target)
            return
        self._mix(target)
        raise refused.added(target)

    def _after(self, target: Target, parameter: torch.Tensor) -> None:
        """A parameter's gradient of this backward is complete."""
        if parameter.grad is None:
            return
        self._lifted.discard(target)
        inner = self._inner()
        self._arrived = self._arrived or not inner
        if self._deferred:
            self._add_parked(target)
            return
        if parameter.grad.layout != torch.strided:
            raise refused.sparse(target.name)
        following = self._handle is not None and self._handle.backward.running
        last = self._backwards == self.timing.backwards - 1 and (following or self.timing.backwards == 1)
        if self.timing.take and last and (inner or (following and self._comes_in_parts(target))):
            return  # stays where it is: the backward around this one, or another within it, may bring more of it
        if self.timing.take and last:
            self._take(target)
        elif self.timing.park and (not self.timing.take or not last):
            self._park(target)

    def _guard(self, target: Target, gradient: torch.Tensor) -> None:
        """Nothing is added to a gradient that is in memory while others of the same step are used up."""
        self._follow()
        if self._used and not self._taking:
            self._mix(target)
            cleared = next((used for used in self._used if used.parameter.grad is None), None)
            raise refused.added(target) if cleared is None else refused.cleared(cleared)

    def _mix(self, target: Target) -> None:
        # Otherwise this backward has changed nothing yet, and the step before can be finished.
        if self._taking or self._arrived or is_nested():
            self._mixed = target.name

    def _inner(self) -> bool:
        if self._handle is not None and self._handle.backward.running:
            return self._handle.backward.nested
        return self._run is not None and self._run.nested

    def _comes_in_parts(self, target: Target) -> bool:
        """Whether its weight is used several times, and reentrant checkpointing runs a backward for each."""
        assert self._handle is not None
        units = self._units.get(target.piece.index) if target.piece is not None else None
        return is_nested() if units is None else self._handle.backward.comes_in_parts(units)  # whose uses nobody counts

    def _follow(self) -> None:
        """Hear of the end of a backward that goes through no wrapped model."""
        following = self._handle is not None and self._handle.backward.running
        if not following and (self._run is None or self._run.over):
            self._taking = self._arrived = False
            self._run = Run.followed(self._ended)

    def _ended(self, run: Run) -> None:
        run.over = True  # also if what follows raises, and a traceback keeps autograd's callback alive
        self.backward_done(None)

    # -- taking and parking --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, target: Target) -> None:
        if self.settings is None:
            self.adapt()
            refuse_others((each.parameter for each in self._hooks), self._handle)  # before the first weight of the step is updated
            self.refuse_calls()
            self.settings = [settings_of(group) for group in self._groups()]
        self._add_parked(target)
        self._used.add(target)
        known = target.gradient_norm() if self.timing.norms else None
        gradient = target.take_gradient(known, parked=False).detach()
        self._updater.set_aside(0)
        self._taking = True
        update = Update(target, gradient, self.settings[target.group], torch.get_num_threads())
        self._given.append(update)
        self.handover.give(update, self.timing.room)
        del update
        del gradient  # it is not kept while others wait for room
        self._updater.wait_for_room(self.timing.room)

    @torch.no_grad()
    def _park(self, target: Target) -> None:
        self._add_parked(target)
        gradient = target.parameter.grad
        assert gradient is not None
        # On the whole tensor and by the same call, because a sum of parts has other last bits.
        self.norms[target] = torch.nn.utils.get_total_norm([gradient.detach()])
        self._store = self._store or SpillStore.create(self.timing.beside, needed=0)
        began = time.monotonic()
        self._store.put(target.name, gradient.detach())
        if self._handle is not None and self._handle.timeline is not None:
            self._handle.timeline.add("write", target.name, began, time.monotonic(), gradient.numel() * gradient.element_size())
        self._parked[target] = Parked(self._store.file, target.name)
        target.take_gradient(self.norms[target], parked=True)

    @torch.no_grad()
    def _add_parked(self, target: Target) -> None:
        """Add what was parked in earlier backwards, scaled if it was since; a sum of two has the same bits either way round."""
        if target in self._parked:
            assert self._store is not None and target.parameter.grad is not None
            before = self._store.get(target.name)
            if target.standin is not None and target.standin.factor is not None:
                before.mul_(target.standin.factor)
            target.parameter.grad.add_(before.to(target.parameter.grad.device))
            del self._parked[target]  # not before it is added: a step without it would go on in silence
            self.norms.pop(target, None)
            self._store.remove(target.name)

    # -- for the step ----------------------------------------------------------------------------------------------------------------------

    @property
    def began(self) -> bool:
        """Whether gradients were taken since the last step: parameters are new already."""
        return self.settings is not None

    def refuse_calls(self) -> None:
        """Have calls of the model refused: they would compute with a mixture."""
        if self._handle is not None:
            refuse_calls(self._handle, self)

    def allow_calls(self) -> None:
        """All weights are of one step again."""
        if self._handle is not None:
            self._handle.stepping.discard(self)

    def check_untouched(self) -> None:
        """Refuse a step for which gradients were changed that are not there.

        Raises:
            ConflictError: a stand-in was cleared, replaced or written to, or weights were updated with a part of a gradient, or written to
                when they had been updated.
        """
        if self._mixed is not None:
            raise errors.ConflictError(
                f"OffloadedOptimizer: the gradient of {self._mixed} came in several parts, and weights were updated with the first",
                where=self._mixed,
                fix="Call rollback(), or close() and load model and a new optimizer from a checkpoint. Then pass overlap=False.",
            )
        for target, version in self._versions.items():
            if target.parameter._version != version:
                raise errors.ConflictError(
                    f"OffloadedOptimizer: {target.name} was written to between backward and step, when the backward had updated it already",
                    where=target.name,
                    fix="Call rollback(), or close() and load model and a new optimizer from a checkpoint. Write to weights after step(), "
                    "or pass overlap=False.",
                )
        for target in (*self._used, *self._parked):
            if target in self._used or target.parameter.grad is not None:
                self._check_shown(target)

    def _check_shown(self, target: Target) -> None:
        shown = target.parameter.grad
        if shown is not None and target.is_taken() and is_placeholder(shown) and not target.is_zeroed():
            return
        if not self.began:
            raise errors.ConflictError(
                f"OffloadedOptimizer: the gradient of {target.name} was cleared or changed between backward and step, but is on the disk",
                where=target.name,
                fix="Call optimizer.zero_grad() to give up all gradients. Pass overlap=False, gradients='host' to change them.",
            )
        raise errors.ConflictError(
            f"OffloadedOptimizer: the gradient of {target.name} was cleared or changed between backward and step, but an update has used "
            "gradients of this step already, and that cannot be undone",
            where=target.name,
            fix="Call rollback(), or close() and load model and a new optimizer from a checkpoint. Pass overlap=False, gradients='host' to "
            "change gradients or to give them up after backward.",
        )

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

    def collect(self, targets: Sequence[Target], scale: torch.Tensor | None, scaling: Mapping[str, torch.Tensor]) -> list[Update]:
        """What is left to do of a step: taken and not handed over, parked, and everything still in `param.grad`; see `scaling_of`."""
        found = self.handover.take_back()
        settings, threads = [{**settings_of(group), **scaling} for group in self._groups()], torch.get_num_threads()
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
        while self._parked:
            target, _ = self._parked.popitem()
            if self._store is not None:
                self._store.remove(target.name)
        self._used.clear()
        self._given.clear()
        self._versions.clear()
        self.handover.clear()
        self.norms.clear()
        self.settings = None
        self._backwards = 0
        self._taking = self._arrived = False
        self._lifted.clear()
        self._mixed = None
        self.allow_calls()

    def close(self) -> None:
        """Take the hooks off, and the stand-ins: whoever trains the model next begins with no gradients.

        Where some of a step to come are on the disk, those in memory go with them: a step with these alone would be another one.
        """
        waiting = any(target.is_taken() for target in self._parked) and self.settings is None
        for target, hooks in self._hooks.items():
            for hook in hooks:
                hook.remove()
            if target.is_taken() or waiting:
                target.parameter.grad = None
        if waiting and threading.main_thread().is_alive():  # else the interpreter exits, and nobody uses them any more
            warnings.warn(
                "OffloadedOptimizer: closed while gradients wait on the disk for the step: all of them are given up. Call step() before "
                "close() to use them, or zero_grad() if they are not needed.",
                errors.TorchwrapWarning,
                stacklevel=4,
            )
        self._hooks.clear()
        if self._handle is not None and self in self._handle.backward.listeners:
            self._handle.backward.listeners.remove(self)
            self.allow_calls()
        if self._store is not None:
            self._store.close()

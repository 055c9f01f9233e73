"""One step: what has to be true before it, which updates it consists of, and carrying them out.

Gradients that backward has used already are waited for. The others are clipped, if they are to be, and handed to the worker now. A step
that failed half-way is finished by the next call: what was updated is not updated again, and nothing is clipped twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from torchwrap.core import errors
from torchwrap.optimizer.chunks import Update
from torchwrap.optimizer.elementwise import Rule, settings_of
from torchwrap.optimizer.gradients import Gradients
from torchwrap.optimizer.handover import streamed_of
from torchwrap.optimizer.resident import Resident
from torchwrap.optimizer.targets import Target
from torchwrap.optimizer.unbroken import Unbroken
from torchwrap.optimizer.updates import Job, Updater

__all__ = ["Step"]


class Step:
    """The step that an optimizer is in, or will take next.

    Args:
        targets: all parameters of the optimizer; the list may grow.
        gradients: what became of theirs in backward.
        updater: carries out updates.
        resident: steps what stays in memory.
        max_grad_norm: clip to this total norm; None: do not.

    Attributes:
        grad_norm: before clipping, of the last step that clipped; a tensor of no dimension.
        counted: steps taken, this one included, when it is over but for what follows it; else None.
        scaling: what a `GradScaler` says of the step that is being taken.
    """

    def __init__(
        self, targets: list[Target], gradients: Gradients, updater: Updater, resident: Resident, max_grad_norm: float | None
    ) -> None:
        self._targets, self._gradients, self._updater, self._resident = targets, gradients, updater, resident
        self._max_grad_norm = max_grad_norm
        self._scale: torch.Tensor | None = None
        self._undoing = False
        self._clipping: Unbroken | None = None  # once it has begun
        self._done: set[Target] = set()  # of a step that failed half-way
        self._stepped: list[tuple[weakref.ref[torch.Tensor], int]] = []  # gradients that were used, as torch counts writes
        self.counted: int | None = None
        self._handed: list[Update] = []  # to the worker, and not known to be over: an interrupt or a hang came before
        self.grad_norm: torch.Tensor | None = None
        self.scaling: Mapping[str, torch.Tensor] = {}

    def gather(self, groups: Sequence[Mapping[str, Any]]) -> list[Update]:
        """Check, clip, and say what is left to do.

        Raises:
            ConflictError: gradients or settings were changed after they had been used, or there is nothing to do a second time.
            StorageError: an update during backward failed.
        """
        if self._undoing:
            raise errors.ConflictError(
                "OffloadedOptimizer: step() after a rollback() that was cut short: some weights are those of the commit, others not",
                where="step",
                fix="Call rollback() again, or close() and load model and a new optimizer from a checkpoint.",
            )
        streamed = [target for target in self._targets if target.streamed]
        self._gradients.check_untouched()
        self._settle()
        self._gradients.handover.land()
        self._updater.check()
        self._check_settings(groups)
        if not (self._gradients.began or self._updater.unfinished or self._done or self._handed or self._resident.stepped):
            self._gradients.adapt()
        for target in streamed:
            self._gradients.drop_cleared(target)
        self._clip()
        unfinished = self._updater.take_unfinished()
        again = {update.target for update in unfinished}
        lost = [update.again() for update in self._handed if not update.done and update.target not in again]
        self._handed.clear()
        unfinished, again = [*unfinished, *lost], again | {update.target for update in lost}
        fresh = self._gradients.collect([t for t in streamed if t not in self._done and t not in again], self._scale, self.scaling)
        self._refuse_repetition([*unfinished, *fresh])
        return [*unfinished, *fresh]

    def carry_out(self, updates: Sequence[Update]) -> None:
        """Hand updates to the worker, those of one unit together, and wait.

        Raises:
            StorageError: reading or writing failed; `gather` gives what is left.
        """
        jobs: dict[int | None, Job] = {}
        for update in updates:
            unit = update.target.unit if update.target.away else None
            job = jobs.setdefault(None if unit is None else unit.index, Job(streamed_of(unit), []))
            job.updates.append(update)
        if updates:
            self._gradients.refuse_calls()
        self._handed += updates
        for job in jobs.values():
            self._updater.submit(job)
        self._settle()
        if not self.changed:
            self._gradients.allow_calls()
        self._updater.check()

    @torch.no_grad()
    def divide(self, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> None:
        """Leave gradients of weights that were stepped in chunks as the class leaves those of others: divided by a `GradScaler`'s scale.

        Only now, because chunks that are repeated need them as they were.
        """
        known: dict[tuple[int, torch.dtype], bool] = {}
        for target in self._targets if "grad_scale" in self.scaling and not self.skipped else ():
            gradient, key = target.gradient() if target.streamed else None, (target.group, target.parameter.dtype)
            if gradient is None or target.is_taken():
                continue
            if key not in known:
                known[key] = rule.divides(settings_of(groups[target.group]), target.parameter.dtype)
            if known[key]:
                gradient.div_(self.scaling["grad_scale"])

    def over(self) -> None:
        """It is done, or its gradients are given up. Calling it again does nothing."""
        if self._clipping is not None:
            with suppress(Exception):
                self._clipping.wait()
        self._gradients.forget()
        self._clipping, self._scale, self.scaling = None, None, {}
        self._handed.clear()
        self._done.clear()
        self._resident.over()

    def remember(self, steps: int) -> None:
        """The step is over, but not what follows it: `step()` again is to do that, and not to use these gradients twice."""
        self._stepped = [(weakref.ref(gradient), gradient._version) for gradient in self._shown()]
        self.counted = steps

    def ended(self, steps: int) -> int:
        """Steps taken, `steps` of them before; nothing of one that is over is under way after this."""
        if self.counted is None:
            return steps
        self.over()
        return self.counted

    def undo(self, restore: Callable[[], None]) -> None:
        """Give it up, and have `restore` bring all weights and state back; until that is done, nothing may use them."""
        self._undoing = True
        self.over()
        self.forget()
        self._gradients.refuse_calls()
        restore()
        self._undoing = False
        self._gradients.allow_calls()

    def forget(self) -> None:
        """What follows it is over as well, or was given up."""
        self.counted, self._stepped = None, []

    def repeated(self) -> bool:
        """Whether there are gradients, and they are still those that were remembered."""
        if self.counted is None:
            return False
        now = self._shown()
        same = all(old() is new and version == new._version for (old, version), new in zip(self._stepped, now, strict=False))
        return bool(now) and len(self._stepped) == len(now) and same

    def _shown(self) -> list[torch.Tensor]:
        return [target.parameter.grad for target in self._targets if target.parameter.grad is not None]

    @property
    def skipped(self) -> bool:
        """Whether a `GradScaler` found infinite gradients, so that no weight is changed."""
        return "found_inf" in self.scaling and bool(self.scaling["found_inf"])

    @property
    def half_done(self) -> bool:
        """Whether some weights are those of after the step, and others those of before."""
        self._settle()
        if self._undoing or self.counted is not None:
            return self._undoing
        return self._gradients.began or bool(self._updater.unfinished or self._done or self._handed or self._resident.stepped)

    @property
    def changed(self) -> bool:
        """Whether the step has updated weights, which cannot be undone, or is about to."""
        if self._undoing or self.counted is not None:
            return self._undoing
        given_back = set(self._updater.unfinished)
        under_way = any(update not in given_back for update in self._handed)
        begun = self._gradients.began or bool(self._done or self._resident.stepped)
        return begun or under_way or any(target.torn for target in self._targets)

    def _settle(self) -> None:
        """Wait for what was handed to the worker, by whichever call, and note what of it is done."""
        self._updater.wait()
        self._done.update(update.target for update in self._handed if update.done)
        self._handed = [update for update in self._handed if not update.done]

    def _clip(self) -> None:
        """Scale all gradients as `clip_grad_norm_` does; once for each step, also if that is repeated after an error or an interrupt."""
        if self._max_grad_norm is None:
            return
        if self._clipping is None:
            if (scaled := self._gradients.scaled()) is not None:
                raise errors.ConflictError(
                    f"OffloadedOptimizer: the gradient of {scaled.name} was clipped already, and would be clipped again with "
                    "max_grad_norm=",
                    where=scaled.name,
                    fix="Clip in one place: leave max_grad_norm= out here, or do not call clip_grad_norm_ (transformers: max_grad_norm=0).",
                )
            self._clipping = Unbroken(partial(self._clip_to, self._max_grad_norm))
        try:
            self._clipping.wait()
        except Exception:
            self._clipping = None
            raise

    def _clip_to(self, most: float) -> None:
        # In the order of `model.parameters()`, which loops give to torch's function, and not of groups: sums have other last bits.
        ordered = sorted(self._targets, key=lambda target: target.place)
        trained = [t for t in ordered if t.parameter.grad is not None or self._gradients.is_parked(t)]
        present = [t.parameter for t in trained if not self._gradients.is_parked(t)]
        if len(present) == len(trained):
            self.grad_norm = torch.nn.utils.clip_grad_norm_(present, most)
        else:
            norms = self._gradients.norms
            # The norm of a norm is itself: torch's function does the rest, in its order.
            each = [norms[t] if t in norms else t.gradient_norm() for t in trained]
            self.grad_norm = torch.nn.utils.get_total_norm(each)
            torch.nn.utils.clip_grads_with_norm_(present, most, self.grad_norm)
            self._scale = torch.clamp(most / (self.grad_norm + 1e-6), max=1.0)

    def _check_settings(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for number, (old, group) in enumerate(zip(self._gradients.settings or (), groups, strict=False)):
            now = settings_of(group)
            changed = [name for name in now if name not in old or not _same(old[name], now[name])]
            if changed:
                name = changed[0]
                raise errors.ConflictError(
                    f"OffloadedOptimizer: {name} of group {number} was changed from {old.get(name)!r} to {now[name]!r} between "
                    "backward and step; the backward has updated weights with the old value",
                    where=f"param_groups[{number}]",
                    fix="Change settings before backward(), or pass overlap=False.",
                )

    def _refuse_repetition(self, updates: Sequence[Update]) -> None:
        if updates or self._gradients.began or self._done or self._resident.stepped:
            return
        used = next((target for target in self._targets if target.is_taken()), None)
        if used is not None:
            raise errors.ConflictError(
                f"OffloadedOptimizer: step() again on gradients that are used up (that of {used.name})",
                where="step",
                fix="Run backward() before each step, or pass overlap=False to keep gradients.",
            )


def _same(left: Any, right: Any) -> bool:
    """Equal, and not a number counts as equal to itself."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right or (left != left and right != right))

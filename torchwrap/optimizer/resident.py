"""Parameters that are not worth streaming: small ones in memory, updated by an ordinary optimizer as a whole.

It is of the same class, with the same groups less the streamed parameters, and keeps their state itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from torchwrap.optimizer.elementwise import Rule, scaled, settings_of, step_of
from torchwrap.optimizer.targets import Target, in_place
from torchwrap.optimizer.unbroken import Unbroken
from torchwrap.stream.timeline import Timeline

__all__ = ["Resident"]


class Resident:
    """The optimizer of what stays in memory, if anything does.

    Args:
        rule: the wrapped class.
        timeline: where its steps are recorded, if anywhere.

    Attributes:
        stepped: of the step that is being taken, the part of these parameters, once it has begun; it is taken once, see `over`.
    """

    def __init__(self, rule: Rule, timeline: Timeline | None = None) -> None:
        self._rule, self._timeline = rule, timeline
        self._whole: torch.optim.Optimizer | None = None
        self._numbers: list[int] = []  # of the groups that have such parameters
        self.stepped: Unbroken | None = None

    def prepare(self, targets: Sequence[Target], groups: Sequence[Mapping[str, Any]]) -> None:
        """Parameters were added, or settings changed; the state stays."""
        small = {n: [t.parameter for t in targets if t.group == n and not t.streamed] for n in range(len(groups))}
        self._numbers = [number for number, parameters in small.items() if parameters]
        if self._numbers:
            before = {} if self._whole is None else self._whole.state
            self._whole = self._rule.cls([{**settings_of(groups[n]), "params": small[n]} for n in self._numbers], **self._rule.options)
            self._whole.state.update(before)

    def step(self, targets: Sequence[Target], groups: Sequence[Mapping[str, Any]], scaling: Mapping[str, torch.Tensor]) -> None:
        """Update them with the gradients that they have and the present settings; `scaling` as `scaling_of` gives it.

        After an interrupt it goes on by itself, and another call only waits for it; an error of the class is raised as torch does.
        """
        if self._whole is None:
            return
        if self.stepped is None:
            for number, group in zip(self._numbers, self._whole.param_groups, strict=True):
                group.update(settings_of(groups[number]))
            self.stepped = Unbroken(partial(self._step, self._whole, targets, scaling))
        try:
            self.stepped.wait()
        except Exception:
            self.stepped = None
            raise

    def _step(self, whole: torch.optim.Optimizer, targets: Sequence[Target], scaling: Mapping[str, torch.Tensor]) -> None:
        began = time.monotonic()
        with scaled(whole, scaling):
            step_of(whole)()
        if self._timeline is not None:
            self._timeline.add("update", "in memory", began, time.monotonic(), 0)
        for target in targets:
            if not target.streamed and target.parameter.grad is not None:
                target.changed = True

    def over(self) -> None:
        """The step is done or given up, and nothing of it under way: `step` begins another one."""
        if self.stepped is not None:
            with suppress(Exception):
                self.stepped.wait()
        self.stepped = None

    def state(self, target: Target) -> dict[str, Any]:
        """What is kept of one of them; empty before a step."""
        return {} if self._whole is None else dict(self._whole.state.get(target.parameter, {}))

    def set_state(self, target: Target, state: Mapping[str, Any]) -> None:
        """Keep this instead; nothing, if it is empty."""
        if self._whole is not None:
            before = self._whole.state.pop(target.parameter, {})
            if state:
                self._whole.state[target.parameter] = in_place(before, state)

"""Parameters that are not worth streaming: small ones in memory, updated by an ordinary optimizer as a whole.

It is of the same class, with the same groups less the streamed parameters, and keeps their state itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchwrap.optimizer.elementwise import Rule, scaled, settings_of, step_of
from torchwrap.optimizer.targets import Target, in_place
from torchwrap.stream.timeline import Timeline

__all__ = ["Resident"]


class Resident:
    """The optimizer of what stays in memory, if anything does.

    Args:
        rule: the wrapped class.
        timeline: where its steps are recorded, if anywhere.
    """

    def __init__(self, rule: Rule, timeline: Timeline | None = None) -> None:
        self._rule, self._timeline = rule, timeline
        self._whole: torch.optim.Optimizer | None = None
        self._numbers: list[int] = []  # of the groups that have such parameters

    def prepare(self, targets: Sequence[Target], groups: Sequence[Mapping[str, Any]]) -> None:
        """Parameters were added, or settings changed; the state stays."""
        small = {n: [t.parameter for t in targets if t.group == n and not t.streamed] for n in range(len(groups))}
        self._numbers = [number for number, parameters in small.items() if parameters]
        if self._numbers:
            before = {} if self._whole is None else self._whole.state
            self._whole = self._rule.cls([{**settings_of(groups[n]), "params": small[n]} for n in self._numbers], **self._rule.options)
            self._whole.state.update(before)

    def step(self, targets: Sequence[Target], groups: Sequence[Mapping[str, Any]], scaling: Mapping[str, torch.Tensor]) -> None:
        """Update them with the gradients that they have and the present settings; `scaling` as `scaling_of` gives it."""
        if self._whole is None:
            return
        for number, group in zip(self._numbers, self._whole.param_groups, strict=True):
            group.update(settings_of(groups[number]))
        began = time.monotonic()
        with scaled(self._whole, scaling):
            step_of(self._whole)()
        if self._timeline is not None:
            self._timeline.add("update", "in memory", began, time.monotonic(), 0)
        for target in targets:
            if not target.streamed and target.parameter.grad is not None:
                target.changed = True

    def state(self, target: Target) -> dict[str, Any]:
        """What is kept of one of them; empty before a step."""
        return {} if self._whole is None else dict(self._whole.state.get(target.parameter, {}))

    def set_state(self, target: Target, state: Mapping[str, Any]) -> None:
        """Keep this instead; nothing, if it is empty."""
        if self._whole is not None:
            before = self._whole.state.pop(target.parameter, {})
            if state:
                self._whole.state[target.parameter] = in_place(before, state)

"""What a call like an example takes, found by making it on shapes (activations/rehearsal.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from torchwrap.activations.choose import Choice, Cost
from torchwrap.activations.rehearsal import Rehearsal
from torchwrap.core import errors
from torchwrap.core.example import described, rows_of
from torchwrap.core.integration import Integration
from torchwrap.stream.settings import Streaming
from torchwrap.stream.units import Unit
from torchwrap.weights.copies import Copies
from torchwrap.weights.timing import check_inputs

__all__ = ["Trial", "inputs_of", "trial_of"]

T = TypeVar("T")

_FIRST = 16 << 20
"""Bytes that libraries take in the first forward of a process (measured: 14 MiB)."""

_HEAP = 64 << 20
"""Bytes of freed tensors that the C library's heap keeps at its end (glibc: twice its largest threshold); none where blocks come from the
system one by one, as in training."""


class Trial:
    """Tries calls of one model.

    Args:
        model: not wrapped yet.
        units: of the model.
        example: of the settings.
        rehearsal: of the model, if there is one already.

    Raises:
        ConfigError: the model cannot be called like that on shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        device: torch.device,
        integration: Integration,
        example: str,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.example: str = example
        self._blocks = [unit.index for unit in units if unit.kind == "block" and unit.parent is None]
        self._known: dict[tuple[str, tuple[Choice, ...] | None], int] = {}
        found = rehearsal or Rehearsal.of(model, units, device, integration, example)
        if found is None:
            raise errors.ConfigError(
                f"{type(model).__name__} cannot be copied to try the example, or is wrapped by another technique already",
                where="example",
                fix="Leave example= out, and set reserve= to the memory that a call takes besides weights.",
            )
        self._rehearsal: Rehearsal = found
        self.forward_bytes(example)

    def forward_bytes(self, example: str, copies: Copies | None = None) -> int:
        """Memory of a forward without gradients besides weights, and of its inputs."""
        if (example, None) not in self._known:
            self._known[example, None] = self._tried(example, lambda: self._rehearsal.forward_bytes(example))
        live = self._known[example, None]
        return _FIRST + live + min(live, _HEAP) + _copied(example, copies)

    def step_bytes(self, example: str, mode: Callable[[int], Choice], copies: Copies | None = None) -> int:
        """The same of a training step, without gradients of weights. `mode`: what becomes of what a block saves, by unit."""
        modes = {unit: mode(unit) for unit in self._blocks}
        key = (example, tuple(modes.values()))
        if key not in self._known:
            self._known[key] = self._tried(example, lambda: self._rehearsal.step_bytes(example, modes))
        return _FIRST + self._known[key] + _copied(example, copies)

    def swapped_bytes(self, example: str, mode: Callable[[int], Choice]) -> int:
        """Bytes that leave in a forward and come back in its backward."""
        costs: list[Cost] = self._tried(example, lambda: self._rehearsal.saves(example))
        return sum(cost.nbytes for cost in costs if mode(cost.unit) == "swap")

    def _tried(self, example: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            raise errors.ConfigError(
                f"a call like {example} cannot be tried on shapes: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                where="example",
                fix="Give what the model is called with. If it looks at values, leave example= out and set reserve=.",
            ) from error


def inputs_of(config: Streaming, batch: int | None, tokens: int | None, example: object) -> tuple[int, int, str | None]:
    """Sequences, tokens of each, and instead of both an example, if one was given here or in the settings.

    Raises:
        ConfigError: numbers below 1, tokens beside an example, or an example of a model that was wrapped without one.
    """
    name = config.technique
    example = config.example if example is None else example
    check_inputs(name, 1 if batch is None else batch, 1 if tokens is None else tokens)
    if example is None:
        return batch or 1, tokens or 128, None
    if config.example is None:
        raise errors.ConfigError(
            f"{name}: the model was wrapped without an example", where="example", fix=f"Wrap it with {name}(model, example=...)."
        )
    if tokens is not None:
        raise errors.ConfigError(f"{name}: tokens={tokens} beside an example", where="tokens", fix="Give another example=.")
    text = described(example, batch=batch)
    return 1, rows_of(text), text


def _copied(example: str, copies: Copies | None) -> int:
    return copies.at(rows_of(example)) if copies is not None else 0


def trial_of(
    config: Streaming,
    model: nn.Module,
    units: Sequence[Unit],
    device: torch.device,
    integration: Integration,
    rehearsal: Rehearsal | None = None,
) -> Trial | None:
    """One, if the settings have an example; with this rehearsal of the model, if there is one already."""
    return Trial(model, units, device, integration, str(config.example), rehearsal) if config.example is not None else None

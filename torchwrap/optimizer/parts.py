"""Which elements of a tensor may be computed together so that every bit is that of computing the whole.

On the CPU, torch runs an elementwise operator over ranges, one per thread, and within a range over whole vector registers; the few elements
left at the end of each range are computed one by one. Both ways round differently in some kernels (measured, torch 2.13: SGD in
bfloat16, fused SGD, RMSprop in bfloat16). So what matters for an element is which of the two ways it would go in the whole tensor, not
where it stands. `run` therefore computes as much of a chunk as goes through registers entirely, the few elements left in a tensor filled up
so that they do, too, and the last block of each range again by itself, at its true length.

Source of the ranges: `at::TensorIterator::for_each` and `at::parallel_for` of torch 2.13; tests/optimizer/test_parts.py fails when they
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchwrap.core import errors
from torchwrap.optimizer.elementwise import Rule

__all__ = ["BLOCK", "Whole", "run"]

BLOCK = 128
"""Elements; a multiple of two registers of every type and instruction set that torch is built for."""

_GRAIN = 32768  # at::internal::GRAIN_SIZE: shorter tensors are not shared between threads


@dataclass(frozen=True, slots=True)
class Whole:
    """How torch would compute a whole tensor.

    Attributes:
        numel: its elements.
        threads: `torch.get_num_threads()` where the optimizer steps.
        ranged: whether ranges may end anywhere: not in fused kernels, which keep them to whole cache lines.
        plain: every element goes the same way: devices other than the CPU.
    """

    numel: int
    threads: int
    ranged: bool
    plain: bool

    def ends(self, first: int, last: int) -> list[tuple[int, int]]:
        """The incomplete last blocks of the ranges, as far as they touch `[first, last)`."""
        if self.plain:
            return []
        size = -(-self.numel // _workers(self.numel, self.threads)) if self.ranged else self.numel
        found = []
        for number in range(first // size, min(-(-last // size), -(-self.numel // size))):
            end = min(self.numel, (number + 1) * size)
            begin = end - (end - number * size) % BLOCK
            if begin < end and begin < last and first < end:
                found.append((begin, end))
        return found

    def even(self, length: int) -> int:
        """The greatest length up to `length` at which every element goes through registers."""
        if self.plain:
            return length
        workers = _workers(length, self.threads) if self.ranged else 1
        even = length // (BLOCK * workers) * BLOCK * workers
        return even if not self.ranged or not even or _workers(even, self.threads) == workers else self.even(even)

    def filled(self, length: int) -> int:
        """The least length from `length` on at which every element goes through registers."""
        if self.plain:
            return length
        workers = _workers(length, self.threads) if self.ranged else 1
        filled = -(-length // (BLOCK * workers)) * BLOCK * workers
        return filled if not self.ranged or _workers(filled, self.threads) == workers else self.filled(filled)


def run(
    rule: Rule,
    settings: Mapping[str, Any],
    whole: Whole,
    span: tuple[int, int],
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
    *,
    begun: bool,
) -> dict[str, Any]:
    """Update one chunk in place.

    Args:
        span: (first element, end) of the chunk in the whole.
        weight: its values.
        gradient: of the same length, not changed.
        state: what is kept per element, likewise; only written to, unless `begun`.
        numbers: what is kept per parameter; not changed.
        begun: False for the parameter's first step, which makes the state.

    Returns:
        What is kept per parameter, afterwards.

    Raises:
        ConfigError: the class keeps something else than it did when it was tried.
    """
    first, last = span
    length = last - first
    ends = whole.ends(first, last)
    pieces = {"": weight, "/": gradient, **state}
    small = [_cut(pieces, first, length, end) for end in ends]
    after: dict[str, Any] = {}
    if sum(min(last, end) - max(first, begin) for begin, end in ends) < length:
        body = whole.even(length)
        if body:
            after = _step(rule, settings, {name: tensor[:body] for name, tensor in pieces.items()}, numbers, begun)
        if body < length:
            rest = _cut(pieces, first, length, (first + body, first + body + whole.filled(length - body)))
            after = _step(rule, settings, rest, numbers, begun)
            for name, tensor in pieces.items():
                if name != "/":
                    tensor[body:length] = rest[name][: length - body]
    for (begin, end), part in zip(ends, small, strict=True):
        after = _step(rule, settings, part, numbers, begun)
        low, high = max(first, begin), min(last, end)
        for name, tensor in pieces.items():
            if name != "/":
                tensor[low - first : high - first] = part[name][low - begin : high - begin]
    return after


def _workers(numel: int, threads: int) -> int:
    return max(1, min(threads, -(-numel // _GRAIN)))


def _cut(pieces: Mapping[str, torch.Tensor], first: int, length: int, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Copies of a block; zeros where it reaches beyond the chunk, only so that what is inside keeps its place."""
    begin, end = block
    low, high = max(first, begin), min(first + length, end)
    made = {}
    for name, tensor in pieces.items():
        made[name] = tensor.new_zeros(end - begin)
        made[name][low - begin : high - begin] = tensor[low - first : high - first]
    return made


def _step(
    rule: Rule, settings: Mapping[str, Any], pieces: Mapping[str, torch.Tensor], numbers: Mapping[str, Any], begun: bool
) -> dict[str, Any]:
    """One step of the class; new state tensors are copied to where they belong."""
    names = [name for name in pieces if name not in ("", "/")]
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in numbers.items()}
    if begun:
        before |= {name: pieces[name] for name in names}
    after = dict(rule.step(settings, pieces[""], pieces["/"], before))
    for name in names:
        value = after.pop(name, None)
        if not isinstance(value, torch.Tensor) or value.shape != pieces[name].shape or value.dtype != pieces[name].dtype:
            raise _changed(rule, name)
        if value.data_ptr() != pieces[name].data_ptr():
            pieces[name].copy_(value)
    extra = [name for name, value in after.items() if isinstance(value, torch.Tensor) and value.numel() > 1]
    if extra:
        raise _changed(rule, extra[0])
    return after


def _changed(rule: Rule, name: str) -> errors.ConfigError:
    return errors.ConfigError(
        f"OffloadedOptimizer: {rule.cls.__name__} no longer keeps {name!r} as it did when it was tried",
        where=name,
        fix="Settings that change what is kept (amsgrad, momentum from or to 0) belong in the constructor: make a new optimizer.",
    )

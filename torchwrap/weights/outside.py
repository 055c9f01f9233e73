"""Keeping what reads weights outside of any forward away from weights that are not there.

Placeholders would make torch's averages (`AveragedModel`) NaN in silence, and for ever, since the next average begins with it; so they
would the parts of a weight that a parametrization (`weight_norm`) keeps in its place; and pruning by size would take whatever comes first
for the smallest, with numbers that look right. There is no hook for these, so as long as a model is wrapped their methods look first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

from torchwrap.core import errors
from torchwrap.core.tensors import data_of, is_placeholder

__all__ = ["look_at_reads"]


class _Method:
    """One method of torch, and what stands in for it.

    Args:
        cls: the class that has it.
        name: its name.
        away: names of what its arguments show and is away, empty if it has none.
        what: it would do to it.
        fix: the way out.
    """

    def __init__(self, cls: type, name: str, away: Callable[..., Iterator[str]], what: str, fix: str) -> None:
        self._cls, self._name, self._plain = cls, name, cls.__dict__[name]
        call = getattr(self._plain, "__func__", self._plain)

        def looking(*args: Any, **options: Any) -> Any:
            for found in away(*args):
                raise errors.ConflictError(f"torchwrap: {what} {found or 'a weight'}, which is away", where=found, fix=fix)
            return call(*args, **options)

        self._looking = staticmethod(looking) if isinstance(self._plain, staticmethod) else looking

    def set(self, look: bool) -> None:
        """Look first, or do not; a method that somebody else has put there stays."""
        if self._cls.__dict__[self._name] is (self._plain if look else self._looking):
            setattr(self._cls, self._name, self._looking if look else self._plain)


def _averaged(average: Any, model: Any, *_: Any) -> Iterator[str]:
    for each in (model, average.module):
        yield from (name for name, parameter in each.named_parameters() if is_placeholder(data_of(parameter)))


def _parametrized(_: Any, modules: Any, original: Any = None, *rest: Any) -> Iterator[str]:
    # One without an inverse keeps the weight as it is, and is computed when the weight is there.
    if isinstance(original, torch.Tensor) and is_placeholder(data_of(original)) and any(hasattr(each, "right_inverse") for each in modules):
        yield ""


def _normed(module: Any, name: str, *_: Any) -> Iterator[str]:
    if is_placeholder(data_of(getattr(module, name))):
        yield name


def _pruned(_: Any, t: Any = None, *rest: Any) -> Iterator[str]:
    # Several weights together come as a copy, and NaN has no size in any case.
    if isinstance(t, torch.Tensor) and (is_placeholder(data_of(t)) or bool(t.isnan().any())):
        yield ""


_FIRST = "Call torchwrap.unwrap(model), do it, and wrap the model again."
_METHODS = (
    _Method(
        AveragedModel,
        "update_parameters",
        _averaged,
        "AveragedModel would average",
        "Average one weight after the other: with torchwrap.core.tensors(model, name) as new, "
        "torchwrap.core.tensors(average, name, write=True) as old: old[name].lerp_(new[name], 1 - decay).",
    ),
    _Method(ParametrizationList, "__init__", _parametrized, "a parametrization would take apart", _FIRST),
    _Method(sys.modules["torch.nn.utils.weight_norm"].WeightNorm, "apply", _normed, "weight_norm would take apart", _FIRST),
    _Method(prune.L1Unstructured, "compute_mask", _pruned, "pruning would look for the smallest elements of", _FIRST),
    _Method(prune.LnStructured, "compute_mask", _pruned, "pruning would look for the smallest rows of", _FIRST),
)


def look_at_reads(look: bool) -> None:
    """Refuse what reads weights that are away, or do not."""
    for method in _METHODS:
        method.set(look)

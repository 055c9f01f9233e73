"""What a block was given when it was called first, for the call that computes it again.

Positional tensors are kept, and compared, by torch's checkpoint. The rest is done here: lists and dictionaries may have been changed by
then, by the block itself or by its caller, so the second call gets copies of what they held, and changes none that anybody sees; tensors in
them and those given by keyword must not have been written to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torchwrap.core import errors

__all__ = ["Given"]


class Given:
    """Arguments of one call.

    Args:
        unit: name of the block.
        args, kwargs: as the first call gets them.

    Cost: one shallow copy of each list and dictionary.
    """

    def __init__(self, unit: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._unit = unit
        self.kwargs: Mapping[str, Any] = kwargs
        copied = _copied((args, dict(kwargs)))
        self._args = {n: mine for n, (mine, theirs) in enumerate(zip(copied[0], args, strict=True)) if mine is not theirs}
        self._kwargs: dict[str, Any] = copied[1]
        leaves = tree_leaves((list(self._args.values()), self._kwargs))
        self._tensors = [(x, x._version) for x in leaves if isinstance(x, torch.Tensor) and not x.is_inference()]

    def again(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of another call, where `args` are the positional ones that torch kept.

        Raises:
            ConflictError: a tensor was written to since the first call.
        """
        if any(tensor._version != version for tensor, version in self._tensors):
            raise errors.ConflictError(
                f"torchwrap: {self._unit} is to be computed again, and a tensor that it was given by keyword or in a list was written to "
                "since its first call",
                where=self._unit,
                fix='Do not write to it before the backward, or wrap with activations="keep" or "disk".',
            )
        mine, kwargs = _copied((self._args, self._kwargs))
        return tuple(mine.get(n, x) for n, x in enumerate(args)), kwargs


def _copied(value: Any, made: dict[int, Any] | None = None) -> Any:
    """The same with new lists and dictionaries; `made` are those so far, by the identity of the old ones."""
    made = {} if made is None else made
    if isinstance(value, tuple):
        items = [_copied(item, made) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, list | dict):
        return value
    if id(value) not in made:
        made[id(value)] = new = copy.copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if (other := _copied(item, made)) is not item:
                new[key] = other
    return made[id(value)]

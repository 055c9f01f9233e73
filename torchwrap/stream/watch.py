"""Catching a forward pass that reads a parameter while it is away.

A unit's weights are present while the unit's own forward runs. A model that reads them elsewhere (a parent that uses a child's weight
without calling the child) would read the placeholder and compute NaN. So the first forward pass runs under a dispatch mode that looks at
the storages of every operator's arguments and raises an error that names the parameter before anything is computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchwrap.core import errors
from torchwrap.stream.units import Piece

__all__ = ["AbsentUseGuard"]

_HARMLESS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}  # move no element


class AbsentUseGuard(TorchDispatchMode):
    """Raises `UnsupportedModelError` when an operator reads the placeholder of one of `pieces`."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__()
        self._names = {piece.absent.untyped_storage().data_ptr(): piece.name for piece in pieces}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in _HARMLESS:
            for value in tree_leaves((args, kwargs)):
                if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type != "meta":
                    name = self._names.get(value.untyped_storage().data_ptr())
                    if name is not None:
                        raise errors.UnsupportedModelError(
                            f"offload: {name} is read by {func} outside the forward of the unit it belongs to, while it is away",
                            where=name,
                            fix=f'Keep it in memory: pin=("{name}",).',
                        )
        return func(*args, **(kwargs or {}))

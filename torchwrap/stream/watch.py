"""Catching a forward pass that reads a parameter while it is away.

A unit's weights are present while the unit's own forward runs. A model that reads them elsewhere (a parent that uses a child's weight
without calling the child) would read the placeholder and compute NaN. So the first forward pass runs under a dispatch mode that looks at
the storages of every operator's arguments and raises an error that names the parameter before anything is computed from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchwrap.core import errors
from torchwrap.stream.units import Piece

__all__ = ["AbsentUseGuard", "can_watch"]

_HARMLESS = {  # read no element
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten._has_compatible_shallow_copy_type.default,
}


class AbsentUseGuard(TorchDispatchMode):
    """Raises `ConflictError` when an operator reads the placeholder of one of `pieces`; keeps it in `error`, should somebody swallow it."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error: errors.ConflictError | None = None
        self._names = {piece.absent.untyped_storage().data_ptr(): piece.name for piece in pieces}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch 2.13 wraps the handler in a lazily imported Dynamo otherwise: seconds, and a hundred megabytes, for an eager program.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in _HARMLESS:
            for value in tree_leaves((args, kwargs)):
                plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
                if plain and value.device.type != "meta":
                    name = self._names.get(value.untyped_storage().data_ptr())
                    if name is not None:
                        # No TypeError: torch turns those raised inside an arithmetic operator into "unsupported operand".
                        self.error = errors.ConflictError(
                            f"torchwrap: {name} is read by {func} outside the forward of the unit it belongs to, while it is away",
                            where=name,
                            fix=f'Keep it in memory: pin=("{name}",).',
                        )
                        raise self.error
        return func(*args, **(kwargs or {}))


def can_watch() -> bool:
    """Whether a dispatch mode changes nothing here.

    Below one, autocast no longer reaches the operators inside a fused one (the encoder layer of torch 2.13 then computes in another
    type), and Dynamo compiles nothing.
    """
    if torch.is_autocast_enabled("cpu") or (torch.cuda.is_available() and torch.is_autocast_enabled("cuda")):
        return False
    frame = sys._getframe(1) if "torch._dynamo" in sys.modules else None
    while frame is not None:
        if frame.f_code.co_filename.endswith("_dynamo/eval_frame.py"):
            return False
        frame = frame.f_back
    return True

"""Catching a forward pass that reads a parameter while it is away.

A unit's weights are present while the unit's own forward runs. A model that reads them elsewhere (a parent that uses a child's weight
without calling the child) would read the placeholder and compute NaN. So the first forward pass runs under a dispatch mode that looks at
the storages of every operator's arguments and raises an error that names the parameter before anything is computed from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchwrap.core import errors
from torchwrap.core.swap import original_class
from torchwrap.stream.units import Piece, Unit

__all__ = ["AbsentUseGuard", "can_watch"]

_HARMLESS = {  # read no element
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten._has_compatible_shallow_copy_type.default,
}


class AbsentUseGuard(TorchDispatchMode):
    """Raises `ConflictError` when an operator reads the placeholder of one of `pieces`; keeps it in `error`, should somebody swallow it.

    Args:
        pieces: those that are away.
        units: what they come and go with.
        model: the model, for the names of what is inside of a unit.
    """

    def __init__(self, pieces: Iterable[Piece], units: Sequence[Unit] = (), model: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error: errors.ConflictError | None = None
        self._pieces = {piece.absent.untyped_storage().data_ptr(): piece for piece in pieces}
        self._units, self._model = units, model

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch 2.13 wraps the handler in a lazily imported Dynamo otherwise: seconds, and a hundred megabytes, for an eager program.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in _HARMLESS:
            for value in tree_leaves((args, kwargs)):
                plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
                if plain and value.device.type != "meta":
                    piece = self._pieces.get(value.untyped_storage().data_ptr())
                    if piece is not None:
                        # No TypeError: torch turns those raised inside an arithmetic operator into "unsupported operand".
                        self.error = self._refused(piece, func)
                        raise self.error
        return func(*args, **(kwargs or {}))

    def _refused(self, piece: Piece, func: Any) -> errors.ConflictError:
        """One weight that is used elsewhere, or a block of which a method or a part is called, and then all of its weights."""
        pin = f'pin=("{piece.name}",)'
        blocks = [unit for unit in self._units if unit.kind == "block" and any(other.index == piece.index for other in unit.pieces)]
        unit = blocks[0].name if blocks and sum(not other.resident for other in blocks[0].pieces) > 1 else None
        if unit is None or self._model is None:
            fix = f"Keep it in memory: {pin}."
        else:
            owners = {other.name.rpartition(".")[0] for other in blocks[0].pieces} - {unit}
            classes = sorted({f'"{original_class(self._model.get_submodule(owner)).__name__}"' for owner in owners})
            apart = f"stream what is inside by itself, units=({', '.join(classes)},), or " if classes else ""
            fix = (
                f'Call {unit} itself, not its methods or parts. If only this weight is used elsewhere: {pin}; else {apart}pin=("{unit}",).'
            )
        return errors.ConflictError(
            f"torchwrap: {piece.name} is read by {func} outside the forward of {unit or 'the unit it belongs to'}, while it is away",
            where=piece.name,
            fix=fix,
        )


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

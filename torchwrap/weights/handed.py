"""What state dicts of a model show its stored weights with, for as long as somebody holds it.

Such a tensor goes on showing its weight when an update or `load_state_dict` has written it to another place, as a state dict of a model in
memory does. Writing to one is found at the next call of the model, because it would have no effect.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchwrap.core import errors
from torchwrap.storage.views import Showing, Views
from torchwrap.stream.units import Piece

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["Handed"]


class Handed:
    """The tensors that state dicts of one model gave for weights that are away."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # and its version, by piece
        self._views: dict[int, Views] = {}

    def give(self, handle: WeightsHandle, piece: Piece, state: Mapping[str, Any]) -> torch.Tensor:
        """A tensor for the piece in a state dict; another name of a tied parameter gets the one that is in there already."""
        found = self._last.get(piece.index)
        view = found[0]() if found is not None and len(piece.names) > 1 else None
        if view is None or not any(torch.is_tensor(value) and value.data_ptr() == view.data_ptr() for value in state.values()):
            view = handle.stored_view(piece, self._views.setdefault(piece.index, Views()))
            self._last[piece.index] = (weakref.ref(view), view._version)
        return view

    def moved(self, piece: Piece, file: Showing) -> None:
        """The piece has a new home in this file."""
        views = self._views.get(piece.index)
        if views is not None and piece.home is not None:
            views.show(file, piece.home.name)

    def forget(self, piece: Piece) -> None:
        """The piece gets another type: as in memory, what was given stays as it is."""
        self._views.pop(piece.index, None)

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raise `ConflictError` if somebody wrote to one: it shows stored bytes, so the model would not follow."""
        for index, (handed, version) in list(self._last.items()):
            view = handed()
            if view is None or view._version != version:
                del self._last[index]
            if view is not None and view._version != version:
                name = next(piece.name for piece in pieces if piece.index == index)
                raise errors.ConflictError(
                    f"torchwrap: the tensor that state_dict() gave for {name} was written to; the weights of the model did not change",
                    where=name,
                    fix=f"Write inside `with torchwrap.core.tensors(model, {name!r}, write=True) as real:`, or use load_state_dict().",
                )

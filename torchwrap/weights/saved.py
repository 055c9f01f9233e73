"""What autograd keeps of a forward whose weights do not stay.

A tensor saved for backward that lies in a slot would be overwritten by the next unit. While a unit runs, such tensors are replaced by a
note of which weight they show, and made again when backward asks: as a view of the slot while the backward holds the unit, else as a
private copy. The cast copies that autocast makes of every weight are replaced too: kept until backward, they would add up to a second
model. Everything else goes to whatever hooks were active outside (activation checkpointing, `save_on_cpu`), or is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchwrap.activations.kept import Kept, modified
from torchwrap.core.tensors import data_of
from torchwrap.stream.units import Piece

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["Modes", "saving_for"]


class Modes:
    """Modes of this thread that a call of the model changes while it runs, as they are when this is made."""

    __slots__ = ("_caches", "_saving")

    def __init__(self) -> None:
        self._saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._caches = torch.is_autocast_cache_enabled()

    def restore(self) -> None:
        """Make them so again, whatever an interrupt left of them; nothing of what has to put them back may be running."""
        while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            if self._saving is not None and top[0] is self._saving[0]:
                break
            torch._C._autograd._pop_saved_tensors_default_hooks()
        torch.set_autocast_cache_enabled(self._caches)


class saving_for(torch.autograd.graph.saved_tensors_hooks):
    """Replace weights of `handle` among the tensors saved in this block; nothing where an enclosing block does so already."""

    def __init__(self, handle: WeightsHandle) -> None:
        # torch asks the innermost hooks only, so these pass on what is not theirs.
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._needed = outer is None or not (isinstance(outer[0], _Pack) and outer[0].handle is handle)
        super().__init__(_Pack(handle, outer), _unpack)

    def __enter__(self) -> None:
        if self._needed:
            super().__enter__()

    def __exit__(self, *args: object) -> None:
        top = torch._C._autograd._top_saved_tensors_default_hooks(True) if self._needed else None
        if top is not None and top[0] is self.pack_hook:  # else an interrupt came before they were there, or when they were gone
            super().__exit__(*args)


class _Weight:
    """A tensor over a weight's memory, or over a cast copy of all of it (`cast`): what is needed to make it again."""

    __slots__ = ("cast", "conjugate", "dtype", "handle", "negative", "offset", "piece", "size", "stride", "versions")

    def __init__(self, handle: WeightsHandle, piece: Piece, tensor: torch.Tensor, offset: int, cast: bool) -> None:
        self.handle, self.piece, self.dtype, self.cast = handle, piece, tensor.dtype, cast
        self.offset, self.size, self.stride = offset // tensor.element_size(), tensor.size(), tensor.stride()
        self.conjugate, self.negative = tensor.is_conj(), tensor.is_neg()
        version = piece.version if handle.engine is None else handle.engine.shown_version(piece)
        self.versions = (version, piece.parameter._version)  # raised by stored and by ordinary writes

    def restore(self) -> torch.Tensor:
        whole, version = self._whole()
        whole = whole.reshape(-1)
        if (version, self.piece.parameter._version) != self.versions:
            raise modified(f"{self.piece.name}, a weight of type {self.piece.dtype} and shape {list(self.piece.shape)},")
        whole = whole.to(self.dtype) if self.cast else whole.view(self.dtype)
        tensor = whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)
        tensor = torch._conj(tensor) if self.conjugate else tensor
        return torch._neg_view(tensor) if self.negative else tensor

    def _whole(self) -> tuple[torch.Tensor, int]:
        engine = self.handle.engine
        # In grad mode (create_graph) what is returned may live as long as the new graph.
        held = engine.held_view(self.piece) if engine is not None and not torch.is_grad_enabled() else None
        if held is not None:
            return held
        value = self.handle.value(self.piece)
        return value, self.piece.version  # looked at after reading: an update under way was waited for


class _Passed:
    """A tensor in the care of the hooks outside."""

    __slots__ = ("_packed", "_unpack")

    def __init__(self, unpack: Callable[[Any], torch.Tensor], packed: Any) -> None:
        self._unpack, self._packed = unpack, packed

    def restore(self) -> torch.Tensor:
        return self._unpack(self._packed)


class _Pack:
    """Called by autograd with every tensor it saves."""

    __slots__ = ("_outer", "handle")

    def __init__(self, handle: WeightsHandle, outer: tuple[Callable[..., Any], Callable[..., Any]] | None) -> None:
        self.handle, self._outer = handle, outer

    def __call__(self, tensor: torch.Tensor) -> _Weight | Kept | _Passed:
        engine = self.handle.engine
        if engine is not None and tensor.layout == torch.strided:
            if (found := engine.piece_at(tensor)) is not None:
                return _Weight(self.handle, found[0], tensor, found[1], cast=False)
            if tensor.is_floating_point() and (piece := self._cast_of(tensor, engine.pieces_in_use())) is not None:
                return _Weight(self.handle, piece, tensor, int(tensor.storage_offset()) * tensor.element_size(), cast=True)
        if self._outer is not None:
            return _Passed(self._outer[1], self._outer[0](tensor))
        return Kept(tensor)

    def _cast_of(self, tensor: torch.Tensor, pieces: list[Piece]) -> Piece | None:
        """The weight of which this is a copy in a narrower type. Compared bit by bit, because a cast of a frozen weight has no history.

        What autocast casts cannot be told otherwise: while it does, it reports itself as switched off.
        """
        size = tensor.element_size()
        count = tensor.untyped_storage().nbytes() // size
        for piece in pieces:
            wider = piece.dtype.is_floating_point and piece.dtype.itemsize > size
            if wider and piece.parameter.numel() == count == tensor.numel():
                flat, weight = tensor.as_strided((count,), (1,), 0), data_of(piece.parameter).reshape(-1)
                some = slice(0, 64)  # an activation of the same size differs at once
                if _same_bits(flat[some], weight[some]) and _same_bits(flat, weight):
                    return piece
        return None


def _same_bits(cast: torch.Tensor, weight: torch.Tensor) -> bool:
    return torch.equal(cast.view(torch.uint8), weight.to(cast.dtype).view(torch.uint8))


def _unpack(packed: _Weight | Kept | _Passed) -> torch.Tensor:
    return packed.restore()

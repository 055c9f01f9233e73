"""Catching a module that writes to its own weights while it runs.

What a forward leaves in a slot is overwritten by the next unit, so a weight that its own module changes (a norm kept below a limit, say)
would be what was stored again in the next call. Another tensor in the parameter's place and writes that count as versions are seen after
every use; writes through `.data` have a version counter of their own, and are seen where the bytes are compared with their sum.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import numpy
import torch

from torchwrap.core.tensors import data_of
from torchwrap.storage.checksum import sum64
from torchwrap.stream.units import Piece

__all__ = ["changed_bytes", "version_of", "written"]


def version_of(parameter: torch.Tensor) -> int:
    """How often the parameter was written to; -1 if that is not counted: it was made in inference mode."""
    try:
        return parameter._version
    except RuntimeError:  # `is_inference` cannot tell: such a parameter that was given ordinary data says no
        return -1


def written(shown: Iterable[tuple[Piece, torch.Tensor, int]]) -> Iterator[Piece]:
    """Pieces that no longer show what was bound to them, or were written to.

    Args:
        shown: pieces, the views bound to them, and their versions at that time.

    Cost: one address and one number each.
    """
    for piece, view, version in shown:
        address = piece.parameter.data_ptr()
        if address == view.data_ptr():
            if version_of(piece.parameter) != version:
                yield piece
        elif address != piece.absent.data_ptr() and not _same(data_of(piece.parameter), view):
            yield piece  # an equal copy loses nothing: recurrent layers lay their weights out anew for cuDNN


def changed_bytes(shown: Iterable[tuple[Piece, torch.Tensor, int]]) -> Iterator[Piece]:
    """Pieces whose bytes in a slot in host memory do not add up to what was read. Cost: one pass over them."""
    for piece, view, _ in shown:
        if piece.checksum is not None:
            # By address: operators on the view would go through whatever transform or dispatch mode the model runs under.
            memory = numpy.ctypeslib.as_array((ctypes.c_ubyte * piece.nbytes).from_address(view.data_ptr()))
            if sum64(memory.data) != piece.checksum:
                yield piece


def _same(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    return tensor.dtype == view.dtype and tensor.device == view.device and torch.equal(tensor, view)

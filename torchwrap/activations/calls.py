"""One call of a block whose activations move, or that is made again in the backward."""

from __future__ import annotations

import enum
import numbers
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchwrap.activations.buffers import Found
from torchwrap.activations.given import Given
from torchwrap.activations.kept import Kept
from torchwrap.activations.measured import storage_address
from torchwrap.activations.records import Use
from torchwrap.activations.swap import Swap
from torchwrap.core.tensors import held_bytes, storage_key
from torchwrap.stream.units import Unit

if TYPE_CHECKING:
    from torchwrap.activations.modes import Activations

__all__ = ["Recomputing", "Swapping"]


class Swapping(torch.autograd.graph.saved_tensors_hooks):
    """One call of a block whose activations move."""

    def __init__(self, swap: Swap, unit: Unit) -> None:
        weights = {storage_address(piece.parameter) for piece in unit.pieces if piece.resident}
        super().__init__(_Pack(swap, swap.begin(unit.name), weights), _unpack)
        self.__enter__()


class _Pack:
    """Called by autograd with every tensor it saves, weights in slots excepted."""

    __slots__ = ("_swap", "_use", "_weights")

    def __init__(self, swap: Swap, use: Use, weights: set[int]) -> None:
        self._swap, self._use, self._weights = swap, use, weights

    def __call__(self, tensor: torch.Tensor) -> Any:
        if (tensor.is_leaf and tensor.requires_grad) or storage_address(tensor) in self._weights:
            return Kept(tensor)
        return self._swap.pack(self._use, tensor)


class Recomputing:
    """One call of a block that will be called again in the backward."""

    def __init__(self, activations: Activations, unit: int, module: nn.Module) -> None:
        self._activations, self._unit, self._module = activations, unit, module

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call so that its activations are not kept, unless it may change its arguments."""
        foreign = next(_changeable((args, kwargs)), None)
        if foreign is not None:
            self._activations.warn_of(foreign, self._unit)
            return call(*args, **kwargs)
        measured = self._activations.measured(self._unit)
        if measured is not None:
            inputs = [x for x in args if isinstance(x, torch.Tensor)]
            measured.input_bytes = sum({storage_key(x): held_bytes(x) for x in inputs}.values())
            if inputs and inputs[0].dim() in (2, 3):
                measured.batch, measured.rows = inputs[0].shape[0], inputs[0].shape[:-1].numel()
            call = partial(measured.run, call)
        found = self._activations.buffers.found(self._module)
        given = Given(self._activations.units[self._unit].name, args, kwargs)
        return checkpoint(_Repeated(call, given, found), *args, use_reentrant=False)


class _Repeated:
    """A call that is made once in the forward, and once for each backward with the buffers and arguments that it found then."""

    def __init__(self, call: Callable[..., Any], given: Given, found: Found) -> None:
        self._call, self._given, self._found = call, given, found
        self._begun = False

    def __call__(self, *args: Any) -> Any:
        if self._begun:
            args, kwargs = self._given.again(args)
            with self._found.put_back():
                return self._call(*args, **kwargs)
        self._begun = True
        output = self._call(*args, **self._given.kwargs)
        self._found.called()
        return output


def _unpack(packed: Any) -> torch.Tensor:
    tensor: torch.Tensor = packed.restore()
    return tensor


_PLAIN = (torch.Tensor, numbers.Number, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, numpy.ndarray, type, range, slice)


def _changeable(value: object) -> Iterator[object]:
    """Objects among a call's arguments that it may change in a way that a second call would see."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _changeable(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _changeable(item)
    elif not isinstance(value, _PLAIN) and not callable(value):
        yield value

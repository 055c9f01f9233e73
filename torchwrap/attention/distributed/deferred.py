"""Attention that is not computed yet, in the place of its result, so that who projects it may compute both together, in blocks of rows.

A model's code calls an attention function, turns what it returns into rows of all heads, and calls its output projection. Tiled sums need
the projection inside the loop over rows. So the function returns a `Deferred`, which goes through that turning as it is; a layer on the
projection finds it. Whatever else touches it (a gate, a norm, an adapter) gets the attention itself, computed then, and so does the
projection afterwards: the model computes what it always did, only without overlap.

Letters: B batch, S tokens, H local heads, Dv width of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchwrap.attention.distributed.tiled import Rows
from torchwrap.core.errors import UnsupportedModelError

__all__ = ["Deferred"]

_ATTRIBUTES: tuple[Any, ...] = (Tensor.shape, Tensor.dtype, Tensor.device)
_READ = {Tensor.dim, Tensor.size, *(attribute.__get__ for attribute in _ATTRIBUTES)}
_RESHAPE = {Tensor.reshape, Tensor.view}


class Deferred(Tensor):
    """A tensor `[B, S, H, Dv]` or `[B, S, H * Dv]` without storage, which knows how to become one.

    Attributes:
        rows: the call that it stands for.
    """

    rows: Rows
    _computed: list[Tensor]

    @staticmethod
    def of(rows: Rows) -> Deferred:
        """The result of this call, `[B, S, H, Dv]`."""
        shape = (rows.q.shape[0], rows.q.shape[2], rows.q.shape[1], rows.v.shape[3])
        return _made(shape, rows, [])

    @property
    def is_computed(self) -> bool:
        """Has somebody needed the numbers?"""
        return bool(self._computed)

    def compute(self) -> Tensor:
        """The numbers, in this tensor's shape; attention is computed once."""
        if not self._computed:
            self._computed.append(self.rows.heads(0, self.rows.q.shape[2]).transpose(1, 2).contiguous())
        return self._computed[0].reshape(self.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READ:
                return func(*args, **(kwargs or {}))
            if func is Tensor.contiguous and not kwargs and len(args) == 1:
                return args[0]
            if func in _RESHAPE and isinstance(args[0], Deferred) and not kwargs:
                reshaped = args[0]._reshaped(func, args[1:])
                if reshaped is not None:
                    return reshaped
            args, kwargs = tree_map_only(Deferred, Deferred.compute, (args, kwargs or {}))
            return func(*args, **kwargs)

    def _reshaped(self, func: Any, shape: Any) -> Deferred | None:
        """The same in another of its two shapes; None if that is another shape, or none."""
        batch, tokens, heads, width = self.rows.q.shape[0], self.rows.q.shape[2], self.rows.q.shape[1], self.rows.v.shape[3]
        asked = list(shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)
        both = [batch, tokens, heads, width], [batch, tokens, heads * width]
        for one in both:
            if len(asked) == len(one) and asked.count(-1) <= 1 and all(size in (-1, real) for size, real in zip(asked, one, strict=True)):
                return _made(tuple(one), self.rows, self._computed)
        return None

    @classmethod
    def __torch_dispatch__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # Code that goes past __torch_function__. Numbers could be had here, but their gradients would be lost without a word.
        raise UnsupportedModelError(
            f"{func} was handed attention that is not computed yet, by code that passes over torch functions of tensor subclasses",
            where="Deferred",
            fix="Wrap the model with allreduce_blocks=1.",
        )


def _made(shape: tuple[int, ...], rows: Rows, computed: list[Tensor]) -> Deferred:
    made: Deferred = Tensor._make_wrapper_subclass(Deferred, shape, dtype=rows.q.dtype, device=rows.q.device)
    made.rows, made._computed = rows, computed
    return made

"""A linear layer computed one block of its weight's rows at a time, for weights that no slot can hold; see stream/tiles.py.

Forward: output columns `a:b` are the product with rows `a:b`, one tile present after another and the next ones being read meanwhile.
Backward: the gradient of the input is the sum over tiles of `gradient[:, a:b] @ W[a:b]`, each tile brought back once more; that of the
weight needs no weight, and is as large as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from torchwrap.activations.kept import modified
from torchwrap.core.tensors import data_of
from torchwrap.stream.engine import Engine
from torchwrap.stream.pieces import check_untouched
from torchwrap.stream.units import Piece
from torchwrap.weights.layers import WeightsLayer

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["TiledLayer"]


class TiledLayer(WeightsLayer):
    """Stands in for the forward of a linear layer whose weight is cut into tiles.

    Args:
        units: indices of the tiles' units, in row order.

    Shapes: x (..., K) float; returns (..., N), as `torch.nn.Linear`.
    Exactness: equal up to rounding; bit-identical where the kernel does not depend on the number of columns, see stream/tiles.py.
    Cost: one tile's output besides the whole; in backward the tiles are read once more, and nothing but the input is kept for it.
    """

    exactness: ClassVar[str] = "allclose: last bits of the linear layers that tile_above= cuts, and what follows from them"

    def __init__(self, handle: WeightsHandle | None, units: tuple[int, ...]) -> None:
        super().__init__(handle)
        self.units: tuple[int, ...] = units

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output, tile by tile; its own forward where the weight is there."""
        engine = self.handle.engine
        if engine is None or (not args and "input" not in kwargs) or len(args) + len(kwargs) != 1:
            return call(*args, **kwargs)  # nothing is away, or torch's own message about the arguments
        assert isinstance(module, nn.Linear)
        with self.handle.lock:
            if self.handle.stepping:
                self.handle.refuse_mixture()
            if self.handle.lent:
                self.handle.hide_lent()
            whole = self.whole
            if whole.resident:  # unwrapped while this thread waited for the lock
                return call(*args, **kwargs)
            check_untouched(whole)
            x = args[0] if args else kwargs["input"]
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, module.weight, module.bias)):
                return _Product.apply(x, module.weight, module.bias, self)  # type: ignore[no-untyped-call]
            return self.product(engine, x, module.bias)

    @property
    def whole(self) -> Piece:
        """The weight."""
        assert self.handle.engine is not None
        whole = self.handle.engine.units[self.units[0]].pieces[0].whole
        assert whole is not None
        return whole

    def product(self, engine: Engine, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        output: torch.Tensor | None = None
        for number in self.units:
            unit = engine.units[number]
            (tile,) = unit.pieces
            rows = slice(tile.first_row, tile.first_row + tile.shape[0])
            engine.acquire(unit)
            try:
                columns = linear(x, tile.parameter, None if bias is None else bias[rows])
            finally:
                engine.release(unit)
            if output is None:
                output = columns.new_empty((*columns.shape[:-1], self.whole.shape[0]))
            output[..., rows] = columns
        assert output is not None
        return output

    def gradient(self, outer: torch.Tensor) -> torch.Tensor:
        """`outer @ weight`, accumulated in float32 or wider. Shapes: outer (..., N); returns (..., K)."""
        engine, whole = self.handle.engine, self.whole
        assert engine is not None
        total: torch.Tensor | None = None
        for number in self.units:
            unit = engine.units[number]
            (tile,) = unit.pieces
            rows = slice(tile.first_row, tile.first_row + tile.shape[0])
            # Held and not acquired: on a separate device the backward runs in a thread that must not wait for the model's lock.
            held = not whole.resident and not tile.resident and engine.hold(unit)
            try:
                if engine.timeline is not None:
                    engine.timeline.begin("backward", unit.name)
                weight = data_of(whole.parameter)[rows] if whole.resident else self._tile(engine, tile)
                part = outer[..., rows] @ weight.to(outer.dtype)
                del weight  # a view that is alive at the end of the hold would keep the slot's memory
            finally:
                if held:
                    engine.unhold(unit)
                if engine.timeline is not None:
                    engine.timeline.end("backward", unit.name)
            total = part.to(torch.promote_types(part.dtype, torch.float32)) if total is None else total.add_(part)
        assert total is not None
        return total

    def _tile(self, engine: Engine, tile: Piece) -> torch.Tensor:
        if tile.resident:
            return data_of(tile.parameter)
        held = engine.held_view(tile)
        return engine.read(tile).to(self.handle.device) if held is None else held[0]


class _Product(torch.autograd.Function):
    """The product with gradients for all three; keeps the input if the weight wants one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: TiledLayer) -> torch.Tensor:
        engine = layer.handle.engine
        assert engine is not None
        ctx.layer, ctx.version, ctx.dtypes = layer, layer.whole.version, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(x if weight.requires_grad else None)
        return layer.product(engine, x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: TiledLayer = ctx.layer
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            whole = layer.whole
            of_x = layer.gradient(outer).to(ctx.dtypes[0])
            if whole.version != ctx.version:  # looked at after reading
                raise modified(f"{whole.name}, a weight of type {whole.dtype} and shape {list(whole.shape)},")
        rows = outer.reshape(-1, outer.shape[-1])
        if ctx.needs_input_grad[1]:
            of_weight = (rows.t() @ x.reshape(-1, x.shape[-1]).to(outer.dtype)).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(ctx.dtypes[2])
        return of_x, of_weight, of_bias, None

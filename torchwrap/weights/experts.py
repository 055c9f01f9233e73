"""Experts of which only those that tokens were routed to are read: which modules they are, and their layer.

An integration says which modules hold experts as slices of whole parameters and which argument of their forward names the experts used;
stream/routed.py reads them. Inference only: gradients need all the weights, so a unit is then fetched whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchwrap.core.integration import ExpertsRef
from torchwrap.stream.routed import ExpertGroup
from torchwrap.stream.units import UnitMap
from torchwrap.weights.layers import WeightsLayer

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["ExpertsLayer", "groups_of"]


class ExpertsLayer(WeightsLayer):
    """Tells the engine which experts a call uses, before it runs."""

    def __init__(self, handle: WeightsHandle | None, number: int, count: int, routed: Callable[..., torch.Tensor | None]) -> None:
        super().__init__(handle)
        self.number: int = number
        self.count: int = count
        self.routed: Callable[..., torch.Tensor | None] = routed

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        engine = self.handle.engine
        if engine is not None:
            engine.begin_experts(self.number, self._rows(module, args, kwargs))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._end()
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        engine = self.handle.engine
        if engine is not None:
            engine.end_experts(self.number)

    def _rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """The experts that the call uses; None for all, also where that cannot be told."""
        if torch.is_grad_enabled():
            return None
        routing = self.routed(module, args, kwargs)
        if routing is None:
            return None
        rows: list[int] = torch.unique(routing.detach().reshape(-1)).tolist()
        return rows if all(0 <= row < self.count for row in rows) else None


def groups_of(refs: list[ExpertsRef], division: UnitMap, resident: frozenset[int]) -> list[tuple[ExpertGroup, ExpertsRef]]:
    """The experts that can be read one by one: parameters that leave, of one unit, with an expert per first index.

    Others come with their unit, whole.
    """
    found = []
    for ref in refs:
        mine = {id(ref.module._parameters.get(name)) for name in ref.parameters}
        for unit in division.units:
            pieces = [
                piece
                for piece in unit.pieces
                if id(piece.parameter) in mine and piece.index not in resident and len(piece.names) == 1 and piece.shape[0] == ref.count
            ]
            if pieces and unit.kind in ("block", "leaf"):
                found.append((ExpertGroup(unit.index, frozenset(piece.index for piece in pieces), ref.count), ref))
    return found

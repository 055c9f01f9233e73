"""The layers around a block that care for its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from torchwrap.activations.calls import Recomputing, Swapping
from torchwrap.core.layer import CallState, Layer

__all__ = ["ActivationLayer", "RecomputeLayer"]


class ActivationLayer(Layer):
    """Swaps what a block saves, if its mode says so. Its owner has the model's `Activations` under that name."""

    where: Literal["inside", "outside"] = "outside"

    traceable = False
    essential = True
    owner: Any

    def __init__(self, owner: Any, unit: int) -> None:
        self.owner = owner
        self.unit: int = unit
        self._calls = CallState()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._calls.push(self.owner.activations.enter(self.unit, module))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._leave()
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        call = self._calls.pop()
        if isinstance(call, Swapping):
            call.__exit__()


class RecomputeLayer(ActivationLayer):
    """Recomputes or swaps. A layer of its own, because what it stands in for is hidden from `torch.compile`."""

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block now and again in the backward, if its mode says so."""
        running = self._calls.peek()
        return running.run(call, args, kwargs) if isinstance(running, Recomputing) else call(*args, **kwargs)

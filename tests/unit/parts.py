"""Small modules and layers for the unit tests, importable by name so that they can be pickled."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from torchwrap.core.layer import CallState, Layer


class Block(nn.Module):
    """One linear map with a nonlinearity, in a class of its own: compiled code of `torch.nn` is not a frame by itself."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return torch.tanh(self.linear(x)) * scale


class Net(nn.Module):
    """Three blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Journal(Layer):
    """Writes `<mark>.before` and so on into a shared list; raises where asked to."""

    def __init__(
        self, journal: list[str], mark: str, where: Literal["inside", "outside"] = "inside", breaks: str = "", traceable: bool = True
    ) -> None:
        self.journal, self.mark, self.where, self.breaks, self.traceable = journal, mark, where, breaks, traceable

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._note("before")
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._note("after")
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        self._note("failed")

    def _note(self, event: str) -> None:
        self.journal.append(f"{self.mark}.{event}")
        if self.breaks == event:
            raise RuntimeError(f"{self.mark} breaks in {event}")


class Times(Layer):
    """Multiplies the output; keeps state per call, so that compiled code has a stack to trace."""

    def __init__(self, factor: float, where: Literal["inside", "outside"] = "inside", traceable: bool = True) -> None:
        self.factor, self.where, self.traceable, self.state = factor, where, traceable, CallState()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.state.push(self.factor)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return output * self.state.pop()

    def failed(self, module: nn.Module, error: BaseException) -> None:
        self.state.pop()


class Instead(Layer):
    """Stands in for the module's own code: calls it and adds one."""

    def replace(self, module: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(*args, **kwargs) + 1

"""Techniques that exist for the tests only, registered through the public interface as a third party would.

`Outer` and `Inner` change nothing and write down their calls, from both slots and from two phases, so that order, copies and undo
can be observed. `Scaled` multiplies what a block returns: a layer that must be seen to take effect. `Failing` breaks while it is
being applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

import torchwrap as tw
from torchwrap.core.integration import Integration
from torchwrap.core.layer import Layer
from torchwrap.core.technique import Handle, Prepared, Technique, register

__all__ = ["Failing", "Inner", "NoteLayer", "Outer", "Scaled", "note_layers", "notes"]


class NoteLayer(Layer):
    """Writes down each call: `before`, `after` or `failed`."""

    def __init__(self, name: str, where: Literal["inside", "outside"]) -> None:
        self.name, self.where = name, where
        self.journal: list[str] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._note("before")
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._note("after")
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        self._note("failed")

    def _note(self, event: str) -> None:
        if not torch.compiler.is_compiling():  # a constant for Dynamo: nothing is traced and nothing is guarded
            self.journal.append(event)


class ScaleLayer(Layer):
    """Multiplies the output of a module by a constant."""

    name = "test_scaled"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * self.factor, *output[1:])
        return output * self.factor


@dataclass(frozen=True, kw_only=True)
class Outer(tw.Config):
    """Notes calls of the blocks and the root outside checkpointing and torch hooks."""

    technique: ClassVar[str] = "test_outer"


@dataclass(frozen=True, kw_only=True)
class Inner(tw.Config):
    """Notes calls of the blocks and the root inside checkpointing."""

    technique: ClassVar[str] = "test_inner"


@dataclass(frozen=True, kw_only=True)
class Scaled(tw.Config):
    """Multiplies the output of every block."""

    technique: ClassVar[str] = "test_scaled"
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Failing(tw.Config):
    """Raises while it is attached, after it prepared without complaint."""

    technique: ClassVar[str] = "test_failing"


def _blocks(model: nn.Module, integration: Integration) -> list[tuple[str, nn.Module]]:
    found = integration.blocks(model) or []
    unique = {id(block.module): (block.fqn, block.module) for block in found}
    return list(unique.values())


class _Noting(Technique[Any]):
    exactness = "bit-identical"
    trains = True
    version = 1
    where: Literal["inside", "outside"] = "inside"

    def prepare(self, model: nn.Module, config: Any, integration: Integration) -> Prepared[Any]:
        places = [*_blocks(model, integration), ("", model)]
        return Prepared(config=config, layers=[(fqn, module, NoteLayer(self.name, self.where)) for fqn, module in places])


class _OuterTechnique(_Noting):
    name, phase, config_class, where = "test_outer", 10, Outer, "outside"


class _InnerTechnique(_Noting):
    name, phase, config_class, where = "test_inner", 45, Inner, "inside"


class _ScaledTechnique(Technique[Scaled]):
    name, phase, version, config_class, exactness, trains = "test_scaled", 30, 1, Scaled, "lossy", True

    def prepare(self, model: nn.Module, config: Scaled, integration: Integration) -> Prepared[Scaled]:
        return Prepared(config=config, layers=[(fqn, module, ScaleLayer(config.factor)) for fqn, module in _blocks(model, integration)])


class _FailingTechnique(Technique[Failing]):
    name, phase, version, config_class, exactness, trains = "test_failing", 60, 1, Failing, "bit-identical", True

    def prepare(self, model: nn.Module, config: Failing, integration: Integration) -> Prepared[Failing]:
        return Prepared(config=config, layers=[("", model, NoteLayer(self.name, "inside"))])

    def attach(self, model: nn.Module, prepared: Prepared[Failing]) -> Handle:
        raise OSError("the disk went away")


outer = register(_OuterTechnique())
inner = register(_InnerTechnique())
scaled = register(_ScaledTechnique())
failing = register(_FailingTechnique())


def note_layers(model: nn.Module, name: str) -> list[NoteLayer]:
    """The noting layers of technique `name` on every module of the model, in module order."""
    from torchwrap.core.swap import layers_of

    return [layer for module in model.modules() for layer in layers_of(module) if layer.name == name]


def notes(model: nn.Module, name: str) -> list[str]:
    """Everything the layers of technique `name` wrote down, module by module."""
    return [event for layer in note_layers(model, name) for event in layer.journal]

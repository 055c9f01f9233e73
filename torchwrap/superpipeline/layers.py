"""What `superpipeline` attaches: the layers of the streaming engine, with a clock around each block while one pass is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from torchwrap.weights.layers import RootLayer, UnitLayer

if TYPE_CHECKING:
    from torchwrap.superpipeline.handle import SuperpipelineHandle

__all__ = ["BlockLayer", "WindowLayer"]


class WindowLayer(RootLayer):
    """On the root: a pass begins and ends, and after the measured one, in training before the one that follows it, the knobs may change."""

    owner: SuperpipelineHandle

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.owner.before_pass(module)
        result = super().before(module, args, kwargs)
        self.owner.pass_begun(module)
        return result

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with self.owner.lock:
            output = super().after(module, args, kwargs, output)
            self.owner.pass_ended(module, whole=True)
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        with self.owner.lock:
            super().failed(module, error)
            self.owner.pass_ended(module, whole=False)


class BlockLayer(UnitLayer):
    """On a block."""

    owner: SuperpipelineHandle

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        meter = self.owner.meter if self.where == "outside" else None
        if meter is None or not meter.running:
            return super().before(module, args, kwargs)
        meter.fetching()
        result = super().before(module, args, kwargs)
        meter.computing(self.unit)
        return result

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        meter = self.owner.meter if self.where == "outside" else None
        if meter is not None and meter.running:
            meter.computed(self.unit)
        return super().after(module, args, kwargs, output)

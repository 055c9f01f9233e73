"""What `superpipeline` attaches besides the layers of the streaming engine: before a pass the knobs may change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from torchwrap.weights.layers import RootLayer

if TYPE_CHECKING:
    from torchwrap.superpipeline.handle import SuperpipelineHandle

__all__ = ["WindowLayer"]


class WindowLayer(RootLayer):
    """On the root: in training the knobs change before the pass that follows the measured one; else the end of that sets them."""

    owner: SuperpipelineHandle

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.owner.before_pass(module)
        return super().before(module, args, kwargs)

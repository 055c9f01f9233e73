"""torchwrap's knowledge of torchvision: which modules of its networks are the repeated blocks, and how windowed attention is reached.

The networks differ in how they nest their blocks (`layer1` to `layer4`, stages inside `features`, an encoder), but each family builds
them from one or two block classes. So the table holds block classes, and the blocks are the outermost modules of these classes in
order of registration, which in torchvision is the order of the calls. Backbones inside detectors and segmenters are found the same way.
Importing this package imports no torchvision. Tested versions: README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.integration import AttentionRoute, BlockRef, Integration
from torchwrap.core.swap import original_class

__all__ = ["TorchvisionIntegration", "integration"]

# Network class -> classes of its blocks.
FAMILIES: dict[str, tuple[str, ...]] = {
    "ResNet": ("BasicBlock", "Bottleneck"),  # also ResNeXt and wide ResNets
    "EfficientNet": ("MBConv", "FusedMBConv"),
    "ConvNeXt": ("CNBlock",),
    "MobileNetV2": ("InvertedResidual",),
    "MobileNetV3": ("InvertedResidual",),
    "MNASNet": ("_InvertedResidual",),
    "ShuffleNetV2": ("InvertedResidual",),
    "RegNet": ("ResBottleneckBlock",),
    "DenseNet": ("_DenseLayer",),
    "VisionTransformer": ("EncoderBlock",),
    "SwinTransformer": ("SwinTransformerBlock", "SwinTransformerBlockV2"),
    "MaxVit": ("MaxVitLayer",),
}

BLOCKS = frozenset(name for names in FAMILIES.values() for name in names)


class TorchvisionIntegration(Integration):
    """Answers the core's questions about torchvision models; see `torchwrap.core.Integration` for each method."""

    name = "torchvision"
    tested: ClassVar[dict[str, tuple[str, str]]] = {"torchvision": ("0.28", "0.28")}

    def matches(self, model: nn.Module) -> bool:
        """True if the model's class, or one it derives from, is defined in torchvision."""
        return any(kind.__module__.startswith("torchvision.") for kind in type(model).__mro__)

    def blocks(self, model: nn.Module) -> list[BlockRef] | None:
        """Blocks of all stages in the order of their calls; stem, transitions and head are not among them.

        Networks that are plain chains of layers (VGG, AlexNet) get the generic answer, `None` where nothing repeats.

        Raises:
            UnsupportedModelError: a network of the table holds no module of its block classes.
        """
        found = list(_walk("", model))
        if found:
            return found
        for kind in original_class(model).__mro__:
            if kind.__module__.startswith("torchvision.") and kind.__name__ in FAMILIES:
                raise UnsupportedModelError(
                    f"no blocks in a {kind.__name__}: looked for modules of class {' or '.join(FAMILIES[kind.__name__])}",
                    fix="The installed torchvision may be newer than this release of torchwrap; see integrations/torchvision/README.md.",
                )
        return super().blocks(model)

    def no_split(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the block classes in this model: a residual connection is inside each."""
        return tuple(sorted({original_class(block.module).__name__ for block in _walk("", model)}))

    def attention(self, model: nn.Module, service: Any, prefix: str = "") -> AttentionRoute | None:
        """Windowed attention of Swin transformers; see `attention.route`. Other networks use `nn.MultiheadAttention`."""
        from torchwrap.integrations.torchvision import attention

        return attention.route(model, service, prefix)


def _walk(prefix: str, module: nn.Module) -> Iterator[BlockRef]:
    for name, child in module.named_children():
        here = f"{prefix}.{name}" if prefix else name
        kind = original_class(child)
        if kind.__name__ in BLOCKS and kind.__module__.startswith("torchvision."):
            yield BlockRef(fqn=here, module=child, container=prefix)
        else:
            yield from _walk(here, child)


integration: TorchvisionIntegration = TorchvisionIntegration()

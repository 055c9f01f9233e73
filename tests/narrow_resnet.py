"""A ResNet-18 of torchvision's blocks and stages, a quarter as wide, so that a test moves and compares 3 MB instead of 45 MB.

In a file of its own because pickled models name their class and importing torchvision takes a while.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

__all__ = ["NarrowResNet"]


class NarrowResNet(ResNet):
    """Stages of 16 to 128 channels; made in `__init__`, where decorators of the class look for them."""

    def __init__(self, classes: int) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(128, classes)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:  # the first stage follows a stem that is as narrow
            self.inplanes, self.conv1, self.bn1 = 16, nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16)
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)

"""torchvision networks: every block is found, in the order of the calls, without torchvision being needed to say no."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import torchvision_ops
from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.integration import integration_for
from torchwrap.integrations.torchvision import integration

torchvision_ops.ensure()
models = pytest.importorskip("torchvision.models")

# name, image side, number of blocks from the architecture's own table of depths
NETWORKS = [
    ("resnet18", 32, 8),
    ("resnet50", 32, 16),
    ("efficientnet_b0", 32, 16),
    ("convnext_tiny", 32, 18),
    ("mobilenet_v2", 32, 17),
    ("mobilenet_v3_small", 32, 11),
    ("mnasnet0_5", 32, 16),
    ("shufflenet_v2_x0_5", 32, 16),
    ("regnet_y_400mf", 32, 16),
    ("densenet121", 32, 58),
    ("vit_b_32", 32, 12),
    ("swin_t", 32, 12),
    ("swin_v2_t", 64, 12),
]


def network(name: str, side: int) -> nn.Module:
    options = {"image_size": side} if name.startswith("vit") else {}
    with torch.random.fork_rng(devices=[]):
        return models.get_model(name, weights=None, **options).eval()


@pytest.mark.parametrize(("name", "side", "count"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_blocks_are_listed_in_the_order_of_their_calls(name: str, side: int, count: int) -> None:
    model = network(name, side)
    found = integration_for(model).blocks(model)
    assert found is not None
    called: list[int] = []
    for block in found:
        block.module.register_forward_pre_hook(lambda module, args: called.append(id(module)))
    with torch.no_grad():
        model(torch.randn(1, 3, side, side))
    assert called == [id(block.module) for block in found]
    assert len(found) == count
    assert all(model.get_submodule(block.fqn) is block.module for block in found)
    assert {type(block.module).__name__ for block in found} == set(integration.no_split(model))


def test_blocks_of_a_backbone_inside_a_segmenter_are_found() -> None:
    from torchvision.models.segmentation import fcn_resnet50

    with torch.device("meta"):
        model = fcn_resnet50(weights=None, weights_backbone=None)
    found = integration.blocks(model)
    assert found is not None
    assert [block.fqn for block in found][:2] == ["backbone.layer1.0", "backbone.layer1.1"]
    assert len(found) == 16


def test_a_chain_of_plain_layers_has_no_blocks() -> None:
    with torch.device("meta"):
        model = models.get_model("alexnet", weights=None)
    assert integration.matches(model)
    assert integration.blocks(model) is None


def test_a_known_network_without_its_blocks_is_refused_with_the_classes() -> None:
    model = network("resnet18", 32)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, stage, nn.Identity())
    with pytest.raises(UnsupportedModelError, match=r"ResNet.*BasicBlock or Bottleneck"):
        integration.blocks(model)


def test_matches_by_origin_of_the_class_only() -> None:
    assert integration.matches(network("resnet18", 32))
    assert not integration.matches(nn.Conv2d(1, 1, 1))

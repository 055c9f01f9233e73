"""What is known about transformers' fused experts: which slices each way of running them uses."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from torchwrap.integrations.transformers import integration
from torchwrap.integrations.transformers.experts import routed

_KINDS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "Olmoe", "Glm4Moe")
_OTHERS = ("GptOss", "Aria", "DeepseekV4")


def _class(name: str) -> type[nn.Module]:
    """The experts class of a family."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if f"class {name}Experts(" in path.read_text():
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            kind: type[nn.Module] = getattr(module, f"{name}Experts")
            return kind
    raise LookupError(name)


def _experts(way: str, kind: str = "Mixtral", parallel: bool = False) -> nn.Module:
    """Eight experts of width 16."""
    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=16, num_local_experts=8)
    for name in ("num_experts", "n_routed_experts"):
        setattr(config, name, 8)
    config.moe_intermediate_size = 16
    config._experts_implementation = way
    torch.manual_seed(0)
    module = _class(kind)(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module._is_expert_parallel = parallel
    return module.eval()


def _call(tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 16, generator=generator)
    index = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(tokens)])  # 5, 6 and 7 are never used
    return x, index, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_slices_that_the_routing_does_not_name_are_not_used(way: str, kind: str, tokens: int) -> None:
    module, args = _experts(way, kind), _call(tokens)
    with torch.no_grad():
        expected = module(*args)
        index = routed(module, args, {})
        assert index is not None
        unused = sorted(set(range(8)) - set(index.reshape(-1).tolist()))
        for parameter in module.parameters():
            parameter[unused] = torch.nan
        assert torch.equal(module(*args), expected) and not expected.isnan().any()


def test_the_routing_is_found_by_name() -> None:
    x, index, weights = _call()
    module = _experts("grouped_mm")
    assert routed(module, (x,), {"top_k_index": index, "top_k_weights": weights}) is index
    assert routed(module, (x, index), {"top_k_weights": weights}) is index


@pytest.mark.parametrize("way", [*sorted(set(ALL_EXPERTS_FUNCTIONS) - {"grouped_mm", "batched_mm"}), "another"])
def test_other_ways_may_use_all(way: str) -> None:
    module = _experts("eager")
    module.config._experts_implementation = way
    assert routed(module, _call(), {}) is None


def test_experts_on_several_devices_may_use_all() -> None:
    assert routed(_experts("grouped_mm", parallel=True), _call(), {}) is None


def test_a_loop_of_another_kind_may_use_all() -> None:
    class Own(type(_experts("eager"))):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            return hidden_states @ self.down_proj.sum(0)

    module = _experts("eager")
    module.__class__ = Own
    assert routed(module, _call(), {}) is None
    holder = nn.ModuleDict({"experts": module})
    assert integration.experts(holder) == []


@pytest.mark.parametrize("name", _KINDS + _OTHERS)
def test_the_usual_loop_is_recognised_by_its_code(name: str) -> None:
    kind = _class(name)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module._is_expert_parallel = False
    module.config = transformers.MixtralConfig()
    module.config._experts_implementation = "eager"
    assert (routed(module, _call(), {}) is not None) == (name in _KINDS)


def test_all_modules_of_a_model_are_found() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, head_dim=16, moe_intermediate_size=16, num_hidden_layers=3, num_experts=4
    )
    config.mlp_only_layers = [1]
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    found = integration.experts(model)
    assert [ref.fqn for ref in found] == ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    assert all(ref.parameters == ("gate_up_proj", "down_proj") and ref.count == 4 for ref in found)
    assert "top_k_index" in inspect.signature(type(found[0].module).forward).parameters

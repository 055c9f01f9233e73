"""No tensor of queries times keys is made anywhere in a wrapped model, forward or backward, whatever the mask and the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchwrap as tw
from tests.integrations import tiny

LENGTH = 1024  # LENGTH ** 2 elements are five times the largest other tensor, the logits


class Largest(TorchDispatchMode):
    """Remembers the operation with the largest result."""

    elements, operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.numel() > self.elements:
                self.elements, self.operation = tensor.numel(), f"{func} {list(tensor.shape)}"
        return result


def model_of(name: str) -> Any:
    case = tiny.case(name)
    sizes = dict(case.arguments, max_position_embeddings=2 * LENGTH)
    if "sliding_window" in sizes:
        sizes["sliding_window"] = 100
    return tiny.Case(case.kind, case.config, sizes, extra=case.extra).build()


def given(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : LENGTH // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM-tied", "BertModel"])
def test_forward_and_backward(name: str, padded: bool) -> None:
    model = tw.fast_attention(model_of(name))
    with Largest() as seen:
        output = model(**given(padded))
        output[0].square().mean().backward()
    assert seen.elements < LENGTH**2, seen.operation


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["dynamic", "static"])
def test_generation(how: dict[str, Any]) -> None:
    model = tw.fast_attention(model_of("MistralForCausalLM"))
    with Largest() as seen:
        model.generate(**given(padded=True), max_new_tokens=3, do_sample=False, pad_token_id=0, **how)
    assert seen.elements < LENGTH**2, seen.operation


def test_the_models_own_attention_makes_one_so_the_test_can_fail() -> None:
    with Largest() as seen, torch.no_grad():
        model_of("LlamaForCausalLM")(**given(padded=True))
    assert seen.elements >= LENGTH**2

"""fast_attention in training with a placement technique: gradients are those of fast_attention alone, bit for bit.

What is computed again in the backward must save what was saved in the forward, also where the first forward is watched by a mode; and a
mask that has no memory may be any argument of a block.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.integrations import attending
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.tensors import held_bytes, storage_key


def gradients(model: Any, given: dict[str, Any]) -> list[torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(3)
    output = next(value for value in model(**given).to_tuple() if isinstance(value, torch.Tensor) and value.requires_grad)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


def placed(model: Any, technique: str) -> None:
    if technique == "superpipeline":
        tw.superpipeline(model, k=1)
        return
    try:
        tw.offload(model, goal="train", params="disk", device_memory=1, reserve=0)
    except tw.BudgetError as error:
        tw.offload(model, goal="train", params="disk", device_memory=error.needed, reserve=0)


@pytest.mark.parametrize("technique", ["offload", "superpipeline"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "whisper"])
def test_gradients_are_those_of_fast_attention_alone(name: str, technique: str) -> None:
    given = attending.inputs(name)
    expected = gradients(tw.fast_attention(attending.built(name).train()), given)
    for first in ("fast_attention", technique):
        model = attending.built(name).train()
        for one in (first, technique if first == "fast_attention" else "fast_attention"):
            placed(model, one) if one == technique else tw.fast_attention(model)
        for _ in range(2):
            found = gradients(model, given)
            for ours, wanted in zip(found, expected, strict=True):
                assert (ours is None) == (wanted is None) and (wanted is None or torch.equal(ours, wanted))
        tw.unwrap(model)


def test_a_mask_holds_the_bytes_of_what_it_is_made_of() -> None:
    valid = torch.ones(2, 64, dtype=torch.bool)
    masks = [TileMask.causal(2, 64, 64), TileMask(2, 64, 64, key_mask=valid), TileMask(2, 64, 64, key_mask=valid)]
    assert [held_bytes(mask) for mask in masks] == [0, 128, 128]
    assert len({storage_key(mask) for mask in masks}) == 3


def test_a_block_that_is_given_its_mask_by_place_is_measured() -> None:
    given = {"input_ids": torch.randint(3, 90, (2, 20)), "decoder_input_ids": torch.randint(3, 90, (2, 7)), "use_cache": False}
    expected = gradients(tw.fast_attention(attending.built("t5").train()), given)
    model = tw.fast_attention(attending.built("t5").train())
    placed(model, "offload")
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(gradients(model, given), expected, strict=True) if wanted is not None)

"""fast_attention on transformers models: what is undone while a call of the model is on its way."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.integrations.attending import built, inputs, tensors


def own(name: str, implementation: str) -> Any:
    model = built(name)
    model.set_attn_implementation(implementation)
    return model


def called(model: Any, name: str) -> list[torch.Tensor]:
    given = inputs(name)
    with torch.no_grad():
        return tensors(name, model(**given), given)


@pytest.mark.parametrize("where", ["other thread", "same thread"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "t5", "bert"])
@pytest.mark.filterwarnings("ignore:.*on a TileMask made the whole mask")
def test_a_padded_call_ends_with_the_models_own_attention(name: str, implementation: str, where: str) -> None:
    model, twin = tw.fast_attention(own(name, implementation)), own(name, implementation)
    expected, layers = called(twin, name), [one for one in model.modules() if "Attention" in type(one).__name__]
    inside, go_on, found = threading.Event(), threading.Event(), []

    def pause(*_: Any) -> None:  # before the second layer, whose mask was made for the technique
        inside.set()
        if where == "same thread":
            tw.unwrap(model)
        else:
            assert go_on.wait(timeout=60)

    handle = layers[len(layers) // 2].register_forward_pre_hook(pause)
    if where == "same thread":
        found = called(model, name)
    else:
        caller = threading.Thread(target=lambda: found.extend(called(model, name)))
        caller.start()
        assert inside.wait(timeout=60)
        tw.unwrap(model)
        go_on.set()
        caller.join(timeout=60)
    handle.remove()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, called(model, name), expected))


def test_a_call_of_a_model_with_flex_attention_is_not_left_midway() -> None:
    """Its mask is none that FlexAttention reads: as a tensor it would be added to the scores."""
    model = tw.fast_attention(own("llama", "flex_attention"))
    layers = [one for one in model.modules() if "Attention" in type(one).__name__]
    with ExitStack() as inside:
        handle = layers[1].register_forward_pre_hook(lambda *_: inside.enter_context(tw.disabled(model, "fast_attention")) and None)
        with pytest.raises(tw.UnsupportedModelError, match="FlexAttention"):
            called(model, "llama")
    handle.remove()
    called(model, "llama")

"""transformers models under torch.func: gradients of samples are those of the model's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import torchwrap as tw
from tests.integrations.attending import built


def parts() -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    model = built("llama")
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return model, weights, torch.randint(3, 90, (3, 1, 7), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any) -> Any:
    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return functional_call(model, weights, (ids,), {"use_cache": False, **options}).logits.square().mean()

    return loss


def test_gradients_of_samples_are_those_of_the_models_own_attention() -> None:
    model, weights, ids = parts()
    each = vmap(grad(loss_of(model)), in_dims=(None, 0))
    expected = each(weights, ids)
    tw.fast_attention(model)
    for name, found in each(weights, ids).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-5)


def test_what_has_no_rule_is_refused_by_name() -> None:
    model, weights, ids = parts()
    loss = loss_of(tw.fast_attention(model))
    with pytest.raises(tw.UnsupportedModelError, match="forward-mode"):
        jvp(lambda weights: loss(weights, ids[0]), (weights,), (weights,))
    with pytest.raises(tw.UnsupportedModelError, match="vmap maps over an attention_mask"):
        vmap(lambda ids, mask: loss(weights, ids, attention_mask=mask))(ids, torch.ones_like(ids))
    assert torch.isfinite(loss(weights, ids[0]))

"""fast_attention on torch's layers where users have written a part of them, and on what torch promises beside the numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw

B, T, E = 2, 7, 16

INPUTS = torch.randn(B, T, E, generator=torch.Generator().manual_seed(1))
HIDDEN = (torch.rand(T, T, generator=torch.Generator().manual_seed(2)) < 0.3) & ~torch.eye(T, dtype=torch.bool)
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.zeros(B, T, dtype=torch.bool)
PADDING[0, 5:] = True


class Distances(nn.TransformerEncoderLayer):
    """Adds something to the mask, which torch's layer has made one of floats."""

    def _sa_block(self, x: torch.Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False) -> torch.Tensor:
        far = -0.3 * (torch.arange(T)[None] - torch.arange(T)[:, None]).abs()
        return super()._sa_block(x, far if attn_mask is None else attn_mask + far, key_padding_mask)


class Two(nn.Module):
    """A layer of no class of torch's, which adds the mask to scores of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(E, 4, batch_first=True)

    def forward(self, src: torch.Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False) -> torch.Tensor:
        scores = src @ src.transpose(1, 2)
        for mask in (src_mask, None if src_key_padding_mask is None else src_key_padding_mask[:, None]):
            scores = scores if mask is None else scores + mask
        return src + scores.softmax(-1) @ src + self.self_attn(src, src, src, attn_mask=src_mask, need_weights=False)[0]


def layer(cls: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return cls(E, 4, 32, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("masks", [{"mask": HIDDEN}, {"mask": HIDDEN, "src_key_padding_mask": PADDING}], ids=["mask", "mask-padding"])
@pytest.mark.parametrize("make", [lambda: layer(Distances), Two], ids=["step", "layer"])
def test_code_of_a_users_layer_is_given_the_masks_that_torch_gives_it(make: Any, masks: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(make(), 2, enable_nested_tensor=False)
    expected = model(INPUTS, **masks)
    torch.testing.assert_close(tw.fast_attention(model)(INPUTS, **masks), expected, rtol=1e-5, atol=1e-5)
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 2


def test_a_step_of_a_users_is_given_masks_of_floats_in_a_layer_alone() -> None:
    model = layer(Distances)
    expected = model(INPUTS, src_mask=HIDDEN, src_key_padding_mask=PADDING)
    got = tw.fast_attention(model)(INPUTS, src_mask=HIDDEN, src_key_padding_mask=PADDING)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_that_is_told_of_a_causal_mask_it_is_not_given_says_so() -> None:
    model = tw.fast_attention(nn.TransformerEncoder(layer(), 1))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        model(INPUTS, is_causal=True)


def test_an_encoders_mask_of_integers_is_torchs_error() -> None:
    model = tw.fast_attention(nn.TransformerEncoder(layer(), 1))
    with pytest.raises(AssertionError, match="only bool and floating types"):
        model(INPUTS, mask=CAUSAL.long())


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padding", [None, PADDING], ids=["alone", "padding"])
@pytest.mark.parametrize("whole", [True, False], ids=["encoder", "layer"])
def test_a_causal_mask_that_learns_has_a_gradient(whole: bool, padding: torch.Tensor | None) -> None:
    learned, model = torch.zeros(T, T).masked_fill(CAUSAL, float("-inf")).requires_grad_(), layer()
    model(INPUTS, src_mask=learned, src_key_padding_mask=padding).square().sum().backward()
    expected, learned.grad = learned.grad, None
    options = {"src_key_padding_mask": padding, "is_causal": None if whole else True}
    model = tw.fast_attention(nn.TransformerEncoder(model, 1, enable_nested_tensor=False) if whole else model)
    model(INPUTS, learned, **options).square().sum().backward()
    torch.testing.assert_close(learned.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_results_can_be_viewed_as_torchs_can(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, 4, batch_first=batch_first).eval()
    with torch.no_grad():
        expected = model(INPUTS, INPUTS, INPUTS, need_weights=False)[0]
        got = tw.fast_attention(copy.deepcopy(model))(INPUTS, INPUTS, INPUTS, need_weights=False)[0]
    assert got.is_contiguous() and expected.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

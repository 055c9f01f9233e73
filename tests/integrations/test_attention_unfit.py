"""fast_attention on models of which a part cannot be computed by another function: refused, or left as it is, never other numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import torchwrap as tw
from tests.integrations.attending import built, settings
from torchwrap.integrations.transformers.attention import NAME, attention_forward

TEXT = dict(vocab_size=99, pad_token_id=0, eos_token_id=2)
# Five keys of 24 are chosen.
SPARSE = dict(
    TEXT, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, max_position_embeddings=64, index_n_heads=2, index_head_dim=8, index_topk=5,
)  # fmt: skip
PEGASUS = dict(
    TEXT, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, block_size=4, num_random_blocks=1, max_position_embeddings=128,
)  # fmt: skip
INFORMER = dict(
    prediction_length=6, context_length=12, input_size=1, num_time_features=1, d_model=16, encoder_layers=2, decoder_layers=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, lags_sequence=[1, 2], dropout=0.0,
)  # fmt: skip
# A bias of compressed keys, 0 and -inf, is joined to the mask.
COMPRESSED = dict(
    TEXT, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
    q_lora_rank=16, o_lora_rank=8, o_groups=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, index_n_heads=2,
    index_head_dim=8, index_topk=4, sliding_window=4, max_position_embeddings=64,
)  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
GIT = dict(
    TEXT, vision_config=VISION, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64
)

REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DeepseekV32Attention": ("DeepseekV32ForCausalLM", "DeepseekV32Config", SPARSE),
    "GlmMoeDsaAttention": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", SPARSE),
    "DeepseekV4Attention": ("DeepseekV4ForCausalLM", "DeepseekV4Config", COMPRESSED),
    "HYV4Attention": ("HYV4ForCausalLM", "HYV4Config", SPARSE),
    "BigBirdPegasusEncoderAttention": ("BigBirdPegasusModel", "BigBirdPegasusConfig", dict(PEGASUS, attention_type="original_full")),
    "InformerProbSparseAttention": ("InformerModel", "InformerConfig", INFORMER),
}


def make(model: str, config: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def words(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("part", REFUSED)
def test_refused_by_the_name_of_the_module_before_anything_is_touched(part: str) -> None:
    model = make(*REFUSED[part])
    before = settings(model)
    with pytest.raises(tw.UnsupportedModelError, match=part) as caught:
        tw.fast_attention(model)
    assert model.get_submodule(caught.value.where) is not model and "other parts" in caught.value.fix
    assert settings(model) == before and tw.wrappers_of(model) == {}


def test_a_module_around_it_is_refused_and_its_other_model_can_be_wrapped() -> None:
    both = nn.ModuleDict({"dense": built("llama"), "sparse": make(*REFUSED["DeepseekV32Attention"])})
    with pytest.raises(tw.UnsupportedModelError, match="DeepseekV32Attention hides") as caught:
        tw.fast_attention(both)
    assert caught.value.where == "sparse.model.layers.0.self_attn" and NAME not in settings(both)
    tw.fast_attention(both["dense"])
    assert set(settings(both["dense"])) == {NAME} and NAME not in settings(both["sparse"])


@pytest.mark.filterwarnings("ignore:aten.select.int on a TileMask")
def test_a_choice_of_keys_that_the_eager_function_ignores_is_an_error_in_the_call() -> None:
    model = make(*REFUSED["DeepseekV32Attention"])
    model.config._attn_implementation_internal = NAME  # as a user may set it
    with pytest.raises(tw.UnsupportedModelError, match="indices"), torch.no_grad():
        model(input_ids=words())
    q = torch.ones(1, 4, 3, 8)
    with pytest.raises(tw.UnsupportedModelError, match="block_indices"):
        attention_forward(built("llama").model.layers[0].self_attn, q, q, q, None, block_indices=q)


@pytest.mark.filterwarnings("ignore:fast_attention leaves calls")
def test_a_text_model_that_adds_its_mask_stays_and_its_vision_is_served() -> None:
    model, given = make("GitForCausalLM", "GitConfig", GIT), dict(input_ids=words(9), pixel_values=torch.ones(2, 3, 8, 8))
    twin, before = copy.deepcopy(model), settings(model)
    with pytest.warns(tw.TorchwrapWarning, match="GitSelfAttention adds"):
        tw.fast_attention(model)
    with torch.no_grad():
        ours, theirs = model(**given).logits, twin(**given).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        given["input_ids"][:, -1] = 7
        torch.testing.assert_close(model(**given).logits[:, :-1], ours[:, :-1], rtol=0, atol=1e-6)
        weights = model(**given, output_attentions=True).attentions
        for got, expected in zip(weights, twin(**given, output_attentions=True).attentions, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    served = tw.handle_of(model, "fast_attention").stats()["served"]
    assert served and all("image_encoder" in key for key in served)
    tw.unwrap(model)
    assert settings(model) == before


def test_settings_that_forbid_leaving_calls_forbid_leaving_a_part() -> None:
    with pytest.raises(tw.UnsupportedModelError, match="GitSelfAttention adds"):
        tw.fast_attention(make("GitForCausalLM", "GitConfig", GIT), fallback="error")

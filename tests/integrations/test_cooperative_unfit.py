"""cache="cooperative" on models whose attention does something of its own with keys and values: refused before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.integrations import attending, tiny
from tests.integrations.test_cooperative_generation import HALF, OPTIONS, measured, no_gathering, prompt

__all__ = ["measured", "no_gathering"]

GPT = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
BART = dict(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip
WHISPER = dict(attending.WHISPER, encoder_attention_heads=2, max_target_positions=64)

CHANGED = {
    "DiffLlamaAttention": tiny.Case("DiffLlamaForCausalLM", "DiffLlamaConfig", attending.TEXT),
    "DogeAttention": tiny.Case("DogeForCausalLM", "DogeConfig", attending.TEXT),
    "JetMoeAttention": tiny.Case(
        "JetMoeForCausalLM", "JetMoeConfig", dict(attending.TEXT, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    ),
}
GEMMA3N = dict(
    attending.TEXT, num_hidden_layers=4, head_dim=8, intermediate_size=[48, 48, 48, 48], hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=99, num_kv_shared_layers=0, laurel_rank=8, altup_num_inputs=2, sliding_window=8,
    activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
OTHER_SIZES = {
    "bart": tiny.Case("BartForCausalLM", "BartConfig", BART),
    "whisper": tiny.Case("WhisperForCausalLM", "WhisperConfig", WHISPER),
}
GEMMA = tiny.Case("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N)


@pytest.mark.filterwarnings("ignore:aten.where.self on a TileMask")
@pytest.mark.parametrize("part", CHANGED)
def test_keys_that_are_computed_with_before_attention_are_refused_when_wrapped(part: str) -> None:
    model = CHANGED[part].build()
    before, known = attending.settings(model), set(model.__dict__)
    with pytest.raises(tw.UnsupportedModelError, match=f"{part} computes with the keys and values") as caught:
        tw.fast_attention(model, **HALF)
    assert type(model.get_submodule(caught.value.where)).__name__ == part and 'cache="arena"' in caught.value.fix
    assert attending.settings(model) == before and set(model.__dict__) == known and not tw.wrappers_of(model)
    plain = CHANGED[part].build().generate(**prompt(), **OPTIONS)
    assert torch.equal(tw.fast_attention(model).generate(**prompt(), **OPTIONS), plain)


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_decoders_with_other_heads_than_the_encoder_beside_them_are_planned_as_they_are(name: str, no_gathering: None) -> None:
    plain, model = OTHER_SIZES[name].build(), tw.fast_attention(OTHER_SIZES[name].build(), **HALF)
    found = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain.generate(**prompt(), **OPTIONS))
    assert found.past_key_values.plan.shape.kv_heads == 4 and found.past_key_values.plan.host_bytes


def test_a_config_that_says_other_heads_than_the_model_has_is_refused_when_wrapped() -> None:
    case: Any = tiny.Case("GPTBigCodeForCausalLM", "GPTBigCodeConfig", dict(GPT, multi_query=True, num_key_value_heads=2))
    model = case.build()
    with pytest.raises(tw.UnsupportedModelError, match="GPTBigCodeAttention has 1 key heads of 8, and the config says 2 of 8") as caught:
        tw.fast_attention(model, **HALF)
    assert caught.value.where == "transformer.h.0.attn" and not tw.wrappers_of(model)


def test_a_width_for_each_layer_is_planned_for(no_gathering: None) -> None:
    plain, model = GEMMA.build(), tw.fast_attention(GEMMA.build(), **HALF)
    found = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain.generate(**prompt(), **OPTIONS)) and found.past_key_values.plan.host_bytes

"""The smallest model of every transformers family that still has several blocks, and one input for each.

One row per class: config class, its arguments, and the kind of input. Sizes are chosen so that a whole folder of tests builds, saves and
loads each of them in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests import torchvision_ops

__all__ = ["CASES", "Case", "case"]

torchvision_ops.ensure()

VOCABULARY, IMAGE_TOKEN = 99, 98

_TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
_HEAD8 = dict(_TEXT, head_dim=8)
_BERT = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0)
_GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
_T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
_IMAGE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8)
_CLIP = dict(
    text_config=dict(_BERT, max_position_embeddings=64, eos_token_id=2, projection_dim=16),
    vision_config=dict(_IMAGE, projection_dim=16),
    projection_dim=16,
)
_LLAVA = dict(
    vision_config=dict(_IMAGE, model_type="clip_vision_model", projection_dim=16), text_config=dict(_TEXT, model_type="llama"),
    image_token_index=IMAGE_TOKEN,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One class: `build()` makes it with the same numbers every time, `inputs()` are the keywords of one forward."""

    kind: str
    config: str
    arguments: dict[str, Any]
    input: str = "text"
    blocks: int = 3
    containers: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kind + ("-tied" if self.extra.get("tie_word_embeddings") else "")

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        import transformers

        config = getattr(transformers, self.config)(**{**self.arguments, **self.extra})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = getattr(transformers, self.kind)(config)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.05)  # biases and norms, too: a swapped pair must show
        return model.to(dtype).eval() if dtype else model.eval()

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(3, 90, (2, 7), generator=generator)
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        if self.input == "text":
            return {"input_ids": ids}
        if self.input == "seq2seq":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
        if self.input == "image":
            return {"pixel_values": pixels}
        if self.input == "both":
            return {"input_ids": ids, "pixel_values": pixels}
        image = torch.full((2, 10 if self.input == "llava_next" else 4), IMAGE_TOKEN)
        inputs = {"input_ids": torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1), "pixel_values": pixels}
        if self.input == "llava_next":
            inputs["pixel_values"] = torch.stack([pixels, pixels.flip(-1)], dim=1)
            inputs["image_sizes"] = torch.tensor([[16, 16], [16, 16]])
        if self.input == "gemma3":
            inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
        return inputs


_TIED = dict(tie_word_embeddings=True)
_GEMMA3_VLM = dict(
    text_config=dict(_HEAD8, sliding_window=8, tie_word_embeddings=True), vision_config=dict(_IMAGE, model_type="siglip_vision_model"),
    mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN,
)  # fmt: skip

CASES: tuple[Case, ...] = (
    Case("LlamaForCausalLM", "LlamaConfig", _TEXT, containers=("model.layers",)),
    Case("LlamaForCausalLM", "LlamaConfig", _TEXT, containers=("model.layers",), extra=_TIED),
    Case("LlamaModel", "LlamaConfig", _TEXT, containers=("layers",)),
    Case("LlamaForSequenceClassification", "LlamaConfig", _TEXT, containers=("model.layers",)),
    Case("LlamaForQuestionAnswering", "LlamaConfig", _TEXT, containers=("transformer.layers",)),
    Case("MistralForCausalLM", "MistralConfig", dict(_TEXT, sliding_window=4), containers=("model.layers",)),
    Case("Qwen2ForCausalLM", "Qwen2Config", _TEXT, containers=("model.layers",), extra=_TIED),
    Case("Qwen3ForCausalLM", "Qwen3Config", _HEAD8, containers=("model.layers",), extra=_TIED),
    Case("GemmaForCausalLM", "GemmaConfig", _HEAD8, containers=("model.layers",), extra=_TIED),
    Case("Gemma2ForCausalLM", "Gemma2Config", dict(_HEAD8, sliding_window=4), containers=("model.layers",), extra=_TIED),
    Case("Gemma3ForCausalLM", "Gemma3TextConfig", dict(_HEAD8, sliding_window=4), containers=("model.layers",), extra=_TIED),
    Case(
        "Gemma3ForConditionalGeneration", "Gemma3Config", _GEMMA3_VLM, "gemma3", 6,
        ("model.vision_tower.encoder.layers", "model.language_model.layers"), _TIED,
    ),
    Case("Phi3ForCausalLM", "Phi3Config", _TEXT, containers=("model.layers",)),
    Case("MixtralForCausalLM", "MixtralConfig", dict(_TEXT, num_local_experts=4), containers=("model.layers",)),
    Case(
        "OPTForCausalLM", "OPTConfig", dict(_BERT, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
        containers=("model.decoder.layers",), extra=_TIED,
    ),
    Case("GPT2LMHeadModel", "GPT2Config", _GPT, containers=("transformer.h",), extra=_TIED),
    Case("GPT2Model", "GPT2Config", _GPT, containers=("h",)),
    Case(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", dict(_BERT, max_position_embeddings=64, tie_word_embeddings=False),
        containers=("gpt_neox.layers",),
    ),
    Case(
        "BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
        containers=("transformer.h",), extra=_TIED,
    ),
    Case(
        "FalconForCausalLM", "FalconConfig", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
        containers=("transformer.h",), extra=_TIED,
    ),
    Case("T5ForConditionalGeneration", "T5Config", _T5, "seq2seq", 6, ("encoder.block", "decoder.block"), _TIED),
    Case("T5Model", "T5Config", _T5, "seq2seq", 6, ("encoder.block", "decoder.block")),
    Case("T5EncoderModel", "T5Config", _T5, containers=("encoder.block",)),
    Case("BertModel", "BertConfig", _BERT, containers=("encoder.layer",)),
    Case("BertForMaskedLM", "BertConfig", _BERT, containers=("bert.encoder.layer",), extra=_TIED),
    Case("BertForSequenceClassification", "BertConfig", _BERT, containers=("bert.encoder.layer",)),
    Case(
        "AlbertForMaskedLM", "AlbertConfig", dict(_BERT, embedding_size=16, num_hidden_groups=1, inner_group_num=2), blocks=2,
        containers=("albert.encoder.albert_layer_groups.0.albert_layers",), extra=_TIED,
    ),
    Case(
        "AlbertModel", "AlbertConfig", dict(_BERT, embedding_size=16, num_hidden_layers=4, num_hidden_groups=2), blocks=2,
        containers=("encoder.albert_layer_groups.0.albert_layers", "encoder.albert_layer_groups.1.albert_layers"),
    ),
    Case("ViTModel", "ViTConfig", _IMAGE, "image", containers=("layers",)),
    Case("ViTForImageClassification", "ViTConfig", _IMAGE, "image", containers=("vit.layers",)),
    Case("CLIPModel", "CLIPConfig", _CLIP, "both", 6, ("vision_model.encoder.layers", "text_model.encoder.layers")),
    Case("CLIPTextModel", "CLIPTextConfig", _CLIP["text_config"], containers=("encoder.layers",)),
    Case("CLIPVisionModelWithProjection", "CLIPVisionConfig", _CLIP["vision_config"], "image", containers=("vision_model.encoder.layers",)),
    Case(
        "LlavaForConditionalGeneration", "LlavaConfig", _LLAVA, "llava", 6,
        ("model.vision_tower.encoder.layers", "model.language_model.layers"),
    ),
    Case(
        "LlavaNextForConditionalGeneration", "LlavaNextConfig", dict(_LLAVA, image_grid_pinpoints=[[16, 16]]), "llava_next", 6,
        ("model.vision_tower.encoder.layers", "model.language_model.layers"),
    ),
    # Families of no table: found by attribute names and _no_split_modules.
    Case("StableLmForCausalLM", "StableLmConfig", _TEXT, containers=("model.layers",)),
    Case("CohereForCausalLM", "CohereConfig", _TEXT, containers=("model.layers",), extra=_TIED),
    Case(
        "DistilBertModel", "DistilBertConfig", dict(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=3, n_heads=4),
        containers=("transformer.layer",),
    ),
    Case(
        "BartForConditionalGeneration", "BartConfig",
        dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, scale_embedding=True),
        "seq2seq", 6, ("model.encoder.layers", "model.decoder.layers"), _TIED,
    ),
)  # fmt: skip


def case(name: str) -> Case:
    """The row of that name: the class, with `-tied` where the head is tied."""
    return next(row for row in CASES if row.name == name)

"""Tiny transformers models of every kind of attention, with inputs and an eager twin of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.integrations import tiny
from torchwrap.attention.masks.mask import TileMask

__all__ = [
    "FAMILIES", "GENERATING", "HOW", "LENGTH", "TEXT", "built", "eager", "every_family", "inputs", "no_materialisation", "prompt",
    "settings", "tensors",
]

TEXT, LENGTH = tiny._TEXT, 12
WHISPER = dict(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip
OSS = dict(tiny._HEAD8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
SWIN = dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2)

FAMILIES = {
    "llama": tiny.case("LlamaForCausalLM"),
    "mistral": tiny.case("MistralForCausalLM"),
    "qwen2": tiny.Case("Qwen2ForCausalLM", "Qwen2Config", dict(TEXT, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "gemma2": tiny.case("Gemma2ForCausalLM-tied"),
    "gemma3": tiny.case("Gemma3ForCausalLM-tied"),
    "gpt_oss": tiny.Case("GptOssForCausalLM", "GptOssConfig", OSS),
    "gpt2": tiny.case("GPT2LMHeadModel-tied"),
    "t5": tiny.case("T5ForConditionalGeneration-tied"),
    "bert": tiny.case("BertModel"),
    "vit": tiny.case("ViTModel"),
    "swin": tiny.Case("SwinModel", "SwinConfig", SWIN, "image"),
    "whisper": tiny.Case("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "speech"),
    "llava": tiny.case("LlavaForConditionalGeneration"),
    "gemma3-vision": tiny.case("Gemma3ForConditionalGeneration-tied"),
}
GENERATING = ("llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt_oss", "gpt2", "t5", "whisper", "llava")

every_family = pytest.mark.parametrize("name", FAMILIES)


def built(name: str) -> Any:
    return FAMILIES[name].build()


def eager(name: str) -> Any:
    model = built(name)
    model.set_attn_implementation("eager")
    return model


def inputs(name: str) -> dict[str, Any]:
    """One batch; texts have a first row padded on the left."""
    case = FAMILIES[name]
    if case.input == "speech":
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(3, 90, (2, 5), generator=generator)
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": ids}
    given = case.inputs()
    if case.input == "text":
        given["input_ids"] = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(5))
        given["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        given["attention_mask"][0, :3] = 0
    return given


def tensors(name: str, output: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """What a model returned, without the rows of padding."""
    found = [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]
    mask = given.get("attention_mask")
    if mask is not None:
        found = [value[mask.bool()] if value.shape[:2] == mask.shape else value for value in found]
    return found


def prompt(name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs(name).items() if not key.startswith("decoder_")}


@contextmanager
def no_materialisation() -> Iterator[None]:
    before = TileMask.materialisations
    yield
    assert TileMask.materialisations == before


HOW = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no-cache": {"use_cache": False},
}


def settings(model: Any) -> list[Any]:
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [getattr(config, "_attn_implementation_internal", None) for config in configs.values()]

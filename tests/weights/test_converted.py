"""Checkpoints that a loader converts: the weights lie where the loader would have put them, so results keep their last bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import torchwrap

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("seed", range(3))
def test_fused_experts_from_a_folder(seed: int, tmp_path: Path) -> None:
    """A float32 shape whose products differ in their last bits when experts lie at another address modulo 64."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        num_local_experts=4,
        intermediate_size=96,
    )
    transformers.MixtralForCausalLM(config).eval().save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    total = sum(parameter.nbytes for parameter in plain.parameters())
    wrapped = torchwrap.offload.from_pretrained(tmp_path, device_memory=int(total * 0.8))
    with torch.no_grad():
        for ids in (torch.arange(1, 9)[None], torch.tensor([[5]])):
            assert torch.equal(wrapped(ids).logits, plain(ids).logits)


def test_another_dtype_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=72, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=101, intermediate_size=136
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    total = sum(parameter.nbytes for parameter in plain.parameters())
    wrapped = torchwrap.offload.from_pretrained(tmp_path, dtype=torch.float32, device_memory=int(total * 0.7))
    away = [piece for piece in torchwrap.handle_of(wrapped, "offload").pieces if not piece.resident]
    assert away and all(piece.residue == 0 for piece in away)
    with torch.no_grad():
        for ids in (torch.arange(1, 9)[None], torch.tensor([[5]])):
            assert torch.equal(wrapped(ids).logits, plain(ids).logits)

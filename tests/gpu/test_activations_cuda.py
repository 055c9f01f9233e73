"""Activations with a real device: moved to page-locked memory or disk and back, they give the bits of a resident model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw

pytest.importorskip("transformers")


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, attention_dropout=0.1
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).train()


def _step(model: Any, ids: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("params", ["device", "host"])
@pytest.mark.parametrize("mode", ["recompute", "host", "disk", "auto"])
def test_steps_on_a_device(mode: str, params: str) -> None:
    ids = torch.randint(3, 2048, (4, 256), generator=torch.Generator().manual_seed(1)).cuda()
    plain = _llama().cuda()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected = [_step(plain, ids, seed) for seed in range(3)]
        model = tw.offload(_llama().cuda(), params=params, activations=mode)
        losses = [_step(model, ids, seed) for seed in range(3)]
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    tw.unwrap(model)


@pytest.mark.parametrize("mode", ["recompute", "host", "disk"])
def test_less_device_memory_is_taken(mode: str) -> None:
    ids = torch.randint(3, 2048, (8, 512), generator=torch.Generator().manual_seed(1)).cuda()
    model = _llama().cuda()
    peaks = []
    for wrapped in (False, True):
        if wrapped:
            tw.offload(model, params="device", activations=mode)
        for seed in range(2):
            model.zero_grad()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            _step(model, ids, seed)
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert peaks[1] < 0.6 * peaks[0]
    tw.unwrap(model)

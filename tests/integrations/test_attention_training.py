"""fast_attention under transformers' Trainer: the loss of every step is that of eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.integrations.training import Data, arguments

pytestmark = pytest.mark.slow

STEPS = 30


def model_of(implementation: str, dropout: float = 0.0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, attention_dropout=dropout, pad_token_id=0, attn_implementation=implementation,
        )  # fmt: skip
        return LlamaForCausalLM(config).train()


def losses(model: Any, folder: Path, **fields: Any) -> list[float]:
    from transformers import Trainer

    trainer = Trainer(model=model, args=arguments(folder, max_steps=STEPS, **fields), train_dataset=Data())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_thirty_steps_have_the_losses_of_eager_attention(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = tw.fast_attention(model_of("sdpa"))
    ours = losses(model, tmp_path / "ours", **fields)
    theirs = losses(model_of("eager"), tmp_path / "eager", **fields)
    assert len(ours) == STEPS
    assert theirs[-1] < theirs[0] - 0.1, "nothing was learnt"
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) >= STEPS * 3


def test_dropout_of_attention_trains(tmp_path: Path) -> None:
    ours = losses(tw.fast_attention(model_of("sdpa", dropout=0.3)), tmp_path / "ours")
    without = losses(tw.fast_attention(model_of("sdpa")), tmp_path / "without")
    assert ours != without
    assert ours[-1] < ours[0] - 0.1

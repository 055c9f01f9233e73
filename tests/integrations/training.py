"""A tiny language model trained by transformers' `Trainer`, in memory and offloaded; also run as a program that is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchwrap as tw
from tests import torchvision_ops

torchvision_ops.ensure()

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from torchwrap.integrations.transformers.callbacks import OffloadCallback, PlanCallback, optimizer_settings  # noqa: E402

__all__ = ["LR", "Data", "KillAfter", "arguments", "history", "killed", "llama", "offloaded", "optimizer_of", "trainer_of"]

LR = 1e-2


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sentences of 8 tokens, always the same."""

    def __init__(self, count: int = 14) -> None:
        self.ids = torch.randint(3, 99, (count, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Three blocks, dropout in attention; equal weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, tie_word_embeddings=tied, attention_dropout=0.1, pad_token_id=0, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype).train()


def offloaded(model: nn.Module, **fields: Any) -> Any:
    """The model with its blocks on the disk."""
    return tw.offload(model, **{"params": "disk", **fields})


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    """Two epochs of 7 batches: with accumulation, the last group of each is a shorter one."""
    given: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": LR, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 5, "lr_scheduler_type": "cosine",
        "warmup_steps": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**given, **fields})


def optimizer_of(model: nn.Module, args: TrainingArguments, **fields: Any) -> torch.optim.Optimizer:
    """What the trainer would make by itself, offloaded."""
    cls, settings = optimizer_settings(model, args)
    return tw.OffloadedOptimizer(model, cls, chunk=8192, **settings, **fields)


def trainer_of(model: Any, args: TrainingArguments, *callbacks: TrainerCallback, optimizer: Any = None, **fields: Any) -> Trainer:
    """A trainer that computes as every other one with the same arguments."""
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Data(),
        eval_dataset=Data(4),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
        **fields,
    )
    trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"))
    return trainer


def history(trainer: Trainer) -> list[dict[str, Any]]:
    """Loss, norm, learning rate and evaluation of every line."""
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "step")
    return [{key: line[key] for key in keys if key in line} for line in trainer.state.log_history]


class KillAfter(TrainerCallback):
    """Kills the process at an event of a step."""

    def __init__(self, step: int, event: str) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: self._maybe(state.global_step, step))

    def _maybe(self, now: int, step: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, kept: bool, step: int, event: str) -> Any:
    """What a program trains that is killed in the middle (`step` >= 0), or goes on: (model, optimizer, trainer)."""
    args = arguments(folder / "out", save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    model = offloaded(llama())
    optimizer = optimizer_of(model, args, path=folder / "run" if kept else None)
    killer = [KillAfter(step, event)] if step >= 0 else []
    return model, optimizer, trainer_of(model, args, *killer, OffloadCallback(), PlanCallback(), optimizer=optimizer)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    killed(Path(sys.argv[1]), sys.argv[2] == "kept", int(sys.argv[3]), sys.argv[4])[2].train()

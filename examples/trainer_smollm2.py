"""Fine-tune SmolLM2-135M with transformers' Trainer and the weights on the disk: clipping, accumulation, evaluation, a kill, and going on.

The first process saves a checkpoint and is killed in the step after it; the second goes on from there. At the end a Trainer without
torchwrap takes the same steps in memory, and every weight is compared. `TORCHWRAP_DATA` names a folder with `wikitext-2/valid.txt`; without
it the text is Python's own documentation. `python trainer_smollm2.py [folder]` does it with another causal language model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import torchwrap as tw
from torchwrap.demo.weights import smollm2
from torchwrap.integrations.transformers.callbacks import OffloadCallback, PlanCallback, optimizer_settings

TOKENS, STEPS, BACKWARDS = 32, 2, 2


class KilledAfter(TrainerCallback):
    """Stands for a power cut: the process is gone in the middle of the step after the given one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def arguments(folder: str, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=BACKWARDS, max_grad_norm=1.0,
        learning_rate=2e-5, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def text(folder: Path) -> list[dict[str, torch.Tensor]]:
    data = os.environ.get("TORCHWRAP_DATA")
    words = (Path(data) / "wikitext-2" / "valid.txt").read_text() if data else "\n".join(topics.values())
    ids = AutoTokenizer.from_pretrained(folder)(words[:4000], return_tensors="pt").input_ids[0]
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)]


def offloaded(folder: Path, data: Any, *, kill: bool) -> Trainer:
    model = tw.offload.from_pretrained(folder, dtype=torch.float32, params="disk")
    saving = "steps" if kill else "no"
    args = arguments("trainer-smollm2", save_strategy=saving, save_steps=1, eval_strategy="steps", eval_steps=STEPS)
    cls, settings = optimizer_settings(model, args)
    optimizer = tw.OffloadedOptimizer(model, cls, **settings)
    callbacks = [OffloadCallback(), PlanCallback(), *([KilledAfter(1)] if kill else [])]
    return Trainer(model, args, train_dataset=data[2:], eval_dataset=data[:2], optimizers=(optimizer, None), callbacks=callbacks)


given = [argument for argument in sys.argv[1:] if argument != "--first"]
folder = Path(given[0]) if given else smollm2()
data = text(folder)
if "--first" in sys.argv:
    offloaded(folder, data, kill=True).train()
killed = subprocess.run([sys.executable, __file__, "--first", *given], check=False).returncode
print(f"killed by signal {-killed} in step {STEPS}; there is {[path.name for path in Path('trainer-smollm2').iterdir()]}")
trainer = offloaded(folder, data, kill=False)
trainer.train(resume_from_checkpoint=True)
print("loss of held-out text:", round(next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry), 4))
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
Trainer(plain, arguments("trainer-in-memory", save_strategy="no"), train_dataset=data[2:]).train()
weights = plain.state_dict()
equal = killed == -signal.SIGKILL and all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
print(f"outputs equal: {equal}")
sys.exit(not equal)

"""Fine-tune SmolLM2-135M with weights and optimizer state on the disk; kill it whenever you like and go on with `--resume`.

Every step is committed. At the end the same steps are taken in memory, and every weight is compared. `TORCHWRAP_DATA` names a folder with
`wikitext-2/valid.txt`; without it the text is Python's own documentation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torchwrap as tw
from torchwrap.demo.weights import smollm2

FRACTION = 0.4
SETTINGS: dict[str, Any] = {"lr": 2e-5, "weight_decay": 0.01, "fused": True}


def batches(tokenizer: Any, tokens: int, first: int, last: int) -> Iterator[torch.Tensor]:
    """(1, T) token ids of consecutive pieces of the text, one for each step."""
    data = os.environ.get("TORCHWRAP_DATA")
    text = (Path(data) / "wikitext-2" / "valid.txt").read_text() if data else "\n".join(topics.values())
    ids = tokenizer(text[: 8 * tokens * last], return_tensors="pt").input_ids
    for step in range(first, last):
        yield ids[:, step * tokens : (step + 1) * tokens]


def train(model: Any, optimizer: torch.optim.Optimizer, data: Iterable[torch.Tensor]) -> list[float]:
    """The losses of one step per batch."""
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def resident(field: str) -> int:
    """Bytes of memory that this process has (`VmRSS`), or has had at most (`VmHWM`)."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)


arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--steps", type=int, default=3)
arguments.add_argument("--tokens", type=int, default=128, help="of a step")
arguments.add_argument("--run", type=Path, default=Path("finetune-smollm2"), help="folder of the run")
arguments.add_argument("--resume", action="store_true", help="go on with the run in the folder")
given = arguments.parse_args()
if not given.resume:
    shutil.rmtree(given.run, ignore_errors=True)

tokenizer = AutoTokenizer.from_pretrained(folder := smollm2())
model = tw.offload.from_pretrained(folder, dtype=torch.float32, params="disk").train()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, after loading
before, whole = resident("VmRSS"), 16 * model.num_parameters()  # weight, gradient and two moments of AdamW, four bytes each
optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, path=given.run, durability="step", chunk="4MiB", **SETTINGS)
for ids in batches(tokenizer, given.tokens, optimizer.steps, given.steps):
    (loss,) = train(model, optimizer, [ids])
    print(f"step {optimizer.steps}: loss {loss:.4f}, memory of training {resident('VmHWM') - before:,} bytes of {whole:,}", flush=True)
small = resident("VmHWM") - before < FRACTION * whole
trained = {name: value.clone() for name, value in model.state_dict().items()}
optimizer.close()

plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
train(plain, torch.optim.AdamW(plain.parameters(), **SETTINGS), batches(tokenizer, given.tokens, 0, given.steps))
equal = all(torch.equal(value, trained[name]) for name, value in plain.state_dict().items())
print(f"outputs equal: {equal}" if small else f"more than {FRACTION:.0%} of the memory was used")
sys.exit(not (equal and small))

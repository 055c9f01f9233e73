"""One training step of SmolLM2-135M as training_timeline.png: what is read, computed, updated and written at the same time.

Weights and the state of AdamW lie on the disk, blocks are computed again in backward. The losses are compared with those in memory.
`python training_timeline.py [steps] [tokens]` draws the last step.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torchwrap as tw
from torchwrap.demo.weights import smollm2

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 2
TOKENS = int(sys.argv[2]) if len(sys.argv) > 2 else 256
folder = smollm2()
text = AutoTokenizer.from_pretrained(folder)("\n".join(topics.values())[: 8 * TOKENS * STEPS], return_tensors="pt").input_ids


def train(model: Any, optimizer: torch.optim.Optimizer, mark: Callable[[str], object]) -> list[float]:
    """The loss of each step."""
    losses = []
    for ids in text.split(TOKENS, dim=1)[:STEPS]:
        mark("forward")
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        mark("backward")
        loss.backward()
        mark("step()")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


model = tw.offload.from_pretrained(folder, dtype=torch.float32, params="disk", activations="recompute", record=True).train()
optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=2e-5, fused=True)
timeline = tw.handle_of(model, "offload").timeline
losses = train(model, optimizer, timeline.mark)
if importlib.util.find_spec("matplotlib"):
    title = f"SmolLM2-135M, float32, {TOKENS} tokens: step {STEPS} with weights and AdamW's state on the disk"
    Path("training_timeline.png").write_bytes(timeline.picture(since=timeline.marks[-3][0], title=title))
optimizer.close()

plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
equal = losses == train(plain, torch.optim.AdamW(plain.parameters(), lr=2e-5, fused=True), lambda _: None)
print(f"outputs equal: {equal}")
sys.exit(not equal)

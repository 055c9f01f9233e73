"""Peak memory of a training step does not grow with the model: slots, chunks in flight, waiting gradients, freed tensors that are kept."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.storage.heap import FreedBlocks, refusal

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

CHILD = """
import os, sys, threading, time, torch
from torch import nn
import torchwrap as tw
from torchwrap import OffloadedOptimizer

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10

class Net(nn.Module):
    def __init__(self, depth, width=768):
        super().__init__()
        made = (nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(depth))
        self.blocks = nn.ModuleList(made)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x

# Importing takes longer than the steps: of each depth by a fork of this process, which computes nothing itself.
options = eval(sys.argv[1])
for depth in map(int, sys.argv[2:]):
    if not (child := os.fork()):
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
else:
    sys.exit(0)

small = nn.Linear(8, 8)  # what torch.optim loads when first used is not the model's
warm = torch.optim.AdamW(small.parameters())
small(torch.ones(1, 8)).sum().backward()
warm.step()
model = tw.offload(Net(depth).train(), params="disk", k=2, units=tuple(f"blocks.{i}" for i in range(depth)))
optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3, chunk="2MiB", **options)
base, peak, over = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not over.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(32, 768)).square().mean().backward()
    optimizer.step()
over.set()
print(peak - base, flush=True)
"""


def peaks_of(options: str, *depths: int) -> list[int]:
    """Bytes for each depth."""
    command = [sys.executable, "-c", CHILD, options, *map(str, depths)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(peak) for peak in done.stdout.split()]


@pytest.mark.parametrize("options", ["{}", "{'max_grad_norm': 0.5, 'gradients': 'disk'}"], ids=["overlap", "clipped"])
def test_three_times_the_model_takes_no_more_memory(options: str) -> None:
    block = 2 * 2 * 768 * 768 * 4
    small, large = peaks_of(options, 4, 12)
    # 8 more blocks are 72 MiB of weights, as much of gradients and twice as much of state.
    assert large - small < 3 * block, f"{small // MIB} MiB with 4 blocks, {large // MIB} MiB with 12"


@pytest.mark.skipif(bool(refusal()), reason=refusal())
def test_memory_of_freed_tensors_is_used_again_until_the_optimizer_is_closed() -> None:
    block = 4 * (512 * 1024 + 1024 * 512)  # its biases stay in memory
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512)) for _ in range(3)))
    model = tw.offload(model, params="disk", k=1, units=("0", "1", "2"))
    handle = tw.handle_of(model, "offload")
    gc.unfreeze()  # conftest.py: what was there before this file is seen again
    gc.collect()  # and what of it is garbage does not go in the middle of the test
    for left in [found for found in gc.get_objects() if type(found) is FreedBlocks]:
        left.close()  # of optimizers that other tests left open: bounds add up
    assert FreedBlocks.counts()["bytes"] == 0
    optimizer = tw.OffloadedOptimizer(model, torch.optim.SGD, lr=1e-3)
    assert not optimizer._works.freed.reason
    assert handle.predict_training(batch=1, tokens=256).kept_bytes == block // 2  # beside a block's gradients
    for _ in range(2):
        reused = FreedBlocks.counts()["reused"]
        model(torch.ones(256, 512)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert FreedBlocks.counts()["reused"] > reused
    assert 0 < FreedBlocks.counts()["bytes"] <= block + block // 2
    optimizer.close()
    assert FreedBlocks.counts()["bytes"] == 0

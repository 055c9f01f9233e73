"""Two techniques at once, saved as a plan, undone in the order that suits."""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory

import torch

import torchwrap as tw

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12))).eval()
x = torch.randn(3, 256)
plain = model(x)

tw.apply(model, [tw.Offload(device_memory="1MiB"), tw.Trace()])
wrapped = model(x)
print(tw.handle_of(model, "trace").explain().splitlines()[0])

with TemporaryDirectory() as folder:
    tw.plan_of(model).save(folder)
    plan = tw.Plan.load(folder)

tw.unwrap(model, "offload")
tw.unwrap(model, "trace")
plan.apply(model)
again = model(x)
tw.unwrap(model)

equal = torch.equal(plain, wrapped) and torch.equal(plain, again) and not tw.wrappers_of(model)
print(f"outputs equal: {equal}")
sys.exit(not equal)

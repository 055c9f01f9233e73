"""A torchvision network whose weights take turns in memory; a batch of images shares each reading. Needs torchvision."""

from __future__ import annotations

import sys

import torch

try:
    import torchvision
except (ImportError, RuntimeError) as error:
    sys.exit(f"this example needs a torchvision that fits the installed torch: {error}")

import torchwrap as tw

torch.manual_seed(0)
model = torchvision.models.vit_b_16(image_size=64, num_classes=10).eval()
images = torch.randn(4, 3, 64, 64)

with torch.inference_mode():
    plain = model(images)
    with tw.applied(model, tw.Offload(device_memory="96MiB")):
        wrapped = model(images)
        stats = tw.handle_of(model, "offload").stats()
        print(f"{stats['total_bytes'] / 2**20:.0f} MiB of weights, at most {stats['held_bytes'] / 2**20:.0f} MiB in memory")

equal = torch.equal(plain, wrapped)
print(f"outputs equal: {equal}")
sys.exit(not equal)

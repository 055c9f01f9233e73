"""A class of your own, wrapped where it is defined: every instance is offloaded, the class stays the same object."""

from __future__ import annotations

import sys

import torch

import torchwrap as tw


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


torch.manual_seed(0)
plain = Net().eval()
wrapped_class = tw.offload(Net, device_memory="4MiB")
torch.manual_seed(0)
wrapped = wrapped_class().eval()

x = torch.randn(2, 512)
with torch.inference_mode():
    equal = wrapped_class is Net and torch.equal(plain(x), wrapped(x))
print(tw.describe(wrapped))
print(f"outputs equal: {equal}")
sys.exit(not equal)

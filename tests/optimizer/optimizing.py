"""A small model to train twice, once in memory and once streamed, and comparisons of everything that comes out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import torchwrap as tw

__all__ = ["ADAM", "Net", "batch", "differences", "pair", "stepped", "trained"]

VOCABULARY = 8192
ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 5 * width + 3), nn.Linear(5 * width + 3, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """A table read by rows, three blocks with weights of odd sizes, a norm and a scale of one element that stay, a head."""

    def __init__(self, *, width: int = 33, tied: bool = False, wide: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY if wide else 64, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(3))
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, VOCABULARY if wide else 64, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x)) * self.scale
        return logits


def pair(dtype: torch.dtype = torch.float32, offload: dict[str, Any] | None = None, **options: Any) -> tuple[Net, Net]:
    """(in memory, streamed), with equal weights, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = Net(**options).to(dtype).train()
    model = copy.deepcopy(plain)
    fields = {"params": "disk"} if offload is None else offload
    return plain, tw.offload(model, units=tuple(f"blocks.{i}" for i in range(3)), **fields)


def batch(number: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """(T,) token ids, the same for equal numbers."""
    return torch.randint(0, vocabulary, (24,), generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    ids = batch(number, model.get_submodule("embedding").num_embeddings)  # type: ignore[arg-type]
    return nn.functional.cross_entropy(model(ids).float(), ids.roll(1))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterator[int] | range, accumulate: int = 1) -> list[float]:
    """The losses of some ordinary steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for micro in range(accumulate):
            loss = loss_of(model, 100 * step + micro) / accumulate
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def differences(
    plain: nn.Module, reference: torch.optim.Optimizer, model: nn.Module, optimizer: torch.optim.Optimizer, tolerated: tuple[str, ...] = ()
) -> list[str]:
    """What is not equal in every bit: parameters, state, format of the state."""
    found = []
    with tw.core.tensors(model) as real:
        found += [name for name, parameter in plain.named_parameters() if not torch.equal(real[name], parameter)]
    expected, got = reference.state_dict(), optimizer.state_dict()
    if expected["param_groups"] != got["param_groups"]:
        found.append(f"param_groups: {expected['param_groups']} and {got['param_groups']}")
    if expected["state"].keys() != got["state"].keys():
        found.append(f"state of {sorted(expected['state'])} and {sorted(got['state'])}")
    for number, kept in expected["state"].items():
        mine = got["state"].get(number, {})
        if list(kept) != list(mine):
            found.append(f"state {number}: {list(kept)} and {list(mine)}")
        for key, value in kept.items():
            other = mine.get(key)
            same = type(value) is type(other) and (
                not torch.is_tensor(value) or (value.dtype == other.dtype and value.shape == other.shape and torch.equal(value, other))
            )
            if not (same and (torch.is_tensor(value) or value == other)):
                found.append(f"state {number}.{key}")
    return [name for name in found if name not in tolerated]


def stepped(**options: Any) -> tuple[nn.Module, tw.OffloadedOptimizer]:
    """After a backward, before the step."""
    _, model = pair()
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, **ADAM, **options)
    loss_of(model, 0).backward()
    return model, optimizer

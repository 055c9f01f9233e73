"""The models that faults happen to, how they are wrapped, and what must hold of a model whenever no forward pass runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

import torchwrap as tw
from tests.faults.tally import same
from tests.models import by_name
from tests.weights.budgets import smallest_budget

__all__ = ["IDS", "Block", "Tower", "at_rest", "checkpoint", "lean", "llama", "probe", "right_again", "tower", "twin_of"]

IDS = torch.tensor([[3, 77, 3, 8000, 11, 5], [0, 8191, 42, 7, 7, 1]])


class Block(nn.Module):
    """Two linear maps and a residual."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Tower(nn.Module):
    """All kinds of unit in 4.5 MB: a table read by row, four blocks that differ, and a head of its own or tied to the table."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(64, 8192, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tower(**settings: Any) -> Tower:
    """A `Tower` with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return Tower(**settings).eval()


def llama() -> nn.Module:
    """A small Llama with the same weights every time."""
    return by_name("llama").build()


def probe(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The result that tells whether the model is right."""
    with torch.no_grad():
        if isinstance(model, Tower):
            return model(ids)
        inputs = by_name("llama").inputs() if hasattr(model, "lm_head") else {"input": torch.linspace(-1, 1, 192).view(3, 64)}
        return getattr(result := model(**inputs), "logits", result)


def lean(model: nn.Module, *, slots: int = 2, **fields: Any) -> nn.Module:
    """Wrap with everything on disk, at the smallest budget, with `slots` slots: no weight is in memory unless a unit is used."""
    fields = {"params": "disk", "k": slots, "io_threads": 2, **fields}
    return tw.offload(model, device_memory=smallest_budget(model, **fields), **fields)


def checkpoint(model: nn.Module, path: Path) -> Path:
    """The model's weights as a safetensors file, which `adopted` serves from."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


def twin_of(make: Callable[[], nn.Module]) -> torch.Tensor:
    """What an unwrapped model of this make gives."""
    return probe(make())


def at_rest(model: nn.Module) -> None:
    """What must hold between calls, whatever happened in them: nothing present, nothing locked, nothing switched."""
    handle = tw.handle_of(model, "offload")
    shown = [piece.name for piece in handle.pieces if not piece.resident and not _hidden(piece)]
    assert not shown, f"still showing values: {shown}"
    if handle.engine is not None:
        used = [fetch.unit.name for fetch in handle.engine._fetches.values() if fetch.users]
        assert not used, f"still in use: {used}"
        slots, free = handle.engine._slots, handle.engine._free
        assert len(free) + len(handle.engine._fetches) == len(slots) <= handle.plan.slots
        assert len({slot.index for slot in slots}) == len(slots), "two slots of one index"
    locked: list[bool] = []

    def try_lock() -> None:
        if handle.lock.acquire(timeout=5):
            handle.lock.release()
        else:
            locked.append(True)

    other = threading.Thread(target=try_lock)
    other.start()
    other.join()
    assert not locked, "the model's lock is held by nobody's call"
    assert _len_torch_dispatch_stack() == 0
    assert torch.is_autocast_cache_enabled()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def right_again(model: nn.Module, expected: torch.Tensor) -> None:
    """The fault is gone: two passes and the unwrapped model give the right result."""
    at_rest(model)
    for _ in range(2):
        assert same(probe(model), expected)
    at_rest(model)
    tw.unwrap(model)
    assert same(probe(model), expected)


def _hidden(piece: Any) -> bool:
    return piece.parameter.untyped_storage().data_ptr() == piece.absent.untyped_storage().data_ptr()

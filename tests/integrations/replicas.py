"""Two processes that average gradients over gloo: ways to make replicas of an offloaded model, those that work and those refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchwrap as tw
from tests.forks import forks
from tests.integrations.training import LR, arguments, llama, offloaded, optimizer_of, trainer_of
from torchwrap.integrations.transformers.callbacks import OffloadCallback

__all__ = ["REFUSED", "WORKING"]

Prepare = Callable[..., Any]


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=LR, chunk=8192)


def _prepared_first(model: nn.Module, prepare: Prepare) -> tuple[nn.Module, Any]:
    outer = prepare(model)
    offloaded(model)
    return outer, prepare(_adam(outer))


def _not_copied(model: nn.Module, prepare: Prepare) -> tuple[nn.Module, Any]:
    offloaded(model)
    outer = DistributedDataParallel(model, init_sync=False)
    return outer, prepare(_adam(outer))


def _in_a_part(model: nn.Module, prepare: Prepare) -> tuple[nn.Module, Any]:
    outer = prepare(model)
    offloaded(model.get_submodule("model"))
    return outer, prepare(_adam(outer))


WORKING = {"prepared first": _prepared_first, "not copied": _not_copied, "a part": _in_a_part}


def _trained(folder: Path, *callbacks: Any) -> None:
    args, model = arguments(folder, max_steps=1), offloaded(llama())
    trainer_of(model, args, *callbacks, optimizer=optimizer_of(model, args, overlap=False)).train()


REFUSED: dict[str, Callable[[Path, Prepare], object]] = {
    "plain": lambda folder, prepare: DistributedDataParallel(offloaded(llama())),
    "superpipeline": lambda folder, prepare: DistributedDataParallel(tw.superpipeline(llama(), k=2, k_prime=1)),
    "inside another": lambda folder, prepare: DistributedDataParallel(nn.ModuleDict({"base": offloaded(llama())})),
    "prepare": lambda folder, prepare: prepare(offloaded(llama())),
    "trainer": lambda folder, prepare: _trained(folder, OffloadCallback()),
    "trainer without callback": lambda folder, prepare: _trained(folder),
}


def _train(model: nn.Module, optimizer: Any, accelerator: Any, rank: int) -> list[float]:
    """Losses and norms of two steps on this process's own data."""
    found = []
    torch.manual_seed(3 + rank)  # dropout
    for step in range(2):
        ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        found += [loss.item(), accelerator.clip_grad_norm_(model.parameters(), 0.5).item()]
        optimizer.step()
        optimizer.zero_grad()
    return found


def main(rank: int, folder: Path) -> None:
    """Try all of them, and write down what came of each."""
    from accelerate import Accelerator

    # accelerate asks for the address and joins the group that is there.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    accelerator = Accelerator(cpu=True)
    plain = llama()
    expected = _train(*accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=LR)), accelerator, rank)
    done: dict[str, Any] = {"losses": expected, "processes": accelerator.num_processes}
    for name, way in WORKING.items():
        model = llama()
        outer, optimizer = way(model, accelerator.prepare)
        found = _train(outer, optimizer, accelerator, rank)
        tw.unwrap(model.get_submodule("model") if name == "a part" else model)
        equal = all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        done[name] = [found == expected, equal]
    for name, refused in REFUSED.items():
        try:
            refused(folder / str(rank), accelerator.prepare)
        except tw.TorchwrapError as error:
            done[name] = [type(error).__name__, str(error)]
    (folder / f"{rank}.json").write_text(json.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks(2, lambda rank: main(rank, Path(sys.argv[1])))

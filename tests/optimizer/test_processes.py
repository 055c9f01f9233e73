"""Two processes that average gradients: bit-identical where the model is replicated first, refused where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchwrap as tw
from tests.contract.distributed import one_process_group
from tests.optimizer.optimizing import batch, loss_of, pair

ROOT = Path(__file__).parents[2]
ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}


def train(rank: int, folder: Path) -> None:
    """One of two processes: train in memory and offloaded, and store what differs."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    differences = []
    for options in ({}, {"max_grad_norm": 0.1, "accumulate": 2}):
        plain, streamed = pair()
        model = tw.unwrap(streamed)
        outer = [DistributedDataParallel(each) for each in (plain, model)]
        tw.offload(model, units=tuple(f"blocks.{i}" for i in range(3)), params="disk")
        optimizers = [torch.optim.AdamW(plain.parameters(), lr=1e-2), tw.OffloadedOptimizer(outer[1], torch.optim.AdamW, **ADAM, **options)]
        losses: list[list[float]] = [[], []]
        for found, each, optimizer in zip(losses, outer, optimizers, strict=True):
            for step in range(3):
                for micro in range(int(options.get("accumulate", 1))):
                    loss = _loss(each, 100 * step + 10 * micro + rank)
                    loss.backward()
                if options and each is outer[0]:
                    nn.utils.clip_grad_norm_(each.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        tw.unwrap(model)
        equal = all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        differences.append((equal, losses[0] == losses[1], losses[0]))
    torch.save(differences, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _loss(model: nn.Module, number: int) -> torch.Tensor:
    ids = batch(number)
    return nn.functional.cross_entropy(model(ids).float(), ids.roll(1))


@pytest.mark.slow
def test_two_processes_compute_what_they_compute_in_memory(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.optimizer.test_processes"]
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (equal, same_losses, losses), (other_equal, other_same, other_losses) in zip(first, second, strict=True):
        assert equal and same_losses and other_equal and other_same
        assert losses != other_losses  # each process has seen its own data


def test_replicating_a_model_whose_weights_are_away_is_refused_by_torch() -> None:
    _, model = pair()
    with one_process_group(), pytest.raises(RuntimeError, match="single memory location"):
        DistributedDataParallel(model)
    assert torch.isfinite(loss_of(model, 0))


def test_gradients_on_the_disk_cannot_be_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(tw.ConfigError, match=r"several processes average them.*FSDP2"):
        tw.OffloadedOptimizer(model, torch.optim.AdamW, gradients="disk", **ADAM)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(int(sys.argv[1]), Path(sys.argv[2]))

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
from tests.forks import forks
from tests.optimizer.optimizing import batch, differences, loss_of, pair

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
    command = [sys.executable, "-m", "tests.optimizer.test_processes", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (equal, same_losses, losses), (other_equal, other_same, other_losses) in zip(first, second, strict=True):
        assert equal and same_losses and other_equal and other_same
        assert losses != other_losses  # each process has seen its own data


def test_copying_weights_that_are_away_is_refused() -> None:
    _, model = pair()
    with one_process_group():
        with pytest.raises(tw.ConflictError, match=r"offload: DistributedDataParallel would copy .*\(at embedding.weight\)"):
            DistributedDataParallel(model)
        outer = DistributedDataParallel(model, init_sync=False)
        assert torch.equal(outer(batch(0)), model(batch(0)))
        outer.module = model  # no replica is made here
    assert torch.isfinite(loss_of(model, 0))


def test_a_group_of_one_process_trains() -> None:
    plain, model = pair()
    with one_process_group():
        outer = DistributedDataParallel(plain), DistributedDataParallel(model, init_sync=False)
        optimizers = torch.optim.AdamW(plain.parameters(), lr=1e-2), tw.OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
        for each, optimizer in zip(outer, optimizers, strict=True):
            for step in range(2):
                optimizer.zero_grad()
                _loss(each, step).backward()
                optimizer.step()
    assert differences(plain, optimizers[0], model, optimizers[1]) == []


def test_weights_that_a_replica_leaves_out_may_be_away() -> None:
    plain, model = pair()
    frozen = [name for name, _ in model.named_parameters() if name != "scale"]  # as adapters on a streamed base
    for each in (plain, model):
        for name in frozen:
            each.get_parameter(name).requires_grad_(False)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(each, frozen)
    with one_process_group():
        for each in (plain, model):
            _loss(DistributedDataParallel(each), 0).backward()
    assert model.scale.grad is not None and torch.equal(model.scale.grad, plain.scale.grad)


def test_a_model_given_its_weights_back_is_replicated() -> None:
    plain, model = pair()
    other, _ = pair()
    tw.unwrap(model)
    with one_process_group():
        assert torch.equal(DistributedDataParallel(model)(batch(0)), plain(batch(0)))
        assert torch.equal(DistributedDataParallel(other)(batch(0)), plain(batch(0)))


def test_gradients_on_the_disk_cannot_be_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(tw.ConfigError, match=r"several processes average them.*FSDP2"):
        tw.OffloadedOptimizer(model, torch.optim.AdamW, gradients="disk", **ADAM)


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks(2, lambda rank: train(rank, Path(sys.argv[1])))

"""What an optimizer will take is known before there is one, if it is named; and chunks do not grow with its state."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.stream.settings import state_bytes
from torchwrap.weights import budget
from torchwrap.weights.budget import process_bytes
from torchwrap.weights.footprint import Footprint, waiting

MASTER = "master_weights(AdamW)"


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        ("AdamW", torch.float32, 8),
        ("AdamW", torch.bfloat16, 4),
        (MASTER, torch.bfloat16, 12),
        (MASTER, torch.float16, 12),
        (MASTER, torch.float32, 8),
        ("master_weights(SGD)", torch.bfloat16, 4),
        ("SGD", torch.float32, 0),
        (6, torch.bfloat16, 6),
    ],
)
def test_state_is_found_by_a_step(optimizer: int | str, dtype: torch.dtype, expected: int) -> None:
    assert state_bytes(optimizer, dtype) == expected


@pytest.mark.parametrize("optimizer", ["Best", "Optimizer", "LBFGS", "lr_scheduler", "master_weights()", "", -1])
def test_what_cannot_be_planned_for_is_refused(optimizer: int | str) -> None:
    with pytest.raises(tw.ConfigError, match=r"\(at optimizer\)"):
        tw.Offload(goal="train", optimizer=optimizer)


def test_weights_that_left_are_no_part_of_what_was_there_before(tmp_path: Path) -> None:
    """Nor do they go on taking memory as holes in the C library's heap, which is where small ones lie.

    In a process of its own: what other tests have left may grow or shrink at any moment.
    """
    code = """
import torch, torchwrap as tw
from torchwrap.weights.budget import process_bytes
for width, count in ((8, 1), (1024, 12), (192, 341)):  # with the first, what is loaded for the first model of a process
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(count)))
    before, streamed = process_bytes(), sum(parameter.nbytes for parameter in model.parameters())
    tw.offload(model, params="disk", units=tuple(str(number) for number in range(len(model))))
    print(before - tw.handle_of(model, "offload").baseline_bytes, streamed)
    tw.unwrap(model)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ)
    for line in said.stdout.splitlines()[1:]:
        left, streamed = map(int, line.split())
        assert streamed == pytest.approx(48 << 20, rel=0.01)
        assert left > 0.7 * streamed


@pytest.mark.parametrize("group", [1 << 30, 1 << 60], ids=["a part", "others too"])
def test_memory_of_the_process_is_not_that_of_others_in_its_group(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(budget, "is_limited", lambda: True)
    monkeypatch.setattr(budget, "group_usage", lambda: group)
    monkeypatch.setattr(budget, "_status", lambda field: 2 << 30)
    assert process_bytes() == min(group, 2 << 30)


def test_what_torch_loads_for_its_first_optimizer_counts_as_there(tmp_path: Path) -> None:
    """In a process of its own, for this happens once in each."""
    code = """
import sys, torch, torchwrap as tw
from torchwrap.weights.budget import process_bytes
def model():
    made = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(2)))
    return tw.offload(made, params="disk", units=("0", "1"))
opened = model()
before = process_bytes()
assert "torch._dynamo" not in sys.modules
first = tw.handle_of(opened, "offload")
known = first.baseline_bytes
tw.OffloadedOptimizer(opened, torch.optim.AdamW, lr=1e-3)
print(first.baseline_bytes - known, process_bytes() - before)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ)
    counted, grown = map(int, said.stdout.split())
    assert grown > 32 << 20
    assert abs(counted - grown) < 0.25 * grown


def wide(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4))).to(dtype)


@pytest.mark.parametrize(
    ("optimizer", "cls", "options", "dtype"),
    [
        ("AdamW", torch.optim.AdamW, {}, torch.float32),
        ("AdamW", torch.optim.AdamW, {}, torch.bfloat16),
        (MASTER, tw.master_weights(torch.optim.AdamW), {}, torch.bfloat16),
        ("SGD", torch.optim.SGD, {}, torch.float32),
        (2, torch.optim.SGD, {"momentum": 0.9}, torch.bfloat16),
    ],
    ids=["adamw", "adamw-bfloat16", "master", "sgd", "momentum"],
)
def test_what_was_planned_is_what_the_optimizer_takes(optimizer: int | str, cls: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = tw.offload(wide(dtype), goal="train", params="disk", units=("0", "1", "2", "3"), optimizer=optimizer)
    handle = tw.handle_of(model, "offload")
    planned = handle.predict_training(batch=1, tokens=16)
    with closing(tw.OffloadedOptimizer(model, cls, lr=1e-3, **options)):
        opened = handle.predict_training(batch=1, tokens=16)
    for name in ("ring_bytes", "gradient_bytes", "kept_bytes", "read_bytes", "written_bytes", "peak_process"):
        assert getattr(planned, name) == getattr(opened, name), name


def test_a_chunk_is_shorter_where_its_state_is_larger() -> None:
    model = tw.offload(wide(torch.bfloat16), params="disk", units=("0", "1", "2", "3"))
    chunk = 256 << 10
    rings = []
    for cls in (torch.optim.AdamW, tw.master_weights(torch.optim.AdamW)):
        with closing(tw.OffloadedOptimizer(model, cls, lr=1e-3, chunk=chunk)) as optimizer:
            rings.append(optimizer.footprint().ring)
            model(torch.ones(2, 512, dtype=torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert rings[0] == 3 * 3 * chunk
    assert rings[1] <= rings[0] < 1.1 * rings[1]  # whole pages


class Tabled(nn.Module):
    """A table of 2 MiB, two blocks of 256 KiB, and a head as large as the table, or the table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(2048, 256), nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(2))
        self.head = nn.Linear(256, 2048, bias=False)
        self.head.weight = self.table.weight if tied else self.head.weight

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_a_backward_that_come_one_after_the_other_do_not_add_up(tied: bool) -> None:
    big, small, kept = 2048 * 256 * 4, 256 * 256 * 4, 1000
    model = tw.offload(Tabled(tied), goal="train", params="disk", units=("blocks.0", "blocks.1"))
    handle = tw.handle_of(model, "offload")
    waits = waiting(handle.units, handle.pieces, big, kept, ())
    assert waits.outside == big + big  # what may wait, and the head's own
    if tied:
        assert waits.blocks == big + small + big  # the head's waits in autograd
        assert waits.tables == 3 * big  # for the table's, and for their sum
    else:
        assert waits.blocks == big + big
        assert waits.tables == big + kept
    footprint = Footprint(ring=10, gradients=30, kept=4, read=0, written=0, overlaps=True, outside=20, tables=50)
    assert footprint.held == 50
    assert footprint.peak(7, 0, 0) == 10 + 7 + 50
    assert footprint.peak(40, 33, 5) == 10 + 7 + 20 + 4 + 33  # a copy of the head's weight, when nothing waits
    assert footprint.peak(40, 33, 30) == 10 + 7 + 30 + 4 + 30


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_model_that_stays_as_a_whole_are_those_of_its_weights(tied: bool) -> None:
    big, small = 2048 * 256 * 4, 256 * 256 * 4
    handle = tw.handle_of(tw.offload(Tabled(tied), goal="train", params="disk", units=("blocks.0", "blocks.1")), "offload")
    waits = waiting(handle.units, handle.pieces, big, 0, {piece.index for piece in handle.pieces})
    every = 2 * small + (1 if tied else 2) * big
    assert every <= waits.blocks <= every + big


def test_freed_gradients_are_not_kept_in_place_of_more_than_there_are() -> None:
    """A wide layer without blocks: its own gradient, and no second one of its size before it."""
    model = nn.Sequential(nn.Linear(64, 2048, bias=False), nn.Tanh(), nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 64, bias=False))
    handle = tw.handle_of(tw.offload(model, goal="train", params="disk"), "offload")
    every = sum(piece.nbytes for piece in handle.pieces)
    assert waiting(handle.units, handle.pieces, 2048 * 2048 * 4, 0, ()).outside == every

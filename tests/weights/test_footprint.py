"""What an optimizer will take is known before there is one, if it is named; and chunks do not grow with its state."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.stream.settings import state_bytes

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

"""An optimizer whose step cannot fit under the limit of the process is refused when it is made, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.optimizer.optimizing import ADAM, batch, pair
from torchwrap.core import errors
from torchwrap.optimizer import workshop
from torchwrap.storage.heap import FreedBlocks

BLOCK = 4 * 512 * 512  # bytes
X = torch.ones(2, 512)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`limited(nbytes)`: a control group leaves so many."""

    def leave(nbytes: int) -> None:
        monkeypatch.setattr(workshop, "is_limited", lambda: True)
        monkeypatch.setattr(workshop, "memory_available", lambda: nbytes)

    return leave


def streamed(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(6))).train()
    return tw.offload(model, **{"device_memory": 4 * BLOCK, **fields})


@pytest.mark.parametrize(
    ("fields", "options", "advice"),
    [
        ({}, {}, 'goal="train"'),
        ({"goal": "train"}, {}, "device_memory="),
        ({}, {"overlap": False, "gradients": "host"}, 'gradients="disk"'),
    ],
    ids=["infer", "train", "waiting"],
)
def test_a_step_that_cannot_fit_is_refused(
    limited: Any, tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], advice: str
) -> None:
    model = streamed(**fields)
    with torch.no_grad():
        before = model(X)
    limited(BLOCK)
    with pytest.raises(errors.BudgetError) as caught:
        tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3, path=tmp_path / "run", **options)
    assert advice in str(caught.value)
    assert caught.value.available == BLOCK < caught.value.needed < 100 * BLOCK
    assert tw.handle_of(model, "offload").optimizer() is None
    with torch.no_grad():
        assert torch.equal(model(X), before)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < BLOCK


def test_with_more_room_the_next_one_is_made(limited: Any) -> None:
    model = streamed()
    limited(BLOCK)
    with pytest.raises(errors.BudgetError) as caught:
        tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3)
    limited(caught.value.needed)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3)
    model(X).square().mean().backward()
    optimizer.step()
    assert optimizer.steps == 1
    optimizer.close()


def test_gradients_that_are_there_already_are_not_counted_twice(limited: Any) -> None:
    model = streamed()
    limited(0)
    with pytest.raises(errors.BudgetError) as before:
        tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3)
    model(X).square().mean().backward()
    with pytest.raises(errors.BudgetError) as after:
        tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3)
    assert before.value.needed - after.value.needed >= 6 * BLOCK  # all gradients; and slots, which are there now


def test_without_a_limit_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "is_limited", lambda: False)
    monkeypatch.setattr(workshop, "memory_available", lambda: 0)
    tw.OffloadedOptimizer(streamed(), torch.optim.AdamW, lr=1e-3).close()


def total(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def stepped(model: nn.Module, optimizer: tw.OffloadedOptimizer) -> None:
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "asked", [{"overlap": False, "gradients": "host"}, {"accumulate": 4, "gradients": "host"}], ids=["behind", "accumulated"]
)
def test_gradients_that_are_to_wait_where_there_is_no_room_are_refused_later_too(limited: Any, asked: dict[str, Any]) -> None:
    model = streamed()
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3, chunk=BLOCK // 4)
    stepped(model, optimizer)
    before = optimizer.footprint()
    limited(BLOCK)
    with pytest.raises(errors.BudgetError) as caught:
        optimizer.configure(**asked)
    assert caught.value.available == BLOCK < caught.value.needed and optimizer.footprint() == before
    optimizer.configure(accumulate=1)  # no more than before
    limited(caught.value.needed)
    optimizer.configure(**asked)
    assert optimizer.footprint().gradients >= total(model)
    optimizer.configure(overlap=True, accumulate=1)
    stepped(model, optimizer)
    assert optimizer.steps == 2
    optimizer.close()


def test_parameters_whose_gradients_do_not_fit_are_not_added(limited: Any) -> None:
    model = streamed()
    first, *others = model.parameters()
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3, params=[first], overlap=False, gradients="host")
    limited(BLOCK)
    with pytest.raises(errors.BudgetError) as caught:
        optimizer.add_param_group({"params": others})
    assert len(optimizer.param_groups) == 1
    limited(caught.value.needed)
    optimizer.add_param_group({"params": others})
    assert len(optimizer.param_groups) == 2
    stepped(model, optimizer)
    optimizer.close()


def test_a_head_gives_nothing_up_if_gradients_will_take_the_memory_that_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(offload={"params": "disk", "k": 2})
    engine, made = tw.handle_of(model, "offload").engine, []
    make_room = engine._make_room
    monkeypatch.setattr(engine, "_make_room", lambda unit: (made.append(unit.name), make_room(unit)))

    def rooms(loss: bool = True) -> set[str]:
        made.clear()
        output = model(batch(0)).sum()
        if loss:
            output.backward()
        return set(made)

    assert rooms() == {"head"}  # no optimizer: gradients stay, and nobody knows how much memory there is
    model.zero_grad()
    optimizer = tw.OffloadedOptimizer(model, torch.optim.Adam, **ADAM)
    for _ in range(2):
        optimizer.zero_grad()
        assert rooms() == set()
        optimizer.step()
    with torch.no_grad():
        assert rooms(loss=False) == {"head"}
    # Another optimizer keeps more than this one's gradients take, and this one's tensors may take that place.
    other = tw.offload(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), device_memory="24MiB", goal="train")
    others = tw.OffloadedOptimizer(other, torch.optim.Adam, **ADAM)
    other(torch.ones(4, 1024)).sum().backward()
    others.step()
    others.zero_grad()
    optimizer.zero_grad()
    assert FreedBlocks.counts()["bytes"] > optimizer.footprint().held
    assert rooms() == set()
    optimizer.step()
    others.close()
    optimizer.close()
    assert rooms() == {"head"}

"""An interrupt at moments that no order of steps is right at: what was begun is let go of, and the next call has the right bits."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.faults.interrupts import interrupted
from tests.optimizer.optimizing import Net, differences, loss_of
from torchwrap import OffloadedOptimizer

BLOCKS = tuple(f"blocks.{i}" for i in range(3))
FORWARD = [
    ("offload", "slots", "_shown", 0),
    ("offload", "engine", "_end_use", 1),
    ("offload", "engine", "release", 0),
    ("superpipeline", "window", "_put_away", 0),
    ("superpipeline", "writes", "written", 1),
]
BACKWARD = [
    ("superpipeline", "updated", "_leave_for_updates", 0),
    ("superpipeline", "slots", "_shown", 0),
    ("superpipeline", "window", "_put_away", 1),
    ("superpipeline", "engine", "unhold", 2),
    ("offload", "engine", "hold", 6),
    ("offload", "engine", "unhold", 2),
]


def wrapped(way: str) -> tuple[Net, Net]:
    """(in memory, streamed by a technique)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = Net(wide=False).train()
    model = copy.deepcopy(plain)
    if way == "offload":
        return plain, tw.offload(model, params="disk", units=BLOCKS, io_timeout_s=3)
    return plain, tw.superpipeline(model, k=2, k_prime=1, train=True, units=BLOCKS, io_timeout_s=3)


def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step()


def at_rest(model: Net, way: str) -> None:
    """Nobody uses a slot, each of them is somewhere, and another thread gets the model."""
    handle = tw.handle_of(model, way)
    engine = handle.engine  # type: ignore[attr-defined]
    assert [fetch.unit.name for fetch in engine._fetches.values() if fetch.bound] == []
    assert len(engine._free) + len(engine._fetches) == len(engine._slots)
    with torch.no_grad():
        thread = threading.Thread(target=model, args=(torch.arange(4),))
        thread.start()
        thread.join(10)
    assert not thread.is_alive()
    assert not handle.stepping  # type: ignore[attr-defined]


@pytest.mark.parametrize(("way", "file", "function", "number"), FORWARD)
def test_interrupted_forward(way: str, file: str, function: str, number: int) -> None:
    plain, model = wrapped(way)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1)
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, 0)
    assert interrupted(lambda: loss_of(model, 1), f"stream/{file}.py", function, number)
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, 1)
    assert differences(plain, reference, model, optimizer) == []
    at_rest(model, way)
    optimizer.close()


@pytest.mark.parametrize(("way", "file", "function", "number"), BACKWARD)
def test_interrupted_backward(way: str, file: str, function: str, number: int, tmp_path: Path) -> None:
    plain, model = wrapped(way)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, path=tmp_path / "run")
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, 0)
    optimizer.commit()
    optimizer.zero_grad()
    assert interrupted(loss_of(model, 1).backward, f"stream/{file}.py", function, number)
    try:
        optimizer.zero_grad()
    except tw.ConflictError:
        optimizer.rollback()
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, 1)
    assert differences(plain, reference, model, optimizer) == []
    at_rest(model, way)
    optimizer.close()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"overlap": False}], ids=["overlap", "clip", "after"])
def test_interrupted_step_is_taken_once(options: dict[str, Any]) -> None:
    plain, model = wrapped("offload")
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, **options)
    for number in range(3):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            loss_of(net, number).backward()
            if net is plain and "max_grad_norm" in options:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            if net is plain or number != 1:
                opt.step()
            else:
                assert interrupted(opt.step, "optimizer/optimizer.py", "_finished")
                opt.step()
    assert optimizer.steps == 3
    assert differences(plain, reference, model, optimizer) == []
    at_rest(model, "offload")
    optimizer.close()


def test_gradients_are_given_up_after_a_step_that_was_interrupted_behind_its_end() -> None:
    plain, model = wrapped("offload")
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    stepped(plain, reference, 0)
    loss_of(model, 0).backward()
    assert interrupted(optimizer.step, "optimizer/optimizer.py", "_finished")
    optimizer.zero_grad()
    assert optimizer.steps == 1
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, 1)
    assert optimizer.steps == 2
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


def test_an_interrupt_leaves_the_lock_to_others_when_calls_begin_to_be_refused() -> None:
    _, model = wrapped("offload")
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, overlap=False)
    loss_of(model, 1).backward()
    assert interrupted(optimizer.step, "weights/stepping.py", "refuse_calls", 2)
    optimizer.step()
    at_rest(model, "offload")
    optimizer.close()


@pytest.mark.parametrize(("function", "number"), [("end_update", 60), ("restore_weight", 5)])
def test_interrupted_rollback_is_done_by_the_next(function: str, number: int, tmp_path: Path) -> None:
    plain, model = wrapped("offload")
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, path=tmp_path / "run")
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, 0)
    optimizer.commit()
    stepped(model, optimizer, 1)
    file = "stream/updated.py" if function == "end_update" else "optimizer/values.py"
    assert interrupted(optimizer.rollback, file, function, number)
    with pytest.raises(tw.ConflictError, match="rollback"):
        loss_of(model, 1)
    with pytest.raises(tw.ConflictError, match="rollback"):
        optimizer.step()
    with pytest.raises(tw.ConflictError, match="rollback"):
        optimizer.commit()
    optimizer.rollback()
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, 1)
    assert differences(plain, reference, model, optimizer) == []
    at_rest(model, "offload")
    optimizer.close()


@pytest.mark.parametrize(("file", "function"), [("step", "changed"), ("workshop", "close")])
def test_interrupted_close_is_done_by_the_next(file: str, function: str) -> None:
    _, model = wrapped("offload")
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1)
    stepped(model, optimizer, 0)
    assert interrupted(optimizer.close, f"optimizer/{file}.py", function)
    optimizer.close()
    OffloadedOptimizer(model, torch.optim.SGD, lr=0.1).close()
    at_rest(model, "offload")


@pytest.mark.parametrize(
    ("file", "function", "most"),
    [
        ("core/layer", "_nest", 12),
        ("activations/layers", "before", 6),
        ("activations/layers", "_leave", 8),
        ("activations/swap", "_submit", 30),
    ],
)
def test_hooks_on_saved_tensors_do_not_stay_and_activations_go_on_to_move(
    file: str, function: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks that an interrupt leaves are those of every later forward, also of other models, and nothing moves any more."""
    monkeypatch.setattr("torchwrap.activations.swap.SMALLEST", 1024)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = Net(wide=False).train()
    model = tw.offload(copy.deepcopy(plain), params="disk", units=BLOCKS, activations="disk", io_timeout_s=3)
    moved = tw.handle_of(model, "offload").activations.swap.counters  # type: ignore[attr-defined]
    loss_of(plain, 1).backward()
    for number in range(most):
        if not interrupted(lambda: loss_of(model, 0).backward(), f"{file}.py", function, number):
            break
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        before = moved["saved"]
        model.zero_grad()
        loss_of(model, 1).backward()
        assert moved["saved"] > before
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert number
    at_rest(model, "offload")
    tw.unwrap(model)


def test_clipping_that_is_interrupted_clips_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes while torch scales the gradients, which takes as long as reading them."""
    plain, model = wrapped("offload")
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, max_grad_norm=0.1)
    whole, calls = torch.nn.utils.clip_grad_norm_, []

    def clipping(*args: Any) -> torch.Tensor:
        norm = whole(*args)
        calls.append(1)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return norm

    loss_of(plain, 0).backward()
    whole(plain.parameters(), 0.1)
    reference.step()
    loss_of(model, 0).backward()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    try:
        optimizer.step()
    except KeyboardInterrupt:
        optimizer.step()
    assert len(calls) == 1
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()

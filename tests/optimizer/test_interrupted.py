"""An interrupt (Ctrl-C) at any moment of a step: the step is finished by the next call, and nothing counts twice."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.optimizer.optimizing import ADAM, Net, differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer

OVERLAP = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])


@pytest.fixture
def interrupts() -> Iterator[None]:
    """An interrupt is raised here, although a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(torch.optim.Optimizer):
    """Plain descent; between two of its parameters the main thread is interrupted, once, when that is asked for."""

    armed = False

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if number == 1 and Interrupting.armed:
                    Interrupting.armed = False
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    time.sleep(0.05)
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])


@OVERLAP
@pytest.mark.parametrize("way_out", ["step", "rollback"])
def test_small_weights_are_stepped_once_when_their_step_is_interrupted(
    overlap: bool, way_out: str, tmp_path: Path, interrupts: None
) -> None:
    plain, model = pair()
    reference = Interrupting(plain.parameters())
    optimizer = OffloadedOptimizer(model, Interrupting, overlap=overlap, path=tmp_path / "run", chunk=65536)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2))
    optimizer.commit()
    optimizer.zero_grad()
    loss_of(model, 200).backward()
    Interrupting.armed = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not Interrupting.armed
    with pytest.raises(tw.ConflictError, match="rollback"):
        optimizer.zero_grad()
    if way_out == "step":
        optimizer.step()
    else:
        optimizer.rollback()
        trained(model, optimizer, range(2, 3))
    trained(plain, reference, range(2, 4))
    trained(model, optimizer, range(3, 4))
    assert optimizer.steps == 4
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


def test_an_error_of_the_class_is_raised_as_it_is_and_the_step_can_be_repeated() -> None:
    class Refusing(Interrupting):
        refusing = False

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if Refusing.refusing:
                raise FloatingPointError("not today")
            super().step(closure)

    plain, model = Net(wide=False), Net(wide=False)
    model.load_state_dict(plain.state_dict())
    reference, optimizer = Refusing(plain.parameters()), OffloadedOptimizer(model, Refusing)
    for net, opt in ((plain, reference), (model, optimizer)):
        loss_of(net, 0).backward()
        Refusing.refusing = True
        with pytest.raises(FloatingPointError, match="not today"):
            opt.step()
        Refusing.refusing = False
        opt.step()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


@OVERLAP
@pytest.mark.parametrize("durability", ["step", "save"])
def test_an_interrupt_behind_the_step_does_not_have_it_taken_twice(
    overlap: bool, durability: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=overlap, path=tmp_path / "run", durability=durability, **ADAM)
    place = (optimizer._works.store, "commit") if durability == "step" else (optimizer._works, "watch")
    whole, calls = getattr(*place), []

    def interrupted(*args: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if durability == "step" else 2):  # the second time that hooks are looked at: behind the step
            raise KeyboardInterrupt
        whole(*args)

    loss_of(model, 0).backward()
    monkeypatch.setattr(*place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.step()
    assert optimizer.steps == 1
    loss_of(plain, 0).backward()
    reference.step()
    assert differences(plain, reference, model, optimizer) == []
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(1, 3))
    assert optimizer.steps == 3
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()

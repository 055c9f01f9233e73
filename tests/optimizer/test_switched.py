"""What the class keeps before a parameter's first step, and settings that change what it keeps in mid-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer

OPTIONS = pytest.mark.parametrize("options", [{}, {"overlap": False}, {"max_grad_norm": 0.1}], ids=["overlap", "after", "clip"])


def stepped(net: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range, clip: bool) -> None:
    for number in numbers:
        optimizer.zero_grad()
        loss_of(net, number).backward()
        if clip and not isinstance(optimizer, OffloadedOptimizer):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_state_that_is_there_before_the_first_step(start: float) -> None:
    plain, model = pair(wide=False)
    reference = torch.optim.Adagrad(plain.parameters(), initial_accumulator_value=start)
    optimizer = OffloadedOptimizer(model, torch.optim.Adagrad, initial_accumulator_value=start, chunk=8192)
    assert differences(plain, reference, model, optimizer) == []
    saved = optimizer.state_dict()
    for net, opt in ((plain, reference), (model, optimizer)):
        net.blocks[1].requires_grad_(False)
        trained(net, opt, range(2))
        assert differences(plain, reference, model, optimizer) == [] or opt is reference
    torch.optim.Adagrad(pair(wide=False)[0].parameters()).load_state_dict(saved)
    optimizer.close()


@OPTIONS
@pytest.mark.parametrize(("before", "after"), [(0.0, 0.9), (0.9, 0.0)])
def test_momentum_is_switched_between_steps(before: float, after: float, options: dict[str, Any], tmp_path: Path) -> None:
    plain, model = pair(wide=False)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=before)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=before, path=tmp_path / "run", chunk=8192, **options)
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, range(2), "max_grad_norm" in options)
        opt.param_groups[0]["momentum"] = after
        late = torch.nn.Parameter(torch.ones(20000))
        opt.add_param_group({"params": [late]})
        stepped(net, opt, range(2, 4), "max_grad_norm" in options)
    assert differences(plain, reference, model, optimizer) == []
    optimizer.commit()
    trained(model, optimizer, range(4, 5))
    optimizer.rollback()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()
    if before:  # goes on in another process
        optimizer = OffloadedOptimizer(
            model, torch.optim.SGD, params=reference_groups(model, late), lr=0.1, path=tmp_path / "run", chunk=8192
        )
        assert differences(plain, reference, model, optimizer) == []
        optimizer.close()


def reference_groups(model: torch.nn.Module, late: torch.nn.Parameter) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}, {"params": [late]}]


def test_momentum_switched_off_before_the_first_step_is_not_kept() -> None:
    plain, model = pair(wide=False)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9, chunk=8192)
    for net, opt in ((plain, reference), (model, optimizer)):
        opt.param_groups[0]["momentum"] = 0
        trained(net, opt, range(2))
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


@OPTIONS
def test_what_torch_cannot_do_is_refused_before_any_weight_is_new(options: dict[str, Any]) -> None:
    plain, model = pair(wide=False)
    reference = torch.optim.Adam(plain.parameters())
    optimizer = OffloadedOptimizer(model, torch.optim.Adam, chunk=8192, **options)
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, range(2), "max_grad_norm" in options)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(tw.ConfigError, match="max_exp_avg_sq"):
        stepped(model, optimizer, range(2, 3), clip=False)
    optimizer.param_groups[0]["amsgrad"] = False
    assert differences(plain, reference, model, optimizer) == []
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, range(2, 4), "max_grad_norm" in options)
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


@OPTIONS
def test_state_that_the_settings_do_not_need_is_kept_and_used_when_they_do(options: dict[str, Any], tmp_path: Path) -> None:
    """A state dict with momentum buffers whose groups say momentum 0, as for a phase without."""
    plain, model = pair(wide=False)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    trained(plain, reference, range(2))
    saved = reference.state_dict()
    saved["param_groups"][0]["momentum"] = 0
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    reference.load_state_dict(saved)
    model.load_state_dict(plain.state_dict())
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, path=tmp_path / "run", chunk=8192, **options)
    optimizer.load_state_dict(saved)
    assert differences(plain, reference, model, optimizer) == []
    optimizer.commit()
    for net, opt in ((plain, reference), (model, optimizer)):
        stepped(net, opt, range(2, 4), "max_grad_norm" in options)
    assert differences(plain, reference, model, optimizer) == []
    optimizer.rollback()
    optimizer.close()
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, path=tmp_path / "run", chunk=8192, **options)
    stepped(model, optimizer, range(2, 4), clip=False)
    for net, opt in ((plain, reference), (model, optimizer)):
        opt.param_groups[0]["momentum"] = 0.5
        stepped(net, opt, range(4, 6), "max_grad_norm" in options)
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()

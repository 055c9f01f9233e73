"""What is done to the model under an optimizer: wrapped in parts, wrapped later, converted, loaded, unwrapped in the middle of a step."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer

ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}
ROOT = Path(__file__).parents[2]


def two(width: int = 160) -> tuple[nn.Sequential, nn.Sequential]:
    """The same model twice, of two parts that can be wrapped by themselves."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(2)))
    return plain, copy.deepcopy(plain)


def part_loss(net: nn.Module, number: int = 0) -> torch.Tensor:
    return net(torch.randn(4, 160, generator=torch.Generator().manual_seed(number))).square().mean()  # type: ignore[no-any-return]


# -- parts wrapped by themselves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_one_optimizer_over_parts_wrapped_by_themselves_is_refused(options: dict[str, Any]) -> None:
    model = two()[1]
    for part in model:
        tw.offload(part, params="disk", units=("0", "2"))
    with pytest.raises(tw.ConflictError, match=r"1\.0\.weight.*one optimizer") as caught:
        OffloadedOptimizer(model, torch.optim.AdamW, **ADAM, **options)
    assert caught.value.where == "1.0.weight"


def test_parameters_of_another_part_cannot_be_added() -> None:
    model = two()[1]
    for part in model:
        tw.offload(part, params="disk", units=("0", "2"))
    optimizer = OffloadedOptimizer(model[0], torch.optim.AdamW, **ADAM)
    with pytest.raises(tw.ConflictError, match="one optimizer"):
        optimizer.add_param_group({"params": model[1].parameters()})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state_dict()["param_groups"][0]["params"]) == 4


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"overlap": False}], ids=["plain", "fused", "late"])
def test_one_optimizer_for_each_part_has_the_numbers_of_training_in_memory(options: dict[str, Any]) -> None:
    plain, model = two()
    for part in model:
        tw.offload(part, params="disk", units=("0", "2"))
    optimizers = [OffloadedOptimizer(part, torch.optim.AdamW, **ADAM, **options) for part in model]
    fused = {name: value for name, value in options.items() if name == "fused"}
    references = [torch.optim.AdamW(part.parameters(), lr=1e-2, **fused) for part in plain]
    for step in range(3):
        for net, opts in ((plain, references), (model, optimizers)):
            for opt in opts:
                opt.zero_grad()  # type: ignore[attr-defined]
            part_loss(net, step).backward()
            for opt in opts:
                opt.step()  # type: ignore[attr-defined]
    for before, reference, part, optimizer in zip(plain, references, model, optimizers, strict=True):
        assert differences(before, reference, part, optimizer) == []


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "part"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"overlap": False}], ids=["overlap", "fused", "late"])
def test_a_part_wrapped_after_the_optimizer_was_made_changes_nothing(options: dict[str, Any], wrapped: bool) -> None:
    plain, model = two()
    if wrapped:
        tw.offload(model[0], params="disk", units=("0", "2"))
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM, **options)
    tw.offload(model[1], params="disk", units=("0", "2"))
    with pytest.raises(tw.ConflictError, match="weights are away"):
        part_loss(model).backward()
        optimizer.step()
    with pytest.raises(tw.ConflictError, match=r"weights are away.*close\(\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.close()
    with tw.core.tensors(model) as real:
        assert all(torch.equal(real[name], value) for name, value in plain.named_parameters())


# -- converted, moved, loaded --------------------------------------------------------------------------------------------------------------

CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.float64),
    "block": lambda model: model.get_submodule("blocks.1").bfloat16(),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_a_model_that_an_optimizer_drives_is_not_converted(how: str) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(1))
    with pytest.raises(tw.ConflictError, match=r"float32.*close\(\)"):
        CONVERSIONS[how](model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.to("cpu").float()
    assert trained(model, optimizer, range(1, 3)) == trained(plain, reference, range(1, 3))
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()
    CONVERSIONS[how](model)
    assert model.get_parameter("blocks.1.up.weight").dtype != torch.float32


def test_a_model_in_the_middle_of_a_step_is_not_loaded() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    other = {name: torch.zeros_like(value) for name, value in plain.state_dict().items()}
    for net in (plain, model):
        loss_of(net, 0).backward()
    with pytest.raises(tw.ConflictError, match=r"load_state_dict.*step\(\)"):
        model.load_state_dict(other)
    optimizer.step()
    reference.step()
    assert differences(plain, reference, model, optimizer) == []
    model.load_state_dict(other)
    assert not any(value.any() for value in model.state_dict().values())


# -- left in the middle of a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "offloaded"])
def test_closing_in_the_middle_of_a_step_says_so(wrap: bool) -> None:
    plain, model = pair()
    model = model if wrap else plain
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    loss_of(model, 0).backward()
    with pytest.warns(tw.TorchwrapWarning, match=r"half a step ahead.*checkpoint") as caught:
        optimizer.close()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.close()


def test_leaving_the_interpreter_in_the_middle_of_a_step_says_nothing() -> None:
    program = (
        "import torch; from tests.optimizer.optimizing import loss_of, pair; from torchwrap import OffloadedOptimizer; model = pair()[1]; "
        "optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2); loss_of(model, 0).backward()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "half a step" not in done.stderr


def test_unwrapping_in_the_middle_of_a_step_says_so() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    for net in (plain, model):
        loss_of(net, 0).backward()
    with pytest.warns(tw.TorchwrapWarning, match=r"half a step ahead.*step\(\).*checkpoint") as caught:
        tw.unwrap(model)
    assert caught[0].filename == __file__
    optimizer.step()
    reference.step()
    assert differences(plain, reference, model, optimizer) == []


def test_closing_and_unwrapping_between_steps_say_nothing() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(model, optimizer, range(1))
    optimizer.configure(overlap=False)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.close()
        tw.unwrap(model)


# -- arguments -----------------------------------------------------------------------------------------------------------------------------


def test_a_path_that_no_system_takes_is_named() -> None:
    with pytest.raises(tw.ConfigError) as caught:
        OffloadedOptimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1, path="\0")
    assert caught.value.where == "path"


@pytest.mark.parametrize("value", [math.nan, torch.tensor(math.nan)], ids=["number", "tensor"])
def test_a_setting_that_is_not_equal_to_itself_was_not_changed(value: Any) -> None:
    plain, model = pair()
    reference = torch.optim.SGD(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        opt.param_groups[0]["note"] = value
        loss_of(net, 0).backward()
        opt.step()  # type: ignore[attr-defined]
    with tw.core.tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())

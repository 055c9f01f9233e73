"""Clipping by the user's own loop, and giving gradients up through the model, on gradients that are on the disk or used already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.optimizer.optimizing import Net, differences, loss_of, pair
from torchwrap import OffloadedOptimizer

ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}


def steps(model: Net, optimizer: torch.optim.Optimizer, max_norm: float, accumulate: int = 1) -> list[tuple[float, float]]:
    """(loss, total norm) of three steps of an ordinary loop, which clears gradients through the model."""
    found = []
    for step in range(3):
        for micro in range(accumulate):
            loss = loss_of(model, 10 * step + micro) / accumulate
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        model.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("gradients", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_clip_grad_norm_of_torch_works_on_gradients_that_wait(dtype: torch.dtype, gradients: Any, accumulate: int) -> None:
    plain, model = pair(dtype)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients=gradients, accumulate=accumulate, **ADAM)
    expected = steps(plain, reference, 0.1, accumulate)
    assert all(norm > 0.1 for _, norm in expected)
    assert steps(model, optimizer, 0.1, accumulate) == expected
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("options", [{"overlap": False}, {"accumulate": 3}], ids=["after", "accumulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_gradients_on_the_disk_stay_scaled_when_a_later_backward_adds_to_them(dtype: torch.dtype, options: dict[str, Any]) -> None:
    plain, model = pair(dtype)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, gradients="disk", **options, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        for step in range(2):
            for micro in range(2):
                loss_of(net, 10 * step + micro).backward()
                assert nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05
            loss_of(net, 10 * step + 2).backward()
            if opt is reference or "accumulate" not in options:  # the third of three is used at once
                for parameter in net.parameters():
                    assert parameter.grad is not None
                    parameter.grad.mul_(0.3 if "accumulate" not in options else 1)
            opt.step()
            opt.zero_grad()
    assert differences(plain, reference, model, optimizer) == []


def test_gradients_on_the_disk_are_not_scaled_by_elements() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="disk", **ADAM)
    loss_of(model, 0).backward()
    gradient = model.head.weight.grad
    assert gradient is not None
    with pytest.raises(tw.ConflictError, match="one by one"):
        gradient.mul_(torch.ones(gradient.shape))
    optimizer.close()


def test_norms_of_gradients_that_were_used_are_told_if_asked_for() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    optimizer.configure(norms=True)
    assert steps(model, optimizer, float("inf")) == steps(plain, reference, float("inf"))
    assert differences(plain, reference, model, optimizer) == []
    loss_of(model, 0).backward()
    with pytest.raises(tw.ConflictError, match="scaling it"):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def test_a_gradient_scaler_that_skips_steps() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="host", **ADAM)
    found: list[list[tuple[float, float]]] = [[], []]
    for lines, each, opt in zip(found, (plain, model), (reference, optimizer), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)  # gradients overflow now and then
        for step in range(8):
            scaler.scale(loss_of(each, step) * 64).backward()
            scaler.unscale_(opt)
            norm = nn.utils.clip_grad_norm_(each.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
            each.zero_grad()
            lines.append((norm.item(), scaler.get_scale()))
    assert str(found[0]) == str(found[1])  # NaN is NaN
    assert 0 < optimizer.steps < 8
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, tw.master_weights(torch.optim.Adam)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_kernels_divide_by_the_scale_themselves(dtype: torch.dtype, cls: type[torch.optim.Optimizer], unscaled: bool) -> None:
    """Where the scale is no power of two this gives other bits than multiplying with its inverse, which is what a `GradScaler` does."""
    plain, model = pair(dtype)
    options: dict[str, Any] = {"fused": True, "lr": 1e-2}
    reference = cls(plain.parameters(), **options)
    optimizer = OffloadedOptimizer(model, cls, overlap=False, gradients="host", chunk=65536, **options)
    left: list[list[torch.Tensor]] = [[], []]
    for found, each, opt in zip(left, (plain, model), (reference, optimizer), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        for step in range(4):
            scaler.scale(loss_of(each, step) * (float("inf") if step == 2 else 1.0)).backward()
            if unscaled:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            found += [parameter.grad.clone() for parameter in each.parameters() if parameter.grad is not None]
            opt.zero_grad()
    assert optimizer.steps == 3
    assert len(left[0]) == len(left[1]) > 8
    assert all(torch.equal(mine.nan_to_num(), expected.nan_to_num()) for mine, expected in zip(left[1], left[0], strict=True))
    assert differences(plain, reference, model, optimizer) == []


def test_a_scaled_step_that_failed_half_way_is_finished_with_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="host", fused=True, lr=1e-2, chunk=16384)
    store, calls = optimizer._works.store, []
    write = store.write

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 9:
            raise tw.StorageError("the disk failed")
        write(*args)

    scalers = [torch.amp.GradScaler("cpu", init_scale=1000.0) for _ in range(2)]
    for each, scaler in zip((plain, model), scalers, strict=True):
        scaler.scale(loss_of(each, 0)).backward()
    scalers[0].step(reference)
    monkeypatch.setattr(store, "write", failing)
    with pytest.raises(tw.StorageError):
        scalers[1].step(optimizer)
    monkeypatch.undo()
    optimizer.step()
    assert differences(plain, reference, model, optimizer) == []


def test_an_optimizer_that_clips_has_gradients_unscaled_before() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, max_grad_norm=0.1, overlap=False, gradients="host", fused=True, lr=1e-2)
    for each, opt in ((plain, reference), (model, optimizer)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        for step in range(2):
            scaler.scale(loss_of(each, step)).backward()
            if opt is reference:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(each.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert differences(plain, reference, model, optimizer) == []


def test_clipping_twice_is_a_conflict() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, max_grad_norm=0.1, gradients="disk", **ADAM)
    loss_of(model, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(tw.ConflictError, match="clipped again"):
        optimizer.step()


def test_other_norms_of_a_gradient_on_the_disk_are_refused() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="disk", **ADAM)
    loss_of(model, 0).backward()
    with pytest.raises(tw.ConflictError, match="is on the disk until the step; its inf-norm"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float("inf"))
    with pytest.raises(tw.ConflictError, match="is on the disk until the step; clamp_"):
        nn.utils.clip_grad_value_(model.parameters(), 0.1, foreach=False)
    optimizer.close()


@pytest.mark.parametrize("options", [{"overlap": False}, {"accumulate": 2}], ids=["after", "accumulated"])
def test_a_gradient_that_cannot_be_read_again_is_not_left_out_in_silence(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, gradients="disk", **options, **ADAM)
    loss_of(model, 0).backward()
    store = optimizer._works.gradients._store
    assert store is not None
    real = store.get

    def failing(name: str) -> torch.Tensor:
        if name == "blocks.1.up.weight":
            raise tw.StorageError("the disk is gone")
        return real(name)

    monkeypatch.setattr(store, "get", failing)
    with pytest.raises(tw.StorageError, match="gone"):
        loss_of(model, 1).backward()
    with pytest.raises((tw.ConflictError, tw.StorageError)):
        optimizer.step()
    monkeypatch.undo()
    if "accumulate" in options:  # the head's gradient has been used
        optimizer.close()
        return
    optimizer.zero_grad()
    for net, opt in ((plain, reference), (model, optimizer)):
        for micro in range(2):
            loss_of(net, micro).backward()
        opt.step()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


@pytest.mark.parametrize("given_up", [False, True], ids=["waiting", "given-up"])
def test_closing_gives_all_gradients_up_if_some_wait_on_the_disk(given_up: bool, recwarn: pytest.WarningsRecorder) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, gradients="disk", accumulate=2, **ADAM)
    loss_of(model, 0).backward()
    assert model.norm.weight.grad is not None
    if given_up:
        optimizer.zero_grad()
    optimizer.close()
    assert [parameter for parameter in model.parameters() if parameter.grad is not None] == []
    told = [str(warning.message) for warning in recwarn if "gradients wait on the disk" in str(warning.message)]
    assert len(told) == (0 if given_up else 1)


@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zero"])
def test_a_gradient_on_the_disk_is_given_up_through_the_model(to_none: bool) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="disk", accumulate=2, **ADAM)
    for each, opt in ((plain, reference), (model, optimizer)):
        loss_of(each, 0).backward()
        each.zero_grad(set_to_none=to_none)
        loss_of(each, 1).backward()
        opt.step()
    assert differences(plain, reference, model, optimizer) == []


def test_a_step_without_gradients_after_they_were_given_up_does_nothing() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="disk", **ADAM)
    for each, opt in ((plain, reference), (model, optimizer)):
        loss_of(each, 0).backward()
        each.zero_grad()
        opt.step()
    assert differences(plain, reference, model, optimizer) == []


def test_gradients_that_were_used_cannot_be_given_up_through_the_model() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    first, second = loss_of(model, 0), loss_of(model, 1)
    first.backward()
    model.zero_grad()
    with pytest.raises(tw.ConflictError, match="was cleared after an update had used it"):
        second.backward()
    with pytest.raises(tw.ConflictError, match=r"step\(\) first"):
        loss_of(model, 1)
    with pytest.raises(tw.ConflictError, match="cleared or changed between backward and step"):
        optimizer.step()
    assert optimizer.steps == 0
    optimizer.close()


def test_timing_is_changed_between_steps_only() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    loss_of(model, 0).backward()
    with pytest.raises(tw.ConflictError, match="configure"):
        optimizer.configure(overlap=False)
    optimizer.step()
    optimizer.configure(overlap=False, gradients="disk", accumulate=2)
    model.zero_grad()
    loss_of(plain, 0).backward()
    reference.step()
    plain.zero_grad()
    assert steps(model, optimizer, 0.1, 2) == steps(plain, reference, 0.1, 2)
    assert differences(plain, reference, model, optimizer) == []
    with pytest.raises(tw.ConfigError, match="0 backwards"):
        optimizer.configure(accumulate=0)

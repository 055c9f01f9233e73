"""Training with the state on the disk gives the bits of training in memory: parameters and the whole optimizer state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.models import by_name
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer

CLASSES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (torch.optim.Adam, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True, "amsgrad": True}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
]
every_class = pytest.mark.parametrize(("cls", "options"), CLASSES, ids=[f"{cls.__name__}-{'-'.join(o)}" for cls, o in CLASSES])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
overlapping = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])
ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}


@every_dtype
@every_class
@overlapping
def test_five_steps_with_every_class(cls: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype, overlap: bool) -> None:
    plain, model = pair(dtype)
    reference = cls(plain.parameters(), **options)
    optimizer = OffloadedOptimizer(model, cls, overlap=overlap, chunk=65536, **options)
    assert trained(model, optimizer, range(5)) == trained(plain, reference, range(5))
    assert differences(plain, reference, model, optimizer) == []
    assert optimizer.steps == 5
    optimizer.close()


@overlapping
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("offload", [{"device_memory": 2_000_000}, {}], ids=["half", "all-resident"])
def test_resident_and_tied_weights(offload: dict[str, Any], tied: bool, overlap: bool) -> None:
    plain, model = pair(offload=offload, tied=tied)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=overlap, **ADAM)
    assert trained(model, optimizer, range(4)) == trained(plain, reference, range(4))
    assert differences(plain, reference, model, optimizer) == []


def test_tied_weights_that_are_streamed() -> None:
    plain, model = pair(tied=True)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    assert trained(model, optimizer, range(4)) == trained(plain, reference, range(4))
    assert differences(plain, reference, model, optimizer) == []


def test_a_model_that_is_not_offloaded_has_only_its_state_on_the_disk() -> None:
    plain, _ = pair()
    model, _ = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    assert trained(model, optimizer, range(3)) == trained(plain, reference, range(3))
    assert differences(plain, reference, model, optimizer) == []


@overlapping
@pytest.mark.parametrize("gradients", ["host", "disk"])
@every_dtype
def test_clipping_is_torchs_own(dtype: torch.dtype, gradients: str, overlap: bool) -> None:
    plain, model = pair(dtype)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=overlap, max_grad_norm=0.5, gradients=gradients, **ADAM)
    for step in range(4):
        reference.zero_grad()
        loss_of(plain, step).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert optimizer.grad_norm is not None and torch.equal(optimizer.grad_norm, norm) and norm > 0.5
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("gradients", ["host", "disk"])
def test_the_norm_is_added_up_in_the_order_of_the_model_and_not_of_groups(gradients: Any) -> None:
    plain, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, params=decayed_and_not(model), lr=0.1, max_grad_norm=0.5, gradients=gradients)
    reference = torch.optim.SGD(decayed_and_not(plain), lr=0.1)
    for step in range(6):
        loss_of(plain, step).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        loss_of(model, step).backward()
        for each in (reference, optimizer):
            each.step()
            each.zero_grad()
        assert optimizer.grad_norm is not None and torch.equal(optimizer.grad_norm, norm)
    assert differences(plain, reference, model, optimizer) == []


def decayed_and_not(net: nn.Module) -> list[dict[str, Any]]:
    """The usual groups."""
    matrices = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": [parameter for parameter in net.parameters() if parameter.dim() < 2]}]


@overlapping
@pytest.mark.parametrize("gradients", ["host", "disk"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["free", "clipped"])
def test_two_backwards_per_step(gradients: str, overlap: bool, max_grad_norm: float | None) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(
        model, torch.optim.AdamW, overlap=overlap, accumulate=2, gradients=gradients, max_grad_norm=max_grad_norm, **ADAM
    )
    for step in range(3):
        reference.zero_grad()
        optimizer.zero_grad()
        for micro in range(2):
            loss_of(plain, 10 * step + micro).backward()
            loss_of(model, 10 * step + micro).backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        reference.step()
        optimizer.step()
    assert differences(plain, reference, model, optimizer) == []


def test_fewer_backwards_than_announced_are_what_the_step_uses() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, accumulate=4, **ADAM)
    assert trained(model, optimizer, range(3), accumulate=2) == trained(plain, reference, range(3), accumulate=2)
    assert differences(plain, reference, model, optimizer) == []


def test_schedulers_and_groups_with_settings_of_their_own() -> None:
    plain, model = pair()

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        flat = [p for p in net.parameters() if p.dim() < 2]
        return [{"params": [p for p in net.parameters() if p.dim() >= 2], "lr": 2e-2}, {"params": flat, "weight_decay": 0.0}]

    reference = torch.optim.AdamW(groups(plain), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, params=groups(model), **ADAM)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=8) for o in (reference, optimizer)]
    for step in range(5):
        for net, opt, schedule in ((plain, reference, schedules[0]), (model, optimizer, schedules[1])):
            trained(net, opt, range(step, step + 1))
            schedule.step()
    assert differences(plain, reference, model, optimizer) == []


def test_the_learning_rate_may_be_a_tensor_that_changes_in_place() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=torch.tensor(1e-2))
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=torch.tensor(1e-2), chunk=65536)
    for step in range(3):
        trained(plain, reference, range(step, step + 1))
        trained(model, optimizer, range(step, step + 1))
        for opt in (reference, optimizer):
            opt.param_groups[0]["lr"].mul_(0.5)
    assert differences(plain, reference, model, optimizer) == []


def test_frozen_and_toggled_parameters() -> None:
    plain, model = pair()
    for net in (plain, model):
        net.blocks[1].requires_grad_(False)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    reserved = optimizer.stats()["disk_bytes"]
    for step in range(6):
        for net, opt in ((plain, reference), (model, optimizer)):
            if step in (2, 4):
                net.blocks[1].requires_grad_(step == 2)
            trained(net, opt, range(step, step + 1))
    assert differences(plain, reference, model, optimizer) == []
    assert optimizer.stats()["disk_bytes"] > reserved


def test_closures() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    for step in range(3):
        losses = []
        for net, opt in ((plain, reference), (model, optimizer)):

            def closure(net: nn.Module = net, opt: torch.optim.Optimizer = opt, step: int = step) -> float:
                opt.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss.item()

            losses.append(opt.step(closure))
        assert losses[0] == losses[1]
    assert differences(plain, reference, model, optimizer) == []


def test_a_gradient_scaler_works_without_overlap() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, **ADAM)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(4):
        for net, opt, scaler in ((plain, reference, scalers[0]), (model, optimizer, scalers[1])):
            opt.zero_grad()
            loss = scaler.scale(loss_of(net, step))
            (loss * float("inf") if step == 2 else loss).backward()  # this step is skipped
            scaler.step(opt)
            scaler.update()
    assert optimizer.steps == 3
    assert differences(plain, reference, model, optimizer) == []


@overlapping
def test_gradients_that_are_not_numbers_propagate_as_in_torch(overlap: bool) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=overlap, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(1))
        opt.zero_grad()
        (loss_of(net, 1) * float("nan")).backward()
        opt.step()
    expected = {name: value.isnan() for name, value in plain.state_dict().items()}
    assert all(torch.equal(value.isnan(), expected[name]) for name, value in model.state_dict().items())
    assert expected["blocks.0.up.weight"].all() and not expected["embedding.weight"].all()


def test_state_goes_to_a_plain_optimizer_and_back() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(plain, reference, range(2))
    trained(model, optimizer, range(2))
    other = torch.optim.AdamW(plain.parameters(), lr=3.0)
    other.load_state_dict(optimizer.state_dict())
    trained(plain, other, range(2, 4))
    optimizer.load_state_dict(reference.state_dict())
    trained(model, optimizer, range(2, 4))
    assert differences(plain, other, model, optimizer) == []
    _, fresh_model = pair()
    fresh = OffloadedOptimizer(fresh_model, torch.optim.AdamW, lr=9.0, chunk=16384)
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    trained(plain, other, range(4, 6))
    trained(fresh_model, fresh, range(4, 6))
    assert differences(plain, other, fresh_model, fresh) == []


@pytest.mark.parametrize("cls", [torch.optim.NAdam, tw.master_weights(torch.optim.NAdam)])
def test_numbers_kept_per_parameter_are_cast_as_torch_casts_them(cls: type[torch.optim.Optimizer]) -> None:
    plain, model = pair(torch.bfloat16)
    reference, optimizer = cls(plain.parameters(), lr=1e-2), OffloadedOptimizer(model, cls, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2))
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        trained(net, opt, range(2, 4))
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adagrad])
def test_state_of_parameters_that_were_frozen_since_is_kept(cls: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    plain, model = pair()
    before = cls(plain.parameters(), lr=1e-2)
    trained(plain, before, range(2))
    model.load_state_dict(plain.state_dict())
    frozen = ("embedding.weight", "blocks.1.up.weight", "blocks.1.norm.weight")
    for net in (plain, model):
        for name in frozen:
            net.get_parameter(name).requires_grad_(False).grad = None
    reference, optimizer = cls(plain.parameters(), lr=1e-2), OffloadedOptimizer(model, cls, path=tmp_path, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        opt.load_state_dict(copy.deepcopy(before.state_dict()))
        trained(net, opt, range(2, 4))
    assert differences(plain, reference, model, optimizer) == []
    optimizer.commit()
    trained(model, optimizer, range(4, 5))
    optimizer.rollback()
    for net, opt in ((plain, reference), (model, optimizer)):
        for name in frozen:
            net.get_parameter(name).requires_grad_(True)
        trained(net, opt, range(5, 7))
    assert differences(plain, reference, model, optimizer) == []


def test_a_state_dict_changes_with_the_steps_after_it_as_a_whole() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    held = []
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2))
        held.append(opt.state_dict())
        trained(net, opt, range(2, 4))
    assert held[1]["state"][0]["step"] == 4
    for number, kept in held[0]["state"].items():
        assert all(torch.equal(value, held[1]["state"][number][key]) for key, value in kept.items())


def test_values_of_the_model_may_be_replaced_between_steps() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    for step in range(4):
        trained(plain, reference, range(step, step + 1))
        trained(model, optimizer, range(step, step + 1))
        if step == 1:
            state = {name: value * 0.5 for name, value in plain.state_dict().items()}
            plain.load_state_dict(state)
            model.load_state_dict(state)
    assert differences(plain, reference, model, optimizer) == []


def test_training_goes_on_after_unwrap() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(plain, reference, range(4))
    trained(model, optimizer, range(2))
    tw.unwrap(model)
    trained(model, optimizer, range(2, 4))
    assert differences(plain, reference, model, optimizer) == []


def test_checkpointed_blocks() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)

    def loss(net: Any, step: int, reentrant: bool) -> torch.Tensor:
        ids = torch.randint(0, 8192, (24,), generator=torch.Generator().manual_seed(step))
        x = net.embedding(ids)
        for block in net.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return (net.head(net.norm(x)) * net.scale).square().mean()

    for step in range(4):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            loss(net, step, step % 2 == 1).backward()
            opt.step()
    assert differences(plain, reference, model, optimizer) == []


def test_a_deep_copy_keeps_its_weights_while_the_original_trains() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    before = loss_of(twin, 7).item()
    trained(model, optimizer, range(2, 4))
    assert loss_of(twin, 7).item() == before != loss_of(model, 7).item()


def test_training_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    by_name("llama-tied").build().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = tw.offload.from_pretrained(tmp_path, params="disk").train()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
        optimizer.step()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

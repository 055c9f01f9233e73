"""What a user may do to an offloaded optimizer by mistake: it is refused, or has the numbers of training in memory."""

from __future__ import annotations

import copy
import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.optimizer.optimizing import ADAM, differences, loss_of, pair, stepped, trained
from tests.optimizer.test_rules import Broken
from torchwrap import OffloadedOptimizer

# -- two optimizers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.LBFGS(p, lr=0.1), lambda p: torch.optim.AdamW(p, fused=True)], ids=["lbfgs", "fused"]
)
@pytest.mark.parametrize("by_name", [True, False])
def test_an_ordinary_optimizer_is_refused_before_its_closure_brings_gradients(make: Any, by_name: bool) -> None:
    _, model = pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make(model.parameters())

    def closure() -> torch.Tensor:
        raise AssertionError("called")

    with pytest.raises(tw.ConflictError, match=r"would write to .*OffloadedOptimizer"):
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_optimizer_on_the_same_parameters_is_refused_until_the_first_is_closed_or_gone() -> None:
    plain, model = pair()
    first = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    with pytest.raises(tw.ConflictError, match=r"close\(\) on the old optimizer"):
        OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    first.close()
    second = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    second.cycle = second  # type: ignore[attr-defined]
    del second
    third = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    assert trained(model, third, range(2)) == trained(plain, reference, range(2))
    assert differences(plain, reference, model, third) == []


def test_parameters_of_another_optimizer_cannot_be_added() -> None:
    _, model = pair()
    blocks, head = list(model.get_submodule("blocks").parameters()), model.get_submodule("head").weight
    first = OffloadedOptimizer(model, torch.optim.AdamW, params=blocks, **ADAM)
    second = OffloadedOptimizer(model, torch.optim.AdamW, params=[head], **ADAM)
    with pytest.raises(tw.ConflictError, match="another one drives blocks"):
        second.add_param_group({"params": blocks[0]})
    assert len(second.param_groups) == 1
    first.close()


# -- gradients changed by hand -----------------------------------------------------------------------------------------------------------


def _replace(parameter: nn.Parameter, value: torch.Tensor | None) -> None:
    parameter.grad = value


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "ones": lambda p: _replace(p, torch.ones_like(p)),
    "zero_": lambda p: p.grad.zero_(),  # type: ignore[union-attr]
    "data": lambda p: setattr(p.grad, "data", torch.ones_like(p)),
}


@pytest.mark.parametrize("how", [*CHANGES, "none", "model"])
def test_what_is_done_to_used_gradients_is_refused(how: str) -> None:
    model, optimizer = stepped()
    if how == "model":
        model.zero_grad()
    for parameter in model.parameters() if how != "model" else ():
        (CHANGES[how] if how != "none" else lambda p: _replace(p, None))(parameter)
    with pytest.raises(tw.ConflictError, match=r"cleared or changed between backward and step.*cannot be undone.*overlap=False"):
        optimizer.step()


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_done_to_gradients_on_the_disk_is_refused(how: str) -> None:
    model, optimizer = stepped(overlap=False, gradients="disk")
    for parameter in model.parameters():
        CHANGES[how](parameter)
    with pytest.raises(tw.ConflictError, match=r"cleared or changed between backward and step.*on the disk.*gradients='host'"):
        optimizer.step()


@pytest.mark.parametrize("way_out", ["rollback", "close"])
def test_after_used_gradients_were_changed_only_an_earlier_state_goes_on(way_out: str, tmp_path: Path) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(2))
    optimizer.commit()
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    model.zero_grad()
    for go_on in (optimizer.step, optimizer.zero_grad, optimizer.commit, lambda: optimizer.load_state_dict(reference.state_dict())):
        with pytest.raises(tw.ConflictError, match=r"rollback\(\)"):
            go_on()
    with pytest.raises(tw.ConflictError, match=r"rollback\(\), or close\(\) and load model and a new optimizer"):
        optimizer.step()
    if way_out == "rollback":
        optimizer.rollback()
    else:
        with pytest.warns(tw.TorchwrapWarning, match="half a step ahead"):
            optimizer.close()
        model.load_state_dict(plain.state_dict())
        optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
        optimizer.load_state_dict(reference.state_dict())
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(2, 4)) == trained(plain, reference, range(2, 4))
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("how", CHANGES)
def test_after_gradients_on_the_disk_were_changed_zero_grad_gives_them_up(how: str) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, gradients="disk", **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        trained(net, opt, range(1))
        opt.zero_grad()
        loss_of(net, 5).backward()
    for parameter in model.parameters():
        CHANGES[how](parameter)
    with pytest.raises(tw.ConflictError, match=r"on the disk.*optimizer.zero_grad\(\)"):
        optimizer.step()
    assert trained(model, optimizer, range(1, 3)) == trained(plain, reference, range(1, 3))
    assert differences(plain, reference, model, optimizer) == []


def test_clearing_between_two_backwards_of_a_step_is_refused() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    first, second = loss_of(model, 0), loss_of(model, 1)
    first.backward()
    model.zero_grad(set_to_none=False)
    with pytest.raises(tw.ConflictError, match=r"has updated weights already.*overlap=False"):
        second.backward()
    with pytest.warns(tw.TorchwrapWarning, match="half a step ahead"):
        optimizer.close()


# -- weights in memory -------------------------------------------------------------------------------------------------------------------


class _Late(nn.Module):
    """Its weight's gradient is complete long before backward has read the weight for the last time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(16, 512), nn.Linear(512, 512, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight(nn.functional.linear(self.first(x), self.weight.weight.detach()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [False, True])
def test_weights_in_memory_are_old_until_the_backward_is_over(wrap: bool) -> None:
    torch.manual_seed(0)
    plain, model = _Late(), _Late()
    model.load_state_dict(plain.state_dict())
    if wrap:
        tw.offload(model, params="disk", units=("first",), pin=("weight",))
    seen: list[bool] = []
    weight = model.weight.weight
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, chunk=4096)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    old = weight.detach().clone()

    def look(parameter: torch.Tensor) -> None:
        optimizer._works.updater.wait()
        seen.append(torch.equal(weight, old))

    model.first.weight.register_post_accumulate_grad_hook(look)
    x = torch.randn(64, 16)
    for net, opt in ((model, optimizer), (plain, reference)):
        net(x).square().mean().backward()
        opt.step()  # type: ignore[attr-defined]
    assert seen == [True]
    assert differences(plain, reference, model, optimizer) == []


class _Interrupt(torch.autograd.Function):
    on = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if _Interrupt.on:
            raise KeyboardInterrupt
        return gradient


def test_after_an_interrupted_backward_of_a_plain_model_later_ones_are_followed_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256) for _ in range(2)]
    optimizer = OffloadedOptimizer(nn.ModuleList(layers), torch.optim.SGD, lr=0.1, chunk=65536)
    x = torch.randn(4, 256)
    for interrupted in (True, False):
        monkeypatch.setattr(_Interrupt, "on", interrupted)
        before = [layer.weight.detach().clone() for layer in layers]
        loss = layers[1](_Interrupt.apply(layers[0](x))).square().mean()
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                loss.backward()
        else:
            loss.backward()  # the updates are over when it returns
            assert not any(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
        optimizer.step()
        optimizer.zero_grad()


def test_weights_written_through_data_are_committed(tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, OffloadedOptimizer]:
        model = pair(offload={})[1]
        return model, OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)

    model, optimizer = begin()
    trained(model, optimizer, range(1))
    optimizer.commit()
    weight = model.get_parameter("norm.weight")
    weight.data.mul_(0.5)
    head = model.get_parameter("head.weight")
    head.data.copy_(head.data.flip(0))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.commit()
    optimizer.close()
    model, optimizer = begin()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    optimizer.close()


# -- backwards that are refused or are none ----------------------------------------------------------------------------------------------


class _Shared(nn.Module):
    """One block twice, recomputed in backwards of their own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=True)
        return x


@pytest.mark.parametrize("wrap", [False, True])
def test_backwards_inside_one_that_is_not_followed_use_nothing(wrap: bool) -> None:
    plain, model = _Shared(), _Shared()
    if wrap:
        tw.offload(model, params="disk", units=("block",))
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    for _ in range(2):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            _Shared.forward(net, torch.ones(3, 128, requires_grad=True)).square().mean().backward()  # type: ignore[arg-type]
            opt.step()
    assert differences(plain, reference, model, optimizer) == []


def test_a_step_does_not_finish_what_a_refused_backward_left_half_done() -> None:
    model = nn.Sequential(_Shared(), nn.Linear(128, 128))  # in memory nobody counts how often a weight is used
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    with pytest.raises(tw.ConflictError, match="overlap=False"):
        model(torch.ones(3, 128, requires_grad=True)).square().mean().backward()
    with pytest.raises(tw.ConflictError, match=r"came in several parts.*rollback"):
        optimizer.step()


@pytest.mark.parametrize("gradients", ["host", "disk"])
def test_gradients_asked_for_by_hand_are_no_backward_of_the_step(gradients: str) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, accumulate=2, gradients=gradients, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        for micro in range(2):
            loss_of(net, micro).backward()
            if not micro:
                torch.autograd.grad(loss_of(net, 7), net.get_parameter("blocks.0.up.weight"))
        opt.step()
    assert differences(plain, reference, model, optimizer) == []


# -- arguments and runs that go on -------------------------------------------------------------------------------------------------------


class Sometimes(torch.optim.SGD):
    """Elementwise for small gradients only."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad * (1e3 / p.grad.norm()).clamp(max=1.0), alpha=group["lr"])


class Large(Sometimes):
    """Elementwise for small tensors only, as one that keeps its state in 8 bits."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad / p.grad.norm() if p.numel() >= 4096 else p.grad, alpha=group["lr"])


class Kernels(Sometimes):
    """Takes the mean out of the gradients of convolutions only."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad - p.grad.mean(dim=(1, 2, 3), keepdim=True) if p.dim() > 3 else p.grad, alpha=group["lr"])


@pytest.mark.parametrize("cls", [Sometimes, Large, Kernels])
def test_a_class_that_is_elementwise_for_some_gradients_only_is_found_out(cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(tw.ConfigError, match="in parts it gives other numbers"):
        OffloadedOptimizer(pair()[1], cls, lr=0.1)


@pytest.mark.parametrize("argument", [{"max_grad_norm": "1"}, {"path": 3}, {"overlap": "no"}, {"accumulate": True}])
def test_arguments_of_another_kind_are_named(argument: dict[str, Any]) -> None:
    with pytest.raises(tw.ConfigError) as caught:
        OffloadedOptimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1, **argument)
    assert caught.value.where in argument
    with pytest.raises(tw.ConfigError, match="NoneType is no model"):
        OffloadedOptimizer(None, torch.optim.SGD, lr=0.1)  # type: ignore[arg-type]


def test_a_run_that_goes_on_with_settings_of_its_own_says_so(tmp_path: Path) -> None:
    optimizer = OffloadedOptimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1, momentum=0.9, path=tmp_path / "run")
    optimizer.commit()
    optimizer.close()
    with pytest.warns(tw.TorchwrapWarning, match=r"lr of group 0 is 0.1 and not 0.2"):
        OffloadedOptimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.2, momentum=0.9, path=tmp_path / "run").close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OffloadedOptimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1, momentum=0.9, path=tmp_path / "run").close()


def test_an_error_of_the_disk_before_the_first_commit_loses_no_streamed_weight(tmp_path: Path) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", overlap=False, **ADAM)
    trained(plain, reference, range(3))
    trained(model, optimizer, range(2))
    disk = optimizer._works.store._disk.backend = Broken(errno.EIO)
    disk.left = 9
    optimizer.zero_grad()
    loss_of(model, 200).backward()
    with pytest.raises(tw.StorageError):
        optimizer.step()
    disk.left = None
    optimizer.step()
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("how", ["asked", "collected"])
def test_what_cannot_be_closed_keeps_nothing_else_open(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    trained(model, optimizer, range(1))
    works = optimizer._works

    def failing(message: str) -> Callable[..., None]:
        def close() -> None:
            raise OSError(message)

        return close

    monkeypatch.setattr(works.gradients, "close", failing("first"))
    monkeypatch.setattr(works.reader, "close", failing("second"))
    with pytest.raises(OSError, match="first"):
        optimizer.close() if how == "asked" else works.close_unasked()
    assert works.freed.nbytes == 0 and not works.updater._threads
    OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM).close()  # folder and parameters are free


def test_weights_without_numbers_are_refused_by_name() -> None:
    with pytest.raises(tw.UnsupportedModelError, match=r"0\.weight is on meta"):
        OffloadedOptimizer(nn.Sequential(nn.Linear(2, 2, device="meta")), torch.optim.SGD, lr=1.0)


# -- parameters that are not those it was made with ---------------------------------------------------------------------------------------


def test_a_parameter_that_is_there_twice_is_refused() -> None:
    _, model = pair()
    weights = [model.head.weight, model.head.weight]
    with pytest.raises(tw.ConfigError, match=r"head.weight is twice in one group"):
        OffloadedOptimizer(model, torch.optim.AdamW, params=weights, lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, params=model.blocks.parameters(), lr=1e-2)
    with pytest.raises(tw.ConfigError, match=r"head.weight is twice in one group"):
        optimizer.add_param_group({"params": weights})
    assert len(optimizer.param_groups) == 1 and trained(model, optimizer, range(1))
    optimizer.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_groups_whose_parameters_were_exchanged_are_refused(overlap: bool) -> None:
    """An ordinary optimizer steps those that are there now; they are neither watched here, nor is there room for their state."""
    plain, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, overlap=overlap)
    group = optimizer.param_groups[0]
    before = group["params"]
    group["params"] = before[:3]
    with pytest.raises(tw.ConflictError, match=r"not those that it was made with.*add_param_group"):
        loss_of(model, 0).backward()
        optimizer.step()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    group["params"] = before
    optimizer.zero_grad()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    assert trained(model, optimizer, range(2)) == trained(plain, reference, range(2))
    assert differences(plain, reference, model, optimizer) == []


def test_a_frozen_weight_with_a_gradient_is_stepped_as_by_torch() -> None:
    plain, model = pair()
    for net in (plain, model):
        net.requires_grad_(False)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    for net, opt in ((plain, reference), (model, optimizer)):
        for parameter in net.parameters():
            parameter.grad = torch.ones(parameter.shape)
        opt.step()
    assert differences(plain, reference, model, optimizer) == []


def test_the_state_of_another_class_is_refused_before_anything_is_changed() -> None:
    plain, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(model, optimizer, range(1))
    before = optimizer.state_dict()
    for cls, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {}), (torch.optim.Adagrad, {})):
        other = cls(plain.parameters(), lr=0.1, **options)
        trained(plain, other, range(1))
        with pytest.raises(tw.ConfigError, match="no state dict of AdamW: it has no betas"):
            optimizer.load_state_dict(other.state_dict())
    without = copy.deepcopy(before)
    del without["state"][0]["exp_avg_sq"]
    with pytest.raises(tw.ConfigError, match="has no exp_avg_sq, only step, exp_avg"):
        optimizer.load_state_dict(without)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][n][key], value) for n, kept in before["state"].items() for key, value in kept.items())
    del before["param_groups"][0]["decoupled_weight_decay"]  # of an older version, and moved by a scheduler
    optimizer.load_state_dict({**before, "param_groups": [{**group, "initial_lr": 1.0} for group in before["param_groups"]]})
    trained(model, optimizer, range(1, 2))

"""What an offloaded optimizer refuses, how it fails, and that the next call works or says what to do."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import torchwrap as tw
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from torchwrap import OffloadedOptimizer
from torchwrap.storage import Backend

ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}


class Broken(Backend):
    """A disk that fails from the n-th write on, until it is mended."""

    def __init__(self, code: int = errno.ENOSPC) -> None:
        self.left: int | None = None
        self.code = code

    def pwrite(self, fd: int, source: memoryview, offset: int) -> int:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code))
        return super().pwrite(fd, source, offset)


def test_optimizer_that_is_made_already_is_told_the_form() -> None:
    _, model = pair()
    with pytest.raises(tw.ConfigError, match=r"object of class AdamW is no optimizer class .*\(model, torch\.optim\.AdamW, lr="):
        OffloadedOptimizer(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "Muon", "SparseAdam"])
def test_classes_that_are_not_elementwise_are_refused_by_name(name: str) -> None:
    _, model = pair()
    with pytest.raises(tw.ConfigError, match=f"{name} cannot be offloaded.*pin="):
        OffloadedOptimizer(model, getattr(torch.optim, name))


class Normed(torch.optim.SGD):
    """Scales by the norm of the whole tensor: other numbers in parts."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


class Signed(torch.optim.Optimizer):
    """Elementwise, and nobody's but the user's."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                        mean.mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                        p.add_(mean.sign(), alpha=-group["lr"])


def test_an_unknown_class_that_is_not_elementwise_is_found_out() -> None:
    _, model = pair()
    with pytest.raises(tw.ConfigError, match="Normed cannot be offloaded: in parts it gives other numbers"):
        OffloadedOptimizer(model, Normed, lr=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_that_does_not_repeat_itself_is_refused(dtype: torch.dtype) -> None:
    momentum: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    with pytest.raises(
        tw.ConfigError, match=rf"torch's fused SGD with momentum gives other numbers each time in {dtype}.*Leave fused= out"
    ):
        OffloadedOptimizer(pair(dtype)[1], torch.optim.SGD, fused=True, **momentum)
    for others in ({"fused": True, "lr": 0.1}, momentum):
        OffloadedOptimizer(pair(dtype)[1], torch.optim.SGD, **others).close()
    OffloadedOptimizer(pair()[1], torch.optim.SGD, fused=True, **momentum).close()


def test_an_unknown_class_that_is_elementwise_works() -> None:
    plain, model = pair()
    reference = Signed(plain.parameters(), lr=0.01)
    optimizer = OffloadedOptimizer(model, Signed, lr=0.01, chunk=65536)
    assert trained(model, optimizer, range(3)) == trained(plain, reference, range(3))
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_grad_norm", 0.0), ("accumulate", 0), ("gradients", "moon"), ("durability", "ever"), ("durability", "step"), ("chunk", 100)],
)
def test_arguments_out_of_range_are_refused(field: str, value: Any) -> None:
    _, model = pair()
    with pytest.raises(tw.ConfigError) as caught:
        OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, **{field: value})
    assert caught.value.where == field


def test_options_the_class_refuses_are_refused_in_its_words() -> None:
    _, model = pair()
    with pytest.raises(ValueError, match="Invalid learning rate"):
        OffloadedOptimizer(model, torch.optim.AdamW, lr=-1.0)


def test_hooks_on_all_optimizers_are_called_once_for_a_step() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    calls: list[object] = []
    hook = register_optimizer_step_post_hook(lambda found, args, kwargs: calls.append(found))
    own = optimizer.register_step_pre_hook(lambda found, args, kwargs: calls.append("own"))
    trained(model, optimizer, range(2))
    hook.remove()
    own.remove()
    assert calls == ["own", optimizer] * 2


# -- gradients that are not there -------------------------------------------------------------------------------------------------------


def taken() -> tuple[nn.Module, OffloadedOptimizer]:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    return model, optimizer


def test_a_gradient_that_was_taken_is_gone_after_zero_grad() -> None:
    model, optimizer = taken()
    assert model.get_parameter("blocks.0.up.weight").grad is not None
    optimizer.step()
    optimizer.zero_grad()
    assert model.get_parameter("blocks.0.up.weight").grad is None


def test_clipping_by_hand_during_overlap_is_loud() -> None:
    model, _ = taken()
    with pytest.raises(tw.ConflictError, match=r"embedding.weight has been used during backward.*overlap=False"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_a_gradient_scaler_during_overlap_is_loud() -> None:
    _, optimizer = taken()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(tw.ConflictError, match=r"has been used during backward.*overlap=False"):
        scaler.step(optimizer)


def test_a_second_backward_before_the_step_is_a_conflict_that_names_the_way_out() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    first, second = loss_of(model, 0), loss_of(model, 1)
    first.backward()
    for again in (second.backward, lambda: loss_of(model, 1)):
        with pytest.raises(tw.ConflictError, match=r"accumulate=N or overlap=False"):
            again()
    optimizer.step()
    optimizer.zero_grad()
    assert trained(model, optimizer, range(1))


def test_forgetting_zero_grad_is_a_conflict() -> None:
    model, optimizer = taken()
    optimizer.step()
    with pytest.raises(tw.ConflictError, match="zero_grad"):
        loss_of(model, 1).backward()


def test_the_models_own_zero_grad_will_do() -> None:
    for set_to_none in (True, False):
        model, optimizer = taken()
        optimizer.step()
        model.zero_grad(set_to_none=set_to_none)
        loss_of(model, 1).backward()
        optimizer.step()
        plain, _ = pair()
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        trained(plain, reference, range(1))
        reference.zero_grad(set_to_none=set_to_none)
        loss_of(plain, 1).backward()
        reference.step()
        assert differences(plain, reference, model, optimizer) == []


def test_giving_up_gradients_that_are_used_is_a_conflict() -> None:
    model, optimizer = taken()
    with pytest.raises(tw.ConflictError, match="cannot be given up"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    assert trained(model, optimizer, range(1))


def test_a_setting_changed_too_late_is_a_conflict() -> None:
    _, optimizer = taken()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(tw.ConflictError, match=r"lr of group 0 was changed from 0.01 to 0.5"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()


def test_stepping_twice_on_used_gradients_is_a_conflict() -> None:
    _, optimizer = taken()
    optimizer.step()
    with pytest.raises(tw.ConflictError, match="used up"):
        optimizer.step()


def test_a_saved_graph_notices_that_its_weights_are_new() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_overlap_gradients_stay_and_may_be_changed() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, **ADAM)
    for net, opt in ((plain, reference), (model, optimizer)):
        loss_of(net, 0).backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
        opt.step()
        opt.step()  # on the same gradients, as one may
    assert differences(plain, reference, model, optimizer) == []


class _Looked(nn.Module):
    def __init__(self, vocabulary: int, *, tied: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(vocabulary, 32, sparse=True), nn.Linear(32, vocabulary, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))  # type: ignore[no-any-return]


def test_sparse_gradients_are_refused_before_a_backward_has_updated_others() -> None:
    model = _Looked(8192)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(tw.UnsupportedModelError, match=r"table\.weight is sparse.*sparse=False"):
        OffloadedOptimizer(model, torch.optim.SGD, lr=0.1)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, params=model.head.parameters(), lr=0.1)
    with pytest.raises(tw.UnsupportedModelError, match="sparse=False"):
        optimizer.add_param_group({"params": [model.table.weight]})
    assert len(optimizer.param_groups) == 1
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
    optimizer.close()


def test_a_sparse_gradient_that_nobody_could_foresee_is_refused_when_it_comes() -> None:
    model = _Looked(8192)
    model.table.requires_grad_(False)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1)
    model.table.requires_grad_(True)
    optimizer.zero_grad()
    with pytest.raises(tw.UnsupportedModelError, match="sparse=False"):
        model(torch.arange(3)).sum().backward()
    optimizer.close()


@pytest.mark.parametrize("vocabulary", [8192, 64])
def test_a_sparse_table_that_is_a_heads_weight_too_and_a_small_one_are_trained(vocabulary: int) -> None:
    torch.manual_seed(0)
    plain = _Looked(vocabulary, tied=vocabulary == 8192)
    model = copy.deepcopy(plain)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1)
    for _ in range(2):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            net(torch.arange(3)).square().mean().backward()
            opt.step()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


# -- failures ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])
@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_full_disk_in_a_first_step_is_mended_and_the_step_repeated(overlap: bool, after: int) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=overlap, **ADAM)
    disk = optimizer._works.store._disk.backend = Broken()
    disk.left = after
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    with pytest.raises(tw.DiskFullError):
        optimizer.step()
    disk.left = None
    optimizer.step()
    trained(plain, reference, range(1))
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(1, 3)) == trained(plain, reference, range(1, 3))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])
def test_a_disk_that_fails_in_the_middle_of_an_update_in_place_needs_a_rollback(tmp_path: Path, overlap: bool) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=overlap, path=tmp_path / "run", **ADAM)
    trained(plain, reference, range(2))
    trained(model, optimizer, range(2))
    optimizer.commit()
    trained(model, optimizer, range(2, 4))
    disk = optimizer._works.store._disk.backend = Broken(errno.EIO)
    disk.left = 9
    optimizer.zero_grad()
    loss_of(model, 4).backward()
    with pytest.raises(tw.StorageError):
        optimizer.step()
    disk.left = None
    with pytest.raises(tw.StorageError, match="rollback"):
        optimizer.step()
    optimizer.rollback()
    assert optimizer.steps == 2
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(2, 5)) == trained(plain, reference, range(2, 5))
    assert differences(plain, reference, model, optimizer) == []


def test_an_error_inside_the_class_is_typed_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair()
    optimizer = OffloadedOptimizer(model, Signed, lr=0.01, chunk=65536)
    step = Signed.step
    with monkeypatch.context() as patched:
        patched.setattr(Signed, "step", lambda self, closure=None: 1 / 0)
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        with pytest.raises(tw.TorchwrapError, match="ZeroDivisionError") as caught:
            optimizer.step()
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and caught.value.where
    assert Signed.step is step
    optimizer.step()
    reference = Signed(plain.parameters(), lr=0.01)
    trained(plain, reference, range(1))
    assert differences(plain, reference, model, optimizer) == []


def test_a_backward_that_raises_half_way_leaves_a_choice() -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)

    def broken(net: nn.Module) -> None:
        def fail(gradient: torch.Tensor) -> None:
            raise KeyboardInterrupt

        block = net.get_submodule("blocks.0")
        hook = block.register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
        with pytest.raises(KeyboardInterrupt):
            loss_of(net, 0).backward()
        hook.remove()

    for net, opt in ((plain, reference), (model, optimizer)):
        opt.zero_grad()
        broken(net)
        if opt is optimizer:
            with pytest.raises(tw.ConflictError, match="given up"):
                opt.zero_grad()
        opt.step()  # with the gradients there are, as in memory
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(1, 3)) == trained(plain, reference, range(1, 3))
    assert differences(plain, reference, model, optimizer) == []


def test_bits_flipped_on_the_disk_are_found_before_they_are_used() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(model, optimizer, range(1))
    segment = optimizer._works.store.file.segments["blocks.1.up.weight:state:exp_avg"]
    os.pwrite(optimizer._works.store.file.fd(False), b"\xff", segment.offset + 5)
    os.fsync(optimizer._works.store.file.fd(False))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    with pytest.raises(tw.CorruptDataError, match=r"blocks\.1\.up\.weight:state:exp_avg"):
        optimizer.step()


def test_a_stored_weight_whose_bytes_changed_is_found_before_the_first_update_counts() -> None:
    _, model = pair()
    handle = tw.handle_of(model, "offload")
    piece = next(piece for piece in handle.pieces if piece.name == "blocks.1.up.weight")
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, overlap=False, **ADAM)
    loss_of(model, 0).backward()
    home = piece.home
    os.pwrite(home.file.fd(False), b"\xff", home.offset + 1001)
    os.fsync(home.file.fd(False))
    with pytest.raises(tw.CorruptDataError, match=r"blocks\.1\.up\.weight"):
        optimizer.step()
    assert piece.home is home


# -- life --------------------------------------------------------------------------------------------------------------------------------


def test_nothing_outlives_the_optimizer_and_the_model(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # other tests may have left models with optimizers to the collector
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", durability="none", **ADAM)
    trained(model, optimizer, range(2))
    assert len(os.listdir(tmp_path / "run")) == 1
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    new = set(threading.enumerate()) - before
    assert not [thread for thread in new if thread.name in ("torchwrap-update", "torchwrap-write")]
    assert loss_of(model, 3).isfinite()  # its weights are in the store still
    del model
    gc.collect()
    assert os.listdir(tmp_path / "run") == []


def test_use_after_close_is_refused_and_the_model_goes_on() -> None:
    plain, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(model, optimizer, range(1))
    optimizer.close()
    optimizer.close()
    with pytest.raises(tw.StorageError, match="closed"):
        optimizer.step()
    trained(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), range(1))
    assert loss_of(model, 1).item() == loss_of(plain, 1).item()
    loss_of(model, 1).backward()
    assert not model.get_parameter("blocks.0.up.weight").grad.isnan().any()  # type: ignore[union-attr]


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_an_optimizer_is_not_copied(how: Callable[[Any], Any]) -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    with pytest.raises(TypeError, match="state_dict"):
        how(optimizer)


def test_a_model_wrapped_after_the_optimizer_was_made_is_noticed() -> None:
    plain, _ = pair()
    optimizer = OffloadedOptimizer(plain, torch.optim.AdamW, overlap=False, **ADAM)
    tw.offload(plain, params="disk")
    loss_of(plain, 0).backward()
    with pytest.raises(tw.ConflictError, match="then make the optimizer"):
        optimizer.step()


def test_states_of_another_shape_are_refused_in_torchs_words() -> None:
    _, model = pair()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"] * 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)


def test_wrapping_draws_no_random_numbers_and_leaves_threads_alone() -> None:
    _, model = pair()
    torch.manual_seed(11)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(11)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, **ADAM)
    trained(model, optimizer, range(1))
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads

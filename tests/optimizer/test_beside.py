"""Updates that run while backward still needs the old weights: what backward reads is old, what comes out is as in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from tests.optimizer.test_rules import Broken
from torchwrap import OffloadedOptimizer
from torchwrap.storage.backend import Backend

ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": "512KiB"}


def _pair(offload: dict[str, Any] | None) -> tuple[nn.Module, nn.Module]:
    """Twice the same, the second one offloaded or as it is; there is room for each gradient and new values beside it."""
    if offload is None:
        return pair(width=129, wide=False)[0], pair(width=129, wide=False)[0]
    return pair(offload=offload, width=129)


class _Here(torch.autograd.Function):
    """Nothing, but for a call when backward comes by."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[], object]) -> torch.Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.call()
        return gradients[0], None


class _Twice(nn.Module):
    """Its backward reads the weight, as a constant, when the weight's gradient is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(96, 96), nn.Linear(96, 96, bias=False)
        self.passing: Callable[[], object] = int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(self.first(x), self.weight.weight.detach()).tanh()
        return x + self.weight(_Here.apply(y, lambda: self.passing()))  # type: ignore[no-any-return, no-untyped-call]


class _Stack(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.blocks, self.recompute = nn.ModuleList(_Twice() for _ in range(3)), recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_block_goes_on_with_a_weight_that_was_updated_meanwhile(recompute: bool, k: int) -> None:
    torch.manual_seed(0)
    plain, model = _Stack(recompute).train(), _Stack(recompute).train()
    model.load_state_dict(plain.state_dict())
    tw.offload(model, params="disk", units=("blocks.0", "blocks.1", "blocks.2"), k=k)
    handle = tw.handle_of(model, "offload")
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9, chunk=4096)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    updated: list[int] = []

    def waiting(block: Any) -> Callable[[], None]:
        piece = handle.piece_of(block.weight.weight)
        assert piece is not None

        def wait() -> None:
            before = handle.engine.shown_version(piece)
            optimizer._works.updater.wait()
            updated.append(piece.version - before)

        return wait

    for block in model.blocks:
        block.passing = waiting(block)  # type: ignore[assignment]
    for step in range(3):
        for net, opt in ((model, optimizer), (plain, reference)):
            opt.zero_grad()
            net(torch.randn(8, 96, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            opt.step()
    assert updated == [1] * 9
    assert optimizer.stats()["bytes_reused"] >= 9 * 96 * 96 * 4  # those weights were in slots when their updates began
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("chunk", ["1MiB", "64KiB"], ids=["room", "too large"])
def test_the_state_of_a_weight_in_memory_is_updated_beside_backward_if_there_is_room_for_values_too(chunk: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 64))
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9, chunk=chunk)
    old, seen = model[1].weight.detach().clone(), []

    def look(_: torch.Tensor) -> None:
        optimizer._works.updater.wait()
        seen.append(("1.weight:state:momentum_buffer" in optimizer._works.store.file.segments, torch.equal(model[1].weight, old)))

    model[0].weight.register_post_accumulate_grad_hook(look)
    model(torch.randn(32, 64)).square().mean().backward()
    assert seen == [(chunk == "1MiB", True)]
    assert not torch.equal(model[1].weight, old)  # the backward is over
    optimizer.step()


@pytest.mark.parametrize("offload", [{"params": "disk"}, {"device_memory": 12_000_000}, None], ids=["disk", "half", "in-memory"])
@pytest.mark.parametrize("writes", [1, 7, 11])
def test_an_update_that_fails_beside_backward_is_finished_by_the_step(tmp_path: Path, offload: dict[str, Any] | None, writes: int) -> None:
    plain, model = _pair(offload)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    assert trained(model, optimizer, range(1)) == trained(plain, reference, range(1))
    optimizer.commit()
    disk = optimizer._works.store._disk.backend = Broken()
    disk.left = writes
    for net, opt in ((plain, reference), (model, optimizer)):
        opt.zero_grad()
        loss_of(net, 100).backward()
    with pytest.raises(tw.StorageError):
        optimizer.step()
    with pytest.raises(tw.ConflictError):
        optimizer.zero_grad()
    disk.left = None
    optimizer.step()
    reference.step()
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(2, 4)) == trained(plain, reference, range(2, 4))


def test_a_rollback_forgets_the_error_of_an_update_beside_backward(tmp_path: Path) -> None:
    plain, model = _pair({"params": "disk"})
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    assert trained(model, optimizer, range(1)) == trained(plain, reference, range(1))
    optimizer.commit()
    disk = optimizer._works.store._disk.backend = Broken()
    disk.left = 3
    optimizer.zero_grad()
    loss_of(model, 100).backward()
    disk.left = None
    optimizer.rollback()
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(1, 3)) == trained(plain, reference, range(1, 3))
    assert differences(plain, reference, model, optimizer) == []


@pytest.mark.parametrize("way_out", ["step", "rollback"])
@pytest.mark.parametrize("offload", [{"params": "disk"}, {"device_memory": 12_000_000}, None], ids=["disk", "half", "in-memory"])
def test_after_a_backward_that_raised_the_step_has_what_it_brought(tmp_path: Path, offload: dict[str, Any] | None, way_out: str) -> None:
    plain, model = _pair(offload)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", **ADAM)
    trained(model, optimizer, range(1))
    trained(plain, reference, range(1))
    optimizer.commit()

    def refuse(_: torch.Tensor) -> None:
        raise KeyError("no further")

    for net, opt in ((plain, reference), (model, optimizer)):
        opt.zero_grad()
        hook = net.get_parameter("blocks.1.up.weight").register_post_accumulate_grad_hook(refuse)
        with pytest.raises(KeyError, match="no further"):
            loss_of(net, 100).backward()
        hook.remove()
    if way_out == "step":
        optimizer.step()
        reference.step()
    else:
        optimizer.rollback()
        reference.zero_grad()
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(2, 4)) == trained(plain, reference, range(2, 4))
    assert differences(plain, reference, model, optimizer) == []


class _Slow(Backend):
    """Lets no write through until it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def pwrite(self, fd: int, source: memoryview, offset: int) -> int:
        self.go.wait(20)
        return super().pwrite(fd, source, offset)


@pytest.mark.parametrize("offload", [{"params": "disk"}, None], ids=["disk", "in-memory"])
def test_backward_waits_for_a_slow_disk_before_more_gradients_wait_than_there_is_room_for(offload: dict[str, Any] | None) -> None:
    _, model = pair(offload=offload, width=257) if offload is not None else (None, pair(width=257)[0])
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9, chunk="2MiB")
    disk = optimizer._works.store._disk.backend = _Slow()
    updater, room, most = optimizer._works.updater, optimizer._works.gradients.timing.room, 0
    wait = updater.wait_for_room

    def watched(nbytes: int) -> None:
        nonlocal most
        most = max(most, updater._bytes)
        if updater._bytes > nbytes:
            disk.go.set()
        wait(nbytes)

    updater.wait_for_room = watched  # type: ignore[method-assign]
    loss_of(model, 0).backward()
    disk.go.set()
    optimizer.step()
    largest = max(parameter.numel() * 4 for parameter in model.parameters())
    assert room < most <= room + largest


def test_a_weight_that_is_written_to_during_backward_is_not_overwritten_in_silence(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(96, 600), nn.Tanh(), nn.Linear(600, 600))  # large enough to be updated beside backward
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, path=tmp_path / "run")
    optimizer.commit()
    before = model[2].weight.detach().clone()

    def write(gradient: torch.Tensor) -> None:
        optimizer._works.updater.wait()  # the last layer's new values are there
        with torch.no_grad():
            model[2].weight.mul_(0.5)

    model[0].bias.register_hook(write)
    with pytest.raises(tw.ConflictError, match="was written to during backward"):
        model(torch.ones(4, 96)).square().sum().backward()
        optimizer.step()
    optimizer.rollback()
    assert torch.equal(model[2].weight, before)
    optimizer.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_weight_that_is_written_to_between_backward_and_step_is_refused_or_as_in_memory(overlap: bool, tmp_path: Path) -> None:
    plain, model = _pair(None)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.5)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run", weight_decay=0.5, overlap=overlap, **ADAM)
    assert trained(model, optimizer, range(1)) == trained(plain, reference, range(1))
    optimizer.commit()
    name = "blocks.1.up.weight"
    for net, opt in ((plain, reference), (model, optimizer)):
        opt.zero_grad()
        loss_of(net, 100).backward()
        with torch.no_grad():
            net.get_parameter(name).mul_(2)
    reference.step()
    if overlap:
        for _ in range(2):
            with pytest.raises(tw.ConflictError, match=f"{name} was written to between backward and step"):
                optimizer.step()
        optimizer.rollback()
        optimizer.zero_grad()
        loss_of(model, 100).backward()
        optimizer.step()
    else:
        optimizer.step()
        assert differences(plain, reference, model, optimizer) == []


class _TwoLayers(nn.Module):
    """A block of two weights, with a call when its backward comes by between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(96, 192, bias=False), nn.Linear(192, 96, bias=False)
        self.passing: Callable[[], object] = int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(_Here.apply(self.up(x).tanh(), lambda: self.passing()))  # type: ignore[no-any-return, no-untyped-call]


def _two_layers(recompute: bool) -> _Stack:
    torch.manual_seed(0)
    model = _Stack(recompute)
    model.blocks = nn.ModuleList(_TwoLayers() for _ in range(3))
    return model.train()


def _half_resident(model: nn.Module) -> tuple[Any, torch.Tensor]:
    """Offload it so that blocks are streamed in part; the last of those, and its weight that stays."""
    tw.offload(model, device_memory=4 * 96 * 192 * 4 + 60_000, units=("blocks.0", "blocks.1", "blocks.2"), k=1)
    parts = [unit for unit in tw.handle_of(model, "offload").units if len({piece.resident for piece in unit.pieces}) == 2]
    return parts[-1], next(piece.parameter for piece in parts[-1].pieces if piece.resident)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_weight_in_memory_of_a_streamed_block_is_new_when_the_backward_has_left_the_block(recompute: bool) -> None:
    plain, model = _two_layers(recompute), _two_layers(recompute)
    (block, staying), seen = _half_resident(model), []
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9, chunk=4096)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    old = staying.detach().clone()

    def look() -> None:
        optimizer._works.updater.wait()
        seen.append(torch.equal(staying, old))

    for each in model.blocks:
        each.passing = look  # type: ignore[assignment]
    for step in range(3):
        for net, opt in ((model, optimizer), (plain, reference)):
            opt.zero_grad()
            net(torch.randn(8, 96, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            opt.step()
    inside = 3 - block.index  # calls before the backward has left that block
    assert seen[:3] == [True] * inside + [False] * (3 - inside)
    assert differences(plain, reference, model, optimizer) == []


def test_a_weight_in_memory_of_a_streamed_block_is_not_overwritten_in_silence_either(tmp_path: Path) -> None:
    model = _two_layers(False)
    _, staying = _half_resident(model)
    optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=0.1, path=tmp_path / "run", chunk="1MiB")
    optimizer.commit()
    before = staying.detach().clone()

    def write() -> None:
        optimizer._works.updater.wait()
        with torch.no_grad():
            staying.mul_(0.5)

    model.blocks[0].passing = write  # type: ignore[assignment]
    with pytest.raises(tw.ConflictError, match="was written to during backward"):
        model(torch.ones(4, 96)).square().sum().backward()
        optimizer.step()
    optimizer.rollback()
    assert torch.equal(staying, before)
    optimizer.close()

"""Blocks that write to their buffers: a block that is computed again finds them as its first call did and leaves them as that left them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.activations import buffers

WIDTH = 16


class Normal(nn.Module):
    """x: (B, C, T) float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Spectral(nn.Module):
    def __init__(self, old: bool = False) -> None:
        super().__init__()
        norm: Any = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
        self.linear = norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


class Counter(nn.Module):
    """Its output depends on how often it was called, also when it does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.linear(x).tanh() * self.count.clone()  # torch refuses what was saved and then written


class Assigning(Counter):
    """Replaces its buffer and registers another in its first call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "scale" in self._buffers:
            self.scale = self.scale * 2
        else:
            self.register_buffer("scale", torch.ones(WIDTH))
        self.count = self.count + self.scale.mean()
        return x + self.linear(x).tanh() * self.count * self.scale


class Codebook(Counter):
    """Writes past autograd's knowledge, as moving averages often do; the buffer is large."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(2 * buffers.LARGE // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.table.data.mul_(1.5)
        return x + self.linear(x).tanh() * self.table.mean()


class Shared(Counter):
    """Two names for one buffer, a module called twice, and what is read after it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counter()
        self.inner.count = self.count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.inner(self.inner(x)).tanh())


KINDS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": Normal,
    "spectral norm": Spectral,
    "old spectral norm": lambda: Spectral(old=True),
    "counter": Counter,
    "assigned": Assigning,
    "large": Codebook,
    "shared": Shared,
}
TECHNIQUES: dict[str, Callable[..., Any]] = {
    "offload": lambda model, **fields: tw.offload(model, params="disk", **fields),
    "superpipeline": lambda model, **fields: tw.superpipeline(model, k=2, k_prime=1, **fields),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_technique = pytest.mark.parametrize("technique", TECHNIQUES)


def _pair(kind: Callable[[], nn.Module], technique: str = "offload", mode: str = "recompute") -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    plain = nn.Sequential(*(kind() for _ in range(4))).train()
    model = copy.deepcopy(plain)
    TECHNIQUES[technique](model, activations=mode)
    return plain, model


def _input() -> torch.Tensor:
    return torch.randn(4, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


def _different(model: nn.Module, plain: nn.Module) -> list[str]:
    """Names of gradients and buffers that are not those of the plain model, in a model that was unwrapped."""
    gradients = [(name, p.grad, dict(plain.named_parameters())[name].grad) for name, p in model.named_parameters()]
    values = [(name, value, dict(plain.named_buffers())[name]) for name, value in model.named_buffers()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert gradients and values
    return [name for name, found, wanted in [*gradients, *values] if found is None or wanted is None or not torch.equal(found, wanted)]


@every_technique
@pytest.mark.parametrize("mode", ["keep", "recompute", "auto", "disk"])
@every_kind
def test_steps(kind: str, mode: str, technique: str) -> None:
    plain, model = _pair(KINDS[kind], technique, mode)
    optimizers: list[Any] = [torch.optim.SGD(plain.parameters(), lr=0.1), tw.OffloadedOptimizer(model, torch.optim.SGD, lr=0.1)]
    for step in range(4):
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(each(_input()).square().mean())
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses), step
    optimizers[1].close()
    plain.eval(), model.eval()
    assert torch.equal(plain(_input()), model(_input()))
    tw.unwrap(model)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


@every_kind
def test_gradients_of_calls_under_way_at_once(kind: str) -> None:
    plain, model = _pair(KINDS[kind])
    for each in (plain, model):
        first, second = each(_input()).square().mean(), each(2 * _input()).square().mean()
        second.backward()
        first.backward(retain_graph=True)
        first.backward()
    tw.unwrap(model)
    assert _different(model, plain) == []


def test_the_buffers_stay_the_same_objects() -> None:
    _, model = _pair(Shared)
    before = dict(model.named_buffers(remove_duplicate=False))
    model(_input()).square().mean().backward()
    assert all(value is before[name] for name, value in model.named_buffers(remove_duplicate=False))


class Failing(Counter):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        self.calls += 1
        if self.calls == 2:
            raise KeyError("again")
        return x.exp()


def test_an_exception_while_computing_again_leaves_the_buffers() -> None:
    _, model = _pair(Failing)
    before = dict(model.named_buffers())
    loss = model(_input()).mean()
    with pytest.raises(KeyError, match="again"):
        loss.backward()
    assert all(value is before[name] and value == 2 for name, value in model.named_buffers())


class Seldom(Counter):
    """Writes to a large buffer from its third call on. The table: (N,) float."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(2 * buffers.LARGE // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x) * self.table.mean()
        if self.count > 3:
            self.table.mul_(1.5)
        return x


def test_large_buffers_are_copied_only_where_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    plain_copy = buffers._copy
    monkeypatch.setattr(buffers, "_copy", lambda tensor: copied.append(tensor.nbytes) or plain_copy(tensor))
    plain, model = _pair(Seldom)
    for step in range(2):
        copied.clear()
        for each in (plain, model):
            each(_input()).square().mean().backward()
        assert copied.count(2 * buffers.LARGE) == (4 if step == 0 else 0)
    with pytest.raises(tw.UnsupportedModelError, match="table") as caught:  # refused, because it was not copied in time
        model(_input())
    assert "disk" in (caught.value.fix or "")
    tw.unwrap(model)
    assert _different(model, plain)


def test_a_large_buffer_changed_before_the_backward_is_noticed() -> None:
    _, model = _pair(Seldom)
    model(_input()).mean().backward()
    loss = model(_input()).mean()
    model[1].table.zero_()
    with pytest.raises(tw.UnsupportedModelError, match="table"):
        loss.backward()


def test_backwards_in_two_threads_leave_the_buffers() -> None:
    """Both are in the middle of computing the same block again; the one that came first ends first."""
    _, model = _pair(Counter)
    before = dict(model.named_buffers())
    kept = buffers.Buffers()
    first, second = kept.found(model[0]), kept.found(model[0])
    inside, out = threading.Event(), threading.Event()

    def other() -> None:
        with second.put_back():
            inside.set()
            assert out.wait(10)

    thread = threading.Thread(target=other)
    with first.put_back():
        thread.start()
        assert inside.wait(10)
    out.set()
    thread.join(10)
    assert model[0].count is before["0.count"]


@pytest.mark.parametrize("kind", ["batch norm", "counter"])
def test_compiled_blocks(kind: str) -> None:
    plain, model = _pair(KINDS[kind])
    for each in (plain, model):
        compiled = torch.compile(each, backend="eager")
        for _ in range(3):
            compiled(_input()).square().mean().backward()
    tw.unwrap(model)
    assert _different(model, plain) == []

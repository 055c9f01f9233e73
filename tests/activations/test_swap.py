"""Activations that leave and come back: how much memory they take meanwhile, and random programs of views and in-place writes."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchwrap as tw
from torchwrap.activations import swap
from torchwrap.activations.records import Use
from torchwrap.activations.swap import Swap
from torchwrap.activations.tiers import DiskTier, HostTier, Loading, Place
from torchwrap.core import errors
from torchwrap.offload.config import Offload
from torchwrap.storage import pool
from torchwrap.stream.arena import HostArena

CPU = torch.device("cpu")
WIDTH = 64
ROWS = 512
PIECE = ROWS * WIDTH * 4  # bytes of one tensor between layers


class _Block(nn.Module):
    """Saves six tensors of PIECE bytes: its input, and two for each map and activation after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.maps:
            x = each(x).exp().mul(1e-3).sin()
        return x


class _Living(TorchDispatchMode):
    """Counts the bytes of all memory that operators return, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= PIECE:
                storage = tensor.untyped_storage()
                if (seen := self._seen.get(storage._cdata)) is None or seen() is not storage:
                    nbytes, key = storage.nbytes(), storage._cdata
                    self._seen[key] = weakref.ref(storage, lambda _, nbytes=nbytes: self._add(-nbytes))
                    self._add(nbytes)
        return output

    def _add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def _peaks(depth: int, mode: str) -> tuple[int, int]:
    """Most bytes alive in the forward and in the backward, gradients of weights not counted."""
    torch.manual_seed(1)
    model = nn.ModuleList(_Block() for _ in range(depth)).requires_grad_(False)
    tw.offload(model, params="device", units=("_Block",), activations=mode)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    for _ in range(2):
        with _Living() as living:
            y = x * 1
            for block in model:
                y = block(y)
            loss = y.square().sum()
            del y
            forward, living.peak = living.peak, living.now
            loss.backward()
            backward = living.peak
        del loss
    return forward, backward


def test_peak_is_that_of_two_blocks_whatever_their_number() -> None:
    saved, working = 6 * PIECE, 4 * PIECE
    assert max(_peaks(4, "disk") + _peaks(12, "disk")) <= 2 * saved + working
    assert min(_peaks(12, "keep")) >= 12 * saved
    inputs = 12 * PIECE
    assert max(_peaks(12, "recompute")) <= inputs + saved + working


# -- the moves, one by one -------------------------------------------------------------------------------------------------------------


class _SlowTier(DiskTier):
    """Writes when told to."""

    def __init__(self) -> None:
        super().__init__(Offload(), CPU)
        self.go, self.begun = threading.Semaphore(0), threading.Semaphore(0)

    def write(self, memory: torch.Tensor, mark: Any) -> Place:
        self.begun.release()
        assert self.go.acquire(timeout=20)
        return super().write(memory, mark)


@contextmanager
def _moves(tier: Callable[[], Any] = lambda: DiskTier(Offload(), CPU), timeout_s: float = 20.0) -> Iterator[Swap]:
    made = Swap(tier, CPU, timeout_s, None)
    yield made
    made.close()


def _settle(moved: Swap) -> None:
    with moved._state:
        assert moved._state.wait_for(lambda: not moved._unwritten, 20)


def _large(fill: float = 1.0) -> torch.Tensor:
    return torch.full((128, 256), float(fill))


def _out(moved: Swap, tensor: torch.Tensor) -> tuple[Use, Any]:
    use = moved.begin("first")
    return use, moved.pack(use, tensor)


def test_memory_is_free_as_soon_as_it_is_written() -> None:
    with _moves() as moved:
        tensor = _large()
        storage = weakref.ref(tensor.untyped_storage())
        _, entry = _out(moved, tensor)
        del tensor
        assert storage() is not None  # the last block's stays
        moved.begin("second")
        _settle(moved)
        assert storage() is None
        back = entry.restore()
        assert torch.equal(back, _large()) and back.data_ptr() % 64 == 0
        assert moved.counters["written"] == moved.counters["read"] == _large().nbytes


def test_asked_for_before_its_write_has_ended() -> None:
    tier = _SlowTier()
    with _moves(lambda: tier) as moved:
        tensor = _large()
        address = tensor.data_ptr()
        _, entry = _out(moved, tensor)
        del tensor
        moved.begin("second")
        assert tier.begun.acquire(timeout=20)
        assert entry.restore().data_ptr() == address
        tier.go.release()
        _settle(moved)
        assert entry.restore().data_ptr() == address  # the backward is there, so it is not sent away any more
        assert moved.counters["read"] == 0
        del entry
        gc.collect()
        assert not list(moved._stored)


def test_asked_for_before_its_write_has_begun() -> None:
    tier = _SlowTier()
    with _moves(lambda: tier) as moved:
        use = moved.begin("first")
        entries = [moved.pack(use, _large(n)) for n in range(3)]
        moved.begin("second")
        assert all(torch.equal(entry.restore(), _large(n)) for n, entry in enumerate(entries))
        for _ in entries:
            tier.go.release()
        _settle(moved)
        assert moved.counters["written"] <= _large().nbytes  # only the one under way


def test_a_dead_graph_is_not_written() -> None:
    tier = _SlowTier()
    with _moves(lambda: tier) as moved:
        use = moved.begin("first")
        entries = [moved.pack(use, _large(n)) for n in range(3)]
        moved.begin("second")
        assert tier.begun.acquire(timeout=20)
        storages = [weakref.ref(each._record.memory.untyped_storage()) for each in entries]
        del entries
        assert [each() is None for each in storages] == [False, True, True]
        tier.go.release()
        _settle(moved)
        assert storages[0]() is None and not list(moved._stored)


def test_one_copy_for_all_views() -> None:
    with _moves() as moved:
        tensor = _large()
        use = moved.begin("first")
        views = [tensor, tensor.t(), tensor[:, :200], tensor.view(-1), tensor.view(torch.int32)]
        entries = [moved.pack(use, view) for view in views]
        expected = [(view.clone(), view.stride(), view.storage_offset()) for view in views]
        del tensor, views
        use = moved.begin("second")
        _settle(moved)
        assert moved.counters["saved"] == moved.counters["written"] == _large().nbytes
        backs = [entry.restore() for entry in entries]
        assert len({back.untyped_storage().data_ptr() for back in backs}) == 1
        for back, (value, stride, offset) in zip(backs, expected, strict=True):
            assert torch.equal(back, value) and back.stride() == stride and back.storage_offset() == offset


def test_a_small_part_of_something_large_moves_alone() -> None:
    with _moves() as moved:
        data = torch.randn(64, 128, 256)
        use = moved.begin("first")
        entry = moved.pack(use, data[7:9, :, 3:])
        moved.begin("second")
        _settle(moved)
        expected = data[7:9, :, 3:].clone()
        residue = data[7:9, :, 3:].data_ptr() % 64
        assert moved.counters["written"] < 3 * expected.nbytes
        del data
        back = entry.restore()
        assert torch.equal(back, expected) and back.data_ptr() % 64 == residue


def test_saved_again_by_a_later_block() -> None:
    with _moves() as moved:
        tensor = _large()
        uses = [moved.begin(str(n)) for n in range(1)]
        entries = [moved.pack(uses[0], tensor)]
        for n in range(1, 4):
            uses.append(moved.begin(str(n)))
            _settle(moved)
            entries.append(moved.pack(uses[-1], tensor))
        assert moved.counters["saved"] == tensor.nbytes
        counter_of_its_own = tensor.unsafe_chunk(2)[1]
        counter_of_its_own.zero_()
        entries.append(moved.pack(uses[-1], tensor))  # of the same version, with other content
        assert moved.counters["saved"] == 2 * tensor.nbytes
        expected = tensor.clone()
        del tensor, counter_of_its_own
        moved.begin("last")
        _settle(moved)
        assert torch.equal(entries.pop().restore(), expected)
        while entries:
            assert torch.equal(entries.pop().restore(), _large())
        assert moved.counters["read"] == 2 * expected.nbytes  # once for all blocks


@pytest.mark.parametrize("when", ["before", "after"])
def test_written_to_is_torchs_error_also_when_the_tensor_is_gone(when: str) -> None:
    with _moves() as moved:
        tensor = _large()
        _, entry = _out(moved, tensor)
        if when == "before":
            tensor.mul_(2)
        moved.begin("second")
        _settle(moved)
        if when == "after":
            tensor.mul_(2)
        del tensor
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            entry.restore()


def test_complex_views_and_numbers_of_other_types() -> None:
    with _moves() as moved:
        use = moved.begin("first")
        z = torch.randn(128, 256, dtype=torch.complex64)
        tensors = [
            z.conj(),
            z.conj().imag,
            z.real,
            torch.arange(1 << 16),
            _large() > 0,
            _large().bfloat16(),
            torch.ones(1 << 16).expand(4, -1),
        ]
        entries = [moved.pack(use, tensor) for tensor in tensors]
        expected = [tensor.clone() for tensor in tensors]
        del tensors, z
        moved.begin("second")
        _settle(moved)
        assert all(torch.equal(entry.restore(), value) for entry, value in zip(entries, expected, strict=True))
        assert [entry.restore().is_conj() for entry in entries[:3]] == [True, False, False]


def test_the_block_before_is_read_ahead() -> None:
    with _moves() as moved:
        uses, entries = [], []
        for n in range(4):
            uses.append(moved.begin(str(n)))
            entries.append([moved.pack(uses[-1], _large(n)) for _ in range(2)])
        moved.begin("head")
        _settle(moved)
        entries[3][0].restore()
        on_the_way = [sum(record.present() is not None or record.loading is not None for record in use.living()) for use in uses]
        assert on_the_way == [0, 0, 2, 2]
        entries[2][0].restore()
        present = [sum(record.present() is not None or record.loading is not None for record in use.living()) for use in uses]
        assert present == [0, 2, 2, 0]


def test_a_write_that_does_not_end_is_an_error() -> None:
    tier = _SlowTier()
    with _moves(lambda: tier, timeout_s=0.05) as moved:
        _, entry = _out(moved, _large())
        moved.begin("second")
        with pytest.raises(errors.StorageError, match="took over"):
            moved.begin("third")
        assert torch.equal(entry.restore(), _large())
        tier.go.release()
        _settle(moved)


def test_a_read_that_fails_is_tried_again_by_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    with _moves() as moved:
        _, entry = _out(moved, _large())
        moved.begin("second")
        _settle(moved)
        tier: Any = moved._tier
        read, calls = tier.read, []

        def fails(place: Place) -> Loading:
            calls.append(place)
            if len(calls) <= 2:
                raise errors.StorageError("a bad moment")
            return read(place)

        monkeypatch.setattr(tier, "read", fails)
        with pytest.raises(errors.StorageError, match="bad moment"):
            entry.restore()
        assert torch.equal(entry.restore(), _large())


def test_host_memory_beside_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tier's own bookkeeping, on a device whose streams do everything at once; tests/gpu has a real one."""
    anything = MagicMock()
    for name in ("Stream", "Event", "device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, anything)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    asked: list[int] = []
    arena = HostArena()
    made, released = [], []
    monkeypatch.setattr(arena, "host_buffer", lambda nbytes: made.append(pool.allocate(nbytes)) or made[-1])
    monkeypatch.setattr(arena, "release_host", released.append)
    with _moves(lambda: HostTier(arena, asked.append)) as moved:
        for _ in range(3):
            entries = []
            for n in range(4):
                use = moved.begin(str(n))
                entries += [(moved.pack(use, _large(n)[:, 1:]), n) for _ in range(2)]
                _settle(moved)
            while entries:
                entry, n = entries.pop()
                back = entry.restore()
                assert torch.equal(back, _large(n)[:, 1:]) and back.stride() == (256, 1)
            del entry, back
        assert moved.counters["read"] == moved.counters["written"] == 3 * 3 * 2 * _large().nbytes
        assert len(made) == len(asked) < 10 and not released  # the same buffers again
        while moved._trash:
            moved._tier.free(moved._trash.popleft())
    assert len(released) == len(made)


# -- random programs ---------------------------------------------------------------------------------------------------------------------


class _Program(nn.Module):
    """A few random operations on a growing list of tensors, among them views and in-place writes. x: (N, N) float."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16, 16), 0.5))
        self.seed = seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dice = random.Random(self.seed)
        tensors = [x * self.scale, x @ self.scale]
        for _ in range(dice.randint(3, 9)):
            a, b = dice.choice(tensors), dice.choice(tensors)
            kind = dice.randrange(11)
            if kind == 0:
                tensors.append(a * b)
            elif kind == 1:
                tensors.append(a @ b)
            elif kind == 2:
                tensors.append(a.sigmoid())
            elif kind == 3:
                tensors.append(a.t())
            elif kind == 4:
                a.mul_(0.5)
            elif kind == 5:
                a.add_(b.sin())
            elif kind == 6:
                tensors.append(torch.cat(a.unsafe_chunk(2)[::-1]))
            elif kind == 7:
                tensors.append(a.softmax(-1) * self.scale)
            elif kind == 8:
                tensors.append(a.exp().clamp(max=3.0))
            elif kind == 9:
                a[: dice.randint(1, 15)].tanh_()
            else:
                tensors.append(a[3:9].repeat(3, 1)[:16] * b)
        total: torch.Tensor = sum(tensors)
        return total / len(tensors)


def _outcome(model: nn.Module, x: torch.Tensor) -> tuple[str, list[torch.Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = x
    try:
        for program in model:
            y = program(y)
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "a view of a leaf" in str(error), error
        return "refused", []
    return "done", [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("part", range(4))
def test_random_programs(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "SMALLEST", 1)
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(part))
    outcomes = []
    for seed in range(part * 25, part * 25 + 25):
        plain, model = (nn.ModuleList(_Program(seed * 7 + n) for n in range(4)) for _ in range(2))
        tw.offload(model, params="device", units=("_Program",), activations="disk")
        (expected, values), (got, found) = _outcome(plain, x), _outcome(model, x)
        assert got == expected, seed
        assert all(
            torch.equal(a, b) or (a.isnan().any() and torch.equal(a.isnan(), b.isnan())) for a, b in zip(values, found, strict=True)
        ), seed
        outcomes.append(got)
        tw.unwrap(model)
    assert {"done", "refused"} == set(outcomes)

"""Slots as large as the largest unit take memory for the units that are in them, and not its size each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.storage import pool
from torchwrap.stream.slots import Slots
from torchwrap.stream.touched import together_bytes

WIDE, NARROW = 2048, 512  # a matrix of 16 MiB between some of 1 to 4 MiB


def layers(count: int) -> nn.Sequential:
    """`count` matrices, one of them wide; each is a unit of its own."""
    torch.manual_seed(0)
    narrow = [nn.Linear(NARROW, NARROW, bias=False) for _ in range(count - 3)]
    wide = [nn.Linear(NARROW, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, NARROW, bias=False)]
    return nn.Sequential(*narrow, *wide).eval()


class Written:
    """Bytes of slots that were written and not given back, by what units need and what is released; and their most."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[int, int] = {}
        self.most = 0
        start, release = Slots._start, pool.Buffer.release_pages

        def started(slots: Any, unit: Any, slot: Any) -> Any:
            fetch = start(slots, unit, slot)
            needed = max((offset + piece.nbytes for piece, offset in slots.layout(unit).places), default=0)
            self.bytes[id(slot.host)] = max(self.bytes.get(id(slot.host), 0), needed)
            self.most = max(self.most, sum(self.bytes.values()))
            return fetch

        def released(buffer: pool.Buffer, offset: int = 0, nbytes: int | None = None) -> None:
            if nbytes is None and id(buffer) in self.bytes:
                self.bytes[id(buffer)] = min(self.bytes[id(buffer)], offset)
            release(buffer, offset, nbytes)

        patch.setattr(Slots, "_start", started)
        patch.setattr(pool.Buffer, "release_pages", released)


@pytest.mark.parametrize("count", [5, 6])
@pytest.mark.parametrize("slots", [2, 3])
def test_one_wide_layer_does_not_fill_every_slot(monkeypatch: pytest.MonkeyPatch, count: int, slots: int) -> None:
    model, x = layers(count), torch.randn(1, NARROW)
    with torch.no_grad():
        expected = model(x)
        tw.offload(model, params="disk", k=slots, units=tuple(name for name, _ in model.named_children()))
        written = Written(monkeypatch)
        for _ in range(4):
            assert torch.equal(model(x), expected)
    handle = tw.handle_of(model, "offload")
    together = together_bytes(handle.units, handle.plan, lambda piece: not piece.resident)
    assert together < 0.85 * slots * handle.plan.slot_bytes
    assert written.most <= together * 33 // 32


def test_blocks_of_one_size_give_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(NARROW, NARROW) for _ in range(6))).eval()
    released: list[object] = []
    tw.offload(model, params="disk", k=3)
    release = pool.Buffer.release_pages
    monkeypatch.setattr(pool.Buffer, "release_pages", lambda *given: (released.append(given), release(*given)))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, NARROW))
    assert not released

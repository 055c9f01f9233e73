"""Cutting weights into tiles: which, where, and what the pieces of a division are afterwards; tiles on a device of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchwrap as tw
from tests.models import FIXTURES, ModelFixture
from tests.stream.fake_arena import FakeArena, stand_in
from tests.stream.machine import Machine
from tests.stream.simulated_cuda import WatchedCuda, simulate
from tests.weights.budgets import smallest_budget
from torchwrap.core.integration import integration_for
from torchwrap.core.tensors import data_of
from torchwrap.storage.checksum import memory_of, sum64
from torchwrap.stream.tiles import ROWS, CutWeight, cut_weights, known_sum, make_whole, parts, share
from torchwrap.stream.units import UnitMap, find_units


def divide(model: nn.Module, above: int) -> tuple[UnitMap, list[CutWeight]]:
    blocks = [(block.fqn, block.module) for block in integration_for(model).blocks(model) or ()]
    division = find_units(model, blocks)
    return division, cut_weights(model, division, above)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.name)
def test_nothing_is_lost_or_doubled(fixture: ModelFixture) -> None:
    model = fixture.build()
    division, cut = divide(model, 1)
    pieces = division.pieces
    assert sorted(name for piece in pieces for name in piece.names) == sorted(n for n, _ in model.named_parameters(remove_duplicate=False))
    assert [unit.index for unit in division.units] == list(range(len(division.units)))
    assert len({part.index for part in [*pieces, *parts(pieces)]}) == len({id(part) for part in [*pieces, *parts(pieces)]})
    bound = [part.index for unit in division.units if unit.kind != "rows" for part in unit.pieces]
    assert len(bound) == len(set(bound)), "a piece would be bound by two units"
    for weight in cut:
        tiles = [division.units[index].pieces[0] for index in weight.units]
        assert tuple(tiles) == weight.piece.tiles and weight.piece.index not in bound
        assert torch.equal(torch.cat([_rows(weight, tile) for tile in tiles]), weight.module.weight)
        assert all(tile.first_row % ROWS == 0 and tile.shape[0] >= ROWS for tile in tiles)


def _rows(weight: CutWeight, tile: Any) -> torch.Tensor:
    return weight.module.weight.detach()[tile.first_row : tile.first_row + tile.shape[0]]


def test_tiles_come_right_after_the_unit_they_were_part_of() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 8)) for _ in range(3)))
    division, _ = divide(model, 1)
    assert [(unit.kind, unit.name, unit.parent) for unit in division.units[:4]] == [
        ("block", "0", None),
        ("tile", "0.0.weight[0:64]", 0),
        ("tile", "0.0.weight[64:128]", 0),
        ("tile", "0.0.weight[128:200]", 0),
    ]
    assert division.units[4].index == 4 and division.units[5].parent == 4


def test_a_layer_with_a_forward_of_its_own_is_left_whole() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 8)) for _ in range(3)))
    model[1][0].forward = lambda input: input  # type: ignore[method-assign]
    assert {weight.name for weight in divide(model, 1)[1]} == {"0.0", "2.0"}


def test_undone_where_all_of_it_stays() -> None:
    model = nn.Sequential(*(nn.Linear(64, 640) for _ in range(2)))
    division, cut = divide(model, 64 << 10)
    before = [piece.index for piece in division.pieces]
    for weight in cut:
        make_whole(weight.piece, division.units)
    assert [piece.index for piece in division.pieces] == before and not any(piece.tiles for piece in division.pieces)


@given(rows=st.integers(2, 5000), width=st.integers(1, 64), above=st.integers(1, 200_000))
def test_ranges(rows: int, width: int, above: int) -> None:
    model = nn.Sequential(nn.Linear(width, rows, bias=False))
    division = find_units(model, [("0", model[0])])
    if not division.units:  # a weight of one element stays
        return
    (cut,) = cut_weights(model, division, above) or [None]
    if cut is None:
        assert rows * width * 4 <= above or rows < 2 * ROWS
        return
    sizes = [tile.shape[0] for tile in cut.piece.tiles]
    assert sum(sizes) == rows and min(sizes) >= ROWS
    assert max(sizes) * width * 4 <= max(above, (2 * ROWS - 1) * width * 4)
    assert max(sizes) - min(sizes) < 2 * ROWS


def test_sums_of_tiles_make_the_sum_of_the_whole() -> None:
    model = nn.Sequential(nn.Linear(37, 1000, dtype=torch.bfloat16))
    division = find_units(model, [("0", model[0])])
    ((_, _, piece, _),) = ((c.name, c.module, c.piece, c.units) for c in cut_weights(model, division, 20_000))
    value = data_of(piece.parameter)
    for tile in piece.tiles:
        assert known_sum(piece) is None
        tile.checksum = sum64(memory_of(value[tile.first_row : tile.first_row + tile.shape[0]]))
    assert known_sum(piece) == sum64(memory_of(value))


def test_resident_tiles_follow_a_new_value_at_the_same_alignment() -> None:
    model = nn.Sequential(nn.Linear(33, 300))
    division = find_units(model, [("0", model[0])])
    (cut,) = cut_weights(model, division, 10_000)
    value = torch.randn(300, 33)
    cut.piece.residue = 24
    for tile in cut.piece.tiles[1:]:
        tile.resident = True
    cut.piece.tiles[0].resident = False
    share(cut.piece, value)
    for tile in cut.piece.tiles[1:]:
        shown = data_of(tile.parameter)
        assert torch.equal(shown, value[tile.first_row : tile.first_row + tile.shape[0]])
        assert shown.data_ptr() % 64 == 24 == tile.residue
    assert data_of(cut.piece.tiles[0].parameter).isnan().all()


# -- on a device of their own -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


def _model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 2000))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))  # sums of small whole numbers are exact in any order
    return model


@pytest.mark.parametrize("mode", ["late", "early", "random"])
@pytest.mark.parametrize("params", ["host", "disk", "auto"])
@pytest.mark.parametrize("make", [FakeArena, WatchedCuda], ids=["fake", "cuda"])
def test_columns_on_a_device(patch: pytest.MonkeyPatch, make: Any, params: Any, mode: Any) -> None:
    machine = Machine(mode)
    if make is WatchedCuda:
        simulate(patch, machine)
    stand_in(patch, machine, make, host_bytes=1 << 40)
    plain = _model()
    fields = {"params": params, "tile_above": 100_000, "units": ("0", "1", "2", "3")}
    model = tw.offload(copy.deepcopy(plain), device_memory=smallest_budget(copy.deepcopy(plain), **fields), **fields)
    x = torch.randint(-2, 3, (4, 64)).float()
    for _ in range(2):
        got, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        one, other = model(got), plain(expected)
        assert torch.equal(one, other)
        one.sum().backward()
        other.sum().backward()
        assert got.grad is not None and expected.grad is not None and torch.equal(got.grad, expected.grad)
    assert machine.copied_bytes > 0
    tw.unwrap(model)
    assert torch.equal(model(x), plain(x))
    machine.check()

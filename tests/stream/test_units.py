"""How a model is divided: what streams, what stays, and that nothing is lost, doubled or bound twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchwrap as tw
from tests.models import FIXTURES, ModelFixture, by_name
from torchwrap.core import errors
from torchwrap.core.integration import integration_for
from torchwrap.stream.units import LEAF_BYTES, UnitMap, find_units


def divide(model: nn.Module, **options: object) -> UnitMap:
    blocks = [(block.fqn, block.module) for block in integration_for(model).blocks(model) or ()]
    return find_units(model, blocks, **options)  # type: ignore[arg-type]


def check(model: nn.Module, division: UnitMap) -> None:
    """Every parameter is in one unit or fixed; only a table's may be in two."""
    named = dict(model.named_parameters(remove_duplicate=False))
    pieces = division.pieces
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert sorted(name for piece in pieces for name in piece.names) == sorted(named)
    assert all(named[name] is piece.parameter for piece in pieces for name in piece.names)
    assert [unit.index for unit in division.units] == list(range(len(division.units)))
    scanned = [piece.index for unit in division.units if unit.kind != "rows" for piece in unit.pieces]
    assert len(scanned) == len(set(scanned)), "a piece would be bound by two units"
    in_units = {piece.index for unit in division.units for piece in unit.pieces}
    fixed = [piece.index for piece in division.fixed]
    assert len(fixed) == len(set(fixed)) and not in_units & set(fixed) and in_units | set(fixed) == set(range(len(pieces)))
    for unit in division.units:
        assert unit.pieces and unit.module is not None
        assert {id(piece.parameter) for piece in unit.pieces} <= {id(p) for p in unit.module.parameters()}
        if unit.parent is not None:
            parent = division.units[unit.parent]
            assert parent.module is not None and unit.module in list(parent.module.modules())


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.name)
def test_nothing_is_lost_or_doubled(fixture: ModelFixture) -> None:
    model = fixture.build()
    check(model, divide(model))


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.name)
def test_every_block_can_be_split(fixture: ModelFixture) -> None:
    model = fixture.build()
    check(model, divide(model, split_above=1))


class Node(nn.Module):
    """Own parameter, a linear map, children that may be shared."""

    def __init__(self, width: int, children: list[nn.Module], own: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(own)) if own else None
        self.linear = nn.Linear(width, width)
        self.inner = nn.ModuleList(children)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        for child in self.inner:
            x = child(x)
        return x


@st.composite
def trees(draw: st.DrawFn) -> tuple[nn.Module, list[tuple[str, nn.Module]], int]:
    """A random tree with shared modules and tied weights, some of its modules as blocks, and a limit above which these are split."""
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 8))):
        children = draw(st.lists(st.sampled_from(made), max_size=2)) if made else []
        made.append(Node(draw(st.sampled_from([1, 3, 8])), children, draw(st.sampled_from([0, 0, 40]))))
    root = Node(2, made, 0)
    linears = [module for module in root.modules() if isinstance(module, nn.Linear)]
    for _ in range(draw(st.integers(0, 2))):
        first, second = draw(st.sampled_from(linears)), draw(st.sampled_from(linears))
        if first.weight.shape == second.weight.shape:
            second.weight = first.weight
    names = {id(module): name for name, module in root.named_modules()}
    blocks = draw(st.lists(st.sampled_from(made), max_size=6))
    return root, [(names[id(block)], block) for block in blocks], draw(st.sampled_from([1, 200, 1 << 30]))


@given(trees())
def test_random_trees(made: tuple[nn.Module, list[tuple[str, nn.Module]], int]) -> None:
    model, blocks, above = made
    division = find_units(model, blocks, split_above=above)
    check(model, division)
    # Whoever owns a streamed parameter lies in the unit that binds it, so it is present whenever it is read.
    owners = {id(module): module for module in model.modules()}
    for unit in division.units:
        assert unit.module is not None
        inside = {id(module) for module in unit.module.modules()}
        for piece in unit.pieces:
            using = [module for module in owners.values() if any(p is piece.parameter for p in module._parameters.values())]
            assert all(id(module) in inside for module in using), piece.names


def test_a_block_above_the_limit_becomes_its_children() -> None:
    model = by_name("llama").build()
    whole = divide(model)
    parts = divide(model, split_above=1)
    assert {unit.name for unit in whole.units} == {f"model.layers.{n}" for n in range(4)}
    assert {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")} <= {unit.name for unit in parts.units}
    assert sum(unit.nbytes for unit in parts.units) >= sum(unit.nbytes for unit in whole.units)


class Tables(nn.Module):
    """Blocks that are no modules to call, but names for some."""

    def __init__(self) -> None:
        super().__init__()
        parts = ({"norm": nn.LayerNorm(64), "up": nn.Linear(64, 256), "down": nn.Linear(256, 64)} for _ in range(3))
        self.layers = nn.ModuleList(nn.ModuleDict(each) for each in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](layer["norm"](x)).relu())
        return x


def test_parts_of_a_block_that_nobody_can_call_are_units() -> None:
    torch.manual_seed(0)
    model, x = Tables(), torch.ones(4, 64)
    expected = model(x)
    division = divide(model)
    check(model, division)
    assert [unit.name for unit in division.units] == [f"layers.{n}.{part}" for n in range(3) for part in ("up", "down")]
    with tw.applied(model, tw.Offload(params="disk")):
        assert torch.equal(model(x), expected)
    with tw.applied(model, tw.Superpipeline(k=2, k_prime=1)):
        assert torch.equal(model(x), expected)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[int(self.gate(x).argmax())](x)


def test_experts_are_units_inside_their_block() -> None:
    model = nn.Sequential(Mixture(), Mixture())
    division = find_units(model, [("0", model[0]), ("1", model[1])])
    check(model, division)
    experts = [unit for unit in division.units if unit.kind == "expert"]
    assert [unit.name for unit in experts] == [f"{n}.experts.{e}" for n in range(2) for e in range(4)]
    assert all(unit.parent is not None and division.units[unit.parent].name == unit.name[0] for unit in experts)
    blocks = [unit for unit in division.units if unit.kind == "block"]
    assert [[piece.name for piece in unit.pieces] for unit in blocks] == [["0.gate.weight"], ["1.gate.weight"]]


def test_experts_of_a_block_with_nothing_else_keep_no_dead_parent() -> None:
    model = nn.Sequential(Mixture(), Mixture())
    for block in model:
        block.gate = nn.Identity()
    division = find_units(model, [("0", model[0]), ("1", model[1])])
    check(model, division)
    assert [unit.kind for unit in division.units] == ["expert"] * 8 and all(unit.parent is None for unit in division.units)


def _stack(*names: str) -> tuple[nn.Module, list[tuple[str, nn.Module]]]:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(3)))
    return model, [(str(n), block) for n, block in enumerate(model)]


@pytest.mark.parametrize(
    ("pin", "kept"),
    [
        ("1", {"1.0.weight", "1.1.weight"}),
        ("1.0", {"1.0.weight"}),
        ("1.0.weight", {"1.0.weight"}),
    ],
)
def test_pinned_names_never_leave(pin: str, kept: set[str]) -> None:
    model, blocks = _stack()
    division = find_units(model, blocks, pin=(pin,))
    check(model, division)
    away = {piece.name for unit in division.units for piece in unit.pieces}
    assert {name for name, _ in model.named_parameters() if name.endswith("weight")} - away == kept


@pytest.mark.parametrize("pin", ["9", "1.0.weigh", "1.0.weight.x", ""])
def test_a_pinned_name_that_is_not_there_is_refused(pin: str) -> None:
    model, blocks = _stack()
    with pytest.raises(errors.ConfigError, match="pin"):
        find_units(model, blocks, pin=(pin,))


def test_a_pinned_tied_name_pins_its_twin() -> None:
    model, blocks = _stack()
    model[0][1].weight = model[0][0].weight
    division = find_units(model, blocks, pin=("0.1",))
    assert "0.0.weight" in {piece.name for piece in division.fixed}


def test_a_weight_shared_by_two_blocks_stays() -> None:
    model, blocks = _stack()
    model[2][0].weight = model[0][0].weight
    division = find_units(model, blocks)
    check(model, division)
    assert "0.0.weight" in {piece.name for piece in division.fixed}
    assert any("2.0.weight" in note for note in division.notes)


def test_two_parameters_over_one_memory_stay() -> None:
    model, blocks = _stack()
    model[2][0].weight = nn.Parameter(model[0][0].weight.data)
    division = find_units(model, blocks)
    fixed = {piece.name for piece in division.fixed}
    assert {"0.0.weight", "2.0.weight"} <= fixed
    assert any("shares memory" in note for note in division.notes)


def test_unusual_tensors_stay() -> None:
    model, blocks = _stack()
    model[0][0].weight = nn.Parameter(torch.randn(32, 32).t())

    class Special(torch.Tensor):
        pass

    model[1][0].weight = nn.Parameter(torch.randn(32, 32).as_subclass(Special))
    division = find_units(model, blocks)
    check(model, division)
    assert {"0.0.weight", "1.0.weight"} <= {piece.name for piece in division.fixed}
    assert any("0.0.weight" in note for note in division.notes) and any("1.0.weight" in note for note in division.notes)


def test_small_pieces_stay() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)) for _ in range(2)))
    division = find_units(model, [("0", model[0]), ("1", model[1])])
    assert [[piece.name for piece in unit.pieces] for unit in division.units] == [["0.0.weight"], ["1.0.weight"]]


def test_one_block_twice_is_one_unit() -> None:
    model, blocks = _stack()
    division = find_units(model, [*blocks, *blocks[::-1]])
    check(model, division)
    assert [unit.name for unit in division.units] == ["0", "1", "2"]


class Language(nn.Module):
    def __init__(self, rows: int, width: int, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.table.weight


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_large_table_is_read_by_rows_and_its_head_streamed(tied: bool) -> None:
    model = Language(LEAF_BYTES // 64 + 1, 16, tied)
    division = find_units(model, [(f"layers.{n}", layer) for n, layer in enumerate(model.layers)])
    check(model, division)
    assert [(unit.kind, unit.name) for unit in division.units] == [
        ("rows", "table"), ("block", "layers.0"), ("block", "layers.1"), ("leaf", "head")
    ]  # fmt: skip
    table, head = division.units[0].pieces, division.units[-1].pieces
    assert (table[0] is head[0]) == tied


@pytest.mark.parametrize("what", ["small", "max_norm", "subclass"])
def test_other_embeddings_are_not_read_by_rows(what: str) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    model = Language(100 if what == "small" else LEAF_BYTES // 64 + 1, 16, False)
    if what != "small":
        model.table = Scaled(*model.table.weight.shape) if what == "subclass" else nn.Embedding(*model.table.weight.shape, max_norm=1.0)
    division = find_units(model, [])
    assert not [unit for unit in division.units if unit.kind == "rows"]
    named = find_units(model, [], gather_only=(type(model.table),)) if what == "subclass" else None
    assert named is None or [unit.name for unit in named.units if unit.kind == "rows"] == ["table"]


def test_large_own_parameters_of_other_modules_are_reported() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(LEAF_BYTES // 4))

    model = nn.Sequential(Own())
    division = find_units(model, [])
    assert not division.units and any(note.startswith("0 keeps") for note in division.notes)


def test_residues_are_those_of_the_addresses() -> None:
    model, blocks = _stack()
    room = torch.empty(32 * 32 * 4 + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + 24
    model[0][0].weight.data = room[start : start + 32 * 32 * 4].view(torch.float32).view(32, 32)
    division = find_units(model, blocks)
    assert next(piece for piece in division.pieces if piece.name == "0.0.weight").residue == 24
    assert all(piece.residue == piece.parameter.data_ptr() % 64 for piece in division.pieces)


def test_buffers_are_counted_once_per_memory() -> None:
    model, blocks = _stack()
    buffer = torch.zeros(100)
    model[0].register_buffer("one", buffer)
    model[1].register_buffer("two", buffer[:10])
    model[2].register_buffer("three", torch.zeros(7))
    assert find_units(model, blocks).buffer_bytes == 400 + 28

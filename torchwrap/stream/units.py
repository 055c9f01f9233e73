"""What is streamed: units of a model and the tensors (pieces) in them.

A *unit* is the smallest thing fetched and released: a repeated block, an expert inside a block, a large leaf outside the blocks (the
output head) or a part of one (see tiles.py), or a table of rows (an embedding, of which one forward needs a few rows only). A *piece* is
one distinct parameter; names tied to one parameter share its piece. Everything that is in no unit is *fixed*: it stays where it is.

A parameter is streamed only if that cannot change a result: an ordinary dense, contiguous tensor that one unit alone uses, and uses
inside its own forward. What is used elsewhere stays fixed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, MutableSet, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.swap import original_class
from torchwrap.core.tensors import data_of, held_bytes, is_placeholder, placeholder, storage_key, tensor_bytes
from torchwrap.storage.aio import Source
from torchwrap.storage.safefile import Segment

__all__ = ["Crc", "Home", "Piece", "SourceFile", "Unit", "UnitMap", "find_units"]

Kind = Literal["block", "expert", "leaf", "rows", "tile"]

LEAF_BYTES = 1 << 20
"""Leaves outside the blocks smaller than this stay fixed (chosen: too little to be worth a request)."""

_SMALL_SHARE = 256
"""A piece below this share of its unit (norms, biases) stays fixed: reading it costs a request and saves nothing."""

_TRAINED_SHARE = 8
"""Trained pieces stay fixed in a unit whose other pieces are frozen, if they are no more than this part of it (chosen)."""

_LEAVES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


Crc = Literal["never", "once", "always"]


class SourceFile(Source, Protocol):
    """A file tensors are read from: `storage.safefile.TensorFile`, or the file of a `SpillStore`."""

    segments: Mapping[str, Segment]

    def view(self, name: str, live: MutableSet[mmap.mmap] | None = None) -> torch.Tensor:
        """A tensor over the file's own pages: no copy. Its mapping is added to `live`."""
        ...


@dataclass(slots=True)
class Home:
    """Where the authoritative bytes of a piece lie on disk."""

    file: SourceFile
    name: str
    offset: int
    nbytes: int
    crc32: int | None = None  # compared when set
    crc: Crc = "never"  # whether reads compute the CRC-32 as well as the sum
    converted: bool = False  # written by us for a loader that would have made it in memory, at an address of its own


@dataclass(slots=True)
class Piece:
    """One distinct parameter and what is needed to take it away and bring it back."""

    index: int
    names: list[str]
    parameter: nn.Parameter
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    residue: int  # address modulo 64 of the original: float32 matrix-vector kernels give other last bits at another one (measured)
    absent: torch.Tensor  # the placeholder shown while the piece is away
    home: Home | None = None
    host: torch.Tensor | None = None  # page-locked copy, where the home is host memory
    resident: bool = True
    checksum: int | None = None  # wrap-around 64-bit sum, known after the first read
    version: int = 0  # raised whenever the values are replaced
    tiles: tuple[Piece, ...] = field(default=(), repr=False, compare=False)  # row blocks that are fetched in its place, see tiles.py
    whole: Piece | None = field(default=None, repr=False, compare=False)  # of a tile: what it is a part of
    first_row: int = 0  # of a tile

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(slots=True)
class Unit:
    """Modules' parameters that come and go together."""

    index: int
    name: str
    module: nn.Module | None  # only while the model is divided and wrapped
    kind: Kind
    pieces: list[Piece]
    parent: int | None = None  # the block an expert lies in: both are present at once

    @property
    def nbytes(self) -> int:
        """Bytes of all its pieces."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(slots=True)
class UnitMap:
    """The division of one model.

    `units` are in expected order of use; `fixed` are the pieces in none of them; `notes` say what stayed fixed and why.
    """

    units: list[Unit]
    fixed: list[Piece]
    buffer_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        """All distinct pieces, fixed ones included; those that are cut, and not their tiles."""
        seen: dict[int, Piece] = {piece.index: piece for piece in self.fixed}
        for unit in self.units:
            seen |= {piece.index: piece for piece in (part.whole or part for part in unit.pieces)}
        return [seen[index] for index in sorted(seen)]


def find_units(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    *,
    gather_only: tuple[type, ...] = (),
    split_above: int = 512 << 20,
    pin: Iterable[str] = (),
) -> UnitMap:
    """Divide a model into units.

    Args:
        model: the model; parameters may be placeholders or on `meta`.
        blocks: repeated layers as (name, module), in call order; repeats of one module are one unit.
        gather_only: subclasses of `nn.Embedding` whose forward gathers rows and then works on the rows alone.
        split_above: bytes above which a block is divided into its children.
        pin: names of modules or parameters that never leave.

    Raises:
        ConfigError: a name in `pin` is neither module nor parameter.
    """
    pieces = _collect_pieces(model)
    notes: list[str] = []
    held = _unmovable(model, pieces, notes) | _pinned(model, pieces, tuple(pin))
    names = {id(module): name for name, module in model.named_modules()}
    units: list[Unit] = []
    taken: dict[int, int] = {}  # piece index -> unit index

    def claim(module: nn.Module, kind: Kind, parent: int | None = None, name: str | None = None) -> Unit:
        own = [pieces[id(p)] for p in module.parameters() if id(p) in pieces]
        unit = Unit(len(units), name or names.get(id(module), type(module).__name__), module, kind, [], parent)
        units.append(unit)
        for piece in own:
            if piece.index not in held and taken.setdefault(piece.index, unit.index) == unit.index:
                unit.pieces.append(piece)
        return unit

    seen: set[int] = set()
    inside: set[int] = set()
    for name, block in blocks:
        if id(block) in seen or id(block) in inside:
            continue
        seen.add(id(block))
        inside |= {id(child) for child in block.modules()}
        for part_name, part in _split(name, block, split_above):
            experts = _experts(part)
            start = len(units)
            for expert_name, expert in experts:
                claim(expert, "expert", None, f"{part_name}.{expert_name}")
            unit = claim(part, "block", None, part_name)
            for expert_unit in units[start:-1]:
                expert_unit.parent = unit.index

    tables: list[Unit] = []
    for name, module in model.named_modules():
        own_bytes = sum(tensor_bytes(p) for p in module._parameters.values() if p is not None)
        if id(module) in inside or own_bytes < LEAF_BYTES:
            continue
        if _is_row_table(module, gather_only):
            tables.append(claim_rows(len(units), name, module, pieces, held))
            units.append(tables[-1])
        elif original_class(module) in _LEAVES:
            claim(module, "leaf")
        else:
            notes.append(f"{name or 'the model itself'} keeps {own_bytes} bytes of own parameters in place: used by its own forward")

    _hold_shared(model, units, taken, held, notes)
    _nest(units)
    for unit in units:
        small = unit.nbytes // _SMALL_SHARE if unit.kind != "rows" else 0
        adapters = _adapters(unit)
        unit.pieces = [p for p in unit.pieces if p.index not in held and p.index not in adapters and p.nbytes > small]
    units = [unit for unit in units if unit.pieces]
    _renumber(units)
    free = {piece.index for unit in units for piece in unit.pieces}
    fixed = [piece for piece in pieces.values() if piece.index not in free]
    buffers = {storage_key(b): held_bytes(b) for b in model.buffers() if b.device.type != "meta"}
    return UnitMap(_call_order(units), fixed, sum(buffers.values()), notes)


def _adapters(unit: Unit) -> set[int]:
    """Indices of a frozen unit's few trained pieces (low-rank adapters): an ordinary optimizer can step what stays."""
    trained = [piece for piece in unit.pieces if piece.parameter.requires_grad]
    return {piece.index for piece in trained} if sum(p.nbytes for p in trained) * _TRAINED_SHARE <= unit.nbytes else set()


def _hold_shared(model: nn.Module, units: list[Unit], taken: dict[int, int], held: set[int], notes: list[str]) -> None:
    """A parameter that a module outside its unit owns too would be missing there: it stays.

    An embedding and its tied head may share one, because a row table never binds its parameter.
    """
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    tables = {id(unit.module) for unit in units if unit.kind == "rows"}

    def served(name: str, unit: Unit) -> bool:
        """Whether this way to the parameter leads through the unit's module, or ends at a table."""
        path = name.split(".")[:-1]
        return modules[".".join(path)] in tables or any(modules[".".join(path[:n])] == id(unit.module) for n in range(len(path) + 1))

    for unit in units:
        for piece in unit.pieces:
            home = units[taken.get(piece.index, unit.index)]
            outside = [name for name in piece.names if not served(name, home)]
            if outside and piece.index not in held:
                held.add(piece.index)
                notes.append(f"{outside[0]} is shared with {unit.name}: it stays in memory")


def _nest(units: list[Unit]) -> None:
    """A unit inside another one (modules shared between blocks can be) is present together with it, as an expert is with its block."""
    by_module = {id(unit.module): unit for unit in units if unit.kind != "rows"}
    for outer in units:
        for module in outer.module.modules() if outer.module is not None else ():
            unit = by_module.get(id(module))
            if unit is not None and unit is not outer and unit.parent is None:
                unit.parent = outer.index


def claim_rows(index: int, name: str, module: nn.Module, pieces: dict[int, Piece], held: set[int]) -> Unit:
    """A unit for an embedding's table; its piece may also belong to a tied head."""
    own = [pieces[id(p)] for p in module._parameters.values() if p is not None and id(p) in pieces]
    return Unit(index, name, module, "rows", [piece for piece in own if piece.index not in held])


def _collect_pieces(model: nn.Module) -> dict[int, Piece]:
    pieces: dict[int, Piece] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in pieces:
            pieces[id(parameter)].names.append(name)
            continue
        data = data_of(parameter)
        on_meta = data.device.type == "meta"
        pieces[id(parameter)] = Piece(
            index=len(pieces),
            names=[name],
            parameter=parameter,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            nbytes=tensor_bytes(parameter),
            residue=0 if on_meta or data.layout != torch.strided or is_placeholder(data) else data.data_ptr() % 64,
            absent=placeholder(parameter.shape, parameter.dtype, "cpu" if on_meta else parameter.device),
        )
    return pieces


def _unmovable(model: nn.Module, pieces: dict[int, Piece], notes: list[str]) -> set[int]:
    """Pieces that streaming could change: tensor subclasses, unusual layouts, shared storages, tables that their own forward writes to."""
    held: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            piece = pieces.get(id(module._parameters.get("weight")))
            if piece is not None:
                held.add(piece.index)
                notes.append(f"{name or 'the model itself'} scales down its own rows (max_norm=): {piece.name} stays in memory")
    storages: dict[object, int] = {}
    for piece in pieces.values():
        data = data_of(piece.parameter)
        if type(data) is not torch.Tensor or type(piece.parameter) is not nn.Parameter:
            held.add(piece.index)
            notes.append(f"{piece.name} is a {type(data).__name__}: it stays in memory")
            continue
        if not (piece.dtype.is_floating_point or piece.dtype.is_complex):
            # An integer has no NaN to show that it is away: reading it at the wrong moment would give a number.
            held.add(piece.index)
            notes.append(f"{piece.name} is {piece.dtype}: it stays in memory")
            continue
        if data.layout != torch.strided:
            held.add(piece.index)
            notes.append(f"{piece.name} is {data.layout}: it stays in memory")
            continue
        if piece.nbytes == 0 or data.numel() <= 1:
            held.add(piece.index)
            continue
        if is_placeholder(data) or data.device.type == "meta":
            continue
        if not data.is_contiguous():
            held.add(piece.index)
            notes.append(f"{piece.name} is not contiguous: it stays in memory")
        twin = storages.setdefault(storage_key(data), piece.index)
        if twin != piece.index:
            held |= {twin, piece.index}
            notes.append(f"{piece.name} shares memory with another parameter: both stay")
    return held


def _pinned(model: nn.Module, pieces: dict[int, Piece], pin: tuple[str, ...]) -> set[int]:
    held: set[int] = set()
    for wanted in pin:
        found = [p.index for p in pieces.values() if any(n == wanted or n.startswith(wanted + ".") for n in p.names)]
        if not found:
            raise errors.ConfigError(
                f"torchwrap: pin names {wanted!r}, which is neither a module nor a parameter of {type(model).__name__}",
                where="pin",
                fix="Take a name from [name for name, _ in model.named_modules()].",
            )
        held.update(found)
    return held


def _split(name: str, block: nn.Module, above: int) -> list[tuple[str, nn.Module]]:
    """A block, or its children when it is too large and they hold its parameters, or when they are called in its place."""
    total = sum(tensor_bytes(p) for p in block.parameters())
    children = [(n, c) for n, c in block.named_children() if any(True for _ in c.parameters())]
    if children and original_class(block).forward is nn.Module.forward and "forward" not in block.__dict__:  # of a `ModuleDict`, say
        large = [(n, c) for n, c in children if sum(tensor_bytes(p) for p in c.parameters()) * _SMALL_SHARE > total]
        return [part for n, c in large for part in _split(f"{name}.{n}", c, above)]
    own = sum(tensor_bytes(p) for p in block._parameters.values() if p is not None)
    if total <= above or not children or own * 2 > total or _experts(block):
        return [(name, block)]
    return [part for n, c in children for part in _split(f"{name}.{n}", c, above)]


def _experts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Members of a `ModuleList` called "experts" inside a block: each is needed only by the tokens routed to it."""
    for name, part in block.named_modules():
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "experts" and len(part) > 1:
            return [(f"{name}.{n}", expert) for n, expert in part.named_children()]
    return []


def _is_row_table(module: nn.Module, gather_only: tuple[type, ...]) -> bool:
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False  # max_norm renormalises the table in place during forward
    return original_class(module).forward is nn.Embedding.forward or original_class(module) in gather_only


def _renumber(units: list[Unit]) -> None:
    new = {unit.index: position for position, unit in enumerate(units)}
    for unit in units:
        unit.index = new[unit.index]
        unit.parent = new.get(unit.parent) if unit.parent is not None else None


def _call_order(units: list[Unit]) -> list[Unit]:
    """Tables first, then blocks with their experts, then other leaves: the guess used until the first pass has been seen."""
    rank = {"rows": 0, "block": 1, "expert": 1, "leaf": 2}
    ordered = sorted(units, key=lambda unit: rank[unit.kind])
    _renumber(ordered)
    return ordered

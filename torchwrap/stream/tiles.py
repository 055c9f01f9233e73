"""A linear layer whose weight is larger than a slot: cut into blocks of rows (tiles), each of which is a unit of its own.

Row block `W[a:b]` of a weight (N, K) gives the output columns `a:b`, so a forward needs one tile at a time. To the engine a tile is
an ordinary unit with one piece, whose parameter is private and whose home is a range of the whole piece's: reading ahead, checking,
residency and both tiers are those of all units. To everyone else the weight stays one piece with one home.

Exactness: equal up to rounding. Each output still is one dot product, but which kernel computes it, and in which order that adds up,
depends on how many columns a product has. Measured (`python -m benchmarks.tile_rounding`; torch 2.13, x86-64 with AVX2 and AVX-512, tiles
of 64 to 8192 rows): float32 and bfloat16 agree bit for bit with one thread, and with two but for one product in 1900; with 8 and 16
threads one float32 product in 17 differs, in tiles of up to 2048 rows; in float64 three of four differ with any number of threads. The
largest difference was 1e-6 of the largest output in float32, 1e-14 in float64, and one rounding of the output in bfloat16. No rule for
the size excludes all of it, so nothing is cut unasked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from torchwrap.core.swap import original_class
from torchwrap.core.tensors import bind, data_of, placeholder
from torchwrap.storage.checksum import crc32, memory_of, sum64
from torchwrap.stream.pieces import copy_of
from torchwrap.stream.units import Home, Piece, Unit, UnitMap

__all__ = ["CutWeight", "copy_tiles", "cut_weights", "known_sum", "make_whole", "parts", "share"]

ROWS = 64
"""Tiles begin at multiples of so many rows and have no fewer, so that each lies as the whole does modulo 64 bytes, and short products
with kernels of their own (measured: below 48 rows) do not occur."""


@dataclass(frozen=True, slots=True)
class CutWeight:
    """A linear layer that is computed tile by tile.

    Attributes:
        units: indices of the tiles' units, in row order.
    """

    name: str
    module: nn.Linear
    piece: Piece
    units: tuple[int, ...]


def cut_weights(model: nn.Module, division: UnitMap, above: int) -> list[CutWeight]:
    """Cut the weights of linear layers larger than `above` bytes into tiles of at most that many, or of 64 rows if those are more.

    The tiles' units come after the unit they were part of. Biases of such layers stay. Left whole are weights that anything but
    `nn.Linear.forward` may use (subclasses, weights shared with other modules than embeddings read by row), and those of experts and of
    other units inside units, which would need a third slot at once.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tables = {id(unit.module) for unit in division.units if unit.kind == "rows"}
    free = max((piece.index for piece in division.pieces), default=0) + 1
    units: list[Unit] = []
    cut: dict[int, tuple[str, nn.Linear, Piece, list[Unit]]] = {}
    for unit in division.units:
        units.append(unit)
        if unit.kind not in ("block", "leaf") or unit.module is None or unit.parent is not None:
            continue
        for name, module in unit.module.named_modules(prefix=unit.name):
            piece = _weight(module, unit, modules, tables)
            if piece is None or piece.index in cut or len(ranges := _ranges(piece, above)) < 2:
                continue
            assert isinstance(module, nn.Linear)
            unit.pieces.remove(piece)
            for fixed in [other for other in unit.pieces if other.parameter is module.bias]:
                unit.pieces.remove(fixed)
                division.fixed.append(fixed)
            piece.tiles = tuple(_tile(piece, free + rank, first, last) for rank, (first, last) in enumerate(ranges))
            free += len(ranges)
            parent = unit.index if module is not unit.module else None
            made = [Unit(-1, tile.name, None, "tile", [tile], parent) for tile in piece.tiles]
            cut[piece.index] = (name, module, piece, made)
            units += made
    kept = [unit for unit in units if unit.pieces]
    new = {unit.index: position for position, unit in enumerate(kept) if unit.index >= 0}
    for position, unit in enumerate(kept):
        unit.index, unit.parent = position, new.get(unit.parent) if unit.parent is not None else None
    division.units = kept
    return [CutWeight(name, module, piece, tuple(unit.index for unit in made)) for name, module, piece, made in cut.values()]


def parts(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces, with tiles in place of those that are cut."""
    for piece in pieces:
        yield from piece.tiles or (piece,)


def share(piece: Piece, value: torch.Tensor | None = None) -> None:
    """Let the tiles of a piece follow its type and home; with its new `value` (N, K), also their sums and what resident ones show.

    Cost: nothing for a piece that is not cut; one pass over the value.
    """
    for tile in piece.tiles:
        start = tile.first_row * (piece.nbytes // piece.shape[0])
        tile.dtype, tile.nbytes = piece.dtype, tile.shape[0] * (piece.nbytes // piece.shape[0])
        tile.residue = (piece.residue + start) % 64
        tile.absent = placeholder(tile.shape, piece.dtype, piece.absent.device)
        tile.host = None if piece.host is None else piece.host[start : start + tile.nbytes]
        if piece.home is None:
            tile.home = None
        elif tile.home is None or value is not None or (tile.home.file, tile.home.offset) != (piece.home.file, piece.home.offset + start):
            # A CRC that was taken of the whole once, when it was written, is none of a tile's.
            crc = "never" if piece.home.crc == "once" and value is None else piece.home.crc
            tile.home = Home(piece.home.file, piece.home.name, piece.home.offset + start, tile.nbytes, None, crc)
        if value is not None:
            rows = value[tile.first_row : tile.first_row + tile.shape[0]]
            if tile.home is not None:
                memory = memory_of(rows)
                tile.checksum = sum64(memory)
                tile.home.crc32 = crc32(memory) if tile.home.crc != "never" else None
            if tile.resident:
                bind(tile.parameter, copy_of(rows.to(piece.absent.device), tile.residue))
        if not tile.resident:
            bind(tile.parameter, tile.absent)
        elif tile.parameter.device != piece.absent.device:
            bind(tile.parameter, data_of(tile.parameter).to(piece.absent.device))


def make_whole(piece: Piece, units: Iterable[Unit]) -> None:
    """Take the cut back: the piece stays in memory, or comes with the first of its tiles' units."""
    mine = [unit for unit in units if any(part.whole is piece for part in unit.pieces)]
    for unit in mine:
        unit.pieces = [piece] if unit is mine[0] else []
    piece.tiles = ()


def copy_tiles(replica: Piece) -> tuple[Piece, ...]:
    """Give a copy of a piece tiles of its own, and return them."""
    made = []
    for tile in replica.tiles:
        shown = copy_of(data_of(tile.parameter), tile.residue) if tile.resident else tile.absent
        made.append(replace(tile, parameter=nn.Parameter(shown, requires_grad=False), names=list(tile.names), whole=replica))
    replica.tiles = tuple(made)
    share(replica)
    return replica.tiles


def known_sum(piece: Piece) -> int | None:
    """The piece's 64-bit sum if it is known, from its tiles' if need be: they begin at multiples of eight bytes."""
    sums = [tile.checksum for tile in piece.tiles]
    if piece.checksum is not None or not sums or None in sums:
        return piece.checksum
    return sum(each for each in sums if each is not None) % (1 << 64)


def _weight(module: nn.Module, unit: Unit, modules: Mapping[str, nn.Module], tables: set[int]) -> Piece | None:
    """The weight of a linear layer whose forward is torch's own and alone uses it; None for all else."""
    if not isinstance(module, nn.Linear) or original_class(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return None
    piece = next((piece for piece in unit.pieces if piece.parameter is module._parameters.get("weight")), None)
    if piece is None:
        return None
    users = [modules[name.rpartition(".")[0]] for name in piece.names]
    return piece if all(user is module or id(user) in tables for user in users) else None


def _ranges(piece: Piece, above: int) -> list[tuple[int, int]]:
    """Row ranges of about equal size, as few as possible; the last, which has the rows beyond a multiple of 64, is not a larger one."""
    rows, row_bytes = piece.shape[0], piece.nbytes // piece.shape[0]
    if piece.nbytes <= above:
        return [(0, rows)]
    most = max(ROWS, above // row_bytes // ROWS * ROWS)
    blocks = rows // ROWS
    count = max(1, min(-(-rows // most), blocks))
    edges = [-(-blocks * tile // count) * ROWS for tile in range(count)] + [rows]
    return list(pairwise(edges))


def _tile(piece: Piece, index: int, first: int, last: int) -> Piece:
    shape = (last - first, *piece.shape[1:])
    absent = placeholder(shape, piece.dtype, piece.absent.device)
    # Gradients go through the whole weight; a parameter of its own keeps autocast from remembering casts of tiles.
    return Piece(
        index=index,
        names=[f"{piece.name}[{first}:{last}]"],
        parameter=nn.Parameter(absent, requires_grad=False),
        shape=shape,
        dtype=piece.dtype,
        nbytes=piece.nbytes // piece.shape[0] * (last - first),
        residue=piece.residue,
        absent=absent,
        whole=piece,
        first_row=first,
    )

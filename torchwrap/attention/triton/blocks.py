"""How large the tiles of a kernel are on a card: as large as the table wants, as small as its shared memory demands.

Compilers hold `stages` tiles of what the inner loop reads in shared memory, beside the tile that stays and scratch for exchanging layouts.
`shared_bytes` bounds that from above (tests/attention compare it with what the compiler reports, for every generation of cards), so a
launch never asks for more than the card has: tiles shrink beforehand, keys first, then stages, then queries.

The table holds starting values, not measured ones: chosen from published kernels for the generations named.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

__all__ = [
    "INTERPRETER", "PASSES", "Blocks", "Card", "Fixed", "Pass", "card_of", "choose", "excess", "interpreted", "padded_width", "precision",
    "shared_bytes", "widen",
]  # fmt: skip

Pass = Literal["forward", "keys", "queries", "bias"]
PASSES: tuple[Pass, ...] = get_args(Pass)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """One choice of tiles.

    Attributes:
        queries: rows of a tile, a power of two from 16.
        keys: columns of a tile, a power of two from 16.
        warps: warps of a program.
        stages: tiles of the inner loop that are in flight.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """What of a choice is not the table's to make, nor to shrink: as in `Blocks`, None where it is."""

    queries: int | None = None
    keys: int | None = None
    warps: int | None = None
    stages: int | None = None

    @property
    def given(self) -> dict[str, int]:
        """Those that are fixed."""
        found = {"queries": self.queries, "keys": self.keys, "warps": self.warps, "stages": self.stages}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What the choice of tiles depends on.

    Attributes:
        capability: compute capability, 90 for 9.0; 0 is the interpreter.
        shared_bytes: shared memory that one program may ask for.
        processors: multiprocessors, for the number of parts that keys are cut into.
    """

    capability: int
    shared_bytes: int
    processors: int


INTERPRETER = Card(capability=0, shared_bytes=1 << 30, processors=2)


def interpreted() -> bool:
    """Triton runs kernels in Python, on the CPU: `TRITON_INTERPRET=1`, which must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def card_of(device: torch.device) -> Card:
    """The card behind a device; the interpreter for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    return _card(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache
def _card(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    return Card(
        capability=found.major * 10 + found.minor,
        # Without the opt-in figure (torch before 2.5) only the 48 KiB are certain that every card gives.
        shared_bytes=getattr(found, "shared_memory_per_block_optin", 48 << 10),
        processors=found.multi_processor_count,
    )


def padded_width(width: int) -> int:
    """Width of a tile for vectors of `width` elements: a power of two, at least 16, as matrix instructions want."""
    return max(16, 1 << (width - 1).bit_length())


def widen(dtype: torch.dtype, card: Card) -> bool:
    """Whether products must be computed from float32 copies of the operands.

    Cards before 8.0 have no bfloat16, and triton 3.3 to 3.9 multiplies float16 there without matrix instructions anyway (its
    pull request 5066). The interpreter's product of bfloat16 operands is wrong by orders of magnitude (3.9; tests/attention).
    """
    return dtype != torch.float32 and (card.capability < 80 and (dtype == torch.bfloat16 or card.capability == 0))


def precision(dtype: torch.dtype, card: Card) -> str:
    """How float32 operands are multiplied: three TF32 products keep float32's accuracy on matrix units; one only where torch may too."""
    if dtype != torch.float32 or card.capability < 80:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@functools.lru_cache(maxsize=4096)
def choose(
    kind: Pass, card: Card, dtype: torch.dtype, width: int, value_width: int, rows: int, wanted: Blocks | Fixed | None = None
) -> Blocks | None:
    """Tiles of a pass that fit the card, or None if none do.

    Args:
        kind: the pass.
        card: the card.
        dtype: of the inputs.
        width: D.
        value_width: Dv.
        rows: rows of queries there are, for calls with few.
        wanted: where to start instead of the table, or what of it stays as it is.
    """
    blocks = wanted if isinstance(wanted, Blocks) else _listed(kind, card, dtype, width, value_width, rows)
    fixed = wanted.given if isinstance(wanted, Fixed) else {}
    blocks = replace(blocks, **fixed)
    while shared_bytes(kind, blocks, dtype, width, value_width, card) > card.shared_bytes:
        smaller = _smaller(blocks, fixed)
        if smaller is None:
            return None
        blocks = smaller
    return blocks


def excess(kind: Pass, card: Card, dtype: torch.dtype, width: int, value_width: int, fixed: Fixed) -> int:
    """Bytes of shared memory that a pass needs at least with what is fixed, where `choose` finds nothing that fits."""
    blocks = Blocks(**{"queries": 16, "keys": 16, "stages": 1, "warps": 4, **fixed.given})
    return shared_bytes(kind, blocks, dtype, width, value_width, card)


def _listed(kind: Pass, card: Card, dtype: torch.dtype, width: int, value_width: int, rows: int) -> Blocks:
    blocks = _start(kind, card, dtype, max(padded_width(width), padded_width(value_width)))
    if kind == "forward":
        fitted = max(16, min(blocks.queries, 1 << max(rows - 1, 0).bit_length()))
        if fitted < 64 and card.capability >= 80:
            # Few queries: the time goes into reading keys, and more of them in flight hide it.
            blocks = Blocks(queries=fitted, keys=max(blocks.keys, 64), warps=4, stages=blocks.stages + 1)
        else:
            blocks = replace(blocks, queries=fitted)
    return blocks


def _start(kind: Pass, card: Card, dtype: torch.dtype, wide: int) -> Blocks:
    if card.capability == 0:
        return Blocks(queries=32, keys=32)
    if card.capability < 80:
        # Without matrix instructions each product is unrolled into multiply-adds: large tiles only make large programs.
        return Blocks(queries=32 if wide <= 128 else 16, keys=32 if wide <= 128 else 16, warps=4, stages=1)
    big = card.capability in (80, 90, 100)
    single = dtype == torch.float32
    if kind == "forward":
        if wide <= 64:
            return Blocks(queries=64 if single else 128, keys=64 if not single else 32, warps=4, stages=3 if big else 2)
        if wide <= 128:
            if single:
                return Blocks(queries=64, keys=32, warps=4, stages=2)
            return Blocks(queries=128, keys=64, warps=8, stages=3) if big else Blocks(queries=64, keys=64, warps=4, stages=2)
        return Blocks(queries=32, keys=16, warps=4, stages=2) if single else Blocks(queries=64, keys=32, warps=8, stages=2)
    if wide <= 64:
        return Blocks(queries=32, keys=32, warps=4, stages=2) if single else Blocks(queries=64, keys=64, warps=8, stages=2)
    if wide <= 128:
        return Blocks(queries=32, keys=32, warps=8, stages=1) if single else Blocks(queries=64, keys=64, warps=8, stages=2 if big else 1)
    return Blocks(queries=16, keys=16, warps=4, stages=1) if single else Blocks(queries=32, keys=32, warps=8, stages=1)


def _smaller(blocks: Blocks, fixed: Mapping[str, int]) -> Blocks | None:
    """The next choice that needs less: keys down to 32, stages, queries, then keys down to 16; what is fixed stays."""
    if blocks.keys > 32 and "keys" not in fixed:
        return replace(blocks, keys=blocks.keys // 2)
    if blocks.stages > 1 and "stages" not in fixed:
        return replace(blocks, stages=blocks.stages - 1)
    if blocks.queries > 16 and "queries" not in fixed:
        # Eight warps on so few rows would each hold what the others hold.
        warps = blocks.warps if "warps" in fixed else min(blocks.warps, 4)
        return replace(blocks, queries=blocks.queries // 2, warps=warps)
    return replace(blocks, keys=16) if blocks.keys > 16 and "keys" not in fixed else None


def shared_bytes(kind: Pass, blocks: Blocks, dtype: torch.dtype, width: int, value_width: int, card: Card) -> int:
    """Shared memory of a program, from above, in bytes.

    Formula: `stages` tiles of what the inner loop reads (keys and values, or queries and gradients), the tiles that stay, a row of numbers,
    and tiles of scores in transit: one for each product that takes them, more where operands travel in two parts (float32 in a forward) or
    come from shared memory only (capability 10). Where nothing is pipelined, keys and values are partly there a second time, transposed.
    """
    # Without matrix instructions operands are multiplied, and so exchanged, in float32.
    size = 4 if card.capability < 80 else dtype.itemsize
    both = padded_width(width) + padded_width(value_width)
    moving, staying = (blocks.queries, blocks.keys) if kind == "keys" else (blocks.keys, blocks.queries)
    forward = kind == "forward"
    read = moving * both * size
    stays = staying * (padded_width(width) if forward else both) * size
    copies = (4 if size == 4 else 1) if forward else 2
    scores = blocks.queries * blocks.keys * size * (2 * copies if 100 <= card.capability < 120 else copies)
    twice = (stays if kind == "keys" else read) * (size // 2 - forward) // 2 if blocks.stages == 1 else 0
    return blocks.stages * read + twice + stays + scores + 1024

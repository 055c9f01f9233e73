"""Where a unit's streamed pieces lie in a slot, worked out once per unit.

Pieces that lie side by side in one file are read in one go, and land where they are used: each keeps its file offset modulo a page, which
also keeps its address modulo 64 (see pieces.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchwrap.core import errors
from torchwrap.stream.planner import PAGE
from torchwrap.stream.units import Piece, SourceFile, Unit

__all__ = ["Layout", "Region", "lay_out"]

_DEVICE_ALIGN = 256
_MERGE_GAP = PAGE  # what `region_bytes` allows for


@dataclass(slots=True)
class Region:
    """A run of bytes of one file that is read in one go, and where it lands in the slot."""

    file: SourceFile
    offset: int
    nbytes: int
    slot_offset: int  # congruent to `offset` modulo a page
    pieces: list[Piece]


@dataclass(slots=True)
class Layout:
    """How a unit's streamed pieces lie in a slot."""

    regions: list[Region] = field(default_factory=list)
    landing: list[tuple[Piece, int]] = field(default_factory=list)  # (piece read from disk, offset in the slot's host side)
    places: list[tuple[Piece, int]] = field(default_factory=list)  # (piece, offset in the slot's device side)
    views: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # slot index -> views in the order of `places`
    needed: int = 0  # bytes of the slot, on either side

    @property
    def read_bytes(self) -> int:
        """Bytes read for one fetch."""
        return sum(region.nbytes for region in self.regions)


def lay_out(unit: Unit, slot_bytes: int, separate: bool) -> Layout:
    """Place a unit's streamed pieces.

    Where reads land in the memory that computes, a piece keeps its file offset modulo a page, so that it needs no second copy. On a
    separate device each piece is copied anyway and goes to a multiple of 256 bytes, where the device's kernels want it.
    """
    streamed = [piece for piece in unit.pieces if not piece.resident]
    homes = sorted(((p.home, p) for p in streamed if p.home is not None), key=lambda pair: (id(pair[0].file), pair[0].offset))
    layout = Layout()
    at = 0
    for home, piece in homes:
        last = layout.regions[-1] if layout.regions else None
        if not separate and home.offset % 64 != piece.residue:
            # The original had another alignment than the file gives: the reader copies it into place.
            layout.regions.append(Region(home.file, home.offset, piece.nbytes, at + piece.residue, [piece]))
            layout.landing.append((piece, at + piece.residue))
            at = (at + piece.residue + piece.nbytes + PAGE - 1) // PAGE * PAGE
            continue
        if (
            last is not None
            and last.slot_offset % PAGE == last.offset % PAGE
            and last.file is home.file
            and 0 <= home.offset - (last.offset + last.nbytes) <= _MERGE_GAP
        ):
            last.nbytes = home.offset + piece.nbytes - last.offset
            last.pieces.append(piece)
        else:
            last = Region(home.file, home.offset, piece.nbytes, at + home.offset % PAGE, [piece])
            layout.regions.append(last)
        layout.landing.append((piece, last.slot_offset + home.offset - last.offset))
        at = (last.slot_offset + last.nbytes + PAGE - 1) // PAGE * PAGE
    needed = at
    if separate:
        at = 0
        for piece in [p for p in streamed if p.host is not None] + [piece for _, piece in homes]:
            layout.places.append((piece, at))
            at = -(-(at + piece.nbytes) // _DEVICE_ALIGN) * _DEVICE_ALIGN
        needed = max(needed, at)
    else:
        layout.places = layout.landing
    if needed > slot_bytes:
        raise errors.StorageError(f"torchwrap: {unit.name} needs a slot of {needed} bytes, but slots have {slot_bytes}", where=unit.name)
    layout.needed = needed
    return layout

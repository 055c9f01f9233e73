"""Reading and writing single pieces: exact bytes at the alignment of the original.

Float32 matrix-vector kernels peel off elements until an address is aligned, so the same weights at another address modulo 64 give other
last bits (measured: torch 2.13 CPU, 30 of 690 shapes and offsets). A piece therefore always comes back at its own `residue`.
"""

from __future__ import annotations

import itertools
from contextlib import suppress

import torch

from torchwrap.core import errors
from torchwrap.core.tensors import bind, placeholder, was_written
from torchwrap.storage import aio, pool
from torchwrap.storage.spill import SpillStore
from torchwrap.stream.planner import PAGE
from torchwrap.stream.units import Crc, Home, Piece

__all__ = ["aligned_copy", "check_untouched", "copy_of", "drop_home", "learn", "part_of", "put_away", "read_piece"]


@torch.inference_mode(False)
@torch.no_grad()
def read_piece(piece: Piece, reader: aio.Reader, timeout_s: float, *, verify: bool) -> torch.Tensor:
    """A fresh host tensor with a piece's bytes, at the alignment modulo 64 of the original.

    Cost: the piece's bytes and up to two pages.
    """
    if piece.host is not None:
        return aligned_copy(piece.host.view(piece.dtype).view(piece.shape), piece.residue)
    home = piece.home
    if home is None:
        raise errors.StorageError(f"torchwrap: {piece.name} has no stored copy", where=piece.name)
    buffer = pool.allocate(piece.nbytes + 2 * PAGE)
    start = home.offset % PAGE if home.offset % 64 == piece.residue else piece.residue  # the reader copies in the second case
    home.file.check_unchanged()
    parts = (part_of(piece),) if verify else ()
    ticket = reader.submit([aio.Read(home.file, home.offset, piece.nbytes, buffer, start, parts)])
    ticket.wait(timeout_s)
    learn(piece, ticket)
    return buffer.tensor()[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)


def part_of(piece: Piece) -> aio.Part:
    """What the reader computes and compares: the piece's sum, and its CRC-32 where the home asks for one."""
    home = piece.home
    assert home is not None
    return aio.Part(piece.name, home.offset, piece.nbytes, piece.checksum, home.crc32, take_crc=home.crc != "never")


def learn(piece: Piece, ticket: aio.Ticket) -> None:
    """Keep the sums of a first read for comparison with later ones; a CRC that was to be checked once is done with."""
    home = piece.home
    if home is None:
        return
    if piece.checksum is None:
        piece.checksum = ticket.sums.get(piece.name)
    if home.crc == "always" and home.crc32 is None:
        home.crc32 = ticket.codes.get(piece.name)
    elif home.crc == "once" and piece.name in ticket.codes:
        home.crc, home.crc32 = "never", None


def check_untouched(piece: Piece) -> None:
    """Raise `ConflictError` if the piece was written to while it was away; the write is lost, and the next call works.

    Cost: that of `was_written`.
    """
    if was_written(piece.parameter, piece.absent):
        piece.absent = placeholder(piece.shape, piece.dtype, piece.absent.device)
        bind(piece.parameter, piece.absent)
        raise errors.ConflictError(
            f"torchwrap: {piece.name} was written to while its weights were away, so the write is lost",
            where=piece.name,
            fix=f"Write inside `with torchwrap.core.tensors(model, {piece.name!r}, write=True) as real:`, or unwrap the model first.",
        )


def aligned_copy(tensor: torch.Tensor, residue: int) -> torch.Tensor:
    """A contiguous copy whose address is `residue` modulo 64."""
    nbytes = tensor.numel() * tensor.element_size()
    room = torch.empty(nbytes + 64, dtype=torch.uint8)
    start = (residue - room.data_ptr()) % 64
    copy = room[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


def copy_of(value: torch.Tensor, residue: int) -> torch.Tensor:
    """A copy that computes the same bits: on the CPU at the same alignment, elsewhere an ordinary one."""
    return aligned_copy(value, residue) if value.device.type == "cpu" and value.is_contiguous() else value.clone()


def put_away(store: SpillStore, piece: Piece, value: torch.Tensor, *, crc: Crc = "once") -> Home:
    """Store a piece's values in our own file, beside any earlier version; its checksums are those of what was written.

    The earlier version stays until `drop_home`, because a `state_dict` handed out before may still show it.
    """
    segment = store.put(f"{piece.name}#{next(_numbers)}", value)
    record = store.file.records[segment.name]
    piece.checksum = record.sum64
    return Home(store.file, segment.name, segment.offset, segment.nbytes, None if crc == "never" else record.crc32, crc)


def drop_home(store: SpillStore, home: Home) -> None:
    """Forget a stored version; its room is used for others."""
    with suppress(errors.StorageError, KeyError):  # the store was closed meanwhile: the file is gone anyway
        store.remove(home.name)


_numbers = itertools.count()

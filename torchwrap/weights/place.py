"""Moving weights to their homes when a model is wrapped, and back when it is unwrapped.

First everything that must leave gets a stored copy: in the model's own safetensors files if those hold the same bytes (compared, not
assumed), in page-locked host memory for a separate device, else in our spill file. Only when all of it is stored are the parameters
hidden, so an error before that costs nothing, and one after it is undone from the values still at hand.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.integration import Integration
from torchwrap.core.tensors import bind, data_of, placeholder
from torchwrap.storage import aio, pool
from torchwrap.storage.checksum import crc32, memory_of, sum64
from torchwrap.storage.generations import GenerationFile
from torchwrap.storage.safefile import index_folder
from torchwrap.storage.spill import SpillStore
from torchwrap.stream.arena import Arena, arena_for
from torchwrap.stream.pieces import aligned_copy, learn, part_of, put_away, read_piece
from torchwrap.stream.planner import PAGE, region_bytes
from torchwrap.stream.progress import progress
from torchwrap.stream.settings import CRC, Streaming
from torchwrap.stream.tiles import parts, share
from torchwrap.stream.units import Home, Piece
from torchwrap.weights.blueprint import Blueprint

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["Placed", "place", "take_back"]

_ALIGN = 256  # of pieces in page-locked memory: what device kernels and copies like
_BATCH = 256 << 20  # bytes of resident weights read at a time, which a separate device needs twice for a moment


@dataclass(slots=True)
class Placed:
    """What was stored and changed, so that it can be undone."""

    store: SpillStore | None = None
    locked: pool.Buffer | None = None  # page-locked copies, on a separate device
    shown: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)  # parameter and what it showed before
    buffers: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)

    def show(self, parameter: nn.Parameter, data: torch.Tensor) -> None:
        """Let a parameter show something else, remembering what it showed."""
        self.shown.append((parameter, data_of(parameter)))
        bind(parameter, data)

    def keep(self) -> None:
        """All went well: forget the old values, so that their memory goes."""
        self.shown.clear()
        self.buffers.clear()

    def undo(self) -> None:
        """Show again what was shown, remove what was stored."""
        for parameter, data in reversed(self.shown):
            bind(parameter, data)
        for module, name, buffer in self.buffers:
            module._buffers[name] = buffer
        if self.store is not None:
            self.store.close()


def place(model: nn.Module, config: Streaming, blueprint: Blueprint, reader: aio.Reader) -> Placed:
    """Give every piece its home and show placeholders for those that are away."""
    division, device, homes = blueprint.division, blueprint.device, blueprint.homes
    placed = Placed()
    arena = arena_for(device)
    away = [piece for piece in division.pieces if not piece.resident]
    try:
        if homes is not None:
            for piece in division.pieces:
                piece.home = next(homes[name] for name in piece.names if name in homes)
                piece.home.crc = "always" if config.verify == "always" else "never"
                # An offset between two elements cannot be an address of theirs; a loader copies such a tensor to an even address.
                # What a loader converts (fused experts, another dtype) it puts into fresh memory, whose addresses are multiples of 64.
                aligned = not arena.separate and not piece.home.converted and piece.home.offset % piece.dtype.itemsize == 0
                piece.residue = piece.home.offset % 64 if aligned else 0
                share(piece)
            _load_residents([part for part in parts(division.pieces) if part.resident], reader, device, placed, config)
        on_disk = _lock_in_host(away, blueprint, arena, reader, config, placed) if arena.separate else away
        if homes is None and on_disk:
            _store(on_disk, model, config, blueprint.integration, reader, placed, match_alignment=not arena.separate)
        _move(model, [piece for piece in division.pieces if piece.resident], device, placed)
        for piece in away:
            piece.absent = placeholder(piece.shape, piece.dtype, device)
            share(piece, data_of(piece.parameter) if homes is None else None)
            placed.show(piece.parameter, piece.absent)
    except BaseException:
        placed.undo()
        raise
    return placed


def take_back(handle: WeightsHandle) -> None:
    """Give every parameter its values again, on the device the model came from; all or nothing."""
    away = [piece for piece in handle.pieces if not piece.resident]
    values = []
    for piece in away:
        # The file of an optimizer goes on changing.
        if handle.mapped and piece.home is not None and not isinstance(piece.home.file, GenerationFile):
            values.append(handle.stored_view(piece))
        else:
            value = read_piece(piece, handle.reader, handle.config.io_timeout_s, verify=handle.config.verify != "header")
            # Out of the page-aligned buffer it was read into, which is larger than the value.
            values.append(aligned_copy(value, piece.residue) if piece.residue else value.clone())
    for piece, value in zip(away, values, strict=True):
        bind(piece.parameter, value.to(handle.origin))
        piece.resident = True
    for piece in handle.pieces:
        shown = data_of(piece.parameter)
        if shown.device != handle.origin:
            bind(piece.parameter, shown.to(handle.origin))


def _store(
    away: list[Piece],
    model: nn.Module,
    config: Streaming,
    integration: Integration,
    reader: aio.Reader,
    placed: Placed,
    *,
    match_alignment: bool,
) -> None:
    """A stored copy for each piece: where the model was loaded from if that still holds these bytes, else in our spill file."""
    found = _stored_tensors(integration.source(model)) if config.path is None else {}
    rest = []
    for piece in away:
        home = _same_in(found, piece, model, reader, config, match_alignment)
        if home is None:
            rest.append(piece)
        else:
            piece.home = home
    if rest:
        placed.store = SpillStore.create(
            Path(config.path) if config.path is not None else None, needed=sum(p.nbytes + 2 * PAGE for p in rest)
        )
        for piece in progress(rest, "storing weights", lambda piece: piece.nbytes):
            piece.home = put_away(placed.store, piece, data_of(piece.parameter), crc=CRC[config.verify])


def _stored_tensors(folder: Path | None) -> dict[str, Home]:
    """What lies in a checkpoint folder, by key; nothing if there is no readable one (the weights are then stored by us)."""
    if folder is None:
        return {}
    try:
        return {key: Home(file, key, segment.offset, segment.nbytes) for key, (file, segment) in index_folder(folder).items()}
    except (errors.StorageError, errors.UnsupportedModelError):
        return {}


def _same_in(
    found: dict[str, Home], piece: Piece, model: nn.Module, reader: aio.Reader, config: Streaming, match_alignment: bool
) -> Home | None:
    """Where the same bytes lie, if they do: equal type, shape, alignment and, after reading them, content."""
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    for name in piece.names:
        for key in (name, prefix + name, name.removeprefix(prefix)):
            home = found.get(key)
            if home is None or home.nbytes != piece.nbytes or home.offset % piece.parameter.element_size():
                continue
            segment = home.file.segments[key]
            if segment.dtype != piece.dtype or segment.shape != piece.shape or (match_alignment and home.offset % 64 != piece.residue):
                continue
            stored = read_piece(dataclasses.replace(piece, home=home, checksum=None), reader, config.io_timeout_s, verify=False)
            mine = data_of(piece.parameter).cpu()
            if torch.equal(stored.view(torch.uint8), mine.contiguous().view(torch.uint8)):
                piece.checksum = sum64(memory_of(mine))
                if config.verify == "always":
                    home.crc, home.crc32 = "always", crc32(memory_of(mine))
                return home
    return None


def _load_residents(pieces: list[Piece], reader: aio.Reader, device: torch.device, placed: Placed, config: Streaming) -> None:
    """Read resident pieces from their files, in file order, into memory of their own."""
    batch: list[Piece] = []
    ordered = sorted(pieces, key=lambda p: (id(p.home.file), p.home.offset) if p.home is not None else (0, 0))
    for piece in progress(ordered, "loading resident weights", lambda piece: piece.nbytes):
        batch.append(piece)
        if sum(p.nbytes for p in batch) >= _BATCH:
            _load_batch(batch, reader, device, placed, config)
            batch = []
    _load_batch(batch, reader, device, placed, config)


def _load_batch(pieces: list[Piece], reader: aio.Reader, device: torch.device, placed: Placed, config: Streaming) -> None:
    if not pieces:
        return
    buffer = pool.allocate(region_bytes(piece.nbytes for piece in pieces))
    at, reads, starts = 0, [], []
    for piece in pieces:
        assert piece.home is not None
        start = at + (piece.home.offset % PAGE if piece.home.offset % 64 == piece.residue else piece.residue)
        parts = (part_of(piece),) if config.verify != "header" else ()
        reads.append(aio.Read(piece.home.file, piece.home.offset, piece.nbytes, buffer, start, parts))
        starts.append(start)
        at = (start + piece.nbytes + PAGE - 1) // PAGE * PAGE
    ticket = reader.submit(reads)
    ticket.wait(config.io_timeout_s)
    memory = buffer.tensor()
    for piece, start in zip(pieces, starts, strict=True):
        learn(piece, ticket)
        placed.show(piece.parameter, memory[start : start + piece.nbytes].view(piece.dtype).view(piece.shape).to(device))


def _lock_in_host(
    away: list[Piece], blueprint: Blueprint, arena: Arena, reader: aio.Reader, config: Streaming, placed: Placed
) -> list[Piece]:
    """Page-locked copies of as many pieces as host memory takes; the pieces that must go to disk."""
    if blueprint.tier == "disk":
        return away
    left, chosen, rest = blueprint.budget.host, [], []
    for piece in away:
        if piece.nbytes + _ALIGN <= left:
            left -= piece.nbytes + _ALIGN
            chosen.append(piece)
        else:
            rest.append(piece)
    if rest and blueprint.tier == "host":
        needed = sum(piece.nbytes + _ALIGN for piece in away)
        raise errors.BudgetError(
            f"{config.technique}: the weights that are not resident do not fit host memory",
            needed=needed,
            available=blueprint.budget.host,
            largest=max(away, key=lambda p: p.nbytes).name,
            fix=f"Set host_memory={needed}, or let some of them lie on the disk.",
        )
    if chosen:
        buffer = placed.locked = arena.host_buffer(sum(piece.nbytes + _ALIGN for piece in chosen))
        memory, at = buffer.tensor(), 0
        for piece in progress(chosen, "copying weights to host memory", lambda piece: piece.nbytes):
            value = data_of(piece.parameter) if piece.home is None else read_piece(piece, reader, config.io_timeout_s, verify=True)
            piece.host = memory[at : at + piece.nbytes]
            piece.host.copy_(value.reshape(-1).view(torch.uint8))
            piece.home = None
            at += (piece.nbytes + _ALIGN - 1) // _ALIGN * _ALIGN
    return rest


def _move(model: nn.Module, resident: list[Piece], device: torch.device, placed: Placed) -> None:
    """What stays goes to the device that computes."""
    for piece in resident:
        shown = data_of(piece.parameter)
        if shown.device != device:
            placed.show(piece.parameter, shown.to(device))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                placed.buffers.append((module, name, buffer))
                module._buffers[name] = buffer.to(device)

"""Units over a file of known content, written byte by byte so that every alignment and gap can be had."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from tests.hangs import hanging_now
from torchwrap.core.tensors import data_of, is_placeholder, placeholder
from torchwrap.storage import Backend
from torchwrap.storage.safefile import TensorFile
from torchwrap.stream.arena import Arena
from torchwrap.stream.engine import Engine
from torchwrap.stream.planner import PlannedUnit, ResidencyPlan, plan_residency
from torchwrap.stream.units import Home, Piece, Unit

__all__ = ["HangingBackend", "Stored", "build", "check_bound", "engine_state", "idle", "plan_for", "using", "write_tensors"]

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}


def write_tensors(path: Path, tensors: Sequence[tuple[str, torch.Tensor]], gaps: Sequence[int] = ()) -> TensorFile:
    """A safetensors file with `gaps[i]` filler bytes before tensor i."""
    header: dict[str, object] = {}
    body = bytearray()
    for index, (name, tensor) in enumerate(tensors):
        gap = gaps[index] if index < len(gaps) else 0
        if gap:
            header[f"filler.{index}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [len(body), len(body) + gap]}
            body += b"\xee" * gap
        data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return TensorFile.open(path)


class Stored:
    """Units whose weights are away, and what the weights are."""

    def __init__(self, units: list[Unit], values: dict[int, torch.Tensor], file: TensorFile) -> None:
        self.units, self.values, self.file = units, values, file

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)


def build(
    path: Path,
    sizes: Sequence[Sequence[int]],
    *,
    gaps: Sequence[int] = (),
    keep_residue: bool = True,
    residue: int = 0,
    parents: dict[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    in_host: frozenset[int] = frozenset(),
    arena: Arena | None = None,
) -> Stored:
    """Units with pieces of these element counts.

    Args:
        gaps: filler bytes before each piece in the file.
        keep_residue: pieces were at the file's alignment; False: at `residue` modulo 64.
        parents: nested unit -> its parent.
        in_host: pieces whose home is page-locked memory of `arena`.
    """
    generator = torch.Generator().manual_seed(7)
    flat = [(unit, count) for unit, counts in enumerate(sizes) for count in counts]
    values = {index: torch.randn(count, generator=generator).to(dtype) for index, (_, count) in enumerate(flat)}
    file = write_tensors(path, [(f"piece.{index}", value) for index, value in values.items()], gaps)
    parents = parents or {}
    units = [
        Unit(index, f"unit.{index}", None, "expert" if index in parents else "block", [], parents.get(index)) for index in range(len(sizes))
    ]
    for index, (unit, _) in enumerate(flat):
        value = values[index]
        segment = file.segments[f"piece.{index}"]
        absent = placeholder(value.shape, value.dtype, "cpu")
        home: Home | None = Home(file, segment.name, segment.offset, segment.nbytes)
        host = None
        if index in in_host:
            assert arena is not None
            host, home = arena.host_buffer(value.nbytes).tensor()[: value.nbytes], None
            host.copy_(value.view(torch.uint8))
        units[unit].pieces.append(
            Piece(
                index=index,
                names=[f"piece.{index}"],
                parameter=nn.Parameter(absent, requires_grad=False),
                shape=tuple(value.shape),
                dtype=value.dtype,
                nbytes=value.nbytes,
                residue=segment.offset % 64 if keep_residue else residue,
                absent=absent,
                home=home,
                host=host,
                resident=False,
            )
        )
    return Stored(units, values, file)


def plan_for(stored: Stored, slots: int) -> ResidencyPlan:
    """Everything streamed through so many slots."""
    planned = [
        PlannedUnit(unit.name, tuple((piece.index, piece.nbytes) for piece in unit.pieces), nested=unit.parent is not None)
        for unit in stored.units
    ]
    return plan_residency(planned, fixed_bytes=0, budget=1 << 50, slots=slots, keep_resident=False)


def check_bound(stored: Stored, unit: Unit) -> None:
    """Every parameter of the unit shows the stored bytes."""
    for piece in unit.pieces:
        shown = data_of(piece.parameter)
        assert not is_placeholder(shown) or shown.numel() == 1, f"{piece.name} is away"
        assert torch.equal(shown, stored.values[piece.index]), f"{piece.name} shows other bytes"


@contextmanager
def using(engine: Engine, unit: Unit) -> Iterator[None]:
    """One use of a unit, as a layer makes it."""
    engine.acquire(unit)
    try:
        yield
    finally:
        engine.release(unit)


def engine_state(engine: Engine) -> None:
    """Every slot is either free or holds one unit, never both; there are never more than planned."""
    free = [id(slot) for slot in engine._free]
    held = [id(fetch.slot) for fetch in engine._fetches.values()]
    assert len({*free, *held}) == len(free) + len(held), "a slot is free and held, or held twice"
    assert {*free, *held} == {id(slot) for slot in engine._slots}, "a slot is lost"
    assert len({slot.index for slot in engine._slots}) == len(engine._slots), "two slots have one index"
    assert len(engine._slots) <= engine.plan.slots


def idle(engine: Engine, stored: Stored) -> None:
    """Nothing is in use: no slot leaks, and every parameter shows its placeholder."""
    engine_state(engine)
    assert not any(fetch.users for fetch in engine._fetches.values())
    for unit in stored.units:
        for piece in unit.pieces:
            assert data_of(piece.parameter).data_ptr() == piece.absent.data_ptr(), f"{piece.name} still shows a slot"


class HangingBackend(Backend):
    """Reads wait while `closed`; `opened` lets them go. `spoil` makes the next reads fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures = 0

    def pread(self, fd: int, target: memoryview, offset: int) -> int:
        if not self.gate.is_set():
            with hanging_now():
                self.gate.wait(20)
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        return super().pread(fd, target, offset)

"""One chunk of one parameter's step: what is read, what is computed, what is written, and when the new values count.

The streams of a parameter are its weight (unless that is in memory), its gradient (if it is parked on the disk) and what the optimizer
keeps per element. Nothing here waits or knows of threads; updates.py says when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torchwrap.core import errors
from torchwrap.optimizer.elementwise import Rule
from torchwrap.optimizer.parts import Whole, run
from torchwrap.optimizer.targets import Target, flat_weight, in_place
from torchwrap.storage import aio
from torchwrap.storage.checksum import sum64
from torchwrap.storage.generations import Draft, GenerationStore, Record
from torchwrap.storage.pool import Buffer, allocate
from torchwrap.storage.spillfile import SpillFile
from torchwrap.storage.workers import mismatch
from torchwrap.stream.pieces import part_of
from torchwrap.stream.timeline import Timeline
from torchwrap.stream.units import Home, Piece

__all__ = ["Chunk", "Chunks", "Parked", "Update"]

_WEIGHT, _GRADIENT = "weight", "gradient"


@dataclass(frozen=True, slots=True)
class Parked:
    """A gradient on the disk."""

    file: SpillFile
    name: str


@dataclass(eq=False, slots=True)
class Update:
    """One parameter's step.

    Attributes:
        gradient: of the parameter's shape, or where it is parked.
        scale: factor of a parked gradient (clipping), as a tensor of no dimension.
        settings: of its group, as they were when the step began.
        threads: `torch.get_num_threads()` where an ordinary optimizer would step.
        beside: the weight is in memory, and a backward runs: new values are collected in `values` until all are there.
        held: that backward may still read the weight, so that they wait for `land`.
    """

    target: Target
    gradient: torch.Tensor | Parked | None
    settings: Mapping[str, Any]
    threads: int
    scale: torch.Tensor | None = None
    beside: bool = False
    held: bool = False
    values: torch.Tensor | None = None
    version: int = 0  # of the weight in memory that `values` were made from, as torch counts
    drafts: dict[str, Draft] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    total: int = 0  # sum of a weight read from a file that is not ours
    left: int = -1  # chunks not yet written; -1 before the first
    begun: bool = False
    done: bool = False  # the new values are the present ones

    def again(self) -> Update:
        """The same, to be carried out from its beginning, when no backward runs."""
        return Update(self.target, self.gradient, self.settings, self.threads, self.scale)

    @torch.inference_mode(False)
    @torch.no_grad()
    def land(self) -> None:
        """Put values that waited where they belong, if there are some, and see that nobody else wrote there.

        Raises:
            ConflictError: somebody wrote to the weight meanwhile; the new values do not know of it.
        """
        memory = flat_weight(self.target)
        assert memory is not None
        if self.target.parameter._version != self.version:
            raise errors.ConflictError(
                f"OffloadedOptimizer: {self.target.name} was written to during backward, when its new values had been computed",
                where=self.target.name,
                fix="Call optimizer.rollback(), or close(); pass overlap=False if weights are to be changed in a backward.",
            )
        if self.values is not None:
            memory.copy_(self.values)
            self.values, self.version = None, self.target.parameter._version

    @property
    def gradient_nbytes(self) -> int:
        """Bytes of memory its gradient takes."""
        return self.gradient.numel() * self.gradient.element_size() if isinstance(self.gradient, torch.Tensor) else 0


@dataclass(eq=False, slots=True)
class Chunk:
    """One chunk under way; `buffers` by stream, and `sums` of what will be written by record."""

    update: Update
    index: int
    buffers: dict[str, Buffer]
    sums: dict[str, int] = field(default_factory=dict)
    ticket: aio.Ticket | None = None


class Chunks:
    """How to step through the chunks of a parameter.

    Args:
        rule: the optimizer class.
        store: where state, and weights that are not in memory, are written.
        reader: reads.
        held: copies elements of a weight from where a backward holds or left it, if it does (`UpdatedWindow.copy_held`);
            None where no weight is streamed.
        done: called when a target got its new values; with their home, if they are in the store.
        timeline: where chunks read ("state"), updated and written are recorded, if anywhere.

    Attributes:
        reused: bytes of weights that were copied from where a backward held them, instead of read.
        seconds: spent in the optimizer class.
        writing_s: spent writing.
    """

    def __init__(
        self,
        rule: Rule,
        store: GenerationStore,
        reader: aio.Reader,
        held: Callable[[Piece, int, torch.Tensor], bool] | None,
        done: Callable[[Target, Home | None], None],
        timeline: Timeline | None = None,
    ) -> None:
        self._rule, self._store, self._reader, self._held, self._done, self._timeline = rule, store, reader, held, done, timeline
        self.reused: int = 0
        self.seconds: float = 0.0
        self.writing_s: float = 0.0

    def begin(self, update: Update) -> int:
        """Begin new versions of all that changes; the number of chunks."""
        target = update.target
        if target.torn:
            raise errors.StorageError(
                f"OffloadedOptimizer: an update of {target.name} was cut short, so its weight is neither the old one nor the new one",
                where=target.name,
                fix="Call optimizer.rollback(), or close() and load model and a new optimizer from a checkpoint.",
            )
        records = [self._store.records[target.state_name(key)] for key in target.layout]
        update.begun = bool(target.order)
        memory = flat_weight(target)
        in_store = memory is None
        if memory is not None and update.beside:
            update.values, update.version = torch.empty_like(memory), target.parameter._version
        geometry = self._store.records[target.weight_name]
        for record in [*records, geometry] if in_store else records:
            update.drafts[record.name] = self._store.draft(record)
        update.left = geometry.count
        return geometry.count

    def read(self, chunk: Chunk) -> None:
        """Start reading what the chunk needs; its buffers are made where they are missing or too small."""
        update, index = chunk.update, chunk.index
        target = update.target
        geometry = self._store.records[target.weight_name]
        first, last = geometry.span(index)
        reads: list[aio.Read] = []
        for stream, dtype in _streams(update).items():
            needed = geometry.chunk * dtype.itemsize
            buffer = chunk.buffers.get(stream)
            if buffer is None or buffer.nbytes < needed:
                buffer = chunk.buffers[stream] = allocate(needed)
            if stream == _WEIGHT:
                reads += self._weight_read(update, geometry, index, buffer)
            elif stream != _GRADIENT:
                record = self._store.records[target.state_name(stream)]
                reads += [self._store.read(record, index, buffer, update.drafts[record.name])] if update.begun else []
            else:
                assert isinstance(update.gradient, Parked)
                segment = update.gradient.file.segments[update.gradient.name]
                offset, nbytes = segment.offset + first * dtype.itemsize, (last - first) * dtype.itemsize
                part = 0 if index else geometry.lead * dtype.itemsize
                reads.append(aio.Read(update.gradient.file, offset, nbytes, buffer, part))
        chunk.ticket = self._reader.submit(reads) if reads else None

    def _weight_read(self, update: Update, record: Record, index: int, buffer: Buffer) -> list[aio.Read]:
        piece = update.target.piece
        if flat_weight(update.target) is not None:
            return []
        assert piece is not None and piece.home is not None
        begin, end = record.span(index)
        inside = buffer.tensor()[record.head(index) :][: (end - begin) * record.dtype.itemsize].view(record.dtype)
        if self._held is not None and self._held(piece, begin, inside):
            self.reused += inside.nbytes
            return []
        if piece.home.file is self._store.file:
            return [self._store.read(record, index, buffer, update.drafts[record.name])]
        piece.home.file.check_unchanged()
        return [aio.Read(piece.home.file, piece.home.offset + begin * record.dtype.itemsize, inside.nbytes, buffer, record.head(index))]

    @torch.inference_mode(False)
    @torch.no_grad()
    def compute(self, chunk: Chunk) -> None:
        """Run the optimizer on the chunk, which has been read."""
        update, target = chunk.update, chunk.update.target
        geometry = self._store.records[target.weight_name]
        span = first, last = geometry.span(chunk.index)
        device, dtype, lead = target.parameter.device, target.parameter.dtype, 0 if chunk.index else geometry.lead
        if update.threads != torch.get_num_threads():
            torch.set_num_threads(update.threads)  # of this thread: the trainer changed its own since it began
        whole = Whole(target.numel, update.threads, not update.settings.get("fused"), device.type != "cpu")

        def room(name: str, kind: torch.dtype) -> torch.Tensor:
            return chunk.buffers[name].tensor()[lead * kind.itemsize :].view(kind)

        weight = room(_WEIGHT, dtype)
        memory = flat_weight(target)
        if memory is not None:
            weight[: last - first].copy_(memory[first:last])
        elif target.piece is not None and target.piece.home is not None and target.piece.home.file is not self._store.file:
            read = weight[: last - first].view(torch.uint8).numpy().data
            update.total = (update.total + sum64(read, first * dtype.itemsize)) % (1 << 64)
        if isinstance(update.gradient, torch.Tensor):
            gradient = update.gradient.reshape(-1)[first:last].contiguous()
        else:
            gradient = room(_GRADIENT, dtype)[: last - first]
            if update.scale is not None:
                gradient.mul_(update.scale)
        state = {key: room(key, kind) for key, kind in target.layout.items()}
        began = time.monotonic()
        numbers = target.numbers if update.begun else {}
        if device.type == "cpu":
            after = run(self._rule, update.settings, whole, span, weight, gradient, state, numbers, begun=update.begun)
        else:
            there = {name: tensor[: last - first].to(device) for name, tensor in {"": weight, "/": gradient, **state}.items()}
            kept = {key: there[key] for key in state}
            after = run(self._rule, update.settings, whole, span, there[""], there["/"], kept, numbers, begun=update.begun)
            for name, tensor in {"": weight, **state}.items():
                tensor[: last - first].copy_(there[name])
        ended = time.monotonic()
        self.seconds += ended - began
        if self._timeline is not None:
            if chunk.ticket is not None:
                self._timeline.add("state", target.name, *chunk.ticket.interval, chunk.ticket.nbytes)
            self._timeline.add("update", target.name, began, ended, 0)
        update.numbers = after
        if update.values is not None:
            update.values[first:last].copy_(weight[: last - first])
        elif memory is not None:
            target.torn = True  # until the last chunk
            memory[first:last].copy_(weight[: last - first])
        # Here and not where it is written: the bytes are in the processor's cache, and the disk does not wait for sums.
        chunk.sums = {name: self._store.sum_of(draft, chunk.index, _memory(chunk, name)) for name, draft in update.drafts.items()}

    def write(self, chunk: Chunk) -> bool:
        """Write what changed; True if that was the last chunk of the parameter, whose new values are the present ones then."""
        update, began, before = chunk.update, time.monotonic(), self._store.bytes_written
        for name, draft in update.drafts.items():
            self._store.write(draft, chunk.index, _memory(chunk, name), chunk.sums.get(name))
        ended = time.monotonic()
        self.writing_s += ended - began
        if self._timeline is not None and update.drafts:
            self._timeline.add("write", update.target.name, began, ended, self._store.bytes_written - before)
        update.left -= 1
        if not update.left:
            self._finish(update)
        return not update.left

    def _finish(self, update: Update) -> None:
        """All chunks are written: the new values are the present ones."""
        target = update.target
        piece = target.piece
        weight = update.drafts.get(target.weight_name)
        home: Home | None = None
        if weight is not None:
            assert piece is not None and piece.home is not None
            foreign = piece.home.file is not self._store.file
            if foreign and piece.checksum is not None and update.total != piece.checksum:
                raise mismatch(piece.home.file, part_of(piece), "sum64", piece.checksum, update.total)
            record = weight.record
            home = Home(self._store.file, record.name, record.offset(weight.half), record.nbytes)
        if update.beside and not update.held:
            update.land()
            target.torn = True  # until the state is that of after as well
        self._store.finish(*update.drafts.values())
        target.numbers, target.order = in_place(target.numbers, update.numbers), self._order(update)
        target.torn, target.changed = False, True
        update.done = True
        self._done(target, home)

    @staticmethod
    def _order(update: Update) -> tuple[str, ...]:
        known = [key for key in update.target.order if key in update.target.layout or key in update.numbers]
        new = [key for key in (*update.numbers, *update.target.layout) if key not in known]
        return (*known, *new)


def _memory(chunk: Chunk, record: str) -> memoryview:
    """Where a record's chunk lies."""
    return chunk.buffers[record.rpartition(":")[2]].memory


def _streams(update: Update) -> dict[str, torch.dtype]:
    """What passes through buffers for each chunk."""
    target = update.target
    parked = {_GRADIENT: target.parameter.dtype} if isinstance(update.gradient, Parked) else {}
    return {_WEIGHT: target.parameter.dtype, **parked, **target.layout}

"""What is to be read, and how it is cut into requests that a disk likes.

O_DIRECT moves whole 4096-byte blocks between equal alignments, so a read is *widened* to block boundaries. If place and offset agree
modulo 4096, the widened range is read in place and a tensor can be bound where it landed, without a copy. What does not agree, or would
leave the target, is read into a small buffer of the reader and copied. Long ranges become requests of equal size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from torchwrap.storage.backend import Source
from torchwrap.storage.checksum import Part
from torchwrap.storage.pool import BLOCK, Buffer, round_down, round_up

__all__ = ["Piece", "Read", "cut", "target_memory"]


@dataclass(frozen=True, slots=True)
class Read:
    """One byte range to fetch: the file's `[offset, offset + nbytes)` lands at `target[start : start + nbytes]`.

    Attributes:
        file: a `TensorFile` or a `SpillFile`.
        offset: first byte in the file; any number.
        nbytes: length in bytes; 0 is allowed.
        target: a `Buffer`, or writable contiguous bytes.
        start: where in `target` the first byte lands. In place if `(address of target + start - offset) % 4096 == 0`, which for a
            `Buffer` is `start % 4096 == offset % 4096`; copied otherwise. In place, all 4096-byte blocks of memory that the range
            touches belong to this read and are overwritten.
        parts: tensors inside the range whose sums are taken and, where given, compared.
    """

    file: Source
    offset: int
    nbytes: int
    target: Buffer | memoryview
    start: int = 0
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One request of a read.

    Attributes:
        low: first byte in the file, at a block boundary.
        high: end, at a block boundary; may lie behind the file's end.
        place: the memory of `[low, high)`, `None` when the bytes must be copied.
    """

    read: Read
    memory: memoryview
    low: int
    high: int
    place: memoryview | None

    def wanted(self) -> tuple[int, int]:
        """The file range of this request that was asked for."""
        return max(self.low, self.read.offset), min(self.high, self.read.offset + self.read.nbytes)

    def bytes_of(self, first: int, last: int) -> memoryview:
        """Memory of the file range `[first, last)`."""
        shift = self.read.start - self.read.offset
        return self.memory[first + shift : last + shift]


def target_memory(read: Read) -> memoryview:
    """The target as bytes.

    Raises:
        ValueError: the range does not fit it, or a part is not inside the range.
    """
    memory = read.target.memory if isinstance(read.target, Buffer) else read.target.cast("B")
    if memory.readonly or min(read.offset, read.nbytes, read.start) < 0 or read.start + read.nbytes > len(memory):
        kind = "read-only target" if memory.readonly else "target"
        raise ValueError(f"{read.nbytes} bytes of offset {read.offset} do not fit at {read.start} of a {kind} of {len(memory)} bytes")
    for part in read.parts:
        if part.offset < read.offset or part.offset + part.nbytes > read.offset + read.nbytes:
            raise ValueError(f"{part.name} [{part.offset}, +{part.nbytes}) is not inside the read [{read.offset}, +{read.nbytes})")
    return memory


def cut(read: Read, chunk: int) -> Iterator[Piece]:
    """The requests of at most `chunk` bytes that make up a read: blocks in place where possible, the rest to be copied."""
    memory = target_memory(read)
    if not read.nbytes:
        return
    low, high = round_down(read.offset), round_up(read.offset + read.nbytes)
    address: int = numpy.frombuffer(memory, dtype=numpy.uint8).__array_interface__["data"][0]
    shift = read.start - read.offset  # file position + shift = position in memory
    inner_low, inner_high = max(low, round_up(-shift)), min(high, round_down(len(memory) - shift))
    if (address + shift) % BLOCK or inner_low >= inner_high:
        inner_low = inner_high = high
    for begin, end, in_place in ((low, inner_low, False), (inner_low, inner_high, True), (inner_high, high, False)):
        count = -(-(end - begin) // chunk)
        size = round_up(-(-(end - begin) // count)) if count else chunk  # equal requests: no tiny last one
        for at in range(begin, end, size):
            stop = min(at + size, end)
            yield Piece(read, memory, at, stop, memory[at + shift : stop + shift] if in_place else None)

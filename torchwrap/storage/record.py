"""The header in front of every segment of a spill file: enough to know what the bytes behind it are, and whether they are intact.

Little-endian: magic (8 bytes), CRC-32 of all that follows (u32), version (u32), header length in bytes (u32), generation (u64), data length
(u64), sum64 (u64), CRC-32 of the data (u32), number of dimensions, length of the type's name, length of the tensor's name (u32 each); then
the dimensions (u64 each), the two names in UTF-8, and zeros up to a multiple of 4096, so that the data starts on a block boundary.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from torchwrap.core.errors import CorruptDataError
from torchwrap.storage.checksum import Part
from torchwrap.storage.header import Segment
from torchwrap.storage.pool import round_up

__all__ = ["Record", "header_nbytes", "read_length", "unpack"]

_MAGIC = b"TWspill\0"
_VERSION = 1
_FIELDS = struct.Struct("<IIQQQIIII")
_START = len(_MAGIC) + 4
_LONGEST = 1 << 20  # a header beyond this is garbage: names are a few hundred bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One version of one tensor in a spill file.

    Attributes:
        segment: where the data lies and what it is.
        generation: grows with every write to the store, so that an older version is told apart.
        sum64: wrap-around sum of the data.
        crc32: CRC-32 of the data.
    """

    segment: Segment
    generation: int
    sum64: int
    crc32: int

    @property
    def header_nbytes(self) -> int:
        """Length of the header, which ends where the data begins."""
        return header_nbytes(self.segment)

    @property
    def extent(self) -> tuple[int, int]:
        """(offset, nbytes) of header and data in the file, whole blocks."""
        return self.segment.offset - self.header_nbytes, self.header_nbytes + round_up(self.segment.nbytes)

    def part(self) -> Part:
        """The data as a part of a read, with both checksums."""
        return Part(self.segment.name, self.segment.offset, self.segment.nbytes, self.sum64, self.crc32)

    def pack(self) -> bytes:
        """The header's bytes."""
        segment, (dtype, name) = self.segment, _texts(self.segment)
        size, rank = self.header_nbytes, len(segment.shape)
        fields = (_VERSION, size, self.generation, segment.nbytes, self.sum64, self.crc32, rank, len(dtype), len(name))
        body = _FIELDS.pack(*fields) + struct.pack(f"<{rank}Q", *segment.shape) + dtype + name
        body = body.ljust(size - _START, b"\0")
        return _MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def header_nbytes(segment: Segment) -> int:
    """Length of the header that a tensor of this name and shape gets."""
    dtype, name = _texts(segment)
    return round_up(_START + _FIELDS.size + 8 * len(segment.shape) + len(dtype) + len(name))


def read_length(block: bytes, path: Path, offset: int) -> int:
    """Header length, from the first 4096 bytes at `offset`; raises `CorruptDataError` if no header begins there."""
    if len(block) < _START + _FIELDS.size or not block.startswith(_MAGIC):
        raise _corrupt(path, offset, "no segment begins here")
    version, size = _FIELDS.unpack_from(block, _START)[:2]
    if version != _VERSION or not 0 < size <= _LONGEST:
        raise _corrupt(path, offset, f"segment of version {version} with a header of {size} bytes")
    return int(size)


def unpack(header: bytes, path: Path, offset: int) -> Record:
    """The record whose header lies at `offset` of the file.

    Raises:
        CorruptDataError: the header is damaged, or contradicts itself.
    """
    size = read_length(header, path, offset)
    body = header[_START:size]
    if len(header) < size or struct.unpack_from("<I", header, len(_MAGIC))[0] != zlib.crc32(body):
        raise _corrupt(path, offset, "the segment's header is damaged")
    _, _, generation, nbytes, total, code, rank, dtype_nbytes, name_nbytes = _FIELDS.unpack_from(body)
    try:
        shape = struct.unpack_from(f"<{rank}Q", body, _FIELDS.size)
        texts = body[_FIELDS.size + 8 * rank :][: dtype_nbytes + name_nbytes].decode("utf-8")
        dtype = getattr(torch, texts[:dtype_nbytes], None)  # type names are ASCII
    except (struct.error, ValueError) as error:
        raise _corrupt(path, offset, f"the segment's header is damaged: {error}") from error
    if not isinstance(dtype, torch.dtype) or math.prod(shape) * dtype.itemsize != nbytes:
        raise _corrupt(path, offset, f"{nbytes} bytes are no {texts[:dtype_nbytes]} of shape {list(shape)}")
    return Record(Segment(texts[dtype_nbytes:], dtype, shape, offset + size, nbytes), generation, total, code)


def _texts(segment: Segment) -> tuple[bytes, bytes]:
    return str(segment.dtype).removeprefix("torch.").encode(), segment.name.encode()


def _corrupt(path: Path, offset: int, what: str) -> CorruptDataError:
    return CorruptDataError(what, where=f"{path}, offset {offset}", fix="The spill file was altered: wrap the model again.")

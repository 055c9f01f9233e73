"""Sums that tell whether stored bytes are the ones that were written, computed piece by piece in any order.

`sum64` adds the bytes up as little-endian 64-bit words, modulo 2^64, the last word padded with zeros. A byte at position i therefore
counts as byte * 256^(i mod 8), and pieces cut anywhere add up as long as each knows its position modulo 8. It runs at memory speed and
catches what disks and file systems do (zeroed, swapped, stale or torn blocks); it does not tell two words that changed places apart.
`crc32` does, at a few GB/s; pieces are joined by `crc32_join`.

Source of the joining rule: a CRC is linear over GF(2); W. W. Peterson and D. T. Brown, Cyclic Codes for Error Detection, 1961.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy
import torch

__all__ = ["Part", "crc32", "crc32_join", "memory_of", "sum64"]

_MASK = (1 << 64) - 1
_POLYNOMIAL = 0xEDB88320  # the CRC-32 of zlib and PNG, bits reversed: bit 31 is the coefficient of x^0


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor's bytes inside a file, and what they must sum up to.

    Attributes:
        name: the tensor's name, for messages and for `Ticket.sums`.
        offset: first byte in the file.
        nbytes: length in bytes.
        sum64: expected sum, `None` to compute without comparing.
        crc32: expected CRC, `None` to compare none (it costs more than the sum).
        take_crc: compute the CRC, for `Ticket.codes`, also when none is expected.
    """

    name: str
    offset: int
    nbytes: int
    sum64: int | None = None
    crc32: int | None = None
    take_crc: bool = False


def sum64(memory: memoryview | bytes | bytearray, position: int = 0) -> int:
    """Wrap-around sum of the 64-bit words of `memory`.

    Args:
        memory: contiguous bytes.
        position: where these bytes stand in the whole; only its value modulo 8 matters.

    Returns:
        A number in [0, 2^64). `sum64(ab) == (sum64(a) + sum64(b, len(a))) % 2**64` for every cut.
    """
    view = memoryview(memory).cast("B")
    phase = position % 8
    head = min((8 - phase) % 8, len(view))
    words = (len(view) - head) // 8
    # numpy and not torch: torch would start a team of worker threads for each reader thread.
    body = int(numpy.frombuffer(view, dtype="<u8", count=words, offset=head).sum(dtype=numpy.uint64)) if words else 0
    first = int.from_bytes(view[:head], "little") << (8 * phase)
    last = int.from_bytes(view[head + 8 * words :], "little")
    return (first + body + last) & _MASK


def crc32(memory: memoryview | bytes | bytearray, before: int = 0) -> int:
    """CRC-32 of `memory`, continuing from `before`."""
    return zlib.crc32(memory, before)


def crc32_join(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of two pieces put together, from the CRC-32 of each.

    Appending n bytes multiplies the first piece's polynomial by x^(8n); the initial and final inversions cancel in the sum.
    """
    return _multiply(first, _power_of_x(8 * second_nbytes)) ^ second if second_nbytes else first


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor as contiguous bytes; shares memory when the tensor is contiguous and on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not plain.numel():
        return memoryview(b"")
    view: memoryview = plain.reshape(-1).view(torch.uint8).numpy().data
    return view


def _multiply(left: int, right: int) -> int:
    """Product of two polynomials over GF(2), modulo the CRC polynomial, in reversed bit order."""
    product = 0
    for power in range(32):
        if left & (1 << (31 - power)):
            product ^= right
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)  # right * x
    return product


@lru_cache(maxsize=256)
def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the CRC polynomial, by squaring. Piece lengths repeat, hence the cache."""
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result

"""Sums of pieces must equal the sum of the whole, however it is cut."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchwrap.storage.checksum import crc32, crc32_join, memory_of, sum64


def naive(data: bytes) -> int:
    padded = data + bytes(-len(data) % 8)
    return sum(int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)) % 2**64


@given(st.binary(max_size=300))
def test_sum_equals_the_definition_word_by_word(data: bytes) -> None:
    assert sum64(data) == naive(data)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=6))
def test_sums_of_pieces_add_up_for_every_cut(data: bytes, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [sum64(data[a:b], a) for a, b in pairwise(bounds)]
    assert sum(pieces) % 2**64 == naive(data)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_joined_crc_equals_zlib_over_both(first: bytes, second: bytes) -> None:
    assert crc32_join(crc32(first), crc32(second), len(second)) == zlib.crc32(first + second)


def test_joined_crc_holds_for_lengths_beyond_four_gigabits() -> None:
    zeros = bytes(1 << 20)
    joined = zlib.crc32(b"start")
    for _ in range(3):
        joined = crc32_join(joined, zlib.crc32(zeros), len(zeros))
    assert joined == zlib.crc32(b"start" + zeros * 3)
    assert crc32_join(0, 7, 1 << 40) == 7


CHANGES = {
    "all zero": lambda data: bytes(len(data)),
    "a block zero": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "one bit": lambda data: data[:5000] + bytes([data[5000] ^ 8]) + data[5001:],
    "a block of another place": lambda data: data[:4096] + data[:4096] + data[8192:],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_disks_do_changes_the_sum(change: Callable[[bytes], bytes]) -> None:
    data = torch.randint(0, 255, (12288,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
    assert sum64(change(data)) != sum64(data)


def test_memory_of_shares_contiguous_tensors_and_copies_the_rest() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    memory_of(tensor)[:4] = b"\0\0\x80?"
    assert tensor[0, 0] == 1.0
    assert bytes(memory_of(tensor.t())) == tensor.t().contiguous().numpy().tobytes()
    assert bytes(memory_of(torch.empty(0, 3))) == b""

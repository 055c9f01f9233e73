"""Buffers: aligned, lazily touched, and never unmapped under a live tensor."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import pickle
import resource

import pytest
import torch

from torchwrap.core.errors import BudgetError, StorageError
from torchwrap.storage import allocate
from torchwrap.storage.pool import HUGE


def resident_bytes(address: int, nbytes: int) -> int:
    """Of this range alone: what the whole process has changes with its other threads, and with libraries that the system drops."""
    pages = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 3 << 20])
def test_buffer_is_aligned_rounded_up_and_zero(nbytes: int) -> None:
    buffer = allocate(nbytes)
    assert buffer.address % HUGE == 0
    assert buffer.nbytes % 4096 == 0
    assert buffer.nbytes >= max(nbytes, 4096)
    assert buffer.tensor().data_ptr() == buffer.address
    assert not buffer.tensor().any()


def test_memory_and_tensor_share_bytes() -> None:
    buffer = allocate(4096)
    buffer.memory[7] = 9
    assert buffer.tensor()[7] == 9
    assert not buffer.memory.readonly


def test_untouched_memory_costs_nothing_and_released_pages_come_back_zero() -> None:
    buffer = allocate(64 << 20)
    assert resident_bytes(buffer.address, buffer.nbytes) == 0
    buffer.tensor().fill_(1)
    assert resident_bytes(buffer.address, buffer.nbytes) == 64 << 20
    buffer.release_pages(1, (64 << 20) - 1)
    assert resident_bytes(buffer.address, buffer.nbytes) == 4096
    assert buffer.tensor()[0] == 1, "a block only partly in the range is kept"
    assert not buffer.tensor()[4096:].any()


def test_tensor_outlives_free() -> None:
    buffer = allocate(1 << 20)
    tensor = buffer.tensor()[5:10]
    buffer.free()
    buffer.free()
    gc.collect()
    tensor.fill_(3)
    assert tensor.tolist() == [3] * 5
    with pytest.raises(StorageError):
        _ = buffer.memory


def test_freed_memory_is_returned() -> None:
    buffer = allocate(64 << 20)
    buffer.tensor().fill_(1)
    buffer.free()
    with pytest.raises(OSError, match="mincore") as caught:
        resident_bytes(buffer.address, buffer.nbytes)
    assert caught.value.errno == errno.ENOMEM  # nothing is mapped there


def test_a_buffer_cannot_be_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(allocate(1))


def test_refused_address_space_is_a_budget_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (256 << 20), limits[1]))
        with pytest.raises(BudgetError) as caught:
            allocate(1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert caught.value.needed >= 1 << 40
    assert isinstance(caught.value, MemoryError)


def test_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        allocate(-1)


def test_tensor_is_uint8_of_the_whole_buffer() -> None:
    tensor = allocate(5000).tensor()
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (8192,)

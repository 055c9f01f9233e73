"""Launching through the driver's C interface, with a library of ours in the place of the driver: what arrives is what was meant."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attention.cuda_host import EMULATION
from torchwrap.attention.cuda import driver, nvrtc, variants
from torchwrap.attention.cuda.params import Params
from torchwrap.core.errors import KernelError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the stand-in of the driver")

STREAM = 0x7F12_3456_7890
VARIANT = variants.split("turing", 64, False)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = tmp_path / "libcuda.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(made), str(EMULATION / "driver.cpp")], check=True)
    monkeypatch.setattr(driver, "_LIBRARY", str(made))
    properties = SimpleNamespace(major=7, minor=5, multi_processor_count=40, shared_memory_per_block=48 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(nvrtc, "binary", lambda variant, arch: nvrtc.Binary(b"\x7fELF" if arch == 75 else b"", ""))
    found = ctypes.CDLL(str(made))
    found.shape.restype = ctypes.POINTER(ctypes.c_uint * 7)
    found.arguments.restype = found.stream.restype = ctypes.c_void_p
    return found


def test_a_launch_carries_its_shape_its_stream_and_every_argument(library: Any) -> None:
    card = driver.Card(torch.device("cuda", 1))
    params = Params(q_length=7, upper=-3, scale=0.125, kv_start=1 << 40)
    params.v.row = 1 << 33
    for grid in ((5, 4, 3), (2, 1, 1)):
        card.launch(VARIANT, grid, params)
    assert list(library.shape().contents) == [2, 1, 1, 128, 1, 1, 0] and library.stream() == STREAM
    assert ctypes.string_at(library.arguments(), ctypes.sizeof(Params)) == bytes(params)
    assert library.load_count() == library.context_count() == 1  # loaded once, in the context torch uses
    assert (card.arch, card.multiprocessors) == (75, 40)


def test_a_thread_that_never_touched_the_card_can_launch(library: Any) -> None:
    card = driver.Card(torch.device("cuda", 0))
    card.launch(VARIANT, (1, 1, 1), Params())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(card.launch, VARIANT, (9, 1, 1), Params()).result()
    assert library.shape().contents[0] == 9 and library.load_count() == library.context_count() == 1


def test_what_the_driver_refuses_is_an_error_with_its_words(library: Any) -> None:
    card = driver.Card(torch.device("cuda", 0))
    with pytest.raises(KernelError, match=r"finding combine failed with error 500: named symbol not found"):
        card.launch(variants.combine("turing", 64), (1, 1, 1), Params())
    card.arch = 70
    with pytest.raises(KernelError, match=r"loading attention for sm_70 failed with error 200.*cuda:0"):
        card.launch(VARIANT, (1, 1, 1), Params())
    assert list(library.shape().contents) == [0] * 7


def test_a_block_that_needs_more_shared_memory_than_there_is_is_not_launched(library: Any) -> None:
    card = driver.Card(torch.device("cuda", 0))
    card.shared_bytes = 16 << 10
    with pytest.raises(KernelError, match="attention needs 18432 bytes of shared memory, a block has 16384"):
        card.launch(VARIANT, (1, 1, 1), Params())
    assert list(library.shape().contents) == [0] * 7 and library.load_count() == 0

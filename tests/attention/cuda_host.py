"""The CUDA kernels on the host: each variant built with g++ against the emulation, and launched as a card would be.

A build takes about half a second of a core; the folder of one test run is shared by its tests.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from torchwrap.attention.cuda.nvrtc import KERNELS
from torchwrap.attention.cuda.params import Params
from torchwrap.attention.cuda.variants import Variant

EMULATION = Path(__file__).parent / "cuda_emulation"
COMPILER = shutil.which("g++")
_OPTIONS = ("-std=c++17", "-O1", "-mf16c", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused", "-fno-gnu-unique")


class Host:
    """A machine of the back end whose device memory is this process's memory."""

    def __init__(self, multiprocessors: int = 4) -> None:
        self.multiprocessors = multiprocessors
        self.launched: list[tuple[str, tuple[int, int, int]]] = []
        self.counts: list[tuple[int, int]] = []  # products and shuffles of the last block of each launch
        self._folder = tempfile.TemporaryDirectory(prefix="torchwrap-emulation-")
        self._loaded: dict[Variant, ctypes.CDLL] = {}

    def launch(self, variant: Variant, grid: tuple[int, int, int], params: Params) -> None:
        library = self._loaded.get(variant) or self._build(variant)
        self.launched.append((variant.entry, grid))
        reason = library.launch(ctypes.byref(params), *grid, variant.threads)
        assert reason is None, f"{variant.entry}: {reason.decode()}"

    def _build(self, variant: Variant) -> ctypes.CDLL:
        name = hashlib.sha256(repr((variant.file, variant.definitions)).encode()).hexdigest()[:16]
        made = os.path.join(self._folder.name, f"{name}.so")
        assert COMPILER is not None
        defined = [f'-DKERNEL_FILE="{variant.file}"', f"-DENTRY={variant.entry}", *variant.definitions]
        includes = [f"-I{EMULATION}", f"-I{KERNELS}"]
        done = subprocess.run(
            [COMPILER, *_OPTIONS, *includes, *defined, str(EMULATION / "run.cpp"), "-o", made], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        library = ctypes.CDLL(made)
        library.launch.restype = ctypes.c_char_p
        library.params_size.restype = ctypes.c_size_t
        assert library.params_size() == ctypes.sizeof(Params), "params.cuh and params.py differ"
        self._loaded[variant] = library
        return library

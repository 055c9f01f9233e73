"""The CUDA kernels on the host: each variant built with g++ against the emulation, and launched as a card would be.

A build takes about half a second of a core.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from torchwrap.attention.cuda.nvrtc import KERNELS
from torchwrap.attention.cuda.params import Params
from torchwrap.attention.cuda.variants import Variant

EMULATION = Path(__file__).parent / "cuda_emulation"
COMPILER = shutil.which("g++")
# Without -fno-gnu-unique the emulation's state would be one for all libraries of the process.
_HALF = ("-mf16c",) if platform.machine() == "x86_64" else ()  # conversions in one instruction
# The check of jumps that distributions switch on knows one stack only.
_OPTIONS = ("-std=c++17", "-O1", "-U_FORTIFY_SOURCE", *_HALF, "-ffp-contract=off", "-fno-gnu-unique", "-shared", "-fPIC")
_WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused")


class Host:
    """A machine of the back end whose device memory is this process's memory.

    `descending` reverses the order in which the threads of a block run between two exchanges. `folder` keeps what was built; the processes
    of one test run may share it.
    """

    def __init__(self, folder: Path, multiprocessors: int = 4) -> None:
        self.multiprocessors = multiprocessors
        self.folder = folder
        self.descending = False
        self.launched: list[tuple[str, tuple[int, int, int]]] = []
        self._libraries: dict[Variant, ctypes.CDLL] = {}

    def launch(self, variant: Variant, grid: tuple[int, int, int], params: Params) -> None:
        library = self._libraries.get(variant)
        if library is None:
            library = self._libraries[variant] = self._build(variant.file, variant.entry, variant.definitions)
        self.launched.append((variant.entry, grid))
        reason = library.launch(ctypes.byref(params), *grid, variant.threads, self.descending)
        assert reason is None, f"{variant.entry}: {reason.decode()}"

    def run_source(self, source: Path, entry: str, threads: int) -> str | None:
        """One block of any kernel; what the emulation complains of."""
        library = self._build(str(source), entry, ("-DHEAD=64",))
        reason = library.launch(ctypes.byref(Params()), 1, 1, 1, threads, self.descending)
        return None if reason is None else str(reason.decode())

    def _build(self, file: str, entry: str, definitions: tuple[str, ...]) -> ctypes.CDLL:
        assert COMPILER is not None
        made = self.folder / f"emulated-{hashlib.sha256(repr((file, definitions)).encode()).hexdigest()[:16]}.so"
        if not made.exists():
            partly = f"{made}.{os.getpid()}"
            defined = [f'-DKERNEL_FILE="{file}"', f"-DENTRY={entry}", *definitions]
            includes = [f"-I{EMULATION}", f"-I{KERNELS}"]
            command = [COMPILER, *_OPTIONS, *_WARNINGS, *includes, *defined, str(EMULATION / "run.cpp"), "-o", partly]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            os.replace(partly, made)
        library = ctypes.CDLL(str(made))
        library.launch.restype = ctypes.c_char_p
        library.params_size.restype = ctypes.c_size_t
        assert library.params_size() == ctypes.sizeof(Params), "params.cuh and params.py differ"
        return library

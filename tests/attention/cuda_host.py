"""The CUDA kernels on the host: each variant built with g++ against the emulation, and launched as a card would be.

A build takes about half a second of a core; the folder of one test run is shared by its tests.
"""

from __future__ import annotations

import ctypes
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
# Without -fno-gnu-unique the emulation's state would be one for all libraries of the process.
_OPTIONS = ("-std=c++17", "-O1", "-mf16c", "-ffp-contract=off", "-fno-gnu-unique", "-shared", "-fPIC")
_WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused")


class Host:
    """A machine of the back end whose device memory is this process's memory."""

    def __init__(self, multiprocessors: int = 4) -> None:
        self.multiprocessors = multiprocessors
        self.launched: list[tuple[str, tuple[int, int, int]]] = []
        self.libraries: dict[Variant, ctypes.CDLL] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="torchwrap-emulation-")

    def launch(self, variant: Variant, grid: tuple[int, int, int], params: Params) -> None:
        library = self.libraries.get(variant)
        if library is None:
            library = self.libraries[variant] = self._build(variant.file, variant.entry, variant.definitions)
        self.launched.append((variant.entry, grid))
        reason = library.launch(ctypes.byref(params), *grid, variant.threads)
        assert reason is None, f"{variant.entry}: {reason.decode()}"

    def run_source(self, source: Path, entry: str, threads: int) -> str | None:
        """One block of any kernel; what the emulation complains of."""
        library = self._build(str(source), entry, ("-DHEAD=64",))
        reason = library.launch(ctypes.byref(Params()), 1, 1, 1, threads)
        return None if reason is None else str(reason.decode())

    def _build(self, file: str, entry: str, definitions: tuple[str, ...]) -> ctypes.CDLL:
        assert COMPILER is not None
        made = str(Path(self._folder.name, f"{len(os.listdir(self._folder.name))}.so"))
        defined = [f'-DKERNEL_FILE="{file}"', f"-DENTRY={entry}", *definitions]
        includes = [f"-I{EMULATION}", f"-I{KERNELS}"]
        command = [COMPILER, *_OPTIONS, *_WARNINGS, *includes, *defined, str(EMULATION / "run.cpp"), "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        library = ctypes.CDLL(made)
        library.launch.restype = ctypes.c_char_p
        library.params_size.restype = ctypes.c_size_t
        assert library.params_size() == ctypes.sizeof(Params), "params.cuh and params.py differ"
        return library

"""The shared library: where it is, whether it can be used here, and what it says of itself.

It has a plain C interface and is loaded through ctypes, which releases the interpreter's lock during a call. It holds the kernels for
several instruction sets, of which the best is taken that the processor has and TORCHWRAP_INSTRUCTION_SET in the environment lets be: with
"baseline" all computes as on a processor of four lanes (aarch64, x86-64 before AVX2).
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from torchwrap.core.errors import UnsupportedModelError

__all__ = ["available", "describe", "instruction_sets", "library", "most_bytes", "number_of", "reason"]

PATH = Path(__file__).with_name("kernels.native.so")
INTERFACE = 12  # TORCHWRAP_INTERFACE in src/call.h
BEST = "TORCHWRAP_INSTRUCTION_SET"
"""Environment variable with the name of the best instruction set that may be taken; read once."""
BUILD = "install a C++17 compiler and build again: pip install -e .  or  python setup.py build_ext --inplace"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not PATH.exists():
        return None, "it was not built: no C++ compiler was found at installation, or this checkout was never installed"
    try:
        loaded = ctypes.CDLL(str(PATH))
    except OSError as error:
        return None, f"it cannot be loaded: {error}"
    found = loaded.torchwrap_interface()
    if found != INTERFACE:
        return None, f"it was built from other sources (interface {found}, needed {INTERFACE})"
    loaded.torchwrap_compiler.restype = ctypes.c_char_p
    loaded.torchwrap_threads.restype = ctypes.c_char_p
    loaded.torchwrap_instruction_set.restype = ctypes.c_char_p
    loaded.torchwrap_memory.restype = ctypes.c_int64
    for function in (loaded.torchwrap_decode, loaded.torchwrap_prefill, loaded.torchwrap_gradients):
        function.argtypes = [ctypes.c_void_p]
    loaded.torchwrap_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    loaded.torchwrap_read.restype = ctypes.c_uint64
    loaded.torchwrap_blocks_hold.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    loaded.torchwrap_blocks_release.argtypes = [ctypes.c_uint64]
    loaded.torchwrap_blocks_counts.argtypes = [ctypes.POINTER(ctypes.c_uint64)]
    if not _sets(loaded):
        return None, f"{BEST} is {os.environ[BEST]!r} and no instruction set that can run here: {', '.join(_runnable(loaded))}"
    return loaded, ""


def _runnable(loaded: ctypes.CDLL) -> dict[str, int]:
    names = {number: loaded.torchwrap_instruction_set(number) for number in range(loaded.torchwrap_instruction_sets())}
    return {name.decode(): number for number, name in names.items() if name is not None}


@functools.cache
def _sets(loaded: ctypes.CDLL) -> dict[str, int]:
    """From the one on that the environment names; none: it names none of them."""
    sets, best = _runnable(loaded), os.environ.get(BEST)
    names = list(sets)
    if not best:
        return sets
    return {name: sets[name] for name in names[names.index(best) :]} if best in names else {}


def available() -> bool:
    """Whether the kernels can be called in this process."""
    return _load()[0] is not None


def reason() -> str:
    """Why the kernels cannot be called; empty when they can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        UnsupportedModelError: it is not there; the message says why.
    """
    loaded, why = _load()
    if loaded is None:
        fix = f"name one of them in {BEST}, or unset it" if BEST in why else BUILD
        raise UnsupportedModelError(f"the native kernels are not available: {why}", where=str(PATH), fix=fix)
    return loaded


def instruction_sets() -> dict[str, int]:
    """What the library holds and may be run here, best first: name to number. Empty when it is not available."""
    return dict(_sets(library())) if available() else {}


def number_of(instruction_set: str | None) -> int:
    """What a call says for one of `instruction_sets()`; None: for the first of them.

    Raises:
        UnsupportedModelError: the library is not there.
        KeyError: it has no such instruction set.
    """
    sets = _sets(library())
    return next(iter(sets.values())) if instruction_set is None else sets[instruction_set]


def most_bytes() -> int:
    """Bytes that the kernels of all threads took beside tensors, at the moment since the last question when these were most.

    Raises:
        UnsupportedModelError: the library is not there.
    """
    return int(library().torchwrap_memory())


def describe() -> dict[str, object]:
    """What a report shows: path, and either compiler, chosen instruction set, source of threads, or the reason."""
    if not available():
        return {"path": str(PATH), "reason": reason()}
    loaded = library()
    return {
        "path": str(PATH),
        "compiler": loaded.torchwrap_compiler().decode(),
        "instruction_set": next(iter(instruction_sets())),
        "threads": loaded.torchwrap_threads().decode(),
    }

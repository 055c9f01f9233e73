"""Kernels compiled when they are first needed, by NVRTC through ctypes, and kept on disk for the next process.

`torch.cuda._compile_kernel` is not used: it gives no binary to keep, passes Python floats as doubles, and needs a card where the tests have
none. The library is the one torch has loaded, else that of the wheel `nvidia-cuda-nvrtc-cu12`, else the system's. CUDA's headers
are not needed: the sources have their own (kernels/shim.cuh).

The cache is `$TORCHWRAP_CACHE`, else `~/.cache/torchwrap`, folder `cubin`, private to the user: what lies there is run. A file is named by
a hash of all sources, options, target and compiler version and starts with the hash of its content.
Source: NVIDIA, NVRTC documentation, release 12.9.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from torchwrap.attention.cuda.variants import Variant
from torchwrap.core.errors import KernelError, StorageError
from torchwrap.storage.atomic import atomic_write, private_folder

__all__ = ["Binary", "binary", "compile_source", "compile_variant", "unavailable"]

KERNELS = Path(__file__).parent / "kernels"
_SONAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so.11.2", "libnvrtc.so")
_DIGEST_BYTES = 32
_log = logging.getLogger("torchwrap.attention.cuda")


@dataclass(frozen=True, slots=True)
class Binary:
    """Machine code for one compute capability.

    Attributes:
        cubin: an ELF file for the driver.
        log: what compiler and assembler said: registers, spills, shared memory. Empty when the binary came from the cache.
    """

    cubin: bytes
    log: str


def unavailable(arch: int) -> str | None:
    """Why nothing can be compiled for compute capability `arch` (70, 75, ...) here, or None."""
    library = _library()
    if library is None:
        return "NVRTC was not found. Install it with: pip install nvidia-cuda-nvrtc-cu12"
    targets = _targets(library)
    if arch not in targets:
        version = ".".join(map(str, _version(library)))
        return f"NVRTC {version} has no target sm_{arch}, only {min(targets)} to {max(targets)}; sm_70 and sm_72 need NVRTC 11 or 12"
    return None


def binary(variant: Variant, arch: int) -> Binary:
    """A variant's machine code, from the cache or compiled now.

    Raises:
        KernelError: NVRTC is missing, does not know the target, or refuses the source.

    Cost: half a second and about 60 KiB of disk, once per variant, target, compiler version and user.
    """
    try:
        path = _folder() / f"{_key(variant, arch)}.cubin"
    except (StorageError, OSError) as error:
        _log.warning("no cache of compiled kernels: %s", error)
        return compile_variant(variant, arch)
    kept = _read(path)
    if kept is not None:
        return Binary(kept, "")
    made = compile_variant(variant, arch)
    try:
        atomic_write(path, hashlib.sha256(made.cubin).digest() + made.cubin)
    except StorageError as error:
        _log.warning("a compiled kernel could not be kept: %s", error)
    return made


def compile_variant(variant: Variant, arch: int) -> Binary:
    """Machine code made now.

    Raises:
        KernelError: as in `binary`.
    """
    return compile_source(variant.file, _sources()[variant.file], arch, variant.definitions)


def compile_source(name: str, source: bytes, arch: int, definitions: tuple[str, ...]) -> Binary:
    """Any source that includes the headers of `kernels/`, compiled for one target.

    Raises:
        KernelError: as in `binary`; the message holds the compiler's log.
    """
    reason = unavailable(arch)
    library = _library()
    if reason is not None or library is None:
        fix = "Use another back end, or install that compiler."
        raise KernelError(f"{name} cannot be compiled for sm_{arch}: {reason}", where=name, fix=fix)
    headers = {header: text for header, text in _sources().items() if header.endswith(".cuh")}
    program = ctypes.c_void_p()
    code = library.nvrtcCreateProgram(
        ctypes.byref(program), source, name.encode(), len(headers),
        _strings(list(headers.values())), _strings([header.encode() for header in headers]),
    )  # fmt: skip
    if code:
        raise KernelError(f"nvrtcCreateProgram returned {code}", where=name)
    try:
        options = _options(arch, definitions)
        code = library.nvrtcCompileProgram(program, len(options), _strings([option.encode() for option in options]))
        log = _fetch(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            raise KernelError(f"NVRTC refused {name} for sm_{arch} with {' '.join(definitions)}: {log}", where=name)
        return Binary(_fetch(library, program, "CUBIN"), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _options(arch: int, definitions: tuple[str, ...]) -> list[str]:
    return [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--ptxas-options=-v", *definitions]


def _strings(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*values)


def _fetch(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    for call, pointer in ((f"nvrtcGet{what}Size", ctypes.byref(size)), (f"nvrtcGet{what}", None)):
        if pointer is None:
            pointer = buffer = ctypes.create_string_buffer(size.value)  # type: ignore[assignment]
        code = getattr(library, call)(program, pointer)
        if code:
            raise KernelError(f"{call} returned {code}", where="NVRTC")
    return buffer.raw


@functools.cache
def _sources() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(KERNELS.iterdir()) if path.suffix in (".cu", ".cuh")}


@functools.cache
def _library() -> ctypes.CDLL | None:
    for candidate in _candidates():
        try:
            return ctypes.CDLL(str(candidate))
        except OSError:
            continue
    return None


def _candidates() -> list[str | Path]:
    wheel = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    folders = [Path(place) / "lib" for place in (wheel.submodule_search_locations or ())] if wheel else []
    in_wheel = [folder / name for folder in folders for name in _SONAMES if (folder / name).exists()]
    # A loaded library is found by its bare name; torch built for CUDA has loaded the one that fits its driver interface.
    return [*_SONAMES, *in_wheel] if torch.version.cuda else [*in_wheel, *_SONAMES]


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _targets(library: ctypes.CDLL) -> list[int]:
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    targets = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(targets)
    return list(targets)


def _key(variant: Variant, arch: int) -> str:
    library = _library()
    hashed = hashlib.sha256(repr((variant.file, _options(arch, variant.definitions), library and _version(library))).encode())
    for name, source in _sources().items():
        hashed.update(name.encode() + b"\0" + source + b"\0")
    return hashed.hexdigest()


def _folder() -> Path:
    root = Path(os.environ.get("TORCHWRAP_CACHE") or Path.home() / ".cache" / "torchwrap")
    return private_folder(root / "cubin")


def _read(path: Path) -> bytes | None:
    """The content of a cache file, None if it is missing or not what was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None

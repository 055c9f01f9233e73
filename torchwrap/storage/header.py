"""The header of a safetensors file, checked strictly.

The format is an 8-byte little-endian header length, a JSON header, then the tensors' bytes without gaps. Nothing in the header is
trusted: every rule is checked before a byte of data is used.

Source: the format description in the README of huggingface/safetensors (limit of 100 MB for the header, no holes, no duplicates).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchwrap.core.errors import CorruptDataError, StorageError

__all__ = ["Segment", "corrupt", "parse_header", "read_header", "strict_json"]

_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one tensor's bytes lie.

    Attributes:
        name: the tensor's name.
        dtype: its element type.
        shape: its shape.
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(fd: int, path: Path, size: int) -> bytes:
    """The JSON bytes of a file of `size` bytes.

    Raises:
        CorruptDataError: the length field is out of range, or no JSON table follows.
    """
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > size - 8:
        raise corrupt(path, f"the header says {length} bytes, the file has {size}")
    if length > _HEADER_LIMIT:
        raise corrupt(path, f"the header says {length} bytes, the format allows {_HEADER_LIMIT}")
    header = os.pread(fd, length, 8)
    if len(header) != length or not header.startswith(b"{"):
        raise corrupt(path, "the header is not a JSON table")
    return header


def strict_json(content: bytes, path: Path) -> dict[str, Any]:
    """JSON table without duplicate keys, NaN or depth that exhausts the stack."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"duplicate name {next(name for name in names if names.count(name) > 1)!r}")
        return table

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        table = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"not valid JSON: {str(error)[:200]}") from error
    if not isinstance(table, dict):
        raise corrupt(path, "not a JSON table")
    return table


def parse_header(header: bytes, path: Path, size: int) -> tuple[dict[str, Segment], dict[str, str]]:
    """(tensors by name in the order of their bytes, the file's own strings).

    Raises:
        CorruptDataError: a rule of the format is broken.
        StorageError: a tensor has a type that torch does not have.
    """
    table = strict_json(header, path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(path, "__metadata__ is not a table of strings")
    start = 8 + len(header)
    segments = sorted((_segment(name, entry, start, path) for name, entry in table.items()), key=lambda s: (s.offset, s.nbytes))
    end = start
    for segment in segments:
        if segment.offset != end:
            kind = "overlaps the one before" if segment.offset < end else "leaves a hole before it"
            raise corrupt(path, f"tensor {segment.name!r} at {segment.offset - start} {kind}, which ends at {end - start}")
        end += segment.nbytes
    if end != size:
        raise corrupt(path, f"the tensors end at byte {end}, the file has {size}")
    return {segment.name: segment for segment in segments}, metadata


def _segment(name: str, entry: object, start: int, path: Path) -> Segment:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    shape, offsets, code = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _naturals(shape) or not _naturals(offsets) or len(shape) > 64 or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(path, f"tensor {name!r} has shape {str(shape)[:80]} and data_offsets {str(offsets)[:80]}")
    if not isinstance(code, str) or code not in _BITS:
        if isinstance(code, str) and code in _WITHOUT_TORCH_TYPE:
            raise StorageError(f"tensor {name!r} has type {code}, which torch {torch.__version__} does not have", where=str(path))
        raise corrupt(path, f"tensor {name!r} has unknown dtype {str(code)[:40]!r}")
    bits = math.prod(shape) * _BITS[code]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise corrupt(path, f"tensor {name!r} of shape {str(shape)[:80]} and type {code} cannot have {offsets[1] - offsets[0]} bytes")
    if code == "F4":  # torch packs two elements into one byte and counts bytes in the last dimension
        if not shape or shape[-1] % 2:
            raise corrupt(path, f"tensor {name!r} of type F4 has an odd last dimension: {shape}")
        shape = [*shape[:-1], shape[-1] // 2]
    return Segment(name, _DTYPES[code], tuple(shape), start + offsets[0], offsets[1] - offsets[0])


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def corrupt(path: Path, what: str) -> CorruptDataError:
    """The error for a checkpoint file that breaks a rule."""
    return CorruptDataError(what, where=str(path), fix="Download or save the file again.")


# Names of safetensors 0.8 for the element types that torch has; the types added over the years are looked up, as older torch lacks some.
_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64",
    "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
_BITS = {code: 4 if code == "F4" else 8 * dtype.itemsize for code, dtype in _DTYPES.items()}
_WITHOUT_TORCH_TYPE = frozenset({"F6_E2M3", "F6_E3M2", *_NAMES} - set(_DTYPES))

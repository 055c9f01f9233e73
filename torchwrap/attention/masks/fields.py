"""The conditions a mask is made of: their names, and what they must look like.

Only shapes, dtypes and devices are checked, never values: a mask is made once per forward, and reading a value waits for the device.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from torchwrap.attention.masks.dictionary import TileDictionary
from torchwrap.core.errors import ConfigError

__all__ = ["FIELDS", "TENSOR_FIELDS", "check", "device_of", "inside", "integer", "left_of"]

TENSOR_FIELDS = ("shift", "kv_start", "kv_end", "key_mask", "q_segments", "k_segments")
FIELDS = ("right", "left", "chunk", *TENSOR_FIELDS, "dictionary", "q_offset", "kv_offset")


def integer(value: Any) -> Any:
    """An integer of numpy as one of Python; anything else as it is, for `check` to judge."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, int | torch.Tensor) else value


def check(batch: int, q_length: int, kv_length: int, values: Mapping[str, Any]) -> None:
    """Refuses conditions that cannot belong to a mask of these lengths.

    Raises:
        ConfigError: unknown name, negative number, wrong shape or dtype, or a condition that lacks its partner.
    """
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise ConfigError(f"Unknown condition {unknown[0]!r}", where="TileMask", fix=f"Known are {', '.join(FIELDS)}.")
    for name, value, least in (
        ("batch", batch, 0), ("q_length", q_length, 0), ("kv_length", kv_length, 0), ("right", values["right"], 0),
        ("left", values["left"], 0), ("chunk", values["chunk"], 1), ("kv_offset", values["kv_offset"], None),
    ):
        if value is None and name in ("right", "left", "chunk"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            fix = "Give an integer." if least is None else f"Give an integer of at least {least}, or None for no such condition."
            raise ConfigError(f"{name} = {value!r}", where=f"TileMask {name}", fix=fix)
    for name, length, dtype in (
        ("shift", None, torch.int32), ("kv_start", None, torch.int32), ("kv_end", None, torch.int32), ("key_mask", kv_length, torch.bool),
        ("q_segments", q_length, torch.int32), ("k_segments", kv_length, torch.int32),
    ):
        _check_tensor(name, values[name], batch, length, dtype)
    if (values["q_segments"] is None) != (values["k_segments"] is None):
        raise ConfigError("q_segments and k_segments come together", where="TileMask", fix="Give both, or neither.")
    if values["shift"] is not None and values["chunk"] is None:
        raise ConfigError("shift without chunk", where="TileMask shift", fix="shift says where chunks begin; give chunk as well.")
    _check_dictionary(values["dictionary"], batch, q_length, kv_length)
    _check_offset(values["q_offset"])


def _check_tensor(name: str, value: Any, batch: int, length: int | None, dtype: torch.dtype) -> None:
    if value is None:
        return
    tail = () if length is None else (length,)
    wanted = f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, (batch, *tail)))}]"
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"{name} is a {type(value).__name__}", where=f"TileMask {name}", fix=f"Give a tensor, {wanted}.")
    if value.dtype != dtype or tuple(value.shape) not in ((batch, *tail), (1, *tail)):
        raise ConfigError(f"{name} is {value.dtype} {list(value.shape)}", where=f"TileMask {name}", fix=f"It must be {wanted}.")


def _check_dictionary(value: Any, batch: int, q_length: int, kv_length: int) -> None:
    if value is None:
        return
    where, fix = "TileMask dictionary", "Use TileMask.from_function or TileMask.from_dense."
    if not isinstance(value, TileDictionary):
        raise ConfigError(f"dictionary is a {type(value).__name__}", where=where, fix=fix)
    there = value.codes.shape[2:]
    needed = tuple(
        -(-(begin + length) // size) if length else 0
        for length, begin, size in zip((q_length, kv_length), value.start, value.block, strict=True)
    )
    if any(have < need for have, need in zip(there, needed, strict=True)) or value.batch not in (1, batch):
        what = f"The dictionary has {list(there)} tiles in {value.batch} batch rows"
        raise ConfigError(f"{what}; {q_length} x {kv_length} in {batch} batch rows needs {list(needed)}", where=where, fix=fix)


def _check_offset(value: Any) -> None:
    fix = "Give an integer or a 0-dim integer tensor."
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ConfigError(f"q_offset is {value.dtype} {list(value.shape)}", where="TileMask q_offset", fix=fix)
    elif value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(f"q_offset = {value!r}", where="TileMask q_offset", fix=fix)


def device_of(values: Mapping[str, Any], device: torch.device | str | None) -> torch.device:
    """The one device of all tensors of a mask.

    Raises:
        ConfigError: they are on different devices, or not on the one that was asked for.
    """
    found = {name: values[name].device for name in (*TENSOR_FIELDS, "dictionary", "q_offset") if hasattr(values[name], "device")}
    wanted = torch.device(device) if device is not None else next(iter(found.values()), torch.device("cpu"))
    for name, place in found.items():
        # "cuda" means the current card; a tensor says which one it is.
        if place.type != wanted.type or (wanted.index is not None and place.index is not None and place.index != wanted.index):
            what = f"{name} is on {place}, the mask on {wanted}"
            raise ConfigError(what, where=f"TileMask {name}", fix=f"Move it with .to({str(wanted)!r}).")
    return next(iter(found.values()), wanted)


def inside(name: str, bounds: tuple[int, int], length: int) -> tuple[int, int]:
    """`bounds` if they are 0 <= first <= end <= length.

    Raises:
        ConfigError: they are not.
    """
    first, end = bounds
    if not 0 <= first <= end <= length:
        raise ConfigError(f"{name} {first} to {end} of {length}", where="TileMask", fix="Give 0 <= first <= end <= the length.")
    return first, end


def left_of(window: int) -> int:
    """The condition `left` of a window of so many keys, the query's own included.

    Raises:
        ConfigError: no positive integer.
    """
    window = integer(window)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ConfigError(f"A window of {window!r} keys", where="TileMask window", fix="Give a positive number of keys.")
    return window - 1

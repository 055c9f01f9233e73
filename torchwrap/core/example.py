"""What a model is called with, for plans and predictions: shapes and types of an example, as text.

An example is what the model would be called with: a tensor, a tuple or list of positional arguments, or a mapping of keywords. Of tensors
only shape, type and order (`@channels_last`) are kept, so it may be a real batch or lie on `meta`. As text it is JSON in which a tensor is
a string such as `"float32[8,3,224,224]"`, so that settings that hold one compare, hash and survive a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchwrap.core.errors import ConfigError

__all__ = ["arguments", "described", "rows_of"]

_TENSOR = re.compile(r"([a-z]+[0-9a-z_]*)\[((?:[0-9]+(?:,[0-9]+)*)?)\](@channels_last)?")
_ACCEPTED = "a tensor, a tuple of arguments, a mapping of keywords, or text such as 'float32[8,3,224,224]'"


def described(example: object, *, batch: int | None = None) -> str:
    """An example as text.

    Args:
        example: tensors, text, or lists, tuples and mappings of these and of numbers, booleans and None.
        batch: instead of the first dimension of the first tensor, in all tensors that begin with the same.

    Raises:
        ConfigError: there is something else in it, or no tensor.

    Example:
        >>> import torch
        >>> from torchwrap.core.example import described
        >>> described(torch.empty(8, 3, 224, 224))
        'float32[8,3,224,224]'
        >>> described({"x": torch.empty(2, 5), "deep": True}, batch=4)
        '{"x": "float32[4,5]", "deep": true}'
    """
    value = _read(example) if isinstance(example, str) else example
    sizes: list[tuple[int, ...]] = []

    def seen(tensor: torch.Tensor) -> str:
        sizes.append(tuple(tensor.shape))
        return _text(tensor)

    written = _written(value, seen)
    if not sizes:
        raise ConfigError(f"there is no tensor in {_short(example)}", where="example", fix=f"Give {_ACCEPTED}.")
    if batch is not None:
        first = next((size[0] for size in sizes if size), None)
        written = _written(value, lambda tensor: _text(_with_batch(tensor, first, batch)))
    return written if isinstance(written, str) else json.dumps(written)


def arguments(text: str, make: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call like the example.

    Args:
        text: of `described`.
        make: a tensor like the one on `meta` that it is given.
    """
    value = _made(_read(text), make)
    if isinstance(value, dict):
        return (), value
    return (tuple(value) if isinstance(value, (list, tuple)) else (value,)), {}


def rows_of(text: str) -> int:
    """Most rows that a matrix product of the call could have: of the tensor that has most, all dimensions but the last together."""
    found = [1]
    _written(_read(text), lambda tensor: found.append(tensor.numel() // max(1, tensor.shape[-1] if tensor.dim() > 1 else 1)))
    return max(found)


def _read(text: str) -> Any:
    if (tensor := _tensor(text.strip())) is not None:
        return tensor
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{_short(text)} is no example of an input", where="example", fix=f"Give {_ACCEPTED}.") from None


def _tensor(text: str) -> torch.Tensor | None:
    match = _TENSOR.fullmatch(text.replace(" ", ""))
    dtype = getattr(torch, match[1], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        return None
    shape = [int(size) for size in match[2].split(",") if size]
    order = torch.channels_last if match[3] and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def _made(value: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, str) and (tensor := _tensor(value)) is not None:
        value = tensor
    if isinstance(value, torch.Tensor):
        return make(value)
    if isinstance(value, list):
        return [_made(item, make) for item in value]
    return {key: _made(item, make) for key, item in value.items()} if isinstance(value, dict) else value


def _written(value: Any, write: Callable[[torch.Tensor], Any]) -> Any:
    """JSON of an example."""
    if isinstance(value, str):
        return write(tensor) if (tensor := _tensor(value)) is not None else value
    if isinstance(value, torch.Tensor):
        return write(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _written(item, write) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_written(item, write) for item in value]
    raise ConfigError(f"an object of class {type(value).__name__} is no input", where="example", fix=f"Give {_ACCEPTED}.")


def _with_batch(tensor: torch.Tensor, first: int | None, batch: int) -> torch.Tensor:
    if not tensor.dim() or tensor.shape[0] != first:
        return tensor
    last = _text(tensor).endswith("last")
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty((batch, *tensor.shape[1:]), dtype=tensor.dtype, device="meta", memory_format=order)


def _text(tensor: torch.Tensor) -> str:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]{'@channels_last' if last else ''}"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

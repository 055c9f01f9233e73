"""Real tensors behind parameters, wherever a placement technique keeps them.

While a parameter's weights are elsewhere (host, disk), the *same* `nn.Parameter` object stays in the model and only its `.data` is
changed, to a placeholder: one NaN expanded to the full shape. Shape, dtype, device and `numel` stay true, storage is one element,
reading it gives NaN loudly and writing in place raises. (A `meta` placeholder cannot be filled again: assigning CPU data to a meta
parameter raises, torch 2.13.) This file is the only one that touches `.data` and storages.

A module whose own parameters may be absent carries a `Holder` in its `__dict__`; `tensors()` asks it for the values.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "Holder",
    "bind",
    "data_of",
    "held_bytes",
    "holder_of",
    "is_placeholder",
    "map_parameters",
    "over_storage",
    "placeholder",
    "references",
    "set_holder",
    "storage_key",
    "tensor_bytes",
    "tensors",
    "tied_groups",
    "was_written",
]

_HOLDER = "_torchwrap_holder"

_BY_ROW, _BY_COLUMN = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_SPARSE_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROW,
    torch.sparse_bsr: _BY_ROW,
    torch.sparse_csc: _BY_COLUMN,
    torch.sparse_bsc: _BY_COLUMN,
}


@runtime_checkable
class Holder(Protocol):
    """What a placement technique leaves in a module whose parameters it may have taken away."""

    def lend(self, module: nn.Module, names: tuple[str, ...], write: bool) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """Real values of `names` (parameter names local to `module`); with `write`, changes are stored on exit."""
        ...


def placeholder(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """One element that stands for an absent tensor of this shape: NaN, or the minimum for integers (False for bool).

    Cost: one element, whatever the shape.
    """
    if dtype.is_floating_point or dtype.is_complex:
        fill: float | int | bool = float("nan")
    else:
        fill = False if dtype == torch.bool else torch.iinfo(dtype).min
    try:
        one = torch.full((), fill, dtype=dtype, device=device)
    except RuntimeError:  # float8 kinds without a NaN fill kernel
        one = torch.full((), fill, device=device).to(dtype)
    return one.expand(tuple(shape))


def is_placeholder(tensor: torch.Tensor) -> bool:
    """True for what `placeholder` made: more than one element, all of them the same one."""
    dense = tensor.layout == torch.strided  # others have no strides to ask for
    return dense and tensor.numel() > 1 and not any(tensor.stride()) and tensor.untyped_storage().nbytes() == tensor.element_size()


def was_written(parameter: torch.Tensor, absent: torch.Tensor) -> bool:
    """True if somebody wrote to the placeholder, or put other data in its place, since it was shown.

    Cost: one pointer and one element compared; on a separate device the pointer only.
    """
    address = absent.data_ptr()
    if parameter.data_ptr() != address:
        return True
    if absent.device.type != "cpu":
        return False
    size = absent.element_size()
    return ctypes.string_at(address, size) != _mark(absent.dtype)


@functools.cache
def _mark(dtype: torch.dtype) -> bytes:
    """The bytes of a fresh placeholder's element."""
    fresh = placeholder((2,), dtype, "cpu")
    return ctypes.string_at(fresh.data_ptr(), fresh.element_size())


def bind(parameter: torch.Tensor, data: torch.Tensor) -> None:
    """Let `parameter` show `data`; the parameter object, its hooks and its place in optimizers stay."""
    parameter.data = data


def data_of(parameter: torch.Tensor) -> torch.Tensor:
    """What the parameter shows now, as a tensor that shares memory and records no history."""
    return parameter.data


def over_storage(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """A new tensor of that shape over existing memory; `offset` and `stride` in elements. Records no history."""
    with torch.no_grad():
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, tuple(size), tuple(stride))


def storage_key(tensor: torch.Tensor) -> tuple[str, int]:
    """Identity of the memory behind a tensor: equal for views of one storage. Tensors without memory of their own are told apart by object.

    These are tensors on meta, sparse ones, and those that are made of others (a `TileMask`).
    """
    if tensor.device.type == "meta" or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return (tensor.device.type, id(tensor))
    return (str(tensor.device), tensor.untyped_storage().data_ptr() or id(tensor))


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor, which views of it share; of one that is made of others, theirs."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else tensor_bytes(tensor)


def references(tensor: torch.Tensor) -> int:
    """How many tensors, this one included, share the tensor's memory; some more, the same each time, for those who look."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes the tensor's elements take when present, whatever is present now; of a sparse one, those that it keeps and their indices."""
    parts = _SPARSE_PARTS.get(tensor.layout)
    return sum(getattr(tensor, part)().nbytes for part in parts) if parts else tensor.numel() * tensor.element_size()


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names that reach one parameter object or one storage, in `named_parameters` order; groups of two or more."""
    groups: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key: object = id(parameter) if is_placeholder(parameter) else storage_key(parameter)
        groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def holder_of(module: nn.Module) -> Holder | None:
    """Who serves this module's absent parameters, if anyone."""
    return module.__dict__.get(_HOLDER)


def set_holder(module: nn.Module, holder: Holder | None) -> None:
    """Name who serves this module's absent parameters; `None` takes the name away."""
    if holder is None:
        module.__dict__.pop(_HOLDER, None)
    else:
        module.__dict__[_HOLDER] = holder


@contextmanager
def tensors(module: nn.Module, *names: str, write: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Real values of a module's parameters, whatever their placement.

    Args:
        module: any module of the model.
        names: dotted parameter names relative to `module`; none means all.
        write: store what the block changed when it ends without an exception.

    Returns:
        A context manager giving `{name: tensor}`. The tensors are valid inside the block only.

    Raises:
        AttributeError: a name is no parameter of `module`.

    Exactness: bit-identical. Cost: the bytes of the names asked for, on the tier that computes.

    Example:
        >>> import torch, torchwrap
        >>> layer = torch.nn.Linear(2, 2)
        >>> with torchwrap.core.tensors(layer, "weight") as real:
        ...     real["weight"].shape
        torch.Size([2, 2])
    """
    wanted = names or tuple(name for name, _ in module.named_parameters(remove_duplicate=False))
    by_owner: dict[str, list[str]] = {}
    for name in wanted:
        owner, _, leaf = name.rpartition(".")
        by_owner.setdefault(owner, []).append(leaf)
    with ExitStack() as stack:
        result: dict[str, torch.Tensor] = {}
        for owner, leaves in by_owner.items():
            part = module.get_submodule(owner)
            holder = holder_of(part)
            prefix = owner + "." if owner else ""
            if holder is not None:
                lent = stack.enter_context(holder.lend(part, tuple(leaves), write))
                result |= {prefix + leaf: lent[leaf] for leaf in leaves}
            else:
                result |= {prefix + leaf: data_of(getattr(part, leaf)) for leaf in leaves}
        yield {name: result[name] for name in wanted}


def map_parameters(module: nn.Module, replace: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter object under `module` once; names that shared an object share the new one.

    Only for a model that nobody else holds parameters of, such as one just built on `meta`.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = replace(f"{prefix}.{name}" if prefix else name, parameter)
                part._parameters[name] = made[id(parameter)]

"""Exact comparison of outputs and of whole models, with the path of the first difference.

A technique whose outputs are close but not equal is compared within its tolerance (`within`), and only what `equal` compares: outputs and
gradients. Weights, buffers, integers and everything that an undo could leave behind are exact for every technique. `difference` walks
two values of any kind side by side: tensors by `torch.equal`, containers and plain objects by their parts.
`model_difference` compares two models in everything an undo could leave behind: classes, `__dict__` of every module, hook
dictionaries, parameters with their gradients, buffers, configuration. The second model is a twin that was never wrapped, so what
torch or transformers itself leaves in a module after a call counts as no difference.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["difference", "equal", "model_difference", "output_difference", "state_difference", "within"]

Tolerance = Mapping[torch.dtype, float]
_tolerance: list[Tolerance] = [{}]


@contextmanager
def within(tolerance: Tolerance) -> Iterator[None]:
    """In the block, `equal` accepts differences of floating tensors up to `tolerance[dtype]`, relative to the largest element."""
    _tolerance.append(tolerance)
    try:
        yield
    finally:
        _tolerance.pop()


def equal(actual: Any, expected: Any) -> None:
    """Fail with the place of the first difference, if there is one."""
    found = output_difference(actual, expected)
    assert found is None, found


def output_difference(actual: Any, expected: Any) -> str | None:
    """Where two outputs first differ by more than the tolerance, or None."""
    return difference(actual, expected, tolerance=_tolerance[-1])


def difference(
    actual: Any, expected: Any, path: str = "output", _seen: set[tuple[int, int]] | None = None, tolerance: Tolerance | None = None
) -> str | None:
    """Where two values first differ (by more than the tolerance of their dtype, if there is one), or None."""
    tolerance = tolerance or {}
    seen = set() if _seen is None else _seen
    if actual is expected or (id(actual), id(expected)) in seen:
        return None
    seen.add((id(actual), id(expected)))
    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        return _tensor_difference(actual, expected, path, tolerance.get(expected.dtype, 0.0))
    if type(actual) is not type(expected):
        return f"{path}: {type(actual)} instead of {type(expected)}"
    if isinstance(actual, type | types.ModuleType | torch.dtype | torch.device | str | bytes | int | float | type(None)):
        return None if actual == expected else f"{path}: {actual!r} instead of {expected!r}"
    if isinstance(actual, Mapping):
        return _mapping_difference(actual, expected, path, seen, tolerance)
    if isinstance(actual, set | frozenset):
        return None if actual == expected else f"{path}: {actual} instead of {expected}"
    if isinstance(actual, list | tuple):
        if len(actual) != len(expected):
            return f"{path}: {len(actual)} items instead of {len(expected)}"
        parts = (difference(a, e, f"{path}[{i}]", seen, tolerance) for i, (a, e) in enumerate(zip(actual, expected, strict=True)))
        return next((part for part in parts if part), None)
    if isinstance(actual, functools.partial) or callable(actual):
        return None if _name(actual) == _name(expected) else f"{path}: {_name(actual)} instead of {_name(expected)}"
    if hasattr(actual, "__dict__"):
        return _mapping_difference(vars(actual), vars(expected), path, seen, tolerance)
    if type(actual).__eq__ is object.__eq__:  # a lock or the like: nothing to compare but the kind
        return None
    return None if actual == expected else f"{path}: {actual!r} instead of {expected!r}"


def _tensor_difference(actual: torch.Tensor, expected: torch.Tensor, path: str, tolerance: float = 0.0) -> str | None:
    for field in ("shape", "dtype", "device", "requires_grad"):
        if getattr(actual, field) != getattr(expected, field):
            return f"{path}: {field} {getattr(actual, field)} instead of {getattr(expected, field)}"
    if torch.equal(actual, expected) or (torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        actual.nan_to_num(), expected.nan_to_num()
    )):
        return None
    if tolerance and expected.numel() and torch.equal(actual.isfinite(), expected.isfinite()):
        allowed = tolerance * max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        if float((actual - expected).nan_to_num(0.0, 0.0, 0.0).abs().max()) <= allowed:
            return None
    return f"{path}: tensors of shape {tuple(actual.shape)} differ by at most {(actual - expected).abs().max():.3g}"


def _mapping_difference(
    actual: Mapping[Any, Any], expected: Mapping[Any, Any], path: str, seen: set[tuple[int, int]], tolerance: Tolerance
) -> str | None:
    if any(isinstance(key, torch.Tensor | nn.Module) for key in expected):  # objects as keys are compared in order
        return difference([*actual.items()], [*expected.items()], path, seen, tolerance)
    if set(actual) != set(expected):
        return f"{path}: extra {sorted(map(str, set(actual) - set(expected)))}, missing {sorted(map(str, set(expected) - set(actual)))}"
    parts = (difference(actual[key], expected[key], f"{path}.{key}", seen, tolerance) for key in expected)
    return next((part for part in parts if part), None)


def _name(function: Any) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def state_difference(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str | None:
    """Where two state dictionaries differ in order, names, shapes, dtypes or values, or None."""
    if list(actual) != list(expected):
        return f"state_dict: keys {list(actual)[:5]}... instead of {list(expected)[:5]}..."
    return difference(dict(actual), dict(expected), "state_dict")


_HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name)
_PARTS = ("_parameters", "_buffers", "_modules")


def model_difference(model: nn.Module, twin: nn.Module) -> str | None:
    """What tells `model` from a twin that was never wrapped, or None."""
    ours, theirs = (list(each.named_modules(remove_duplicate=False)) for each in (model, twin))
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return "the module trees have different names"
    for (name, module), (_, other) in zip(ours, theirs, strict=True):
        found = _module_difference(module, other, name or "<root>")
        if found:
            return found
    return None


def _same_class(ours: type, theirs: type) -> bool:
    """Equal classes; those that parametrizations and FSDP make per instance are equal if they have the same name and bases."""
    made_alike = (ours.__module__, ours.__qualname__, ours.__bases__) == (theirs.__module__, theirs.__qualname__, theirs.__bases__)
    return ours is theirs or (made_alike and not any("__torchwrap_base__" in vars(cls) for cls in (ours, theirs)))


def _module_difference(module: nn.Module, other: nn.Module, path: str) -> str | None:
    if not _same_class(type(module), type(other)):
        return f"{path}: class {type(module)} at {id(type(module)):x} instead of {type(other)} at {id(type(other)):x}"
    if set(module.__dict__) != set(other.__dict__):
        extra, missing = (sorted(set(a) - set(b)) for a, b in ((module.__dict__, other.__dict__), (other.__dict__, module.__dict__)))
        return f"{path}.__dict__: extra {extra}, missing {missing}"
    for part in ("_parameters", "_buffers"):
        mine, theirs = module.__dict__[part], other.__dict__[part]
        found = state_difference(mine, theirs) or difference(
            {key: getattr(value, "grad", None) for key, value in mine.items()},
            {key: getattr(value, "grad", None) for key, value in theirs.items()},
            "grad",
        )
        if found:
            return f"{path}.{part}: {found}"
    for hooks in _HOOKS:  # keys are global counters, so the functions are compared
        mine, theirs = module.__dict__[hooks], other.__dict__[hooks]
        if [_name(value) for value in mine.values()] != [_name(value) for value in theirs.values()]:
            return f"{path}.{hooks}: {[_name(v) for v in mine.values()]} instead of {[_name(v) for v in theirs.values()]}"
    for key, value in module.__dict__.items():
        if key in _PARTS or key in _HOOKS or isinstance(value, nn.Module) or key.startswith("__composable_api"):
            continue  # the last is FSDP2's own state, which numbers its parameters in order of creation
        found = difference(value, other.__dict__[key], f"{path}.{key}")
        if found:
            return found
    return None

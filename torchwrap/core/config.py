"""Settings of a technique: frozen dataclasses whose fields carry their own documentation, unit and range.

A config is a value: it is checked when it is made, compares and hashes by content, and survives JSON. Sizes are integers of bytes inside
and strings such as `"6GiB"` at the border. Fields that only make sense on one machine (paths, thread counts) are marked and left out of
plans. Older stored versions pass through the class's chain of pure migration functions.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, overload

import torch

from torchwrap.core.errors import ConfigError

__all__ = ["Config", "format_bytes", "option", "parse_size"]

T = TypeVar("T")
Self = TypeVar("Self", bound="Config")

_UNITS = {"": 1, "b": 1} | {
    unit + suffix: base**power
    for power, unit in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_ACCEPTED = "bytes as an integer, or a number with B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(value: int | str, *, field: str = "size") -> int:
    """Bytes of a size written as `6GiB`, `500MB`, `1.5 GiB` or plain bytes.

    Args:
        value: the size; case and space before the unit do not matter.
        field: the name used in the error message.

    Raises:
        ConfigError: no such unit, not a number, negative, or 2**63 and more.

    Example:
        >>> from torchwrap.core.config import parse_size
        >>> parse_size("1.5 GiB")
        1610612736
    """
    size = -1
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())) and match[2].lower() in _UNITS:
        size = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if not 0 <= size < 2**63:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise ConfigError(f"{shown} is not a size", where=field, fix=f"Accepted: {_ACCEPTED}. For example '1.5GiB'.")
    return size


def format_bytes(n: int) -> str:
    """A size for people, such as `1.25 GiB`.

    Example:
        >>> from torchwrap.core.config import format_bytes
        >>> format_bytes(1342177280)
        '1.25 GiB'
    """
    if abs(n) < 1024:
        return f"{n} B"
    power = min(4, (abs(n).bit_length() - 1) // 10)
    return f"{n / 1024**power:.2f} {' KMGT'[power]}iB"


@overload
def option(
    default: T, *, doc: str, unit: str = ..., low: float | None = ..., high: float | None = ...,
    choices: Sequence[object] | None = ..., machine: bool = ..., size: bool = ...,
) -> T: ...
@overload
def option(
    *, default_factory: Callable[[], T], doc: str, unit: str = ..., low: float | None = ..., high: float | None = ...,
    choices: Sequence[object] | None = ..., machine: bool = ..., size: bool = ...,
) -> T: ...
@overload
def option(
    *, doc: str, unit: str = ..., low: float | None = ..., high: float | None = ...,
    choices: Sequence[object] | None = ..., machine: bool = ..., size: bool = ...,
) -> Any: ...
def option(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    doc: str,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[object] | None = None,
    machine: bool = False,
    size: bool = False,
) -> Any:
    """A field of a config, documented where it is declared.

    Args:
        default: value when the user gives none; without it (and without `default_factory`) the field is required.
        default_factory: makes the default.
        doc: one sentence, shown in the documentation table.
        unit: bytes, seconds, blocks, tokens, fraction, ...
        low: smallest value allowed.
        high: largest value allowed.
        choices: the only values allowed.
        machine: True if the value is bound to this machine and does not belong in a plan.
        size: True if the field takes sizes; it is stored as bytes.
    """
    metadata = {
        "doc": doc, "unit": unit or ("bytes" if size else ""), "low": low, "high": high,
        "choices": None if choices is None else tuple(choices), "machine": machine, "size": size,
    }
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every technique's settings; subclass with `@dataclass(frozen=True, kw_only=True)`.

    Attributes:
        technique: name of the technique the config belongs to.
        version: of the stored form; raise it with a migration whenever a field changes its name or meaning.
        migrations: `{version: function}`; each takes the stored fields of that version and returns those of the next.

    Raises:
        ConfigError: when made with a value of the wrong type or out of its range.
    """

    technique: ClassVar[str] = ""
    version: ClassVar[int] = 1
    migrations: ClassVar[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}

    if not TYPE_CHECKING:  # checkers know the fields by `__init__`

        def __new__(cls, *_, **values):
            known = [field.name for field in dataclasses.fields(cls)]
            for name in values:
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1)
                    fix = f"Did you mean {close[0]!r}?" if close else f"Fields: {', '.join(known) or 'none'}."
                    raise ConfigError(f"{cls.__name__} has no field {name!r}", fix=fix)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            where = f"{type(self).__name__}.{field.name}"
            if field.metadata.get("size") and (value is not None or not _accepts(hints.get(field.name, Any), None)):
                value = parse_size(value, field=where)
            elif isinstance(value, os.PathLike):
                value = os.fspath(value)
            elif isinstance(value, list):
                value = tuple(value)
            _check(value, field.metadata, hints.get(field.name, Any), where)
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Check what concerns several fields; raise `ConfigError`."""

    def to_dict(self, machine: bool = False) -> dict[str, Any]:
        """The fields as JSON values; machine-bound ones only with `machine`.

        Raises:
            ConfigError: a value has no JSON form.
        """
        return {
            field.name: _to_json(getattr(self, field.name), f"{type(self).__name__}.{field.name}")
            for field in dataclasses.fields(self)
            if machine or not field.metadata.get("machine")
        }

    @classmethod
    def from_dict(cls: type[Self], values: dict[str, Any], version: int | None = None) -> Self:
        """A config from what `to_dict` gave, possibly under an older version of the class.

        Raises:
            ConfigError: unknown field (the message has the closest name), newer version, no migration, or bad value.
        """
        stored = cls.version if version is None else version
        if stored > cls.version or stored < 1:
            raise ConfigError(
                f"{cls.technique} config has version {stored}, this library knows versions 1 to {cls.version}",
                fix="Upgrade torchwrap." if stored > cls.version else "",
            )
        for step in range(stored, cls.version):
            if step not in cls.migrations:
                raise ConfigError(f"{cls.technique} config of version {step} has no migration to version {step + 1}")
            values = cls.migrations[step](dict(values))
        try:
            return cls(**{name: _from_json(value) for name, value in values.items()})
        except TypeError as error:
            raise ConfigError(f"{cls.__name__} is incomplete: {error}") from error


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name imported for type checkers only
        return {}


def _check(value: object, rules: Any, hint: Any, where: str) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError("nan is not a value", where=where)
    choices = rules.get("choices")
    if choices is not None and value not in choices:
        close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        fix = f"Use one of {', '.join(map(repr, choices))}." + (f" Did you mean {close[0]!r}?" if close else "")
        raise ConfigError(f"{value!r} is not accepted", where=where, fix=fix)
    if choices is None and not rules.get("size") and not _accepts(hint, value):
        raise ConfigError(f"{value!r} is of type {type(value).__name__}", where=where, fix=f"Expected {_named(hint)}.")
    low, high = rules.get("low"), rules.get("high")
    if isinstance(value, int | float) and not isinstance(value, bool) and (
        (low is not None and value < low) or (high is not None and value > high)
    ):
        unit = f" {rules['unit']}" if rules.get("unit") else ""
        allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise ConfigError(f"{value!r}{unit} is out of range", where=where, fix=f"Allowed: {allowed}{unit}.")


def _named(hint: Any) -> str:
    """An annotation for people: `int or 'auto'`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_named, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint).replace("typing.", "")


def _accepts(hint: Any, value: object) -> bool:
    """Does `value` fit the annotation, as far as JSON can tell values apart?"""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_accepts(part, value) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_accepts(arguments[0], item) for item in value)
        return len(value) == len(arguments) and all(map(_accepts, arguments, value))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and hint is not object:
        # A path is kept as text, so that a config equals the one read back from JSON.
        return isinstance(value, hint) or (issubclass(hint, os.PathLike) and isinstance(value, str))
    return True


def _to_json(value: object, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list | tuple):
        return [_to_json(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and value.keys() not in ({"dtype"}, {"device"}):
        return {key: _to_json(item, where) for key, item in value.items()}
    raise ConfigError(f"{value!r} has no JSON form", where=where)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if isinstance(value, dict):
        if value.keys() == {"dtype"}:
            dtype = getattr(torch, value["dtype"], None) if isinstance(value["dtype"], str) else None
            if not isinstance(dtype, torch.dtype):
                raise ConfigError(f"{value['dtype']!r} is not a dtype", fix="For example {'dtype': 'bfloat16'}.")
            return dtype
        if value.keys() == {"device"}:
            try:
                return torch.device(value["device"])
            except (RuntimeError, TypeError) as error:
                raise ConfigError(f"{value['device']!r} is not a device", fix="For example {'device': 'cuda:0'}.") from error
        return {key: _from_json(item) for key, item in value.items()}
    return value

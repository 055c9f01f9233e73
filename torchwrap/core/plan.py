"""What is applied to a model, as a small JSON file beside its checkpoint.

A plan is read as data and nothing else: techniques are looked up by name among those that are installed, values are JSON with tags for
dtypes and devices, and the reader refuses what JSON readers commonly let through (duplicate keys, NaN, integers of any length, unlimited
depth and size). Settings that only make sense on one machine are left out unless asked for.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from torchwrap.core.config import Config
from torchwrap.core.errors import ConfigError, NotAppliedError, PlanError, TorchwrapWarning
from torchwrap.core.swap import original_class
from torchwrap.core.technique import technique_named
from torchwrap.core.transaction import apply, inner_model, wrappers_of

__all__ = ["FILE_NAME", "Plan", "plan_of"]

M = TypeVar("M", bound=nn.Module)

FILE_NAME = "torchwrap.json"
FORMAT = 1
MAX_BYTES = 1 << 20  # chosen: a plan of every technique is below 10 kB
MAX_DEPTH = 32  # chosen: a plan needs 6; the limit keeps the parser off Python's recursion limit
MAX_DIGITS = 20  # holds every 64-bit number


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Configs in effective order, and the model they were made for.

    Attributes:
        configs: outermost technique first.
        model: `{"class": ..., "parameters": count}` of that model; empty if unknown.

    Example:
        >>> import torch, torchwrap as tw
        >>> model = tw.trace(torch.nn.Linear(2, 2))
        >>> tw.Plan.from_json(tw.plan_of(model).to_json()) == tw.plan_of(model)
        True
    """

    configs: tuple[Config, ...]
    model: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: M) -> M:
        """Apply the plan and return the model; warns if it was made for a model of another class or size."""
        here = _describe_model(model)
        if self.model and self.model != here:
            warnings.warn(
                f"this plan was made for {self.model.get('class')} with {self.model.get('parameters')} parameters and is applied to "
                f"{here['class']} with {here['parameters']}",
                TorchwrapWarning,
                stacklevel=2,
            )
        return apply(model, self.configs)

    def to_json(self, machine: bool = False) -> str:
        """The plan as text; with `machine`, also the settings bound to this machine."""
        from torchwrap import __version__  # the version stands in the top package, which imports this module

        content = {
            "format": FORMAT,
            "torchwrap": __version__,
            "model": self.model,
            "techniques": [
                {"name": config.technique, "version": config.version, "config": config.to_dict(machine)} for config in self.configs
            ],
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """A plan from text.

        Raises:
            PlanError: malformed, too large, newer than this library, or a technique that is not installed.
            ConfigError: a technique's settings are not what it accepts.
        """
        content = _mapping(_strict_json(text), "plan", {"format", "torchwrap", "model", "techniques"}, {"format", "techniques"})
        if type(content["format"]) is not int or content["format"] < 1:
            raise PlanError(f"{content['format']!r} is not a format number", where="format")
        if content["format"] > FORMAT:
            raise PlanError(
                f"format {content['format']} is newer than this library, which knows {FORMAT}", where="format", fix="Upgrade torchwrap."
            )
        if not isinstance(content["techniques"], list):
            raise PlanError("not a list", where="techniques")
        model = _mapping(content.get("model", {}), "model", {"class", "parameters"}, set())
        configs = tuple(_config(entry, f"techniques[{index}]") for index, entry in enumerate(content["techniques"]))
        return cls(configs=configs, model=model)

    def save(self, path: str | os.PathLike[str], machine: bool = False) -> Path:
        """Write the plan, whole or not at all; `path` is a folder (the file is `torchwrap.json`) or a `.json` file."""
        from torchwrap.storage.atomic import atomic_write  # core does not depend on storage; only saving does

        target = _file(path)
        atomic_write(target, self.to_json(machine).encode())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a folder or a `.json` file.

        Raises:
            FileNotFoundError: there is no such file.
            PlanError: see `from_json`; the message names the file.
        """
        target = _file(path)
        with open(target, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        try:
            return cls.from_json(raw)
        except PlanError as error:
            raise PlanError(error.what, where=f"{target}{f', {error.where}' if error.where else ''}", fix=error.fix) from error


def plan_of(model: nn.Module) -> Plan:
    """The plan that makes another such model what this one is.

    Args:
        model: a model, wrapped or not.
    """
    return Plan(configs=tuple(wrappers_of(model).values()), model=_describe_model(model))


def _describe_model(model: nn.Module) -> dict[str, Any]:
    root = inner_model(model)
    count = sum(parameter.numel() for parameter in root.parameters() if not is_lazy(parameter))
    return {"class": original_class(root).__qualname__, "parameters": count}


def _file(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    return target if target.suffix == ".json" and not target.is_dir() else target / FILE_NAME


def _config(entry: Any, where: str) -> Config:
    stored = _mapping(entry, where, {"name", "version", "config"}, {"name", "version", "config"})
    name, version = stored["name"], stored["version"]
    if not isinstance(name, str):
        raise PlanError(f"{name!r} is not a name", where=f"{where}.name")
    if type(version) is not int or version < 1:
        raise PlanError(f"{version!r} is not a version number", where=f"{where}.version")
    try:
        config_class: type[Config] = technique_named(name).config_class
    except NotAppliedError as error:
        raise PlanError(error.what, where=f"{where}.name", fix=error.fix) from error
    if version > config_class.version:
        raise PlanError(
            f"{name} settings of version {version} are newer than this library, which knows {config_class.version}",
            where=f"{where}.version",
            fix="Upgrade torchwrap.",
        )
    values = _mapping(stored["config"], f"{where}.config", None, set())
    try:
        return config_class.from_dict(values, version)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{where}.config{f', {error.where}' if error.where else ''}", fix=error.fix) from error


def _mapping(value: Any, where: str, known: set[str] | None, required: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"a {type(value).__name__} where an object belongs", where=where)
    for name in value:
        if known is not None and name not in known:
            raise PlanError(f"unknown entry {name[:60]!r}", where=where, fix=f"Known: {', '.join(sorted(known))}.")
    for name in sorted(required - value.keys()):
        raise PlanError(f"entry {name!r} is missing", where=where)
    return value


def _strict_json(text: str | bytes) -> Any:
    if len(text) > MAX_BYTES:
        raise PlanError(f"larger than {MAX_BYTES} bytes", fix="This is not a plan file.")
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise PlanError(f"not UTF-8 text: {error}") from error
    _check_depth(decoded)
    try:
        return json.loads(
            decoded, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_short_int, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise PlanError(f"not JSON: {error}") from error


def _check_depth(text: str) -> None:
    depth, quoted, escaped = 0, False, False
    for character in text:
        if quoted:
            quoted, escaped = escaped or character != '"', character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise PlanError(f"nested deeper than {MAX_DEPTH} levels")
        elif character in "]}":
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise PlanError(f"entry {name[:60]!r} appears twice")
        result[name] = value
    return result


def _no_constant(text: str) -> Any:
    raise PlanError(f"{text} is not a JSON value")


def _short_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise PlanError(f"an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise PlanError(f"{text[:60]} is out of range for a number")
    return value

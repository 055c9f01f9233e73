"""What an offloaded optimizer commits beside its records, as JSON: what the run is of, its settings and its step counts.

Numbers come back exactly: Python writes a float with as many digits as it takes, and a float32 is a float64 too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchwrap.core import errors
from torchwrap.optimizer.elementwise import settings_of
from torchwrap.optimizer.targets import Target
from torchwrap.storage.manifest import Json

__all__ = ["check_same_run", "describe_run", "from_json", "to_json", "warn_of_other_settings"]


def describe_run(
    cls: type[torch.optim.Optimizer], targets: Sequence[Target], kept: Mapping[str, Mapping[str, Any]], groups: Any, steps: int
) -> dict[str, Json]:
    """The run as it is now.

    Args:
        kept: what is kept per parameter and not per element, by the parameter's name.

    Raises:
        ConfigError: a setting is of a kind that cannot be stored.
    """
    return {
        **_identity(cls, targets),
        "steps": steps,
        "groups": [to_json(settings_of(group), f"param_groups[{index}]") for index, group in enumerate(groups)],
        "kept": {name: to_json(dict(numbers), name) for name, numbers in kept.items()},
    }


def check_same_run(run: Mapping[str, Json], cls: type[torch.optim.Optimizer], targets: Sequence[Target], folder: str) -> None:
    """Raise `ConfigError` if a committed run is of another model or optimizer class."""
    mine = _identity(cls, targets)
    for key, wanted in mine.items():
        found = run.get(key)
        if found == wanted:
            continue
        what = f"{found!r} was committed, this is {wanted!r}"
        if isinstance(found, list) and isinstance(wanted, list):
            different = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), (len(found), len(wanted)))
            what = f"{different[0]!r} was committed, this model has {different[1]!r}"
        raise errors.ConfigError(
            f"OffloadedOptimizer: the folder holds a run of something else ({key}): {what}",
            where=folder,
            fix="Use another folder, or remove this one to begin anew.",
        )


def warn_of_other_settings(run: Mapping[str, Json], groups: Sequence[Mapping[str, Any]]) -> None:
    """Say which settings given now are replaced by those of a committed run. A learning rate that a schedule moved is none of them."""
    stored = run["groups"]
    assert isinstance(stored, list)
    found = []
    for index, (old, group) in enumerate(zip(stored, groups, strict=False)):
        before = from_json(old)
        for name, value in settings_of(group).items():
            kept = before.get("initial_lr", before.get("lr")) if name == "lr" else before.get(name)
            if to_json(value, name) != to_json(kept, name):
                found.append(f"{name} of group {index} is {before.get(name)!r} and not {value!r}")
    if found:
        warnings.warn(
            f"OffloadedOptimizer: the run goes on with its own settings: {', '.join(found)}. Change optimizer.param_groups to have others.",
            errors.TorchwrapWarning,
            stacklevel=3,
        )


def _identity(cls: type[torch.optim.Optimizer], targets: Sequence[Target]) -> dict[str, Json]:
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "parameters": [[t.name, str(t.parameter.dtype), list(t.parameter.shape), t.group] for t in targets],
    }


def to_json(value: Any, where: str) -> Json:
    """A value as JSON; what JSON does not have becomes a table of one entry that names the kind."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, tuple | list):
        return {type(value).__name__ if type(value) in (tuple, list) else "list": [to_json(item, where) for item in value]}
    if isinstance(value, Mapping):
        return {"table": {str(name): to_json(item, f"{where}.{name}") for name, item in value.items()}}
    if isinstance(value, torch.Tensor) and value.numel() <= 64:
        plain = value.detach().cpu()
        kind = str(plain.dtype).removeprefix("torch.")
        return {"tensor": [kind, list(plain.shape), [to_json(item, where) for item in plain.flatten().tolist()]]}
    raise errors.ConfigError(
        f"OffloadedOptimizer: a {type(value).__name__} cannot be committed", where=where, fix='Use durability="none", or plain numbers.'
    )


def from_json(value: Json) -> Any:
    """What `to_json` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float" and isinstance(content, str):
        return float(content)
    if kind == "table" and isinstance(content, dict):
        return {name: from_json(item) for name, item in content.items()}
    assert isinstance(content, list)
    if kind == "tensor":
        dtype, shape, items = content
        assert isinstance(items, list)
        return torch.tensor([from_json(item) for item in items], dtype=getattr(torch, str(dtype))).reshape(shape)  # type: ignore[arg-type]
    made = [from_json(item) for item in content]
    return tuple(made) if kind == "tuple" else made

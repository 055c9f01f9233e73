"""What a technique is: a name, a phase, settings, and how it is put on a model and taken off; all call forms; the registry.

A technique says what it would do (`prepare`), makes ready (`attach`) and tidies up (`detach`). Putting its layers on modules, order,
conflicts, undoing and failure are the same for all and stand in transaction.py.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, TypeVar, overload

from torch import nn

from torchwrap.core import BUILT_IN
from torchwrap.core.config import Config
from torchwrap.core.decorate import decorate_class, decorate_factory
from torchwrap.core.errors import ConfigError, NotAppliedError, UnsupportedModelError
from torchwrap.core.integration import Integration
from torchwrap.core.layer import Layer

if TYPE_CHECKING:
    from torchwrap.core.plan import Plan
    from torchwrap.core.report import Row

__all__ = [
    "Applied",
    "Handle",
    "Named",
    "Place",
    "Prepared",
    "Technique",
    "as_configs",
    "name_of",
    "register",
    "technique_named",
    "techniques",
]

C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")
Place = tuple[str, nn.Module, Layer]
"""(name of the module, the module, the layer on it)."""

_GROUP = "torchwrap.techniques"
_ABSENT: Any = object()


@dataclass(kw_only=True)
class Prepared(Generic[C]):
    """What `Technique.prepare` found out, before anything is touched.

    Attributes:
        config: the config, completed if the technique fills in automatic values.
        layers: what will stand where; `Technique.attach` may add to it.
        notes: remarks for `describe` and `check`.
        rows: rows for `check`, if the technique knows more than the table shows by itself.
        data: whatever `attach` needs.
    """

    config: C
    layers: list[Place] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    data: Any = None


class Handle:
    """The live object of an applied technique, from `handle_of(model, name)`. The defaults know nothing."""

    def stats(self) -> dict[str, Any]:
        """Counters since the technique was applied."""
        return {}

    def tiers(self) -> dict[str, int] | None:
        """Bytes of weights now on `device`, `host` and `disk`; `None` if the technique places nothing."""
        return None

    def bytes_moved(self) -> int | None:
        """Bytes of weights moved between tiers per forward; `None` if the technique moves nothing."""
        return None

    def predict(self, *, batch: int = 1, tokens: int = 1) -> Any:
        """Expected memory and time of one forward; `None` if the technique does not change them."""
        return None

    def explain(self) -> str:
        """Why things are as they are, for people."""
        return ""

    def trim(self) -> None:
        """Give back memory that is only held for speed."""

    def close(self) -> None:
        """Release resources; called by `unwrap`."""


@dataclass(kw_only=True)
class Applied:
    """Record of one applied technique.

    Attributes:
        config: its settings.
        handle: its live object.
        places: where its layers are.
        notes: remarks made when it was applied.
    """

    config: Config
    handle: Handle
    places: list[Place]
    notes: list[str]


class Technique(Generic[C]):
    """A named method of changing how a model runs; one instance per technique, callable in every form.

    `technique(model, **fields)` applies and returns the model, `@technique` and `@technique(**fields)` decorate a class or a factory. A
    config object may stand in place of the fields.

    Attributes:
        name: snake_case verb phrase, the same as `config_class.technique`.
        phase: of `order.PHASES`.
        version: of the technique, for reports.
        config_class: its settings.
        exactness: `bit-identical`, `allclose` or `lossy`, with the condition.
        trains: True if a model under it can be trained.
    """

    name: ClassVar[str]
    phase: ClassVar[int]
    version: ClassVar[int] = 1
    config_class: type[C]
    exactness: ClassVar[str] = "bit-identical"
    trains: ClassVar[bool] = True

    def prepare(self, model: nn.Module, config: C, integration: Integration) -> Prepared[C]:
        """Check and plan without touching the model; raise a typed error if it cannot be done."""
        raise NotImplementedError

    def attach(self, model: nn.Module, prepared: Prepared[C]) -> Handle:
        """Make ready (move weights, open files). The layers are put on afterwards. On an error the model must be as it was."""
        return Handle()

    def detach(self, model: nn.Module, handle: Handle) -> None:
        """Undo `attach`; called while the layers are still on, so they must not mind that it is undone."""
        handle.close()

    @overload
    def __call__(self, target: M, config: C | None = None, /, **options: object) -> M: ...
    @overload
    def __call__(self, target: type[M], config: C | None = None, /, **options: object) -> type[M]: ...
    @overload
    def __call__(self, target: C, /) -> Callable[[R], R]: ...
    @overload
    def __call__(self, target: Callable[P, R], config: C | None = None, /, **options: object) -> Callable[P, R]: ...
    @overload
    def __call__(self, /, **options: object) -> Callable[[R], R]: ...
    def __call__(self, target: Any = _ABSENT, config: C | None = None, /, **options: object) -> Any:
        """Apply to a module, decorate a class or a factory, or make a decorator.

        Args:
            target: a module, a module class, a factory, a config, or nothing.
            config: the settings as an object.
            **options: the settings as fields; not together with `config`.

        Raises:
            ConfigError: a field is unknown or out of range, or both forms of settings are given.
            UnsupportedModelError: `target` is the name or the folder of a model.
            TypeError: `target` is none of these; `None` is none of them.
        """
        if isinstance(target, Config):
            if config is not None:
                raise ConfigError(f"{self.name} got two configs")
            target, config = _ABSENT, target
        from torchwrap.core.transaction import apply  # it needs the registry below

        settings = self._settings(config, options)
        if target is _ABSENT:
            return lambda thing: self(thing, settings)
        if isinstance(target, nn.Module):
            return apply(target, settings)
        if isinstance(target, type):
            if not issubclass(target, nn.Module):
                raise TypeError(f"{self.name} decorates module classes; {target.__name__} is not one")
            return decorate_class(target, settings, apply)
        if callable(target):
            return decorate_factory(target, settings, apply)
        if isinstance(target, (str, os.PathLike)):
            load = f", or torchwrap.{self.name}.from_pretrained({os.fspath(target)!r})" if hasattr(self, "from_pretrained") else ""
            raise UnsupportedModelError(f"{self.name} takes a model, not its name", where=repr(target), fix=f"Load the model first{load}.")
        raise TypeError(f"{self.name} takes a module, a module class or a function that makes one, not a {type(target).__name__}")

    def _settings(self, config: C | None, options: dict[str, object]) -> C:
        if config is None:
            return self.config_class(**options)
        if options:
            raise ConfigError(f"{self.name} got a config and the fields {', '.join(options)}", fix="Give one or the other.")
        if not isinstance(config, self.config_class):
            known = ", ".join(f"{entry.name}=..." for entry in fields(self.config_class)[:2])
            raise ConfigError(
                f"{self.name} takes an object of class {self.config_class.__name__}, not of class {type(config).__name__}",
                fix=f"Give settings by their names: {self.name}(model, {known}).",
            )
        return config

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            # `torchwrap.offload` is this object and also the name of its package: `torchwrap.offload.config` must be found.
            module = sys.modules.get(f"{type(self).__module__.rpartition('.')[0]}.{name}")
            if module is None or name.startswith("_"):
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            return module

    def __repr__(self) -> str:
        return f"<technique {self.name}>"

    def __reduce__(self) -> tuple[Callable[[str], Technique[Any]], tuple[str]]:
        return (technique_named, (self.name,))


Named = str | type[Config] | Config | Technique[Any]
"""What names a technique: its name, its config class, a config, or itself."""

_registry: dict[str, Technique[Any]] = {}

T = TypeVar("T", bound=Technique[Any])


def register(technique: T) -> T:
    """Make a technique known by its name.

    Raises:
        ConfigError: the name is another technique's.
    """
    other = _registry.get(technique.name)
    if other is not None and type(other).__qualname__ != type(technique).__qualname__:
        raise ConfigError(f"the name {technique.name!r} belongs to {other!r} already")
    _registry[technique.name] = technique
    return technique


def techniques() -> tuple[str, ...]:
    """Names of all techniques that can be used here, loaded or not."""
    return tuple(sorted({*_registry, *BUILT_IN, *(entry.name for entry in importlib.metadata.entry_points(group=_GROUP))}))


def technique_named(name: str) -> Technique[Any]:
    """The technique of this name.

    Raises:
        NotAppliedError: there is none; the message has the closest name.
    """
    if name not in _registry:
        if name in BUILT_IN:
            importlib.import_module(BUILT_IN[name])
        else:
            for entry in importlib.metadata.entry_points(group=_GROUP, name=name):
                register(entry.load())
    if name not in _registry:
        close = difflib.get_close_matches(name, techniques(), n=1)
        raise NotAppliedError(
            f"there is no technique {name!r}",
            fix=f"Did you mean {close[0]!r}?" if close else f"Install the package that has it. Known: {', '.join(techniques())}.",
        )
    return _registry[name]


def name_of(named: object) -> str:
    """The name of a technique that is given by its name, as itself, by its config class or by a config.

    Raises:
        ConfigError: this names none.
    """
    if isinstance(named, str):
        return named
    if isinstance(named, Technique):
        return named.name
    if isinstance(named, Config) or (isinstance(named, type) and issubclass(named, Config)):
        return named.technique
    raise ConfigError(f"{named!r} names no technique", fix=f"Give a name: {', '.join(map(repr, techniques()))}.")


def as_configs(configs: Config | Sequence[Config] | Plan) -> list[Config]:
    """Configs as a list, from one, several or a plan.

    Raises:
        ConfigError: one of them is something else; the message has what was probably meant.
    """
    inside = getattr(configs, "configs", None)  # a Plan
    if inside is not None and not isinstance(configs, Config):
        return list(inside)
    listed: list[Any] = list(configs) if isinstance(configs, Iterable) and not isinstance(configs, str) else [configs]
    for config in listed:
        if not isinstance(config, Config):
            raise _no_config(config)
    return listed


def _no_config(given: object) -> ConfigError:
    """The error for what stands where a config should, with the one that was probably meant."""
    if isinstance(given, type) and issubclass(given, Config):
        return ConfigError(f"the class {given.__name__} is not a config", fix=f"Give an object of it: {given.__name__}().")
    name = given.name if isinstance(given, Technique) else given
    if isinstance(name, str) and name in techniques():
        return ConfigError(f"{given!r} is not a config", fix=f"Give {technique_named(name).config_class.__name__}(), with its settings.")
    return ConfigError(f"{given!r} is not a config", fix="Give config objects, such as torchwrap.Trace().")

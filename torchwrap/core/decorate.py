"""Applying techniques to what a class or a factory makes.

A decorated class stays the same object. Its `__init__`, and that of each subclass that has one, is wrapped so that the techniques are
applied when the outermost `__init__` of an instance has returned. Inside a framework's loader the weights come later: a model made by a
loading class method (`from_pretrained`) is wrapped when that returns, and one made by a loader nobody announced, on its first call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import nn

from torchwrap.core.config import Config
from torchwrap.core.errors import ConflictError, NotAppliedError, UnsupportedModelError
from torchwrap.core.integration import integration_for
from torchwrap.core.layer import Layer
from torchwrap.core.swap import attach, detach, layers_of

__all__ = ["PENDING", "decorate_class", "decorate_factory", "drop_pending", "undecorate_class"]

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)
Apply = Callable[[nn.Module, list[Config]], Any]

_CONFIGS = "_torchwrap_decorated"  # in a decorated class's own __dict__: {technique: (config, apply)}
# Class methods that make an instance and fill it afterwards, in transformers, diffusers and hub mixins.
_LOADERS = ("from_pretrained", "from_config", "_from_config")
PENDING = "pending"
"""Name of the layer on an instance that waits for its loader."""


class _Construction(threading.local):
    """What this thread is making: ids of instances whose `__init__` runs, and depth of loading class methods."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.loading = 0


_construction = _Construction()


def decorate_class(cls: type[M], config: Config, apply: Apply) -> type[M]:
    """Let every future instance of `cls` and its subclasses be wrapped; returns `cls` itself."""
    decorated = cls.__dict__.get(_CONFIGS, {})
    if config.technique in decorated:
        raise ConflictError(
            f"{cls.__name__} is decorated with {decorated[config.technique][0]} already, and now with {config}",
            fix=f"Remove one: torchwrap.unwrap({cls.__name__}, {config.technique!r}).",
        )
    setattr(cls, _CONFIGS, {**decorated, config.technique: (config, apply)})
    if not decorated:
        _wrap_subclass_hook(cls)
        for entry in (cls, *_subclasses(cls)):
            _wrap_init(entry)
        for name in _LOADERS:
            _wrap_loader(cls, name)
    return cls


def undecorate_class(cls: Any, name: str | None) -> None:
    """Take one decoration, or all, from a class; instances that exist stay as they are.

    Raises:
        NotAppliedError: the class is not decorated with `name`.
    """
    decorated = dict(cls.__dict__.get(_CONFIGS, {}))
    if name is not None and name not in decorated:
        raise NotAppliedError(f"{cls.__name__} is not decorated with {name!r}", fix=f"It is with: {', '.join(decorated) or 'nothing'}.")
    decorated = {key: value for key, value in decorated.items() if name is not None and key != name}
    if decorated:
        setattr(cls, _CONFIGS, decorated)
        return
    if _CONFIGS in cls.__dict__:
        delattr(cls, _CONFIGS)
        for entry in (cls, *_subclasses(cls)):
            if not _decorations(entry):
                for attribute in ("__init__", "__init_subclass__", *_LOADERS):
                    _restore(entry, attribute)


def decorate_factory(factory: F, config: Config, apply: Apply) -> F:
    """The same factory, whose module (alone, or the one in a tuple, list or dict) comes out wrapped."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        result = factory(*args, **kwargs)
        module = _the_module(result, getattr(factory, "__qualname__", repr(factory)))
        applied = apply(module, [config])
        if applied is not module:
            raise TypeError(f"applying {config.technique} returned another object than the model")
        return result

    return make  # type: ignore[return-value]


def _the_module(result: Any, factory: str) -> nn.Module:
    if isinstance(result, nn.Module):
        return result
    values = list(result.values()) if isinstance(result, dict) else list(result) if isinstance(result, tuple | list) else []
    modules = [value for value in values if isinstance(value, nn.Module)]
    if len(modules) != 1:
        raise TypeError(
            f"{factory} returned a {type(result).__name__} with {len(modules)} modules; a decorated factory must return a module, "
            "or a tuple or dict that holds exactly one"
        )
    return modules[0]


def _decorations(cls: type) -> dict[str, tuple[Config, Apply]]:
    """Decorations of a class and its bases; the class nearest to the instance wins."""
    found: dict[str, tuple[Config, Apply]] = {}
    for entry in reversed(cls.__mro__):
        found |= entry.__dict__.get(_CONFIGS, {})
    return found


def _subclasses(cls: Any) -> list[Any]:
    found: list[Any] = []
    for entry in cls.__subclasses__():
        found += [entry, *_subclasses(entry)]
    return found


def _own(attribute: str, wrapper: Any, cls: Any) -> None:
    """Set a wrapper on the class and remember what was in its own `__dict__`, so that `_restore` leaves no trace."""
    function: Any = wrapper.__func__ if isinstance(wrapper, classmethod) else wrapper
    function._torchwrap_replaced = (attribute in cls.__dict__, cls.__dict__.get(attribute))
    setattr(cls, attribute, wrapper)


def _restore(cls: type, attribute: str) -> None:
    current = cls.__dict__.get(attribute)
    function = current.__func__ if isinstance(current, classmethod) else current
    replaced = getattr(function, "_torchwrap_replaced", None)
    if replaced is not None and getattr(function, "_torchwrap_owner", None) is cls:
        if replaced[0]:
            setattr(cls, attribute, replaced[1])
        else:
            delattr(cls, attribute)


def _is_ours(cls: type, attribute: str) -> bool:
    current = cls.__dict__.get(attribute)
    return getattr(current.__func__ if isinstance(current, classmethod) else current, "_torchwrap_owner", None) is cls


def _wrap_init(cls: type) -> None:
    if _is_ours(cls, "__init__"):
        return
    original = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if id(self) in _construction.running:
            original(self, *args, **kwargs)
            return
        _construction.running.add(id(self))
        try:
            original(self, *args, **kwargs)
        finally:
            _construction.running.discard(id(self))
        _made(self)

    __init__._torchwrap_owner = cls  # type: ignore[attr-defined]
    _own("__init__", __init__, cls)


def _wrap_subclass_hook(cls: Any) -> None:
    original = cls.__dict__.get("__init_subclass__")

    def __init_subclass__(sub: Any, /, **kwargs: Any) -> None:
        if original is not None:
            original.__get__(None, sub)(**kwargs)
        else:
            super(cls, sub).__init_subclass__(**kwargs)
        # A subclass generated by `swap` has no construction of its own: it is given to objects that exist.
        if "__torchwrap_base__" not in sub.__dict__ and _decorations(sub):
            _wrap_init(sub)

    __init_subclass__._torchwrap_owner = cls  # type: ignore[attr-defined]
    _own("__init_subclass__", classmethod(__init_subclass__), cls)


def _wrap_loader(cls: Any, name: str) -> None:
    function = getattr(getattr(cls, name, None), "__func__", None)
    if function is None:  # not there, or no class method
        return

    @functools.wraps(function)
    def load(owner: type, *args: Any, **kwargs: Any) -> Any:
        _construction.loading += 1
        try:
            result = function(owner, *args, **kwargs)
        finally:
            _construction.loading -= 1
        if _construction.loading == 0:
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, nn.Module) and isinstance(value, cls):
                    _settle(value)
        return result

    load._torchwrap_owner = cls  # type: ignore[attr-defined]
    _own(name, classmethod(load), cls)


def _made(module: nn.Module) -> None:
    """The outermost `__init__` has returned: apply now, or leave it to the loader or to the first call."""
    if not _decorations(type(module)):
        return
    with integration_for(module).loading() as state:
        waits = _construction.loading > 0 or state.active or _on_meta(module)
        loader = state.loader
    if waits:
        attach(module, _Pending(loader), outermost_index=0)
    else:
        _settle(module)


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def drop_pending(module: nn.Module) -> bool:
    """Give up waiting for a loader; True if the module was waiting."""
    waiting = [layer for layer in layers_of(module) if isinstance(layer, _Pending)]
    for layer in waiting:
        detach(module, layer)
    return bool(waiting)


def _settle(module: nn.Module) -> None:
    """Apply the class's decorations to a finished instance."""
    drop_pending(module)
    decorated = _decorations(type(module))
    for apply in {id(apply): apply for _, apply in decorated.values()}.values():
        apply(module, [config for config, own in decorated.values() if own is apply])


class _Pending(Layer):
    """Stands on an instance whose loader was still at work; applies the decorations on the first call."""

    name = PENDING
    where: Literal["inside", "outside"] = "outside"
    traceable = False

    def __init__(self, loader: str) -> None:
        self.loader = loader

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _on_meta(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} was made by {self.loader or 'a loader'} on `meta` and is called before it has weights",
                fix="Load the weights, then call the model; or load an undecorated class and apply the technique to the result.",
            )
        _settle(module)
        return module(*args, **kwargs)

"""Putting layers on a module by giving it a generated subclass of its class, and taking them off again.

`attach` sets `module.__class__` to a subclass with the same name, signature and documentation whose `forward` and call consult an
immutable tuple of layers in `module.__dict__`. The object keeps its identity, `isinstance`, parameters and hooks; Dynamo guards on
the class, so layers added or removed after compilation take effect. The idea is FSDP2's class swap (PyTorch, `fully_shard`) with the
name kept, because transformers keys its output recorder by `str(type(model))`. Only this file assigns the class of a module.

The outside slot overrides `_call_impl`, through which `nn.Module.__call__` goes, and not `__call__` itself: a bound `__call__` captured
earlier (`torch.compile(model)`) and tools that replace `nn.Module.__call__` (`torch.fx`) then still pass through it. A frame more per
call costs 0.15 us (benchmarks/test_overhead.py), so a class has two generated forms: with the inside slot, and with both.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from torchwrap.core.errors import ConflictError, NotAppliedError, UnsupportedModelError
from torchwrap.core.layer import Layer, Placement, run, switch, tell_failed

__all__ = ["Placement", "attach", "check_swappable", "detach", "is_dormant", "layers_of", "original_class", "owners_of"]

_LAYERS = "_torchwrap"  # all layers of the module, outermost first; the others are derived from it
_INSIDE, _OUTSIDE = "_torchwrap_inside", "_torchwrap_outside"
_UNDER = "_torchwrap_under"  # an instance `forward` that was there before the class was changed
_ONLY_INSIDE, _ONLY_OUTSIDE = "_torchwrap_only_inside", "_torchwrap_only_outside"  # the layer itself where the short way serves
_BASE, _BOTH = "__torchwrap_base__", "__torchwrap_both__"


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """The layers on this very module, outermost first."""
    layers: tuple[Layer, ...] = module.__dict__.get(_LAYERS, ())
    return layers


def owners_of(module: nn.Module) -> list[Any]:
    """The distinct placement owners of the module's layers."""
    found: dict[int, Any] = {}
    for layer in layers_of(module):
        if layer.owner is not None:
            found[id(layer.owner)] = layer.owner
    return list(found.values())


def is_dormant(module: nn.Module) -> bool:
    """True if no layer is left but the generated class had to stay, because something else now builds on it."""
    return _LAYERS not in module.__dict__ and _generated_in(type(module)) is not None


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as the user wrote it, below generated classes and parametrizations."""
    cls = _user_class(type(module))
    # A parametrization is a class with one base, the class it was put on (torch 2.13, `torch.nn.utils.parametrize`).
    return _user_class(cls.__bases__[0]) if is_parametrized(module) else cls


def _user_class(cls: type[nn.Module]) -> type[nn.Module]:
    base: type[nn.Module] = cls.__dict__.get(_BASE, cls)
    return base


def check_swappable(module: nn.Module) -> None:
    """Raise `UnsupportedModelError` if the module's class can take no subclass, before anything is planned for it."""
    cls = type(module)
    if issubclass(cls, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{cls.__name__} is a ScriptModule, whose code is fixed", fix="Wrap the module before torch.jit.script, or use it unscripted."
        )
    if issubclass(cls, LazyModuleMixin):
        raise UnsupportedModelError(
            f"{cls.__name__} changes its own class when it first runs, which would drop every layer",
            fix="Call the model once, then wrap it.",
        )


def attach(module: nn.Module, layer: Layer, *, outermost_index: int | None = None) -> None:
    """Put `layer` on `module`.

    Args:
        module: any module but a scripted one.
        layer: a layer that is not yet on this module.
        outermost_index: place among the module's layers, 0 is outermost; `None` is innermost.

    Raises:
        ConflictError: the layer is there already, a second layer replaces the module's code, or an instance attribute
            `forward` hides the class from calls.
        UnsupportedModelError: the class cannot be subclassed in place.
    """
    layers = list(layers_of(module))
    if any(layer is other for other in layers):
        raise ConflictError(f"layer {layer.name!r} is on this {type(module).__name__} already", fix="Detach it first.")
    if layer.replace is not None:
        for other in layers:
            if other.replace is not None:
                raise ConflictError(
                    f"{layer.name!r} and {other.name!r} both replace the code of one {type(module).__name__}",
                    fix=f"Unwrap one of them, for example torchwrap.unwrap(model, {other.name!r}).",
                )
    generated = _generated_in(type(module))
    own = module.__dict__.get("forward")
    if layer.where == "inside" and own is not None and (generated is None or own is module.__dict__.get(_UNDER)):
        raise ConflictError(
            f"{type(module).__name__} has an instance attribute `forward` (set by {_origin(own)}), so layer {layer.name!r} would never run",
            fix="Remove that mechanism first (for accelerate hooks: accelerate.hooks.remove_hook_from_module(model, recurse=True); "
            "after Accelerator.prepare: accelerator.unwrap_model(model, keep_fp32_wrapper=False)), or wrap before it is put on.",
        )
    if generated is None:
        check_swappable(module)
        if own is not None:
            module.__dict__[_UNDER] = own
        _set_class(module, _generate(type(module), layer.where == "outside"))
    elif layer.where == "outside" and not getattr(generated, _BOTH):
        if generated is not type(module):
            raise ConflictError(
                f"the class {type(module).__name__} was built on top of a wrapped one, so layer {layer.name!r} has no place outside it",
                fix="Apply this technique first, then the other mechanism.",
            )
        _set_class(module, _generate(getattr(generated, _BASE), both=True))
    layers.insert(len(layers) if outermost_index is None else outermost_index, layer)
    _store(module, tuple(layers))


def detach(module: nn.Module, layer: Layer) -> None:
    """Take `layer` off `module`; with the last layer the module's class and `__dict__` are as before.

    The pass-through class stays if something was built on top of it since (`is_dormant`).

    Raises:
        NotAppliedError: the layer is not on this module.
    """
    layers = layers_of(module)
    rest = tuple(other for other in layers if other is not layer)
    if len(rest) == len(layers):
        raise NotAppliedError(f"layer {layer.name!r} is not on this {type(module).__name__}")
    _store(module, rest)
    if not rest:
        wake(module)


def wake(module: nn.Module) -> None:
    """Give a module without layers its own class back, unless a foreign mechanism sits on top."""
    base = type(module).__dict__.get(_BASE)
    if base is not None and _LAYERS not in module.__dict__ and module.__dict__.get("forward") is module.__dict__.get(_UNDER):
        module.__dict__.pop(_UNDER, None)
        _set_class(module, base)


def _store(module: nn.Module, layers: tuple[Layer, ...]) -> None:
    inside = tuple(layer for layer in layers if layer.where == "inside")
    outside = tuple(layer for layer in layers if layer.where == "outside")
    for key, value in (
        (_LAYERS, layers),
        (_INSIDE, inside),
        (_OUTSIDE, outside),
        (_ONLY_INSIDE, _only(inside)),
        (_ONLY_OUTSIDE, _only(outside)),
    ):
        if value:
            module.__dict__[key] = value
        else:
            module.__dict__.pop(key, None)
    compiled = module.__dict__.get("_compiled_call_impl")
    if isinstance(compiled, _AroundCompiled):
        if _OUTSIDE not in module.__dict__:
            module.__dict__["_compiled_call_impl"] = compiled.compiled
    elif compiled is not None and _OUTSIDE in module.__dict__ and not _calls_slot(compiled):
        module.__dict__["_compiled_call_impl"] = _AroundCompiled(module, compiled)


def _only(layers: tuple[Layer, ...]) -> Layer | None:
    """The layer of a slot that has exactly one, if it needs nothing from the general runner."""
    return layers[0] if len(layers) == 1 and layers[0].traceable and layers[0].replace is None else None


class _AroundCompiled:
    """Outside layers around a call that `module.compile()` captured before they came."""

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self.module, self.compiled = module, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run(self.module.__dict__.get(_OUTSIDE, ()), self.module, self._plain, args, kwargs)

    def _plain(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)


def _calls_slot(compiled: Callable[..., Any]) -> bool:
    """True if `module.compile()` captured the generated class's call, which consults the slot itself."""
    bound = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    return getattr(getattr(bound, "__func__", None), "__module__", None) == __name__


def _origin(function: object) -> str:
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__module__", None) or type(inner).__module__)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    try:
        object.__setattr__(module, "__class__", cls)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} has a memory layout that cannot take a subclass in place: {error}",
            fix="Wrap the modules inside it instead.",
        ) from error


def _generated_in(cls: type) -> type | None:
    return next((entry for entry in cls.__mro__ if _BASE in entry.__dict__), None)


# class -> its generated subclasses, by "has both slots". Weak in the class; a subclass holds its base, so an entry lives as long as
# the process does, which keeps compiled code valid when a model is wrapped again. It holds no instance.
_subclasses: weakref.WeakKeyDictionary[type[nn.Module], dict[bool, type[nn.Module]]] = weakref.WeakKeyDictionary()


def _generate(cls: type[nn.Module], both: bool) -> type[nn.Module]:
    """The subclass of `cls` with the inside slot or with both, made once per class."""
    forms = _subclasses.setdefault(cls, {})
    if both in forms:
        return forms[both]
    namespace = _overrides(cls) | {"forward": _inside_slot(cls)}
    if both:
        namespace["_call_impl"] = _outside_slot(cls)
    namespace |= {_BOTH: both, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, _BASE: cls}
    try:
        metaclass: Any = type(cls)
        made: type[nn.Module] = metaclass(cls.__name__, (cls,), namespace)
    except Exception as error:
        raise UnsupportedModelError(
            f"{cls.__name__} cannot be subclassed in place: {error}", where=f"{cls.__module__}.{cls.__qualname__}",
            fix="Wrap the modules inside it instead.",
        ) from error
    return forms.setdefault(both, made)


# The two slots differ in two names only. They are not one function with parameters: each is the short way for exactly one layer, with
# nothing built and no frame added per call.
def _inside_slot(cls: Any) -> Callable[..., Any]:
    plain_forward = cls.forward

    @functools.wraps(plain_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer = self.__dict__.get(_ONLY_INSIDE)
        if layer is None or switch.on:
            layers = self.__dict__.get(_INSIDE)
            return run(layers, self, plain_forward, args, kwargs) if layers else plain_forward(self, *args, **kwargs)
        args, kwargs = layer.before(self, args, kwargs)
        try:
            return layer.after(self, args, kwargs, plain_forward(self, *args, **kwargs))
        except BaseException as error:
            tell_failed(layer, self, error)
            raise

    return forward


def _outside_slot(cls: Any) -> Callable[..., Any]:
    plain_call = cls._call_impl

    def _call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer = self.__dict__.get(_ONLY_OUTSIDE)
        if layer is None or switch.on:
            layers = self.__dict__.get(_OUTSIDE)
            return run(layers, self, plain_call, args, kwargs) if layers else plain_call(self, *args, **kwargs)
        args, kwargs = layer.before(self, args, kwargs)
        try:
            return layer.after(self, args, kwargs, plain_call(self, *args, **kwargs))
        except BaseException as error:
            tell_failed(layer, self, error)
            raise

    return _call_impl


def _overrides(cls: Any) -> dict[str, Any]:
    """Copying, pickling and moving, each after asking who places the weights."""

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        for owner in owners_of(self):
            _ask(owner, "before_deepcopy", self, memo)
        if id(self) in memo:
            copied: nn.Module = memo[id(self)]
            return copied
        inherited = getattr(cls, "__deepcopy__", None)
        if inherited is not None:
            copied = inherited(self, memo)
            return _told(_adopt(copied, copy.deepcopy(_ours(self), memo)))
        replica: nn.Module = self.__new__(type(self))
        memo[id(self)] = replica
        # A class put on top (a parametrization) may forbid pickling but not copying, so its state is taken from `__dict__`.
        getstate = getattr(self, "__getstate__", None)  # `object` has one only from Python 3.11
        state = getstate() if getstate is not None and type(self).__dict__.get(_BASE) is cls else self.__dict__
        _restore(replica, copy.deepcopy(state, memo))
        return _told(replica)

    reduce_plainly: Callable[..., Any] = cls.__reduce_ex__

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        if type(self).__dict__.get(_BASE) is not cls:
            return reduce_plainly(self, protocol)
        for owner in owners_of(self):
            reduced = _ask(owner, "reduce", self)
            if reduced is not None:
                return reduced
        make, args, *rest = reduce_plainly(self, max(int(protocol), 2))
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_rebuild, (cls, getattr(type(self), _BOTH) if _LAYERS in self.__dict__ else None), *rest)
        # The class builds itself in its own way: let it, and put the layers on what comes out.
        return (_rebuild_own_way, (make, args, _ours(self)), *rest)

    def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for owner in owners_of(self):
            if hasattr(owner, "convert"):
                converted: nn.Module = owner.convert(self, fn, recurse, MethodType(cls._apply, self))
                return converted
        moved: nn.Module = cls._apply(self, fn, recurse)
        return moved

    def to_empty(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        _refuse(self, "to_empty")
        emptied: nn.Module = cls.to_empty(self, *args, **kwargs)
        return emptied

    def share_memory(self: nn.Module) -> nn.Module:
        _refuse(self, "share_memory")
        shared: nn.Module = cls.share_memory(self)
        return shared

    made = (__deepcopy__, __reduce_ex__, _apply, to_empty, share_memory)
    for function in made:
        functools.update_wrapper(function, getattr(cls, function.__name__, function))
    return {function.__name__: function for function in made}


def _ask(owner: Any, method: str, *args: Any) -> Any:
    found = getattr(owner, method, None)
    return found(*args) if found is not None else None


def _told(copied: nn.Module) -> nn.Module:
    for owner in owners_of(copied):
        _ask(owner, "after_deepcopy", copied)
    return copied


def _refuse(module: nn.Module, verb: str) -> None:
    # The verb is called on one module and reaches all below it.
    for part in module.modules():
        for owner in owners_of(part):
            _ask(owner, "refuse", part, verb)


def _restore(module: nn.Module, state: Any) -> None:
    setstate = getattr(module, "__setstate__", None)
    if setstate is not None and not isinstance(state, tuple):
        setstate(state)
        return
    plain, slots = state if isinstance(state, tuple) else (state, None)
    module.__dict__.update(plain or {})
    for name, value in (slots or {}).items():
        object.__setattr__(module, name, value)


def _rebuild(cls: type[nn.Module], both: bool | None) -> nn.Module:
    """An empty instance for `pickle` to fill; a class that was only dormant (`None`) comes back as itself."""
    target = cls if both is None else _generate(cls, both)
    return target.__new__(target)


def _rebuild_own_way(make: Callable[..., nn.Module], args: tuple[Any, ...], ours: dict[str, Any]) -> nn.Module:
    return _adopt(make(*args), ours)


def _ours(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if key.startswith(_LAYERS)}


def _adopt(module: nn.Module, ours: dict[str, Any]) -> nn.Module:
    """Put layers and records on a copy whose class made it in its own way (`GraphModule`) and may have dropped them."""
    if _LAYERS in ours:
        if _generated_in(type(module)) is None:
            _set_class(module, _generate(type(module), _OUTSIDE in ours))
        for key, value in ours.items():
            module.__dict__.setdefault(key, value)
    return module

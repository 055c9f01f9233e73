"""Behaviour on one module: the `Layer` base class, per-call state, and the runner that calls layers in order.

A layer sees a call before and after the module's own code. With layers A (outermost) and B, the order is
`A.before, B.before, forward, B.after, A.after`. If anything raises, every layer whose `before` had returned and whose `after` had
not gets `failed` once, innermost first, and the exception goes on. The runner is a plain nested `try`, which Dynamo traces as one graph.

Layers with `traceable=False` (they move weights, take locks, write files) are kept out of traces: the sandwich is run in a frame that
Dynamo skips, each layer call in one that it does not look into, and the module's own forward is compiled as a graph of its own.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

__all__ = ["CallState", "Layer", "Placement", "held_back", "run", "runs_inside", "suspended"]

# torch 2.13: what Dynamo does with the frames that this thread calls now; None outside compiled functions, also without Dynamo loaded.
# There is no public question for it (it is in torch 2.6 and later); see test_layers_stay_hidden_when_dynamo_gives_up.
_watching_frames: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback

_logger = logging.getLogger("torchwrap.layer")

Call = Callable[..., Any]
"""A module's own code as a plain function: `call(module, *args, **kwargs)`."""


class Layer:
    """What a technique does on one module; override what you need.

    A traceable layer must not read a Python number that changes between calls: Dynamo guards on it and recompiles every time.
    An `inside` layer runs again when activation checkpointing recomputes its module, so it must be idempotent, and its
    `failed` must stay quiet: checkpointing ends a recompute early by an exception of its own.

    Attributes:
        name: name of the technique the layer belongs to.
        where: `inside` stands around `forward` (within torch hooks and checkpointing); `outside` around the whole call, once.
        traceable: True if `before` and `after` only compute on tensors and can be compiled with the module.
        essential: True if the model is unusable without the layer (it makes weights present); `disabled` leaves it running.
        owner: who places the module's weights, if the layer belongs to a placement technique.
        exactness: of what the layer computes, if not that of its technique.

    Example:
        >>> import torch
        >>> from torchwrap.core.layer import Layer
        >>> from torchwrap.core.swap import attach, detach
        >>> class Double(Layer):
        ...     def after(self, module, args, kwargs, output):
        ...         return 2 * output
        >>> module, double = torch.nn.Identity(), Double()
        >>> attach(module, double)
        >>> float(module(torch.tensor(3.0)))
        6.0
        >>> detach(module, double)
    """

    name: str = ""
    where: Literal["inside", "outside"] = "inside"
    traceable: bool = True
    essential: bool = False
    owner: Placement | None = None
    exactness: ClassVar[str] = ""
    replace: ClassVar[Callable[..., Any] | None] = None
    """Optional method `replace(self, module, call, args, kwargs) -> output` in place of the module's own code, `call(*args, **kwargs)`."""

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments the call goes on with."""
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output the call goes on with; `args` and `kwargs` are what `before` returned."""
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        """Release what `before` took; called once if the call raised afterwards. Must not raise."""


class Placement(Protocol):
    """Optional methods of a `Layer.owner`; the generated class calls those that are there."""

    def convert(
        self, module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool, original: Callable[..., nn.Module]
    ) -> nn.Module:
        """Stand in for `nn.Module._apply` (`to`, `half`, `cuda`, ...); `original(fn, recurse)` is the plain one."""
        ...

    def refuse(self, module: nn.Module, verb: str) -> None:
        """Raise `UnsupportedModelError` if `verb` (`to_empty`, `share_memory`) cannot be done."""
        ...

    def before_deepcopy(self, module: nn.Module, memo: dict[int, Any]) -> None:
        """Prepare `memo` before the module's `__dict__` is copied."""
        ...

    def after_deepcopy(self, module: nn.Module) -> None:
        """Called of the copy's owner with the copied module."""
        ...

    def reduce(self, module: nn.Module) -> tuple[Any, ...] | None:
        """Stand in for `__reduce_ex__` (pickle, `torch.save`); `None` for the ordinary way."""
        ...

    def call_lock(self) -> AbstractContextManager[Any]:
        """Held while layers are changed, so that a running forward ends first."""
        ...


class _Stack(threading.local):
    """One stack per thread. It is there from the start: an attribute that appears later would make Dynamo compile twice."""

    def __init__(self) -> None:
        self.values: tuple[Any, ...] = ()


class CallState:
    """Values of the calls that are running now in this thread, innermost last: what a layer carries from `before` to `after`.

    A layer keeps one and pushes in `before`, pops in `after` and `failed`. Recursion and shared modules nest, threads do not meet. A
    copy (deepcopy, pickle) starts empty.
    """

    def __init__(self) -> None:
        self._stack = _Stack()

    def push(self, value: object) -> None:
        """Begin a call with this value."""
        self._stack.values = (*self._stack.values, value)

    def peek(self, default: Any = None) -> Any:
        """The value of the innermost running call, or `default` if none runs."""
        values = self._stack.values
        return values[-1] if values else default

    def pop(self) -> Any:
        """End the innermost call and return its value; `None` if none runs."""
        values = self._stack.values
        if not values:
            return None
        self._stack.values = values[:-1]
        return values[-1]

    def __reduce__(self) -> tuple[type[CallState], tuple[()]]:
        return (CallState, ())


class _Suspension(threading.local):
    """Layers that `disabled` holds back in this thread."""

    layers: tuple[Layer, ...] = ()


class _Switch:
    """One flag read per call: does any thread hold layers back? Only then is the thread's own list looked at."""

    __slots__ = ("on", "users")

    def __init__(self) -> None:
        self.on: bool = False
        self.users: int = 0


switch: _Switch = _Switch()
_suspension = _Suspension()
_switch_lock = threading.Lock()


def held_back() -> tuple[Layer, ...]:
    """Layers that calls made by this thread pass over now; for `suspended` in a thread that works for this one."""
    return _suspension.layers


@contextmanager
def suspended(layers: tuple[Layer, ...]) -> Iterator[None]:
    """Within the block, calls made by this thread pass these layers over; nests; restored on error."""
    held = tuple(layer for layer in layers if not layer.essential)
    previous = _suspension.layers
    with _switch_lock:
        switch.users += 1
        switch.on = True
    _suspension.layers = (*previous, *held)
    try:
        yield
    finally:
        _suspension.layers = previous
        with _switch_lock:
            switch.users -= 1
            switch.on = switch.users > 0


def run(layers: tuple[Layer, ...], module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `call(module, *args, **kwargs)` inside `layers`, outermost first."""
    if switch.on:
        held = _suspension.layers
        layers = tuple(layer for layer in layers if not any(layer is other for other in held))
    # Not only while Dynamo traces this very frame: one that it has given up on (its recompile limit, which blocks that were compiled by
    # themselves use up) runs as it is, and Dynamo then looks into what it calls.
    if torch.compiler.is_dynamo_compiling() or _watching_frames() is not None:
        for layer in layers:
            if not layer.traceable:
                return _breaks()[0](layers, module, call, args, kwargs)
    return _nest(layers, 0, module, call, args, kwargs)


def _nest(
    layers: tuple[Layer, ...], depth: int, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if depth == len(layers):
        for layer in layers:
            if layer.replace is not None:
                return layer.replace(module, call.__get__(module), args, kwargs)
        return call(module, *args, **kwargs)
    layer = layers[depth]
    args, kwargs = layer.before(module, args, kwargs)
    try:
        return layer.after(module, args, kwargs, _nest(layers, depth + 1, module, call, args, kwargs))
    except BaseException as error:
        tell_failed(layer, module, error)
        raise


def runs_inside(engine: object) -> bool:
    """Whether this thread is in a call that layers with this `engine` are around. Cost: a walk up the Python stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _nest.__code__ or frame.f_code is _nest_untraced.__code__:
            around = frame.f_locals
            passed = around["layers"][: around["depth"]] if "depth" in around else [entry[0] for entry in around.get("entered", ())]
            if any(getattr(layer, "engine", None) is engine for layer in passed):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def tell_failed(layer: Layer, module: nn.Module, error: BaseException) -> None:
    """Call `layer.failed`; what it raises is logged, so that the user sees the first error."""
    try:
        layer.failed(module, error)
    except Exception:
        _logger.exception("layer %r of %s raised in failed()", layer.name, type(module).__name__)


# Made on first use, and Dynamo is at work then: importing Dynamo costs seconds that an eager program must not pay.
_made: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def _breaks() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`_nest_untraced` in a frame that Dynamo skips but whose callees it compiles, and a caller whose callees it leaves alone."""
    global _made
    if _made is None:
        disable: Callable[..., Any] = torch.compiler.disable
        _made = (disable(_nest_untraced, recursive=False), disable(_call_untraced))
    return _made


def _call_untraced(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _nest_untraced(
    layers: tuple[Layer, ...], module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The same nesting with every layer call kept from Dynamo; `call` is left to it."""
    hidden = _breaks()[1]
    entered: list[tuple[Layer, tuple[Any, ...], dict[str, Any]]] = []
    try:
        for layer in layers:
            args, kwargs = hidden(layer.before, module, args, kwargs)
            entered.append((layer, args, kwargs))
        replacing = next((layer.replace for layer in layers if layer.replace is not None), None)
        output = call(module, *args, **kwargs) if replacing is None else hidden(replacing, module, call.__get__(module), args, kwargs)
        while entered:
            layer, args, kwargs = entered[-1]
            output = hidden(layer.after, module, args, kwargs, output)
            entered.pop()
        return output
    except BaseException as error:
        for layer, _, _ in reversed(entered):
            hidden(tell_failed, layer, module, error)
        raise

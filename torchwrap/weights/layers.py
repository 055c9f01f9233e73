"""What a technique that streams weights attaches to modules: one layer for each unit, one for each row table, one for the root.

They sit in the forward slot ("inside"), which runs again when activation checkpointing recomputes, those of units also around the whole
call. They are essential: disabling them would leave the placeholders, and changes no result anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from torchwrap.core import errors
from torchwrap.core.layer import CallState, Layer, runs_inside
from torchwrap.core.tensors import bind
from torchwrap.storage.heap import FreedBlocks
from torchwrap.stream.pieces import check_untouched
from torchwrap.stream.rows import RowTable
from torchwrap.stream.units import Piece, Unit
from torchwrap.stream.watch import AbsentUseGuard, can_watch
from torchwrap.weights.footprint import staying_bytes, table_bytes
from torchwrap.weights.measure import Meter
from torchwrap.weights.saved import Modes, saving_for
from torchwrap.weights.transforms import refuse_transforms

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["RootLayer", "RowLayer", "UnitLayer", "WeightsLayer"]


class WeightsLayer(Layer):
    """What all of them have in common: the handle, and a value for each running call."""

    traceable = False
    essential = True

    def __init__(self, handle: WeightsHandle | None) -> None:
        self.owner: WeightsHandle | None = handle
        self._calls = CallState()

    @property
    def handle(self) -> WeightsHandle:
        """The live object it works for."""
        assert self.owner is not None
        return self.owner

    @property
    def engine(self) -> object:
        """By which `core.layer.runs_inside` knows the layers of one model."""
        return None if self.owner is None else self.owner.engine or self.owner

    def _unlock(self, lock: threading.RLock, modes: Modes, error: BaseException) -> None:
        """The outermost call in this thread is over: let go of the model's lock, and of all that an interrupt left of the call."""
        engine = self.handle.engine
        try:
            modes.restore()  # first: what comes next may wait for a disk, and be interrupted again
            if engine is not None:
                engine.ended_by(error)
        finally:
            while lock._is_owned():  # type: ignore[attr-defined]
                lock.release()


class _Pass:
    """A call of the whole model: what has to be ended with it.

    Attributes:
        lock: the model's, as it was when the call began.
        outermost: this thread did not have it before.
        modes: of the thread, as they were then.
        locked: this call took it.
        guard: watches for misplaced weights, if anything does.
    """

    __slots__ = ("guard", "lock", "locked", "modes", "outermost")

    def __init__(self, lock: threading.RLock) -> None:
        self.lock, self.outermost = lock, not lock._is_owned()  # type: ignore[attr-defined]
        self.modes = Modes()
        self.locked = False
        self.guard: AbsentUseGuard | None = None

    def unwatch(self) -> bool:
        """End the watching; whether the call was watched."""
        watched = self.guard is not None and self.guard in _get_current_dispatch_mode_stack()
        if watched and self.guard is not None:
            self.guard.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return watched


class RootLayer(WeightsLayer):
    """Holds the model's lock for a whole forward, counts passes, and watches the first one in each mode."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        handle = self.handle
        if handle.engine is not None:
            handle.engine.check_process()
            refuse_transforms("")
        handle.backward.settle()
        if handle.lock._is_owned() and not runs_inside(self.engine):  # type: ignore[attr-defined]
            while (left := self._calls.pop()) is not None:  # by an interrupt just behind the end of this function
                left.modes = Modes()  # those of then are nobody's any more
                self._cut(left, module, KeyboardInterrupt())
        running = _Pass(handle.lock)
        try:
            running.locked = running.lock.acquire()
            if handle.engine is not None and running.outermost:
                handle.engine.count_slots()
            if handle.stepping:
                handle.refuse_mixture()
            handle.hide_lent()
            handle.handed.check(handle.pieces)
            if module.training in handle.unwatched and can_watch():
                running.guard = AbsentUseGuard((piece for piece in handle.pieces if not piece.resident), handle.units, module)
                running.guard.__enter__()  # type: ignore[no-untyped-call]
            if torch.is_grad_enabled():
                handle.activations.pass_begins()
            handle.backward.pass_begins()
            handle.pass_begun(module)
            self._calls.push(running)
        except BaseException as error:
            self._cut(running, module, error)
            raise
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        handle = self.handle
        running: _Pass = self._calls.peek()
        if running.guard is not None and running.guard.error is not None:
            raise running.guard.error  # the model swallowed it and went on computing with NaN
        handle.backward.pass_ends()
        if running.unwatch():
            handle.unwatched.discard(module.training)
        handle.passes += 1
        handle.pass_ended(module, whole=True)
        if torch.is_grad_enabled():
            handle.backward.watch_root(output)
        running.locked = False
        running.lock.release()
        self._calls.pop()
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        running: _Pass | None = self._calls.pop()
        if running is not None:
            self._cut(running, module, error)

    def _cut(self, running: _Pass, module: nn.Module, error: BaseException) -> None:
        """An error ended the call, perhaps while it began or ended."""
        handle = self.handle
        try:
            handle.backward.pass_ends()
            running.unwatch()
            if handle.meter is not None and running.outermost:
                handle.meter.pass_cut()
            elif running.locked:
                handle.pass_ended(module, whole=False)
        finally:
            if running.outermost:
                self._unlock(running.lock, running.modes, error)
            elif running.locked:
                running.lock.release()


class UnitLayer(WeightsLayer):
    """Makes a unit's weights present while its module runs."""

    def __init__(self, handle: WeightsHandle | None, unit: int, where: Literal["inside", "outside"]) -> None:
        super().__init__(handle)
        self.unit: int = unit
        self.where: Literal["inside", "outside"] = where

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.handle.stepping:
            self.handle.refuse_mixture()
        if self.where == "inside":
            self.handle.backward.used(self.unit)
        engine = self.handle.engine
        if engine is None:
            self._calls.push(None)
            return args, kwargs
        unit = engine.units[self.unit]
        refuse_transforms(unit.name)
        if self.handle.lent:
            self.handle.hide_lent()
        roomy = unit.kind == "leaf" and _copies_weight(args)
        roomy = roomy and _room_of_gradients(self.handle) < max(piece.nbytes for piece in unit.pieces)
        meter = self._meter()
        if meter is not None:
            meter.fetching(self.unit)
        scope = _Scope(self.handle, unit)
        try:
            engine.acquire(unit, roomy=roomy, whole=torch.is_grad_enabled())
            scope.begin()
            if meter is not None:
                meter.computing(self.unit, alone=roomy and not engine.arena.separate)
            self._calls.push(scope)
        except BaseException as error:
            self._cut(scope, error)
            raise
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        scope: _Scope | None = self._calls.peek()
        meter = self._meter()
        if meter is not None and meter.apart:  # the end of what the device was given, and nothing of the host's
            meter.computed(self.unit)
        written = scope.close(module.training) if scope is not None else None
        if meter is not None:
            meter.computed(self.unit)
        if written is not None and scope is not None:
            raise errors.UnsupportedModelError(
                f"{self.name}: the forward of {scope.unit.name} wrote to its weight {written.name}, which is streamed: that is lost",
                where=written.name,
                fix=f'Keep it in memory: pin=("{written.name}",).',
            )
        self._calls.pop()
        if scope is not None and self.where == "outside" and torch.is_grad_enabled():
            self.handle.backward.watch(scope.unit, output)
        return output

    def _meter(self) -> Meter | None:
        """What takes the time of this use, if anything does."""
        meter = self.handle.meter if self.where == "outside" else None
        return meter if meter is not None and meter.running else None

    def failed(self, module: nn.Module, error: BaseException) -> None:
        scope: _Scope | None = self._calls.pop()
        if scope is not None:
            self._cut(scope, error)

    def _cut(self, scope: _Scope, error: BaseException) -> None:
        """An error ended the use, perhaps while it began or ended."""
        try:
            scope.close(None)
        finally:
            if scope.outermost:
                self._unlock(scope.lock, scope.modes, error)


class RowLayer(WeightsLayer):
    """Stands in for an embedding's forward: reads the rows that the ids name."""

    def __init__(self, handle: WeightsHandle | None, unit: int) -> None:
        super().__init__(handle)
        self.unit = unit

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.handle.stepping:
            self.handle.refuse_mixture()
        self.handle.backward.used(self.unit)
        table = self.handle.tables.get(self.unit)
        if table is None:
            return call(*args, **kwargs)
        refuse_transforms(table.piece.name)
        assert isinstance(module, nn.Embedding)
        with self.handle.lock:
            check_untouched(table.piece)
            if not args and "input" not in kwargs:
                return call(*args, **kwargs)  # torch's own message about the missing argument
            ids = args[0] if args else kwargs["input"]
            with self.handle.unchanging(table.piece):
                if self.handle.plain_table(module):
                    output = table.forward(module, ids)
                else:
                    output = self._through_own_forward(module, table, call, ids, args, kwargs)
        if torch.is_grad_enabled() and table.piece.parameter.requires_grad:
            self.handle.backward.watch_lookup(output, table_bytes(self.handle.units, table.piece))
        return output

    def _through_own_forward(
        self,
        module: nn.Embedding,
        table: RowTable,
        call: Callable[..., Any],
        ids: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """For embeddings that work on the rows they looked up (a scale): let their own forward look up in the rows that were read."""
        piece = table.piece
        if torch.is_grad_enabled() and module.weight.requires_grad:
            # The gradient needs the whole table's shape, so the whole table is present for this call.
            with self.handle.lend(module, ("weight",), False) as real:
                return _called_with(module, real["weight"], piece, call, args, kwargs)
        wanted, inverse = torch.unique(ids.detach().reshape(-1).cpu(), return_inverse=True)
        if wanted.numel() and not (int(wanted[0]) >= 0 and int(wanted[-1]) < piece.shape[0]):
            raise IndexError("index out of range in self")
        rows = table.rows(wanted)
        if module.padding_idx is not None and module.padding_idx >= len(rows):
            # torch checks padding_idx against the table it sees; the rows added here are never looked up.
            rows = torch.cat([rows, rows.new_zeros(module.padding_idx + 1 - len(rows), *rows.shape[1:])])
        local = inverse.reshape(ids.shape).to(ids.device, ids.dtype)
        new_args, new_kwargs = ((local, *args[1:]), kwargs) if args else (args, {**kwargs, "input": local})
        return _called_with(module, rows.to(ids.device), piece, call, new_args, new_kwargs)


def _called_with(
    module: nn.Embedding, weight: torch.Tensor, piece: Piece, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    bind(module.weight, weight)
    try:
        return call(*args, **kwargs)
    finally:
        bind(module.weight, piece.absent)


class _Scope:
    """One use of a unit: autocast's cache off, saved weights replaced by notes, and the release at the end."""

    __slots__ = ("_cache", "_engine", "_handle", "_hooks", "_open", "lock", "modes", "outermost", "unit")

    def __init__(self, handle: WeightsHandle, unit: Unit) -> None:
        assert handle.engine is not None
        self._handle, self._engine, self.unit = handle, handle.engine, unit
        self.lock: threading.RLock = handle.engine.lock
        self.outermost: bool = not self.lock._is_owned()  # type: ignore[attr-defined]
        self.modes = Modes()
        self._open = self._cache = False
        self._hooks: saving_for | None = None

    def begin(self) -> None:
        """The unit was acquired."""
        handle, unit = self._handle, self.unit
        self._open = True
        # With its cache on, autocast keeps a cast copy of every weight until the region ends: all the memory that streaming saves. It
        # is needed only where a weight is used again in the region: one copy then collects the gradients of all uses, in its own type.
        self._cache = torch.is_autocast_cache_enabled() and not (handle.keeps_casts and unit.kind in ("block", "expert"))
        if self._cache:
            torch.set_autocast_cache_enabled(False)
        if torch.is_grad_enabled():
            self._hooks = saving_for(handle)
            self._hooks.__enter__()

    def close(self, training: bool | None) -> Piece | None:
        """End the use, once; a weight that the unit's own module wrote to, if there is one."""
        if not self._open:
            return None
        if self._hooks is not None:
            self._hooks.__exit__()
        if self._cache:
            torch.set_autocast_cache_enabled(True)
        self._open = False
        return self._engine.release(self.unit, training)


def _copies_weight(args: tuple[Any, ...]) -> bool:
    """Whether a matrix product with this input keeps a reordered copy of its weight: several rows, or one cut out of a larger tensor."""
    x = args[0] if args else None
    if not isinstance(x, torch.Tensor) or not x.numel() or not x.dim():
        return False
    return x.numel() > x.shape[-1] or x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _room_of_gradients(handle: WeightsHandle) -> int:
    """Bytes that a forward may use because gradients will need them in the backward after it, and only then.

    Not those of gradients of weights that stay: they may be there still, from the step before. Nor what freed tensors hold of them; what is
    kept beyond this optimizer's bound is in that of others.
    """
    optimizer = handle.optimizer() if handle.driven and torch.is_grad_enabled() else None
    footprint = optimizer.footprint() if optimizer is not None else None
    if footprint is None or not (footprint.overlaps and footprint.grows):
        return 0
    staying = staying_bytes(handle.units, handle.pieces, {piece.index for piece in handle.pieces if piece.resident})
    return footprint.held - staying - min(FreedBlocks.counts()["bytes"], footprint.freed)

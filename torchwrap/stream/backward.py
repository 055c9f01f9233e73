"""Following a backward through the units, in reverse.

Each unit's forward leaves a hook on its outputs. Autograd calls it when their gradient is known, before it runs any node of the unit and
before it asks for anything that the unit saved: the moment to let go of the unit behind and to bring this one's weights. Nodes run in
the reverse order of their creation, so when that hook fires the nodes of the unit behind are done.

Nothing here is needed for a right result. A weight that is asked for while its unit is not held (several backwards at once, create_graph,
a hook that never fired) is read again as a private copy; see saved.py. Gathering a submodule's parameters before its backward and
releasing them after it is from Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", 2021,
section 7.1; the trigger is ours.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from torchwrap.stream.engine import Engine
from torchwrap.stream.units import Unit

__all__ = ["Backward", "BackwardClock", "BackwardListener", "Run", "is_nested"]


class BackwardListener(Protocol):
    """Who wants to know how far a backward has come. Called in the thread that runs the hooks, with no lock held."""

    def backward_begun(self) -> None:
        """The outermost backward comes to the model; no node there has run. What is raised here ends it."""
        ...

    def unit_done(self, unit: Unit) -> None:
        """Every node of the unit that this backward has reached has run. A unit used several times may be reported several times."""
        ...

    def table_reached(self, nbytes: int) -> None:
        """The gradient of a lookup in a table is known; that of the table comes next and takes so many bytes."""
        ...

    def backward_done(self, error: BaseException | None) -> None:
        """The outermost backward is over. `error` tells that it was cut short; then the call comes with the next use of the model."""
        ...


class BackwardClock(Protocol):
    """Who takes the time of a backward. Called in the thread that runs the hooks, with no lock held."""

    def backward_begun(self) -> None:
        """The backward is about to reach the model."""
        ...

    def fetching(self, unit: int) -> None:
        """A unit's weights are about to be brought in."""
        ...

    def computing(self, unit: int) -> None:
        """They are present; its nodes come now."""
        ...

    def computed(self, unit: int) -> None:
        """Its nodes have run."""
        ...

    def backward_ended(self, error: BaseException | None) -> None:
        """The backward is over; see `BackwardListener.backward_done`."""
        ...


class Backward:
    """The backward that runs through a model now, if one does.

    Args:
        engine: holds the units; None where every weight is resident.

    Attributes:
        listeners: told of every finished unit and of the end.
        clock: takes the time, if anything does.
    """

    def __init__(self, engine: Engine | None) -> None:
        self.listeners: list[BackwardListener] = []
        self.clock: BackwardClock | None = None
        self._engine = engine
        self._timeline = engine.timeline if engine is not None else None
        self._since: dict[int, float] = {}  # of open units, if that is recorded
        self._open: list[Unit] = []  # units whose nodes are running: a block, and the expert inside it
        self._run: Run | None = None
        self._closing: int | None = None  # thread that cleans up after it
        self._begun = threading.Lock()
        self._uses: dict[int, int] = {}  # since the forward after the last backward began, by unit
        self._apart: set[int] = set()  # units used where reentrant checkpointing builds no graph
        self._old = False
        self._idle = False  # a forward of the whole model runs for which nobody wants gradients

    def pass_begins(self) -> None:
        """A forward of the whole model begins, in the thread that calls this."""
        self._idle = bool(self.listeners) and not torch.is_grad_enabled() and not is_nested()

    def pass_ends(self) -> None:
        """It is over."""
        self._idle = False

    def used(self, unit: int) -> None:
        """A forward uses a unit, or computes it again. Cost: without a gradient a walk up the Python stack, if anybody listens."""
        if not self.listeners or self.runs_here:
            return
        apart = not torch.is_grad_enabled()
        if apart and (self._idle or not is_nested()):
            return  # nothing comes back through it; checkpointing alone does not tell, it runs in evaluations as well
        if self._old:
            self._uses, self._apart, self._old = {}, set(), False
        self._uses[unit] = self._uses.get(unit, 0) + 1
        if apart:
            self._apart.add(unit)

    def comes_in_parts(self, units: Iterable[int]) -> bool:
        """Whether a gradient of a weight of these units may be accumulated several times: in a backward of its own for some of its uses."""
        each = list(units)
        return not self._apart.isdisjoint(each) and sum(self._uses.get(unit, 0) for unit in each) > 1

    @property
    def running(self) -> bool:
        """Whether a backward runs through the model now, so that listeners will hear of its end."""
        run = self._run
        return run is not None and not run.over

    @property
    def runs_here(self) -> bool:
        """Whether it runs in this thread: what is called here now is computed again for a gradient."""
        run = self._run
        return run is not None and not run.over and run.thread == threading.get_ident()

    @property
    def nested(self) -> bool:
        """Whether the backward that is followed lies in another one (reentrant checkpointing), so that its end is not the end."""
        run = self._run
        return run is not None and run.nested

    def watch(self, unit: Unit, output: Any) -> None:
        """Follow the backward into this use of the unit through what it returned."""
        self._hook(output, lambda _: self._enter(unit))

    def watch_lookup(self, output: Any, nbytes: int) -> None:
        """Notice that the gradient of a table follows, which takes `nbytes` while it is made."""
        if self.listeners:
            self._hook(output, lambda _: self._reach(nbytes))

    def watch_root(self, output: Any) -> None:
        """Notice the outermost backward before it reaches a unit; with reentrant checkpointing those run in backwards of their own."""
        self._hook(output, lambda _: self._begin())

    def settle(self) -> None:
        """Clean up after a backward that an exception ended. Cheap when there is none."""
        run = self._run
        if run is not None and run.over and self._closing in (None, threading.get_ident()):
            self._close(run, RuntimeError("the backward was ended by an exception before all of its nodes had run"))

    def _hook(self, output: Any, fn: Callable[[torch.Tensor], None]) -> None:
        # Leaves keep their hooks for ever, and belong to the user.
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None]
        if tensors:
            torch.autograd.graph.register_multi_grad_hook(tensors, fn, mode="any")

    def _enter(self, unit: Unit) -> None:
        """The backward comes to a unit."""
        if not self._ours():
            return
        self._leave(unit)
        if not any(unit is other for other in self._open):
            self._open.append(unit)
        # With create_graph=True what is saved becomes part of a new graph: private copies.
        if self._engine is not None and not torch.is_grad_enabled():
            if self.clock is not None:
                self.clock.fetching(unit.index)
            self._engine.hold(unit)
            if self.clock is not None:
                self.clock.computing(unit.index)
        if self._timeline is not None:
            self._since.setdefault(unit.index, time.monotonic())

    def _begin(self) -> None:
        self._ours()

    def _reach(self, nbytes: int) -> None:
        if self._ours():
            for listener in self.listeners:
                listener.table_reached(nbytes)

    def _ours(self) -> bool:
        """Begin to follow the running backward, unless another one is followed already in another thread."""
        self.settle()
        with self._begun:
            new = self._run is None
            if self._run is None:
                self._run = Run.followed(lambda run: self._close(run, None))
            ours = self._run.thread == threading.get_ident()
        for listener in self.listeners if new else ():
            listener.backward_begun()
        if new and self.clock is not None:
            self.clock.backward_begun()
        return ours

    def _leave(self, unit: Unit | None) -> None:
        """Let go of all open units but those that `unit` lies in."""
        around = self._around(unit)
        done = [other for other in self._open if other.index not in around]
        self._open = [other for other in self._open if other.index in around]
        for other in reversed(done):
            if self.clock is not None:
                self.clock.computed(other.index)
            if self._engine is not None:
                self._engine.unhold(other)
            if self._timeline is not None and (since := self._since.pop(other.index, None)) is not None:
                self._timeline.add("backward", other.name, since, time.monotonic(), 0)
        for other in reversed(done):
            for listener in self.listeners:
                listener.unit_done(other)

    def _around(self, unit: Unit | None) -> set[int]:
        around: set[int] = set()
        while unit is not None and unit.index not in around:
            around.add(unit.index)
            unit = self._engine.units[unit.parent] if self._engine is not None and unit.parent is not None else None
        return around

    def _close(self, run: Run, error: BaseException | None) -> None:
        with self._begun:
            if self._run is not run:
                return
            self._closing = threading.get_ident()
        try:
            if error is None:
                self._leave(None)
            else:
                self._open.clear()
                self._since.clear()
                if self._engine is not None:
                    self._engine.recover()
            if self.clock is not None:
                self.clock.backward_ended(error)
            for listener in self.listeners:
                listener.backward_done(error)
            self._old, self._run = True, None  # last: what an interrupt kept from being done, `settle` does
        finally:
            self._closing = None


def is_nested() -> bool:
    """Called from a hook: whether the backward that runs was begun by a node of another. Cost: a walk up the Python stack."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_globals.get("__name__") == "torch.autograd.function":
            return True
        frame = frame.f_back
    return False


class Run:
    """One backward, the one that runs when this is made.

    Attributes:
        over: autograd has forgotten it, whether it came to its end or raised.
        thread: that its hooks run in.
        nested: it lies inside one that we missed.
    """

    __slots__ = ("nested", "over", "thread")

    def __init__(self) -> None:
        self.over = False
        self.nested: bool = is_nested()
        self.thread: int = threading.get_ident()

    @classmethod
    def followed(cls, ended: Callable[[Run], None]) -> Run:
        """Called from a hook; `ended` is called when the running backward comes to its end, and not if it raises."""
        run = cls()
        torch.autograd.Variable._execution_engine.queue_callback(_End(run, ended))
        return run


class _End:
    """What autograd calls at the end of a backward, and destroys uncalled when the backward raises."""

    __slots__ = ("_ended", "_run")

    def __init__(self, run: Run, ended: Callable[[Run], None]) -> None:
        self._run, self._ended = run, ended

    def __call__(self) -> None:
        self._run.over = True  # also if what follows raises, and a traceback keeps this alive
        self._ended(self._run)

    def __del__(self) -> None:
        self._run.over = True

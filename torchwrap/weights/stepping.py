"""Keeping ordinary optimizers away from weights that are not there.

`torch.optim` writes into the parameters themselves. A parameter whose weights are away shows one element expanded to its shape: most
kernels refuse to write to it, but fused ones take its address and its length and write past the element (torch 2.13 on the CPU, measured:
the heap is damaged). So every step is looked at before it begins, with torch's own hook for that, as long as the model is wrapped. An
optimizer that knows where the weights of some models are is held to those: another model, or another part, may have been wrapped since.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from torchwrap.core import errors
from torchwrap.stream.units import Piece
from torchwrap.weights.outside import look_at_reads

if TYPE_CHECKING:
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["STEPS_ABSENT_WEIGHTS", "refuse_calls", "refuse_others", "warn_of_mixture", "watch_steps"]

STEPS_ABSENT_WEIGHTS = "steps_absent_weights"
"""An optimizer with a method of this name says of which handles it knows where the weights are."""


_watched: list[tuple[weakref.ref[WeightsHandle], RemovableHandle]] = []
_lock = threading.Lock()


def watch_steps(handle: WeightsHandle) -> Callable[[], None]:
    """Refuse steps of ordinary optimizers that would write to the handle's absent weights; calling what is returned ends that."""
    with _lock:
        # Those of models that were collected go here and not in a finalizer: that could run inside a step, which walks the same table.
        for entry in [entry for entry in _watched if entry[0]() is None]:
            _watched.remove(entry)
            entry[1].remove()
        _watched.append((weakref.ref(handle), hook := register_optimizer_step_pre_hook(_Watch(handle))))
        look_at_reads(True)

    def end() -> None:
        with _lock:
            _watched[:] = [entry for entry in _watched if entry[1] is not hook]
            hook.remove()
            if not _watched:
                look_at_reads(False)

    return end


def refuse_others(parameters: Iterable[torch.Tensor], handle: WeightsHandle | None) -> None:
    """Raise `ConflictError` if the weight of one of these is away with another handle than this one."""
    others = [other for entry in list(_watched) if (other := entry[0]()) is not None and other is not handle]
    for parameter in parameters if others else ():
        for other in others:
            piece = other.piece_of(parameter)
            if piece is not None and not piece.resident:
                raise _wrapped_since(piece)


def refuse_calls(handle: WeightsHandle, who: object) -> None:
    """Have calls of the model refused, but for what the backward computes again, until `who` leaves `handle.stepping`.

    Calls that run in other threads end first: they began with the weights of the step before.

    Raises:
        ConflictError: one did not end within `io_timeout_s`; nothing is refused then.
    """
    if who in handle.stepping:
        return
    lock = handle.lock
    mine = lock._is_owned()  # type: ignore[attr-defined]
    try:
        if not lock.acquire(timeout=handle.config.io_timeout_s):
            raise errors.ConflictError(
                "OffloadedOptimizer: weights are to change, and a call of the model has been running for "
                f"{handle.config.io_timeout_s:g} s in another thread",
                where="forward",
                fix="Let calls in other threads end before backward() and step().",
            )
        handle.stepping.add(who)
        if mine:
            lock.release()
    finally:
        if not mine and lock._is_owned():  # type: ignore[attr-defined]
            lock.release()  # also where an interrupt came just behind `acquire`


def warn_of_mixture(what: str, fix: str, stacklevel: int) -> None:
    """Say that weights are left as they are in the middle of a step; `stacklevel` as for the caller."""
    warnings.warn(
        f"torchwrap: {what} in the middle of a step: some weights are half a step ahead of the others. {fix}",
        errors.TorchwrapWarning,
        stacklevel=stacklevel + 1,
    )


def _wrapped_since(piece: Piece) -> errors.ConflictError:
    return errors.ConflictError(
        f"OffloadedOptimizer: {piece.name} was wrapped after the optimizer was made, or without it; its weights are away",
        where=piece.name,
        fix="close() this one. Wrap first, then make the optimizer: OffloadedOptimizer(part, ...) for each part that is wrapped by itself.",
    )


class _Watch:
    """Holds no reference to the handle: hooks of this kind live in a table of the process."""

    def __init__(self, handle: WeightsHandle) -> None:
        self._handle = weakref.ref(handle)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        handle = self._handle()
        knows = getattr(optimizer, STEPS_ABSENT_WEIGHTS, None)
        if handle is None or (knows is not None and knows(handle)):
            return
        closure = (*args[1:], kwargs.get("closure"))[0]  # brings gradients when it is too late to look
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                piece = handle.piece_of(parameter)
                if piece is None or piece.resident:
                    continue
                if knows is not None and parameter.requires_grad:  # its gradient may have been taken already, or not come yet
                    raise _wrapped_since(piece)
                if parameter.grad is not None or (closure is not None and parameter.requires_grad):
                    raise errors.ConflictError(
                        f"torchwrap: {type(optimizer).__name__} would write to {piece.name}, whose weights are away",
                        where=piece.name,
                        fix=f"Use torchwrap.OffloadedOptimizer(model, torch.optim.{type(optimizer).__name__}, ...).",
                    )

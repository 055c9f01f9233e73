"""Which back end computes a call, and why.

Every back end says of a call why it cannot compute it, or nothing. Of those that can, the first of a list is taken; the list depends on the
device. On CPUs "cpu" comes first: its compositions use torch's kernel for what torch does well, so there is nothing that torch alone does
faster but by the cost of Python around it (see `cpu.backend` for the choice among compositions, and docs/results for measurements).
"eager", which stores all scores, comes last. A back end whose kernel could not be compiled or launched is not asked again for calls of that
kind in this process: the next one computes the same call.
"""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from torchwrap.attention.contract import Backend, Call
from torchwrap.attention.settings import Settings, settings_of
from torchwrap.core import errors

__all__ = ["BACKENDS", "Choice", "attempt", "backend", "choose", "failures", "order"]

R = TypeVar("R")

BACKENDS = {
    "cpu": "torchwrap.attention.cpu.backend:Composed",
    "triton": "torchwrap.attention.triton.backend:Triton",
    "cuda_mma": "torchwrap.attention.cuda.backend:CudaMma",
    "sdpa": "torchwrap.attention.torch_kernels.backend:TorchSdpa",
    "sdpa-flash": "torchwrap.attention.torch_kernels.flash:Flash",
    "sdpa-efficient": "torchwrap.attention.torch_kernels.efficient:Efficient",
    "sdpa-cudnn": "torchwrap.attention.torch_kernels.cudnn:Cudnn",
    "eager": "torchwrap.attention.reference:Eager",
}
"""Where each back end is defined; loaded when it is first asked for."""

_Kind = tuple[str, torch.device, torch.dtype, int, int]
_failed: dict[_Kind, str] = {}
_lock = threading.Lock()

_ORDER = {"cpu": ("cpu", "sdpa", "eager"), "cuda": ("triton", "cuda_mma", "sdpa", "eager")}


@dataclass(frozen=True, slots=True)
class Choice:
    """A back end and the reason for it.

    Attributes:
        backend: computes the call.
        call: the call.
        notes: what was asked for, or why those before it in the order cannot.
    """

    backend: Backend
    call: Call
    notes: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why this one and, if it can say, how it computes the call; put together when asked for."""
        describe = getattr(self.backend, "describe", None)
        return "; ".join([f"{self.backend.name}: {self.notes[0]}", *([describe(self.call)] if describe else []), *self.notes[1:]])


def choose(call: Call, given: str | Settings = "auto") -> Choice:
    """The back end for a call.

    Args:
        call: the call.
        given: "auto", one of `BACKENDS`, or settings.

    Raises:
        ConfigError: there is no back end of that name.
        UnsupportedModelError: it cannot compute this call; the message has the check that failed and a back end that can.
    """
    name = settings_of(given).backend
    if name != "auto":
        return Choice(_forced(call, name), call, ("asked for",))
    refused: list[str] = []
    for candidate in order(call):
        found = backend(candidate)
        why_not = _failed.get(_kind(candidate, call)) or found.refuses(call)
        if why_not is None:
            return Choice(found, call, (f"first that can, on {call.q.device.type}", *refused))
        refused.append(f"not {candidate}: {why_not}")
    raise errors.UnsupportedModelError("no back end can compute this call: " + "; ".join(refused), where="attend")


def attempt(call: Call, given: str | Settings, work: Callable[[Backend], R]) -> R:
    """Have a call computed; under "auto" by the next back end if the kernel of the first cannot run here.

    Args:
        call: the call.
        given: as in `choose`.
        work: a method of the back end that it is given; it must leave nothing half-done when it raises.

    Raises:
        ConfigError, UnsupportedModelError: as in `choose`.
        KernelError: the kernel of the back end that was asked for cannot run.
    """
    while True:
        found = choose(call, given).backend
        try:
            return work(found)
        except errors.KernelError as error:
            if settings_of(given).backend != "auto":
                raise
            with _lock:
                first = _kind(found.name, call) not in _failed
                _failed[_kind(found.name, call)] = f"it failed here before: {error}"
            if first:
                warnings.warn(
                    f"attention: the kernel of back end {found.name!r} cannot run, another one is used from now on: {error}",
                    errors.TorchwrapWarning,
                    stacklevel=3,
                )


def failures() -> int:
    """How many kinds of kernels have failed in this process; a choice made before the last of them may be another now."""
    return len(_failed)


def order(call: Call) -> tuple[str, ...]:
    """Names of the back ends in the order in which they are asked."""
    return _ORDER.get(call.q.device.type, ("sdpa", "eager"))


@functools.cache
def backend(name: str) -> Backend:
    """The back end of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BACKENDS:
        raise errors.ConfigError(
            f"backend={name!r} is unknown", where="attend", fix=f'Choose "auto" or one of {", ".join(map(repr, BACKENDS))}.'
        )
    module, _, cls = BACKENDS[name].partition(":")
    found: Backend = getattr(importlib.import_module(module), cls)()
    return found


def _kind(name: str, call: Call) -> _Kind:
    """What one kernel is compiled for."""
    return name, call.q.device, call.q.dtype, call.width, call.value_width


def _forced(call: Call, name: str) -> Backend:
    found = backend(name)
    why_not = found.refuses(call)
    if why_not is not None:
        nearest = next(other for other in (*order(call), "eager") if other != name and backend(other).refuses(call) is None)
        raise errors.UnsupportedModelError(
            f"backend={name!r} cannot compute this call: {why_not}",
            where="attend",
            fix=f'Use backend="auto", or backend={nearest!r}, which can.',
        )
    return found

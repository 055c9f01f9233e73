"""Which back end computes a call, and why.

Every back end says of a call why it cannot compute it, or nothing. Of those that can, the first of a list is taken: of what was measured on
this machine for calls of that kind, else of what is shipped (`tuning.table`). On CPUs "cpu" comes first: its compositions use torch's
kernel for what torch does well, so there is nothing that torch alone does faster but by the Python around it, which is done once for each
layout of tensors (`prepared`; see `cpu.backend` for the choice among compositions, and docs/results for measurements). Who would store a
mask of more than `tuning.table.MASK_BYTES` comes after those who need none; "eager", which stores all scores, comes last. A back end whose
kernel could not be compiled or launched is not asked again for calls of that kind in this process: the next one computes the same call.
"""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from torchwrap.attention.contract import Backend, Call, Prepared
from torchwrap.attention.settings import Settings, settings_of
from torchwrap.attention.tuning.clock import median_seconds
from torchwrap.attention.tuning.kinds import Doing, Kind, kind_of
from torchwrap.attention.tuning.store import Measurements, measurements
from torchwrap.attention.tuning.table import CANDIDATES, MASK_BYTES, first_choices
from torchwrap.core import errors
from torchwrap.native.threads import one_thread, stuck

__all__ = [
    "BACKENDS", "SHARING", "Choice", "attempt", "attempt_part", "backend", "choose", "compare", "order", "prepare", "revision", "sharing",
]  # fmt: skip

R = TypeVar("R")

BACKENDS = {
    "cpu": "torchwrap.attention.cpu.backend:Composed",
    "triton": "torchwrap.attention.triton.backend:Triton",
    "cuda_mma": "torchwrap.attention.cuda.backend:CudaMma",
    "sdpa": "torchwrap.attention.torch_kernels.backend:TorchSdpa",
    "sdpa-flash": "torchwrap.attention.torch_kernels.flash:Flash",
    "sdpa-efficient": "torchwrap.attention.torch_kernels.efficient:Efficient",
    "sdpa-cudnn": "torchwrap.attention.torch_kernels.cudnn:Cudnn",
    "flash_attn": "torchwrap.attention.flash_attn:FlashAttn",
    "flex": "torchwrap.attention.torch_kernels.flex:Flex",
    "eager": "torchwrap.attention.reference:Eager",
}
"""Where each back end is defined; loaded when it is first asked for."""

SHARING = ("cpu", "triton", "cuda_mma")
"""Those whose backward gives the share of some of the keys from the out and lse of all; torch's own kernels and "eager" do not."""

_Kind = tuple[str, torch.device, torch.dtype, int, int]
_failed: dict[_Kind, str] = {}
_lock = threading.Lock()

_measuring = threading.Lock()
_measured = 0
_NOTHING: dict[str, str] = {}


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


def choose(call: Call, given: str | Settings = "auto", doing: Doing = "forward") -> Choice:
    """The back end for a call.

    Args:
        call: the call.
        given: "auto", one of `BACKENDS`, or settings.
        doing: what of the call is computed.

    Raises:
        ConfigError: there is no back end of that name.
        UnsupportedModelError: it cannot compute this call; the message has the check that failed and a back end that can.
    """
    settings = settings_of(given)
    if settings.backend != "auto":
        return Choice(_forced(call, settings, doing), call, ("asked for",))
    names, known = _listed(call, settings, doing)
    refused: list[str] = []
    for name in names:
        found = backend(name)
        why_not = (_failed and _failed.get(_kind(name, call))) or _undecided(found, settings, doing) or found.refuses(call)
        if why_not is None:
            return Choice(found, call, (known.get(name) or f"first that can, on {call.q.device.type}", *refused))
        refused.append(f"not {name}: {why_not}")
    raise errors.UnsupportedModelError("no back end can compute this call: " + "; ".join(refused), where="attend")


def attempt(call: Call, given: str | Settings, work: Callable[[Backend], R], doing: Doing = "forward") -> R:
    """Have a call computed; under "auto" by the next back end if the kernel of the first cannot run here.

    Args:
        call: the call.
        given: as in `choose`.
        work: a method of the back end that it is given; it must leave nothing half-done when it raises.
        doing: what of the call is computed.

    Raises:
        ConfigError, UnsupportedModelError: as in `choose`.
        KernelError: the kernel of the back end that was asked for cannot run.
    """
    if stuck():
        with one_thread():
            return attempt(call, given, work, doing)
    settings = settings_of(given)
    if settings.tune == "measure" and settings.backend == "auto":
        compare(call, settings, work, doing)
    while True:
        found = choose(call, settings, doing).backend
        try:
            return work(found)
        except errors.KernelError as error:
            if settings.backend != "auto":
                raise
            _set_aside(found, call, error)


def attempt_part(call: Call, where: str, work: Callable[[Backend], R]) -> R:
    """As `attempt`, for a call over some of the keys.

    Raises:
        UnsupportedModelError: as in `sharing`.
    """
    while True:
        found = sharing(call, where)
        try:
            return work(found)
        except errors.KernelError as error:
            _set_aside(found, call, error)


def _set_aside(found: Backend, call: Call, error: errors.KernelError) -> None:
    """Its kernel cannot run here: it is not asked again for such calls, which is said once."""
    with _lock:
        first = _kind(found.name, call) not in _failed
        _failed[_kind(found.name, call)] = f"it failed here before: {error}"
    if first:
        warnings.warn(
            f"attention: the kernel of back end {found.name!r} cannot run, another one is used from now on: {error}",
            errors.TorchwrapWarning,
            stacklevel=4,
        )


def prepare(call: Call, given: str | Settings, trains: bool, mask: torch.Tensor | None) -> Prepared | None:
    """What computes calls like this one from now on, if the back end for them has it ready, until `revision` says otherwise.

    Args:
        call: the call.
        given: as in `choose`.
        trains: with gradients, which the same back end has to be the choice for.
        mask: as a tensor, of which only the layout is the same in the next call; None: that of the call, if there is one.
    """
    settings = settings_of(given)
    doings: tuple[Doing, ...] = ("forward", "backward") if trains else ("forward",)
    if settings.tune == "measure" and settings.backend == "auto":
        known = measurements(call.q.device, settings.tune_dir).orders
        if any(kind_of(call, doing) not in known for doing in doings):
            return None  # `attempt` measures
    found = choose(call, settings).backend
    make = getattr(found, "prepare", None)
    if make is None or (trains and choose(call, settings, "backward").backend is not found):
        return None
    made: Prepared | None = make(call, trains, mask)
    return made


def compare(
    call: Call, settings: Settings, work: Callable[[Backend], object], doing: Doing, names: tuple[str, ...] | None = None
) -> dict[str, float]:
    """Time the back ends that can compute a call, if that was not done for calls of its kind; keep the figures.

    Args:
        call: the call; its own tensors are read, so nothing is allocated but what back ends return and need.
        settings: where figures are kept.
        work: as in `attempt`.
        doing: as in `attempt`.
        names: back ends to compare, measured whatever is known; None: those of `tuning.table.CANDIDATES`, unless measured before.

    Returns:
        Seconds by back end; empty if nothing was timed.

    Cost: some 8 calls of each back end.
    """
    global _measured
    store, kind = measurements(call.q.device, settings.tune_dir), kind_of(call, doing)
    if (names is None and kind in store.orders) or not _is_timeable(call):
        return {}
    with _measuring:  # a second measurement beside the first would spoil both
        if names is None and kind in store.orders:
            return {}
        asked = names or CANDIDATES.get(call.q.device.type, ())
        able = [name for name in asked if _failed.get(_kind(name, call)) is None and backend(name).refuses(call) is None]
        able = [name for name in able if _mask_bytes(backend(name), call) <= MASK_BYTES]
        runs = {name: functools.partial(work, backend(name)) for name in able}
        seconds, _ = median_seconds(runs, call.q.device) if len(runs) > 1 else ({}, {})
        store.add(kind, seconds)
        _measured += 1
    return seconds


def revision() -> int:
    """Grows when a choice made before may be another now: a kernel has failed, or something was measured."""
    return len(_failed) + _measured


def order(call: Call, given: str | Settings = "auto", doing: Doing = "forward") -> tuple[str, ...]:
    """Names of the back ends in the order in which they are asked."""
    return _listed(call, settings_of(given), doing)[0]


def _listed(call: Call, settings: Settings, doing: Doing) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names in order, and what was measured of them."""
    found = None
    if settings.tune != "off" and (store := measurements(call.q.device, settings.tune_dir)).orders:
        lists = store.lists  # held, so that a list made of figures that are old by then is dropped with the others
        found = lists.get(kind := kind_of(call, doing))
        if found is None:
            found = lists[kind] = _corrected(first_choices(call), store, kind)
    names, known = (first_choices(call), _NOTHING) if found is None else found
    (batch, heads, rows, _), columns = call.q.shape, call.k.shape[2]
    # Most calls are so small that no mask of theirs is large, whoever makes it.
    if 8 * batch * heads * rows * columns > MASK_BYTES and _mask_bytes(backend(names[0]), call) > MASK_BYTES:
        names = tuple(sorted(names, key=lambda name: (name == "eager", _mask_bytes(backend(name), call) > MASK_BYTES)))
    return names, known


def _corrected(names: tuple[str, ...], store: Measurements, kind: Kind) -> tuple[tuple[str, ...], dict[str, str]]:
    """The shipped order with those that were measured in front."""
    fastest = tuple(name for name in store.orders.get(kind, ()) if name in BACKENDS)
    return (*fastest, *(name for name in names if name not in fastest)), {name: store.reasons[kind, name] for name in fastest}


def _mask_bytes(found: Backend, call: Call) -> int:
    memory = getattr(found, "memory", None)
    return 0 if memory is None else int(memory(call))


def _undecided(found: Backend, settings: Settings, doing: Doing) -> str | None:
    if settings.deterministic and doing == "backward" and not getattr(found, "deterministic", True):
        return "its gradients may differ from run to run, and deterministic=True was asked for"
    return None


def _is_timeable(call: Call) -> bool:
    """False for tensors without numbers, and while a card is told to note launches for later: then nothing may wait for it."""
    if type(call.q) is not torch.Tensor or call.q.device.type == "meta":
        return False
    return call.q.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def sharing(call: Call, where: str) -> Backend:
    """The first of `SHARING` that can compute a call over some of the keys, and has not failed to.

    Args:
        call: over some of the keys.
        where: who asks, for the error.

    Raises:
        UnsupportedModelError: there is none for this call.
    """
    for name in order(call):
        if name in SHARING and _kind(name, call) not in _failed and backend(name).refuses(call) is None:
            return backend(name)
    raise errors.UnsupportedModelError(
        f"none of {', '.join(SHARING)} can compute a part of {call.q.dtype} on {call.q.device}",
        where=where,
        fix="Attend all keys at once: attend, or ulysses_attend over processes.",
    )


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


@functools.cache
def _with_tiles(name: str, tiles: tuple[int | None, ...]) -> Backend:
    """A back end that takes tiles as they are given."""
    from torchwrap.attention.triton.blocks import Fixed  # the only one there is, and seldom needed

    queries, keys, warps, stages = tiles
    kind: Any = type(backend(name))
    made: Backend = kind(Fixed(queries=queries, keys=keys, warps=warps, stages=stages))
    return made


def _forced(call: Call, settings: Settings, doing: Doing) -> Backend:
    name = settings.backend
    found = _with_tiles(name, settings.tiles) if settings.tiles else backend(name)
    why_not = _undecided(found, settings, doing) or found.refuses(call)
    if why_not is not None:
        if settings.tiles and backend(name).refuses(call) is None:
            fix = "Leave out block_m, block_n, num_warps and num_stages: the table's tiles fit."
        else:
            nearest = next(
                other for other in (*order(call), "eager")
                if other != name and backend(other).refuses(call) is None and _undecided(backend(other), settings, doing) is None
            )  # fmt: skip
            fix = f'Use backend="auto", or backend={nearest!r}, which can.'
        raise errors.UnsupportedModelError(f"backend={name!r} cannot compute this call: {why_not}", where="attend", fix=fix)
    return found

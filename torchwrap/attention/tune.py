"""Measuring ahead which back end is fastest on this machine, so that no call of a program has to wait for it.

The figures are those that `attend(..., backend=Settings(tune="measure"))` takes when a kind of call first comes; here for shapes that are
given. What is found is kept for later processes, and every call under `tune="table"`, the default, goes by it. For a model, run it once
on inputs of the lengths that matter with `tune="measure"`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchwrap.attention import dispatch
from torchwrap.attention.contract import Backend, Call, Gradients, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.settings import Settings
from torchwrap.attention.tuning import clock
from torchwrap.attention.tuning.kinds import Doing, Kind, kind_of, said
from torchwrap.attention.tuning.store import measurements
from torchwrap.core.errors import ConfigError
from torchwrap.storage.limits import memory_available

__all__ = ["Measured", "Shape", "tune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One kind of calls.

    Attributes:
        heads: Hq.
        kv_heads: Hkv.
        width: D.
        q_length: Sq.
        kv_length: Sk.
        batch: B.
        value_width: Dv; None: D.
        causal: no query sees a later key; the last query stands at the last key.
        window: keys that a query sees, its own included; None: all.
        softcap: bound of the scores; None: none.
        dtype: of q, k and v.
        device: where.
    """

    heads: int
    kv_heads: int
    width: int
    q_length: int
    kv_length: int
    batch: int = 1
    value_width: int | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"

    def call(self) -> Call:
        """A call of this shape with random numbers; torch's own generators are not touched.

        Raises:
            ConfigError: the shape is no shape, or would need more than half of the memory that is free.
        """
        value_width = self.width if self.value_width is None else self.value_width
        if min(self.heads, self.kv_heads, self.width, self.q_length, self.kv_length, self.batch, value_width) < 1:
            raise ConfigError(f"{self} has a size below 1", where="tune", fix="Give positive sizes.")
        device = _with_index(torch.device(self.device))
        numbers = self.heads * self.q_length * (self.width + value_width) + self.kv_heads * self.kv_length * (self.width + value_width)
        # Twice: inputs and their gradients; what a back end needs beside them is of the same order.
        needed, free = 2 * self.batch * numbers * self.dtype.itemsize, _free(device)
        if needed > free // 2:
            raise ConfigError(
                f"{self} needs {needed >> 20} MiB and {free >> 20} MiB are free on {device}",
                where="tune",
                fix="Give a smaller batch or length.",
            )
        generator = torch.Generator(device).manual_seed(0)

        def random(heads: int, length: int, width: int) -> Tensor:
            return torch.empty(self.batch, heads, length, width, dtype=self.dtype, device=device).normal_(generator=generator)

        mask = None
        if self.window is not None:
            mask = TileMask.window(self.batch, self.q_length, self.kv_length, self.window, device=device)
        elif self.causal:
            mask = TileMask.causal(self.batch, self.q_length, self.kv_length, device=device)
        q, k = random(self.heads, self.q_length, self.width), random(self.kv_heads, self.kv_length, self.width)
        return checked(q, k, random(self.kv_heads, self.kv_length, value_width), mask=mask, softcap=self.softcap)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was found for one kind of calls.

    Attributes:
        kind: key of the kind.
        seconds: of each back end that was timed; empty if fewer than two could be compared.
        order: names, first choice first.
    """

    kind: Kind
    seconds: dict[str, float]
    order: tuple[str, ...]

    def __str__(self) -> str:
        if not self.order:
            return f"{said(self.kind)}: nothing to compare"
        return f"{said(self.kind)}: " + ", ".join(f"{name} {self.seconds[name] * 1e3:.3g} ms" for name in self.order)


def tune(
    shapes: Iterable[Shape | Call], *, train: bool = False, backends: Iterable[str] | None = None, tune_dir: str | None = None
) -> list[Measured]:
    """Measure the back ends for some shapes and keep what was found.

    Args:
        shapes: kinds of calls, or calls, whose own tensors are then read.
        train: measure backward as well; it is chosen by itself.
        backends: names of those to compare, whatever was known before; None: those that `tuning.table.CANDIDATES` names for the device,
            where nothing is known yet. "flex" on CPUs compiles for seconds and is compared only if it is named.
        tune_dir: folder of the measurements, as in `Settings`.

    Returns:
        What is known for each, forward before backward.

    Raises:
        ConfigError: an unknown back end, or a shape that is none, does not fit into memory, or takes more than a minute for one call.

    Cost: some 8 calls of each back end and kind; for long ones fewer, so that a kind takes minutes at most.

    Example:
        >>> import tempfile
        >>> from torchwrap.attention.tune import Shape, tune
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = tune([Shape(heads=4, kv_heads=2, width=16, q_length=1, kv_length=64)], tune_dir=folder)
        >>> sorted(found[0].order)
        ['cpu', 'sdpa']
    """
    names = None if backends is None else tuple(backends)
    for name in names or ():
        dispatch.backend(name)
    settings = Settings(tune="measure", tune_dir=tune_dir)
    found: list[Measured] = []
    for shape in shapes:
        with torch.no_grad():
            call = shape.call() if isinstance(shape, Shape) else shape
            _check_ends(call)
            forward = call if train else replace(call, wants_lse=False)
            dispatch.compare(forward, settings, functools.partial(_forward, call=forward), "forward", names)
            found.append(_known(call, settings, "forward"))
            if train:
                out, lse = dispatch.attempt(call, settings, functools.partial(_forward, call=call))
                work = functools.partial(_backward, call=call, out=out, lse=lse, grad=torch.ones_like(out))
                dispatch.compare(call, settings, work, "backward", names)
                found.append(_known(call, settings, "backward"))
    return found


_PROBED = 1 << 28
"""Products of a query with a number of a key, or of a weight with one of a value, in a part that says how long the whole takes (chosen)."""


def _check_ends(call: Call) -> None:
    """Raise `ConfigError` if one call would take longer than `clock.LIMIT_S`, as its last rows say, which see the most keys."""
    row = call.batch * call.heads * call.kv_length * (call.width + call.value_width)
    rows = max(1, _PROBED // max(row, 1))
    if rows >= call.q_length or call.bias is not None or call.q.device.type == "meta":
        return
    first = call.q_length - rows
    part = replace(call, q=call.q[:, :, first:], mask=None if call.mask is None else call.mask.sub(rows=(first, call.q_length)))
    work = functools.partial(dispatch.attempt, part, Settings(tune="off"), functools.partial(_forward, call=part))
    seconds, _ = clock.median_seconds({"part": work}, call.q.device)
    whole = seconds.get("part", 0.0) * call.q_length / rows
    if whole > clock.LIMIT_S:
        raise ConfigError(
            f"one call of q {list(call.q.shape)}, k {list(call.k.shape)} takes about {whole:.0f} s here, and measuring takes several of "
            "each back end",
            where="tune",
            fix="Give a smaller batch or length.",
        )


def _forward(found: Backend, call: Call) -> tuple[Tensor, Tensor]:
    return found.forward(call)


def _backward(found: Backend, call: Call, out: Tensor, lse: Tensor, grad: Tensor) -> Gradients:
    return found.backward(call, out, lse, grad, None)


def _known(call: Call, settings: Settings, doing: Doing) -> Measured:
    store, kind = measurements(call.q.device, settings.tune_dir), kind_of(call, doing)
    return Measured(kind=kind, seconds=store.seconds().get(kind, {}), order=store.orders.get(kind, ()))


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = memory_available()  # of the container too, and with what files take for the moment
    return known if known is not None else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

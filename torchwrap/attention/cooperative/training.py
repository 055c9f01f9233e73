"""Attention, with gradients, over keys and values that stay on the host: fine-tuning with contexts longer than the device holds.

Forward: keys and values cross the link in chunks, each is attended on the device while the next is under way, partials are merged, and only
out and lse are kept. Backward: the chunks cross again. The gradient of a partial needs nothing but the out and lse of the whole
(contract.py), so each chunk gives its share of dq and all of its own dk and dv, which go back to the host while the next chunk is attended.
The device holds what belongs to the queries, and two chunks.

Source: the identity is that of Dao et al., "FlashAttention", 2022, algorithm 4; keys from the host instead of from the card's own memory.

Letters: B sequences, Hq and Hkv query and key heads, Sq queries, Sk keys, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchwrap.attention.autocast import exact_dtypes
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cooperative.arena import Piece
from torchwrap.attention.cooperative.machine import Machine, Mark, machine_for
from torchwrap.attention.cooperative.query import sees
from torchwrap.attention.cooperative.staging import Chunk, Staging, Workers
from torchwrap.attention.dispatch import attempt_part
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.merge import grad_of_sinks, merge_into, with_sinks
from torchwrap.core import errors

__all__ = ["host_attend"]

CHUNK_BYTES = 8 << 20


def host_attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | None = None, scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, grads: tuple[Tensor, Tensor] | None = None, chunk_bytes: int = CHUNK_BYTES,
    machine: Machine | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of queries on a device over keys and values on its host.

    Args:
        q: queries, on the device.
        k: keys, on the CPU; page-locked they cross the link faster. Their dtype may be another than that of q, in which they are attended.
        v: values, on the CPU.
        mask: what each query sees; None: everything.
        scale: factor of the scores; None: `1 / sqrt(D)`.
        softcap: bound of the scaled scores.
        sinks: one logit for each query head, on the device.
        grads: tensors on the CPU, shaped as k and v, to which backward adds the gradients of k and v; autograd hands on none then. So keys
            that many chunks of a prompt attend need one sum and not one for each. None: as autograd has it.
        chunk_bytes: of keys and values that cross the link at a time.
        machine: of q's device; None: made for this call.

    Returns:
        out and lse, both on the device. Gradients flow to q, k, v and sinks, also from lse; no second derivatives.

    Raises:
        ConfigError: shapes, dtypes or places do not fit together.
        UnsupportedModelError: no back end can compute a part.
        WorkError: adding gradients up on the host failed.

    Shapes: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), sinks (Hq); out (B, Hq, Sq, Dv) in the dtype of q, lse (B, Hq, Sq).

    Exactness: as `attend`, gradients included.

    Cost: on the device `2 * chunk_bytes`, as much again for their gradients, and out in float32; on the host, in backward, two chunks
        beside the gradients. k and v cross the link once in forward and once in backward, their gradients once in backward.

    Example:
        >>> q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8, requires_grad=True)
        >>> out, lse = host_attend(q, k, v)
        >>> out.sum().backward()
        >>> v.grad.sum().round()
        tensor(96.)
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q = q.to(torch.get_autocast_dtype(q.device.type))
    job = _Job.made(q, k, v, mask, scale, softcap, sinks, grads, chunk_bytes, machine or machine_for(q.device))
    found: tuple[Tensor, Tensor] = _HostAttention.apply(q, k, v, sinks, job)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """What forward and backward of one call share."""

    call: Call  # without tensors
    machine: Machine
    chunk_tokens: int
    grads: tuple[Tensor, Tensor] | None

    @classmethod
    def made(
        cls, q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, scale: float | None, softcap: float | None, sinks: Tensor | None,
        grads: tuple[Tensor, Tensor] | None, chunk_bytes: int, machine: Machine,
    ) -> _Job:  # fmt: skip
        def refused(what: str, fix: str) -> errors.ConfigError:
            return errors.ConfigError(what, where="host_attend", fix=fix)

        if mask is not None and not isinstance(mask, TileMask):
            raise refused(f"the mask is a {type(mask).__name__}", "Give a TileMask, such as TileMask.from_dense(mask).")
        for name, memory in (("k", k), ("v", v)):
            if not isinstance(memory, Tensor):
                raise refused(f"{name} is a {type(memory).__name__}", "Give tensors (torch.tensor, torch.from_numpy).")
            if memory.device.type != "cpu" or not memory.is_floating_point():
                raise refused(f"{name} is {memory.dtype} on {memory.device}", "Give floating numbers on the CPU, or use attend.")
        if k.dtype != v.dtype:
            raise refused(f"k is {k.dtype} and v {v.dtype}", "Give both in one dtype.")
        if chunk_bytes < 1:
            raise refused(f"chunk_bytes is {chunk_bytes}", "Give a positive number.")
        for given, like in zip(grads or (), (k, v), strict=bool(grads)):
            if given.shape != like.shape or given.device.type != "cpu" or given.requires_grad:
                where = f"{list(given.shape)} on {given.device}"
                raise refused(f"gradients are to be added to {where}", "Give plain tensors shaped as k and v, on the CPU.")
        # Their numbers and places differ, their shapes must fit as for any call. The mask's numbers are needed.
        q, k, v = (one.new_empty(one.shape, dtype=q.dtype, device="meta") for one in (q, k, v))
        call = checked(
            q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=None if sinks is None else sinks.detach().to("meta")
        )  # fmt: skip
        token = max(1, q.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * q.dtype.itemsize)
        call = replace(call, mask=mask, sinks=None)
        return cls(call=call, machine=machine, chunk_tokens=max(1, min(chunk_bytes // token, k.shape[2])), grads=grads)

    def staging(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> Staging:
        """Buffers for the way to the device."""
        made = Staging(self.machine, self.chunk_tokens)
        made.reserve((k.shape[0], k.shape[1], k.shape[3], v.shape[3]), k.dtype, dtype)
        return made

    def chunks(self, k: Tensor, v: Tensor, staging: Staging) -> Iterator[Chunk]:
        """What some query sees, each sent when it is asked for."""
        whole, slot = Piece("host", 0, k, v), 0
        for first in range(0, k.shape[2], self.chunk_tokens):
            end = min(first + self.chunk_tokens, k.shape[2])
            if sees(self.call.mask, first, end):
                yield staging.send(whole.cut(first, end), slot, None)
                slot = 1 - slot

    def each(self, q: Tensor, k: Tensor, v: Tensor, work: Callable[[Call, int], None]) -> None:
        """`work` on the call over each chunk in turn, on the device, while the next one is under way."""
        staging = self.staging(k, v, q.dtype)
        arriving = self.chunks(k, v, staging)
        under_way = list(islice(arriving, 2))
        try:
            while under_way:
                chunk = under_way.pop(0)

                def compute(chunk: Chunk = chunk) -> None:
                    keys, values = staging.widened(chunk.keys, chunk.values, q.dtype)
                    columns = (chunk.first, chunk.first + keys.shape[2])
                    mask: Any = None if self.call.mask is None else self.call.mask.sub(columns=columns).to(q.device)
                    work(replace(self.call, q=q, k=keys, v=values, mask=mask, some_keys=True), chunk.first)

                with exact_dtypes(q):
                    self.machine.compute(compute, reads=(chunk.keys, chunk.values), after=chunk.arrived)
                staging.free[chunk.slot] = self.machine.computed()
                under_way += islice(arriving, 1)
        finally:
            self.machine.now()  # nothing is on its way from k and v any more, whatever the caller does with them
            staging.release()


class _HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
        call = job.call
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=call.accumulate)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=call.accumulate)
        if not call.is_empty:

            def attend(part: Call, first: int) -> None:
                merge_into(out, lse, *attempt_part(part, "host_attend", lambda found: found.forward(part)))

            job.each(q, k, v, attend)
        whole, lse = with_sinks(out, lse, sinks)
        whole = whole.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, whole, lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return whole, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        if given[0] is None and given[1] is None:
            return (None,) * 5
        job: _Job = ctx.job
        grad_out, grad_lse = torch.zeros_like(out) if given[0] is None else given[0], given[1]
        dq = torch.zeros_like(q, dtype=job.call.accumulate)
        sums = job.grads or (torch.zeros_like(k), torch.zeros_like(v))
        if not job.call.is_empty:
            with _Home(job.machine, sums) as home:

                def share(part: Call, first: int) -> None:
                    grads = attempt_part(part, "host_attend", lambda found: found.backward(part, out, lse, grad_out, grad_lse))
                    dq.add_(grads[0])
                    home.send(grads[1:3], first)

                job.each(q, k, v, share)
        dsinks = None
        if sinks is not None:
            delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - (0.0 if grad_lse is None else grad_lse)
            dsinks = grad_of_sinks(sinks, lse, delta)
        dk, dv = (None, None) if job.grads is not None else sums
        return dq.to(q.dtype), dk, dv, dsinks, None


class _Home:
    """The way of gradients back to the host, through two buffers there, added up by a thread while the device goes on.

    Args:
        machine: of the device.
        sums: to which they are added, as k and v.
    """

    def __init__(self, machine: Machine, sums: tuple[Tensor, Tensor]) -> None:
        self.machine, self.sums = machine, sums
        self._workers = Workers(1)
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None, None]
        self._adding: list[Future[Any] | None] = [None, None]
        self._slot = 0

    def __enter__(self) -> _Home:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for slot in range(2):
                self._wait(slot, quiet=kind is not None)
        finally:
            self._workers.close()
            for buffer in self._buffers:
                for memory in buffer or ():
                    self.machine.release_host(memory)

    def send(self, grads: tuple[Tensor, Tensor], first: int) -> None:
        """Start to add gradients of tokens from `first` on."""
        slot, self._slot = self._slot, 1 - self._slot
        self._wait(slot)
        buffer = self._buffers[slot]
        if buffer is None:
            # The first chunk is the longest.
            buffer = self._buffers[slot] = tuple(self.machine.host_memory((one.numel(),), one.dtype) for one in grads)  # type: ignore[assignment]
        assert buffer is not None
        there = [memory[: one.numel()].view(one.shape) for memory, one in zip(buffer, grads, strict=True)]
        marks = [self.machine.download(one.contiguous(), memory) for one, memory in zip(grads, there, strict=True)]
        self._adding[slot] = self._workers.submit(lambda: self._add(there, marks, first))

    def _add(self, there: list[Tensor], marks: list[Mark], first: int) -> None:
        def add() -> None:
            for total, memory in zip(self.sums, there, strict=True):
                total[:, :, first : first + memory.shape[2]] += memory

        with torch.no_grad():
            self.machine.work(add, reads=there, lane=(0, 1), after=marks)

    def _wait(self, slot: int, *, quiet: bool = False) -> None:
        future, self._adding[slot] = self._adding[slot], None
        if future is not None and (error := future.exception()) is not None and not quiet:
            raise errors.WorkError(
                f"adding gradients up on the host failed: {error}", where="host_attend", fix="The sums are incomplete: begin the step anew."
            ) from error

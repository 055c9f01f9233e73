"""Sequence-parallel attention in a ring: keys and values travel round the processes, and every process attends what passes.

Each process has its part of the sequence. In each of T steps it attends the keys and values that it holds while sending them on to the next
process and receiving those of the one before; partials merge by lse (merge.py). Backward, the keys and values make the same round and their
gradients travel with them: a partial's gradient needs only the lse and the output of the whole, so shares simply add up, in float32. Only
key heads travel, never copies for the query heads that share them.

With a causal mask and parts in order the last process would do most of the work. In the "zigzag" layout the sequence is cut into 2 T chunks
and process r has the chunks r and 2 T - 1 - r, an early and a late one, so that all see about as many keys. Chunks that no query of a chunk
sees are not attended.
Source: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023; zigzag as in ring-flash-attention, 2024.

Letters: B batch, Hq and Hkv query and key heads, T processes, S tokens of the whole sequence, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from torchwrap.attention.contract import Backend, Call, Gradients, checked
from torchwrap.attention.dispatch import attempt_part, sharing
from torchwrap.attention.distributed.agreement import same_everywhere
from torchwrap.attention.distributed.works import Group, Outstanding, exchange, group_size, resolved
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.merge import grad_of_sinks, merge, with_sinks
from torchwrap.core import errors

__all__ = ["Layout", "ring_attend", "shard", "unshard"]

R = TypeVar("R")

Layout = Literal["zigzag", "contiguous"]


def shard(x: Tensor, dim: int, rank: int, size: int, layout: Layout = "zigzag") -> Tensor:
    """The part of process `rank` of `size` of a whole sequence along `dim`.

    Raises:
        ConfigError: the length cannot be divided evenly.
    """
    pieces = x.chunk(_chunks(size, layout, x.shape[dim]), dim) if x.shape[dim] else (x,) * _chunks(size, layout, 0)
    return torch.cat([pieces[index] for index in _chunks_of(rank, size, layout)], dim)


def unshard(parts: list[Tensor], dim: int, layout: Layout = "zigzag") -> Tensor:
    """The whole sequence from the parts of all processes, in order of their numbers."""
    found: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        mine = _chunks_of(rank, len(parts), layout)
        found.update(zip(mine, part.chunk(len(mine), dim), strict=True))
    return torch.cat([found[index] for index in sorted(found)], dim)


def ring_attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | None = None, scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, layout: Layout = "zigzag", group: Group = None, timeout_s: float | None = None,
    using: Backend | None = None, agreed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a sequence of which each process has its part.

    Args:
        q: `[B, Hq, S / T, D]`, the part that `shard` gives.
        k: `[B, Hkv, S / T, D]`.
        v: `[B, Hkv, S / T, Dv]`.
        mask: of the whole sequence, `[B | 1, 1, S, S]`, the same on every process; None: everything is visible.
        scale, softcap: as in the contract.
        sinks: `[Hq]`, the same on every process.
        layout: as given to `shard`.
        group: of processes; None: the default one.
        timeout_s: longest wait for one exchange in seconds; None: what the process group allows.
        using: what computes partials; None: the first back end that can.
        agreed: the processes know that they came with the same call; they do not ask each other then.

    Returns:
        out `[B, Hq, S / T, Dv]` in the dtype of q, and lse `[B, Hq, S / T]`. Gradients flow to q, k, v and sinks.

    Raises:
        ConfigError: the length cannot be divided evenly, or a process came with other sizes or another dtype, layout, mask, scale or cap.
        UnsupportedModelError: no back end can compute the parts.
        WorkError: an exchange failed or did not end in time; the message names the step ("block").

    Exactness: as one attention over all keys, up to rounding. Gradients of sinks are this process' share.
    Cost: six integers of every process before, unless `agreed`. Per process keys and values twice (those attended and those arriving),
        backward their gradients in float32 twice as well. Traffic `(T - 1) / T` of all keys and values forward, that and `T` parts of
        gradients backward.
    """
    rank, size = group_size(group)
    call = checked(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
    ring = _Ring(rank, size, layout, mask, q.shape[2], group, timeout_s, using)
    if using is None:
        sharing(replace(call, sinks=None), "ring_attend")  # raises while nothing has been sent
    if not agreed:
        also = {"layout": layout, "mask": mask, "scale": call.scale, "softcap": call.softcap, "choice of sinks": sinks is not None}
        same_everywhere("ring_attend", q, k, v, group, also=also, timeout_s=timeout_s)
    found: tuple[Tensor, Tensor] = _RingAttention.apply(q, k, v, sinks, call, ring)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Query rows of this process and keys of another, as (first, end) in their parts, with the mask of just those."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    mask: TileMask | None


class _Ring:
    """Who has which tokens, and the exchanges."""

    def __init__(
        self, rank: int, size: int, layout: Layout, mask: TileMask | None, tokens: int, group: Group, timeout_s: float | None,
        using: Backend | None,
    ) -> None:  # fmt: skip
        self.rank, self.size, self.layout, self.mask = rank, size, layout, mask
        self.group, self.timeout_s, self.using = group, timeout_s, using
        self.chunk = tokens * size // _chunks(size, layout, tokens * size)
        if mask is not None and mask.shape[2:] != (tokens * size, tokens * size):
            raise errors.ConfigError(
                f"the mask is {list(mask.shape)} and {size} processes have {tokens} tokens each",
                where="ring_attend",
                fix="Give the mask of the whole sequence.",
            )

    def rectangles(self, step: int) -> Iterator[_Rectangle]:
        """What to attend in a step: everything visible between this process' queries and the keys that are here then."""
        holder = (self.rank - step) % self.size
        for row, mine in enumerate(_chunks_of(self.rank, self.size, self.layout)):
            for column, theirs in enumerate(_chunks_of(holder, self.size, self.layout)):
                seen = None if self.mask is None else self.mask.sub(rows=self._span(mine), columns=self._span(theirs))
                if seen is None or any(seen.key_range(b) != (0, 0) for b in range(seen.shape[0])):
                    yield _Rectangle(self._span(row), self._span(column), seen)

    def _span(self, index: int) -> tuple[int, int]:
        return index * self.chunk, (index + 1) * self.chunk

    def forward(self, part: Call) -> tuple[Tensor, Tensor]:
        """By the back end that was asked for, or the first that can; likewise backward."""
        return self._computed(part, lambda found: found.forward(part))

    def backward(self, part: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """The share of the keys of this part."""
        return self._computed(part, lambda found: found.backward(part, out, lse, grad_out, grad_lse))

    def _computed(self, part: Call, work: Callable[[Backend], R]) -> R:
        return attempt_part(part, "ring_attend", work) if self.using is None else work(self.using)

    def outstanding(self) -> Outstanding:
        """A context for exchanges."""
        return Outstanding("the exchange of keys and values", group=resolved(self.group), timeout_s=self.timeout_s)

    def send_on(self, works: Outstanding, step: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Begin to send tensors to the next process; returns where those of the one before arrive."""
        into = tuple(torch.empty_like(one) for one in tensors)
        works.start(step, lambda: exchange(tensors, into, self.group))
        return into


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call, ring: _Ring) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=call.accumulate)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=call.accumulate)
        here: tuple[Tensor, ...] = (k.contiguous(), v.contiguous())
        with ring.outstanding() as works:
            for step in range(ring.size):
                coming = ring.send_on(works, step, here) if step + 1 < ring.size else here
                for part in ring.rectangles(step):
                    rows = slice(*part.rows)
                    partial = _partial(call, q, here, part)
                    out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], *ring.forward(partial))
                works.wait(step)
                here = coming
        whole, lse = with_sinks(out, lse, sinks)
        whole = whole.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, whole, lse)
        ctx.call, ctx.ring = call, ring
        ctx.set_materialize_grads(False)
        return whole, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        call, ring = ctx.call, ctx.ring
        grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        grad_lse = grads[1]
        dq = torch.zeros_like(q, dtype=call.accumulate)
        here: tuple[Tensor, ...] = (k.contiguous(), v.contiguous())
        summed: tuple[Tensor, ...] | None = None
        with ring.outstanding() as works:
            for step in range(ring.size):
                coming = ring.send_on(works, step, here) if step + 1 < ring.size else here
                local = tuple(torch.zeros_like(one, dtype=call.accumulate) for one in here)
                for part in ring.rectangles(step):
                    rows, columns = slice(*part.rows), slice(*part.columns)
                    partial = _partial(call, q, here, part)
                    of_lse = None if grad_lse is None else grad_lse[:, :, rows]
                    found = ring.backward(partial, out[:, :, rows], lse[:, :, rows], grad_out[:, :, rows], of_lse)
                    dq[:, :, rows] += found[0]
                    for mine, grad in zip(local, found[1:3], strict=True):
                        mine[:, :, columns] += grad
                works.wait()
                if summed is not None:  # what the processes before found for the keys that are here now
                    for mine, arrived in zip(local, summed, strict=True):
                        mine += arrived
                # After the last step the gradients have one more way to go: home.
                summed = ring.send_on(works, step, local) if ring.size > 1 else local
                here = coming
        assert summed is not None
        dsinks = None
        if sinks is not None:
            delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - (0.0 if grad_lse is None else grad_lse)
            dsinks = grad_of_sinks(sinks, lse, delta)
        return dq.to(q.dtype), summed[0].to(k.dtype), summed[1].to(v.dtype), dsinks, None, None


def _partial(call: Call, q: Tensor, here: tuple[Tensor, ...], part: _Rectangle) -> Call:
    """One rectangle as a call; sinks count once, at the end."""
    rows, columns = slice(*part.rows), slice(*part.columns)
    k, v = here[0][:, :, columns], here[1][:, :, columns]
    return Call(q=q[:, :, rows], k=k, v=v, mask=part.mask, scale=call.scale, softcap=call.softcap, some_keys=True)


def _chunks(size: int, layout: Layout, tokens: int) -> int:
    chunks = 2 * size if layout == "zigzag" else size
    if layout not in ("zigzag", "contiguous"):
        raise errors.ConfigError(f"layout is {layout!r}", where="layout", fix='Use "zigzag" or "contiguous".')
    if tokens % chunks:
        raise errors.ConfigError(
            f"{tokens} tokens cannot be divided into {chunks} equal chunks", where="layout", fix=f"Pad to a multiple of {chunks}."
        )
    return chunks


def _chunks_of(rank: int, size: int, layout: Layout) -> tuple[int, ...]:
    return (rank, 2 * size - 1 - rank) if layout == "zigzag" else (rank,)

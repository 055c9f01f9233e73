"""Attention of some queries over keys and values in two memories: each part is attended where it lies, or on its way, and merged.

Few queries (decoding): the query goes to the host, worker threads attend the host's tokens while the device attends its own; a share of the
host's tokens may cross the link in chunks and be attended on the device as well, so that device, host and link all work. Only the partial
results return, `[B, Hq, Sq, Dv]` numbers and their lse. Many queries (a prompt): all of the host's tokens cross the link, because the host
has the bandwidth for one query's reading and not the arithmetic for thousands. The chunks pass through two buffers in turn.

Exact: partials over disjoint keys merge to the result over all of them, up to rounding (merge.py). Masks are cut, not changed.
Source: H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024, has the host compute whole layers;
working on both sides within a layer, and the streamed share, are ours.

Letters: B sequences, Hq and Hkv query and key heads, Sq queries, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from torchwrap.attention.cooperative.machine import Machine, Mark
from torchwrap.attention.cooperative.tiers import Piece, TieredLayer
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.merge import merge_all, with_sinks

__all__ = ["HostError", "Query", "Staging", "Workers", "attend_tiers"]

MOST_ROWS = 64  # query rows that share a key head, up to which the host computes: beyond, arithmetic outweighs reading
Partial = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, "TileMask | None", float, "float | None"], Partial]


class HostError(Exception):
    """The host's share of a step failed; the cause is chained."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Query:
    """What is attended, and how.

    Attributes:
        q: `[B, Hq, Sq, D]` on the device.
        mask: of all keys, `[B | 1, 1, Sq, Sk]`, or None: everything is visible.
        scale, softcap, sinks: as in the contract.
        attend: computes one partial, `(q, k, v, mask, scale, softcap) -> (out, lse)`, on either side.
    """

    q: Tensor
    mask: TileMask | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    attend: Attend

    def over(self, q: Tensor, keys: Tensor, values: Tensor, first: int) -> Partial:
        """The partial over the keys `[first, first + n)`, which `keys` and `values` hold."""
        last = first + keys.shape[2]
        mask = None if self.mask is None or self.sees_all(last) else self.mask.sub(columns=(first, last)).to(q.device)
        with torch.no_grad():  # grad mode belongs to a thread, and a new thread begins with gradients on
            out, lse = self.attend(q, keys, values, mask, self.scale, self.softcap)  # type: ignore[arg-type]  # Tensor.to: a mask stays one
        return out.to(lse.dtype), lse

    def sees_all(self, length: int) -> bool:
        """Every query sees every one of `length` keys, by a rule that needs no look at the batch."""
        mask = self.mask
        if mask is None or mask.plain == "full":
            return True
        return mask.plain == "causal" and mask.first_query() >= mask.kv_offset + length - 1

    def sees(self, first: int, end: int) -> bool:
        """Some query may see a key of `[first, end)`; where False none does."""
        if self.mask is None:
            return True
        part = self.mask.sub(columns=(first, end))
        return any(part.key_range(row) != (0, 0) for row in range(part.shape[0]))


class Staging:
    """Two buffers on the device for chunks that cross the link, and one on the host for the query.

    Args:
        machine: where memory comes from.
        chunk_tokens: tokens in a buffer.
    """

    def __init__(self, machine: Machine, chunk_tokens: int) -> None:
        self.machine, self.chunk_tokens = machine, chunk_tokens
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.free: list[Mark] = [None, None]
        self._query: Tensor | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(memory.untyped_storage().nbytes() for pair in self.buffers for memory in pair)

    def reserve(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        """Allocate the buffers of the device for (B, Hkv, D, Dv), unless they are there."""
        batch, kv_heads, width, value_width = shape
        wanted = [(batch, kv_heads, self.chunk_tokens, last) for last in (width, value_width)]
        if not self.buffers or [tuple(memory.shape) for memory in self.buffers[0]] != wanted:
            self.buffers = []
            with torch.inference_mode(False):
                made = [[self.machine.device_memory(one, dtype) for one in wanted] for _ in range(2)]
            self.buffers, self.free = [(keys, values) for keys, values in made], [None, None]

    def query(self, like: Tensor) -> Tensor:
        """Host memory for a query."""
        if self._query is None or self._query.shape != like.shape or self._query.dtype != like.dtype:
            if self._query is not None:
                self.machine.release_host(self._query)
            with torch.inference_mode(False):
                self._query = self.machine.host_memory(tuple(like.shape), like.dtype)
        return self._query

    def release(self) -> None:
        """Give all memory back."""
        self.buffers, self.free = [], [None, None]
        if self._query is not None:
            self.machine.release_host(self._query)
            self._query = None


@dataclass(slots=True)
class Workers:
    """Threads that attend on the host, each a run of the tokens; what a kernel does with threads of its own comes on top.

    Attributes:
        count: number of threads, begun with the first step.
    """

    count: int = 1
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def submit(self, work: Callable[[], tuple[Partial, Mark]]) -> Future[tuple[Partial, Mark]]:
        """Let a thread do `work`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="torchwrap-host-attention")
        return self._pool.submit(work)

    def close(self) -> None:
        """End the threads after what they are doing. The next step begins new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


def attend_tiers(
    layer: TieredLayer, query: Query, *, staging: Staging, workers: Workers, streamed: float, fresh: tuple[Tensor, Tensor] | None = None
) -> Partial:
    """Attention over everything a layer holds.

    Args:
        layer: keys and values.
        query: what attends.
        staging: buffers for what crosses the link.
        workers: threads of the host.
        streamed: share, in [0, 1], of the host's tokens that cross the link although the host could attend them.
        fresh: keys and values of the last tokens where they are still on the device, `[B, Hkv, n, D]` and `[B, Hkv, n, Dv]`: of a prompt
            longer than the device's arena, part is on the host already.

    Returns:
        out `[B, Hq, Sq, Dv]` on the device in the dtype of q, and lse `[B, Hq, Sq]`.

    Raises:
        HostError: a worker failed. Every other worker has ended.
    """
    q, machine = query.q, layer.machine
    many = q.shape[2] * (q.shape[1] // layer.near.keys.shape[1] if layer.near is not None else 1) > MOST_ROWS
    held = layer.length - (fresh[0].shape[2] if many and fresh else 0)
    pieces = [piece for piece in layer.pieces(held) if query.sees(piece.first, piece.end)]
    host = [piece for piece in pieces if piece.tier == "host"]
    tokens = sum(piece.end - piece.first for piece in host)
    there, crossing = _divided(host, 0 if many else tokens - round(tokens * streamed))

    futures = _start_host(layer, query, there, staging, workers)
    try:
        near = [(piece.keys, piece.values, piece.first) for piece in pieces if piece.tier == "device"]
        if len(near) > 1 and layer.near is not None and held == layer.length and query.sees_all(held):
            near = [(*layer.near.span(0, layer.first + layer.recent), 0)]  # one run of memory, and the order of keys is nothing to a sum
        if many and fresh and query.sees(held, layer.length):
            near.append((*fresh, held))
        partials = list(_on_device(layer, query, near, crossing, staging))
        wait(futures)
    except BaseException:
        wait(futures)  # they read memory that the caller may give back
        raise
    for future in futures:
        if (error := future.exception()) is not None:
            raise HostError(str(error) or type(error).__name__) from error
        found, mark = future.result()
        partials.append(machine.compute(partial(_moved, found, q.device), reads=(), after=(mark,)))
    return machine.compute(partial(_merged, query, partials, layer), reads=())


def _divided(host: Sequence[Piece], tokens: int) -> tuple[list[Piece], list[Piece]]:
    """The first `tokens` tokens of the pieces, and the others."""
    before, after = list[Piece](), list[Piece]()
    for piece in host:
        here = min(tokens, piece.end - piece.first)
        tokens -= here
        before += [_cut(piece, 0, here)] if here else []
        after += [_cut(piece, here, piece.end - piece.first)] if here < piece.end - piece.first else []
    return before, after


def _cut(piece: Piece, first: int, end: int) -> Piece:
    return Piece(piece.tier, piece.first + first, piece.keys[:, :, first:end], piece.values[:, :, first:end])


def _start_host(
    layer: TieredLayer, query: Query, pieces: list[Piece], staging: Staging, workers: Workers
) -> list[Future[tuple[Partial, Mark]]]:
    """Send the query to the host and let the workers begin, each with an equal run of the tokens."""
    if not pieces:
        return []
    machine, tokens = layer.machine, sum(piece.end - piece.first for piece in pieces)
    q = staging.query(query.q)
    sent = machine.download(query.q, q)
    futures, left, rest = [], tokens, pieces
    for lane in range(workers.count):
        mine, rest = _divided(rest, -(-left // (workers.count - lane)))
        left -= sum(piece.end - piece.first for piece in mine)
        if mine:

            def work(mine: list[Piece] = mine, lane: int = lane) -> tuple[Partial, Mark]:
                return machine.work(
                    lambda: merge_all([query.over(q, piece.keys, piece.values, piece.first) for piece in mine]),
                    reads=[memory for piece in mine for memory in (piece.keys, piece.values)],
                    lane=(lane, workers.count),
                    after=(sent, layer.spilled),
                )

            futures.append(workers.submit(work))
    return futures


def _on_device(
    layer: TieredLayer, query: Query, near: list[tuple[Tensor, Tensor, int]], crossing: list[Piece], staging: Staging
) -> Iterator[Partial]:
    """Partials over what is on the device, then over what arrives there."""
    machine = layer.machine
    chunks = [
        _cut(piece, at, min(at + staging.chunk_tokens, piece.end - piece.first))
        for piece in crossing
        for at in range(0, piece.end - piece.first, staging.chunk_tokens)
    ]
    if chunks and layer.near is not None:
        staging.reserve(layer.near.shape, layer.near.keys.dtype)
    arrived = [_send(layer, chunk, slot, staging) for slot, chunk in enumerate(chunks[:2])]
    for keys, values, first in near:
        yield machine.compute(partial(query.over, query.q, keys, values, first), reads=(keys, values))
    for index, chunk in enumerate(chunks):
        slot, count = index % 2, chunk.end - chunk.first
        keys, values = (memory[:, :, :count] for memory in staging.buffers[slot])
        yield machine.compute(partial(query.over, query.q, keys, values, chunk.first), reads=(keys, values), after=arrived[slot])
        staging.free[slot] = machine.computed()
        if index + 2 < len(chunks):
            arrived[slot] = _send(layer, chunks[index + 2], slot, staging)


def _send(layer: TieredLayer, chunk: Piece, slot: int, staging: Staging) -> tuple[Mark, ...]:
    after = (staging.free[slot], layer.spilled)
    count = chunk.end - chunk.first
    return tuple(
        layer.machine.upload(source, memory[:, :, :count], after)
        for source, memory in zip((chunk.keys, chunk.values), staging.buffers[slot], strict=True)
    )


def _moved(found: Partial, device: torch.device) -> Partial:
    return found[0].to(device), found[1].to(device)


def _merged(query: Query, partials: list[Partial], layer: TieredLayer) -> Partial:
    q = query.q
    if not partials:
        width = layer.near.values.shape[3] if layer.near is not None else q.shape[3]
        wide = torch.promote_types(q.dtype, torch.float32)
        partials = [(q.new_zeros(*q.shape[:3], width, dtype=wide), q.new_full(q.shape[:3], float("-inf"), dtype=wide))]
    out, lse = with_sinks(*merge_all(partials), query.sinks)
    return out.to(q.dtype), lse

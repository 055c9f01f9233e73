"""Attention of some queries over keys and values in several memories: each part is attended where it lies, or on its way, and merged.

Few queries (decoding): the query goes to the host, worker threads attend the host's tokens while the device attends its own; a share of the
host's tokens may cross the link in chunks and be attended on the device as well, so that device, host and link all work. What is on the
disk is read ahead by one more thread, which attends each block as it arrives. Only partial results return, `[B, Hq, Sq, Dv]` numbers and
their lse. Many queries (a prompt): all of the host's tokens cross the link, because the host has the bandwidth for one query's reading and
not the arithmetic for thousands. The chunks pass through two buffers in turn.

Exact: partials over disjoint keys merge to the result over all of them, up to rounding (merge.py). Masks are cut, not changed.
Source: H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024, has the host compute whole layers;
working on both sides within a layer, and the streamed share, are ours.

Letters: B sequences, Hq and Hkv query and key heads, Sq queries, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from torchwrap.attention.cooperative.arena import Piece
from torchwrap.attention.cooperative.disk import Fetch, ShelfPiece
from torchwrap.attention.cooperative.machine import Machine, Mark
from torchwrap.attention.cooperative.query import Partial, Query
from torchwrap.attention.cooperative.staging import Chunk, Staging, Workers
from torchwrap.attention.cooperative.tiers import TieredLayer
from torchwrap.attention.merge import merge_all, with_sinks

__all__ = ["HostError", "attend_tiers"]

MOST_ROWS = 64  # query rows that share a key head, up to which the host computes: beyond, arithmetic outweighs reading
AHEAD = 2  # blocks of the disk that are on their way at the same time


class HostError(Exception):
    """The host's share of a step failed; the cause is chained."""


class Layer(Protocol):
    """What a layer is to a step: parts that hold some of its heads each."""

    machine: Machine

    @property
    def parts(self) -> tuple[tuple[TieredLayer, int, int], ...]:
        """Part, its first head, the head after its last."""
        ...

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv)."""
        ...


def attend_tiers(
    layer: Layer, query: Query, *, staging: Staging, workers: Workers, streamed: float, fresh: tuple[Tensor, Tensor] | None = None
) -> Partial:
    """Attention over everything a layer holds.

    Args:
        layer: keys and values.
        query: what attends.
        staging: buffers for what crosses the link.
        workers: threads of the host.
        streamed: share, in [0, 1], of the tokens in the host's memory that cross the link although the host could attend them.
        fresh: keys and values of the last tokens where they are still on the device, `[B, Hkv, n, D]` and `[B, Hkv, n, Dv]`: of a prompt
            longer than the device's arena, part is on the host already.

    Returns:
        out `[B, Hq, Sq, Dv]` on the device in the dtype of q, and lse `[B, Hq, Sq]`.

    Raises:
        HostError: a worker failed. Every other worker has ended.
        StorageError: the disk failed while what is there crossed the link.
    """
    machine, heads = layer.machine, layer.shape[1]
    shares = [_Share(part, query.of_heads(first, end, heads), (first, end), streamed, fresh) for part, first, end in layer.parts]
    futures: list[list[Future[tuple[Partial, Mark]]]] = []
    try:
        # The host is woken for all parts before the device begins with the first.
        for place, share in enumerate(shares):
            futures.append(share.start_host(place, staging, workers))
        found = [list(share.on_device(staging)) for share in shares]
    finally:
        wait([one for some in futures for one in some])  # they read memory that the caller may give back
    for some, partials in zip(futures, found, strict=True):
        for future in some:
            if (error := future.exception()) is not None:
                raise HostError(str(error) or type(error).__name__) from error
            moved, mark = future.result()
            partials.append(machine.compute(partial(_moved, moved, query.q.device), reads=(), after=(mark,)))
    return machine.compute(lambda: _joined([share.merged(some) for share, some in zip(shares, found, strict=True)]), reads=())


class _Share:
    """One part of a layer in one step: which of its tokens are attended where."""

    def __init__(
        self, layer: TieredLayer, query: Query, heads: tuple[int, int], streamed: float, fresh: tuple[Tensor, Tensor] | None
    ) -> None:
        self.layer, self.query, self.machine = layer, query, layer.machine
        group = query.q.shape[1] // layer.shape[1] if layer.shape[1] else 1
        many = query.q.shape[2] * group > MOST_ROWS
        new = fresh[0].shape[2] if many and fresh else 0
        held = layer.length - new
        pieces = [piece for piece in layer.pieces(held) if query.sees(piece.first, piece.end)]
        shelved = [piece for piece in layer.on_disk(held) if query.sees(piece.first, piece.end)]
        host = [piece for piece in pieces if piece.tier == "host"]
        tokens = sum(piece.end - piece.first for piece in host)
        self.there, self.crossing = _divided(host, 0 if many else tokens - round(tokens * streamed))
        self.shelved, self.shelved_crossing = ([], shelved) if many else (shelved, [])
        self.near = [(piece.keys, piece.values, piece.first) for piece in pieces if piece.tier == "device"]
        if len(self.near) > 1 and layer.near is not None and held == layer.length and query.sees_all(held):
            # One run of memory, and the order of keys is nothing to a sum.
            self.near = [(*layer.near.span(0, layer.first + layer.recent), 0)]
        if new and fresh and query.sees(held, layer.length):
            self.near.append((fresh[0][:, slice(*heads)], fresh[1][:, slice(*heads)], held))

    def start_host(self, place: int, staging: Staging, workers: Workers) -> list[Future[tuple[Partial, Mark]]]:
        """Send the query to the host and let the workers begin, each with an equal run of the tokens; one more follows the disk."""
        if not self.there and not self.shelved:
            return []
        query, rounding = self.query, self.layer.rounding
        q = query.q if rounding is None else rounding.query(query.q, query.scale, self.layer.shape[1])
        there = staging.query(place, q)
        after = (self.machine.download(q, there), self.layer.spilled)
        futures, left, rest = [], sum(piece.end - piece.first for piece in self.there), self.there
        if self.shelved:
            futures.append(workers.submit(partial(self._follow_disk, there, workers.count, after)))
        for lane in range(workers.count):
            mine, rest = _divided(rest, -(-left // (workers.count - lane)))
            left -= sum(piece.end - piece.first for piece in mine)
            if mine:
                futures.append(workers.submit(partial(self._attend_host, there, mine, (lane, workers.count), after)))
        return futures

    def _attend_host(self, q: Tensor, mine: list[Piece], lane: tuple[int, int], after: tuple[Mark, ...]) -> tuple[Partial, Mark]:
        return self.machine.work(
            lambda: merge_all([self.query.on_host(q, piece.keys, piece.values, piece.first) for piece in mine]),
            reads=[memory for piece in mine for memory in (piece.keys, piece.values)],
            lane=lane,
            after=after,
        )

    def _follow_disk(self, q: Tensor, workers: int, after: tuple[Mark, ...]) -> tuple[Partial, Mark]:
        partials, mark = list[Partial](), None
        for piece, fetch, arrived in _read_ahead(self.machine, self.shelved):
            fetch.wait()
            keys, values = piece.of(fetch)
            found, mark = self.machine.work(
                partial(self.query.on_host, q, keys, values, piece.first),
                reads=(keys, values),
                lane=(workers, max(1, workers)),
                after=(*after, arrived),
            )
            partials.append(found)
        return merge_all(partials), mark

    def on_device(self, staging: Staging) -> Iterator[Partial]:
        """Partials over what is on the device, then over what arrives there."""
        query, machine = self.query, self.machine
        if self.crossing or self.shelved_crossing:
            staging.reserve(self.layer.shape, self.layer.storage, self.layer.dtype)
        arriving = self._sent(staging)
        under_way = list[Chunk]()
        if not self.shelved_crossing:  # waiting for the disk would keep the device waiting
            under_way += islice(arriving, 2)
        for keys, values, start in self.near:
            yield machine.compute(partial(query.over, query.q, keys, values, start), reads=(keys, values))
        under_way += islice(arriving, 2 - len(under_way))
        while under_way:
            chunk = under_way.pop(0)
            yield machine.compute(partial(self._over, staging, chunk), reads=(chunk.keys, chunk.values), after=chunk.arrived)
            staging.free[chunk.slot] = machine.computed()
            under_way += islice(arriving, 1)

    def _over(self, staging: Staging, chunk: Chunk) -> Partial:
        keys, values = staging.widened(chunk.keys, chunk.values, self.query.q.dtype)
        return self.query.over(self.query.q, keys, values, chunk.first)

    def _sent(self, staging: Staging) -> Iterator[Chunk]:
        """Chunks on their way to the device, each begun when it is asked for: the disk's first, then the host's."""
        slot = 0
        for piece, fetch, _ in _read_ahead(self.machine, self.shelved_crossing):
            fetch.wait()
            keys, values = piece.of(fetch)
            marks: tuple[Mark, ...] = ()
            for chunk in _chunks(Piece("host", piece.first, keys, values), staging.chunk_tokens):
                sent = staging.send(chunk, slot, self.layer.spilled)
                marks += sent.arrived
                yield sent
                slot = 1 - slot
            # The buffer is read into again when this is done.
            self.machine.work(lambda: None, reads=(), lane=(0, 1), after=marks)
        for run in self.crossing:
            for chunk in _chunks(run, staging.chunk_tokens):
                yield staging.send(chunk, slot, self.layer.spilled)
                slot = 1 - slot

    def merged(self, partials: list[Partial]) -> Partial:
        """One result of the partials of this part's heads."""
        q = self.query.q
        if not partials:
            width = self.layer.shape[3] if self.layer.near is not None else q.shape[3]
            wide = torch.promote_types(q.dtype, torch.float32)
            partials = [(q.new_zeros(*q.shape[:3], width, dtype=wide), q.new_full(q.shape[:3], float("-inf"), dtype=wide))]
        out, lse = with_sinks(*merge_all(partials), self.query.sinks)
        return out.to(q.dtype), lse


def _read_ahead(machine: Machine, pieces: Sequence[ShelfPiece]) -> Iterator[tuple[ShelfPiece, Fetch, Mark]]:
    """Blocks in order, `AHEAD` of them on their way while one is used."""
    under_way: list[tuple[ShelfPiece, Fetch, Mark]] = []
    rest = iter(pieces)

    def begin() -> None:
        for piece in rest:
            fetch, mark = machine.read(piece.start, piece.nbytes)
            under_way.append((piece, fetch, mark))
            return

    try:
        for _ in range(AHEAD):
            begin()
        while under_way:
            yield under_way[0]
            under_way.pop(0)[1].release()
            begin()
    finally:
        for _, fetch, _ in under_way:
            fetch.release()


def _divided(host: Sequence[Piece], tokens: int) -> tuple[list[Piece], list[Piece]]:
    """The first `tokens` tokens of the pieces, and the others."""
    before, after = list[Piece](), list[Piece]()
    for piece in host:
        count = piece.end - piece.first
        here = min(tokens, count)
        tokens -= here
        before += [piece.cut(0, here)] if here else []
        after += [piece.cut(here, count)] if here < count else []
    return before, after


def _chunks(piece: Piece, tokens: int) -> Iterator[Piece]:
    count = piece.end - piece.first
    return (piece.cut(at, min(at + tokens, count)) for at in range(0, count, tokens))


def _moved(found: Partial, device: torch.device) -> Partial:
    return found[0].to(device), found[1].to(device)


def _joined(found: list[Partial]) -> Partial:
    """Results of runs of heads, side by side."""
    return found[0] if len(found) == 1 else (torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1))

"""What a step needs beside the tokens themselves: buffers on the way to the device, one for the query, and threads on the host.

Letters: B sequences, Hkv heads, D and Dv widths of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from torchwrap.attention.cooperative.arena import Piece
from torchwrap.attention.cooperative.machine import Machine, Mark

__all__ = ["Chunk", "Staging", "Workers"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens on their way to the device.

    Attributes:
        slot: which of the two buffers they fill.
        keys: `[B, Hkv, n, D]` there.
        values: `[B, Hkv, n, Dv]`.
        first: number of the first token.
        arrived: marks after which they are there.
    """

    slot: int
    keys: Tensor
    values: Tensor
    first: int
    arrived: tuple[Mark, ...]


class Staging:
    """Two buffers on the device for chunks that cross the link, and one on the host for the query.

    Args:
        machine: where memory comes from.
        chunk_tokens: tokens in a buffer.
    """

    def __init__(self, machine: Machine, chunk_tokens: int) -> None:
        self.machine, self.chunk_tokens = machine, chunk_tokens
        self.free: list[Mark] = [None, None]
        self._buffers: list[tuple[Tensor, Tensor]] = []  # of keys and of values, flat
        self._wide: tuple[Tensor, Tensor] | None = None
        self._queries: dict[int, Tensor] = {}

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(memory.untyped_storage().nbytes() for pair in (*self._buffers, self._wide or ()) for memory in pair)

    def reserve(self, shape: tuple[int, int, int, int], storage: torch.dtype, dtype: torch.dtype) -> None:
        """Allocate the buffers of the device for (B, Hkv, D, Dv), unless they are there.

        Args:
            shape: the largest that will pass.
            storage: dtype of what crosses the link.
            dtype: in which it is attended.
        """
        batch, kv_heads, width, value_width = shape
        needed = tuple(batch * kv_heads * self.chunk_tokens * last for last in (width, value_width))
        if (
            self._buffers
            and self._buffers[0][0].dtype == storage
            and all(have.numel() >= need for have, need in zip(self._buffers[0], needed, strict=True))
        ):
            return
        self._buffers, self._wide, self.free = [], None, [None, None]
        memory = self.machine.device_memory
        with torch.inference_mode(False):
            self._buffers = [(memory((needed[0],), storage), memory((needed[1],), storage)) for _ in range(2)]
            if storage != dtype:
                self._wide = memory((needed[0],), dtype), memory((needed[1],), dtype)

    def send(self, piece: Piece, slot: int, spilled: Mark) -> Chunk:
        """Start the upload of at most a chunk of the host's tokens into a buffer, once that is free."""
        after = (self.free[slot], spilled)
        sources = (piece.keys, piece.values)
        there = tuple(memory[: source.numel()].view(source.shape) for source, memory in zip(sources, self._buffers[slot], strict=True))
        marks = tuple(self.machine.upload(source, memory, after) for source, memory in zip(sources, there, strict=True))
        return Chunk(slot, there[0], there[1], piece.first, marks)

    def widened(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What arrived, in the dtype in which it is attended; valid until the next call."""
        if keys.dtype == dtype or self._wide is None:
            return keys, values
        wide = tuple(memory[: one.numel()].view(one.shape) for one, memory in zip((keys, values), self._wide, strict=True))
        return wide[0].copy_(keys), wide[1].copy_(values)

    def query(self, place: int, like: Tensor) -> Tensor:
        """Host memory for the query of part `place` of a layer."""
        found = self._queries.get(place)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            if found is not None:
                self.machine.release_host(found)
            with torch.inference_mode(False):
                found = self._queries[place] = self.machine.host_memory(tuple(like.shape), like.dtype)
        return found

    def release(self) -> None:
        """Give all memory back."""
        self._buffers, self._wide, self.free = [], None, [None, None]
        for memory in self._queries.values():
            self.machine.release_host(memory)
        self._queries = {}


@dataclass(slots=True)
class Workers:
    """Threads that attend on the host, each a run of the tokens, and one more for what comes from the disk.

    Attributes:
        count: number of threads, begun with the first step.
    """

    count: int = 1
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Let a thread do `work`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count + 1, thread_name_prefix="torchwrap-host-attention")
        return self._pool.submit(work)

    def close(self) -> None:
        """End the threads after what they are doing. The next step begins new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

"""The keys and values of a whole model in two memories, kept consistent whatever fails.

Every layer appends the same tokens and is attended once for each forward pass. When a part of that fails in layer i, the layers before it
already hold the new tokens and those behind do not; all of them are then cut back to the tokens of the pass before, so that the same pass
can be tried again, and the error names the layer.

Letters: B sequences, Hq and Hkv query and key heads, Sq queries, n new tokens, D and Dv widths.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchwrap.attention.attend import attend
from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative.machine import Machine
from torchwrap.attention.cooperative.planner import Plan
from torchwrap.attention.cooperative.step import Attend, HostError, Query, Staging, Workers, attend_tiers
from torchwrap.attention.cooperative.tiers import Room, TieredLayer
from torchwrap.attention.cpu import decode
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors

__all__ = ["TieredCache"]

CHUNK_TOKENS = 1024


class TieredCache:
    """Keys and values of some layers, part of them on the host.

    Args:
        rooms: for each layer, how much goes where.
        machine: the device and its host.
        streamed: share, in [0, 1], of the host's tokens that a decode step reads over the link.
        chunk_tokens: tokens in one of the two staging buffers.
        workers: threads that attend on the host.
        partial: computes one partial on either side; None: `attend`.

    Attributes:
        layers: one `TieredLayer` for each room.

    Exactness: as one attention over all keys, up to rounding; no gradients.
    Cost: `device_bytes` and `host_bytes`, and on the host one query.
    """

    def __init__(
        self, rooms: Sequence[Room], *, machine: Machine, streamed: float = 0.0, chunk_tokens: int = CHUNK_TOKENS, workers: int = 1,
        partial: Attend | None = None,
    ) -> None:  # fmt: skip
        self.machine, self.streamed = machine, streamed
        self.layers = [TieredLayer(index, machine, room) for index, room in enumerate(rooms)]
        self._staging, self._workers = Staging(machine, chunk_tokens), Workers(workers)
        self._partial = partial or _attend
        self._fresh: tuple[int, int, Tensor, Tensor] | None = None  # layer, its version, keys and values of its last append
        weakref.finalize(self, self._workers.close)

    @classmethod
    def from_plan(
        cls, plan: Plan, machine: Machine, dtype: torch.dtype, *, workers: int = 1, partial: Attend | None = None
    ) -> TieredCache:
        """The cache of a plan, with all its memory allocated now.

        Raises:
            PlanError: there is less memory than the plan counts on. Nothing stays allocated.
        """
        shape = plan.shape
        rooms = [
            Room(kept, min(plan.recent, kept) if kept < plan.tokens else 0, plan.spill, plan.host_tokens(layer), kept < plan.tokens)
            for layer, kept in enumerate(plan.device_tokens)
        ]
        cache = cls(rooms, machine=machine, streamed=plan.streamed, chunk_tokens=plan.chunk_tokens, workers=workers, partial=partial)
        sizes = (shape.batch, shape.kv_heads, shape.width, shape.value_width)
        try:
            for layer in cache.layers:
                layer.reserve(*sizes, dtype)
            if plan.staging_bytes:
                cache._staging.reserve(sizes, dtype)
        except (MemoryError, torch.OutOfMemoryError) as error:
            device, host = cache.device_bytes, cache.host_bytes
            reached = sum(one.near is not None for one in cache.layers)
            cache.release()
            raise errors.PlanError(
                f"no memory for keys and values of {plan.tokens} tokens: {plan.device_bytes} bytes were planned on the device and "
                f"{plan.host_bytes} on the host, and allocating failed at {device} and {host} ({error})",
                where=f"layer {reached}",
                fix="Plan with less device_bytes or host_bytes, a shorter sequence or a smaller batch.",
            ) from error
        return cache

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(layer.device_bytes for layer in self.layers) + self._staging.device_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes allocated on the host for keys and values."""
        return sum(layer.host_bytes for layer in self.layers)

    def append(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens to a layer.

        Args:
            index: of the layer.
            keys: `[B, Hkv, n, D]` on the device.
            values: `[B, Hkv, n, Dv]`.

        Raises:
            BudgetError: neither side has memory for them. All layers hold what they held before this pass.
        """
        layer = self.layers[index]
        with self._restored(layer, layer.length):
            try:
                layer.append(keys.detach(), values.detach())
            except (MemoryError, torch.OutOfMemoryError) as error:
                needed = keys.nbytes + values.nbytes
                raise errors.BudgetError(
                    f"no memory for {keys.shape[2]} more tokens behind {layer.length}: {error}",
                    needed=needed,
                    available=0,
                    where=f"layer {index}",
                    fix="The cache holds the tokens before this pass. Free memory and repeat it, or crop the cache.",
                ) from error
        self._fresh = (index, layer.version, keys.detach(), values.detach())

    def attend(
        self, index: int, q: Tensor, *, mask: TileMask | None = None, scale: float | None = None, softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attention over all tokens of a layer.

        Args:
            index: of the layer.
            q: `[B, Hq, Sq, D]` on the device.
            mask: of all tokens held, `[B | 1, 1, Sq, Sk]`; None: every query sees every token.
            scale: None: `1 / sqrt(D)`.
            softcap: as in the contract.
            sinks: `[Hq]`.

        Returns:
            out `[B, Hq, Sq, Dv]` in the dtype of q, and lse `[B, Hq, Sq]`. Partials of a device other than the CPU were rounded to a half
            dtype once.

        Raises:
            ConfigError: q asks for gradients.
            WorkError: a thread of the host failed. All layers hold what they held before this pass.
        """
        layer = self.layers[index]
        if torch.is_grad_enabled() and q.requires_grad:
            raise errors.ConfigError(
                "a cache with tokens on the host computes no gradients", where=f"layer {index}", fix="Use torch.no_grad(), or no cache."
            )
        fresh, self._fresh = self._fresh, None
        query = Query(
            q=q, mask=mask, scale=q.shape[3] ** -0.5 if scale is None else scale, softcap=softcap, sinks=sinks, attend=self._partial
        )
        with self._restored(layer, layer.previous):
            try:
                return attend_tiers(
                    layer, query, staging=self._staging, workers=self._workers, streamed=self.streamed,
                    fresh=fresh[2:] if fresh and fresh[:2] == (index, layer.version) else None,
                )  # fmt: skip
            except HostError as error:
                raise errors.WorkError(
                    f"attention on the host failed: {error}",
                    where=f"layer {index}",
                    fix=f"The cache holds the {layer.previous} tokens before this pass: repeat it, or keep everything on the device.",
                ) from error.__cause__

    def crop(self, length: int) -> None:
        """Forget tokens from `length` on, in every layer that has them."""
        for layer in self.layers:
            layer.crop(length)

    def select(self, index: Tensor) -> None:
        """Rows `index` of the batch in place of all, in every layer. Shapes: index (B',)."""
        for layer in self.layers:
            layer.select(index)

    def release(self) -> None:
        """Give all memory back and end the threads; the next append begins anew."""
        self._workers.close()
        self._fresh = None
        for layer in self.layers:
            layer.release()
        self._staging.release()

    @contextmanager
    def _restored(self, layer: TieredLayer, length: int) -> Iterator[None]:
        """On an error every layer is cut back to `length` tokens."""
        try:
            yield
        except BaseException:
            self.crop(length)
            raise


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """One partial. On a CPU it comes wider than half types, so that these are rounded to once, after the merge."""
    if q.device.type == "cpu":
        call = checked(q, k, v, mask=mask, scale=scale, softcap=softcap)
        form = None if call.is_empty else decode.form(call)
        if form is not None:
            return decode.partial(call, form)
    return attend(q, k, v, mask=mask, scale=scale, softcap=softcap, return_lse=True)

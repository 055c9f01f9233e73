"""The keys and values of a whole model in two memories, kept consistent whatever fails.

Every layer appends the same tokens and is attended once for each forward pass. When a part of that fails in layer i, the layers before it
already hold the new tokens and those behind do not; all of them are then cut back to the tokens of the pass before, so that the same pass
can be tried again, and the error names the layer.

Letters: B sequences, Hq and Hkv query and key heads, Sq queries, n new tokens, D and Dv widths.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchwrap.attention.attend import attend
from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative.disk import Disk
from torchwrap.attention.cooperative.heads import HeadLayer, HeadRoom
from torchwrap.attention.cooperative.machine import Machine
from torchwrap.attention.cooperative.planner import Plan
from torchwrap.attention.cooperative.query import Attend, Query
from torchwrap.attention.cooperative.rounding import Loss
from torchwrap.attention.cooperative.staging import Staging, Workers
from torchwrap.attention.cooperative.step import HostError, attend_tiers
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
        storage: dtype on the host and the disk; None: that of the device.
        disk: where blocks go for which the host has no room; closed by `release`.

    Attributes:
        layers: one `TieredLayer` or `HeadLayer` for each room.
        gathers: how often all tokens of a layer were put together for who does not attend here; a warning says so the first time.

    Exactness: as one attention over all keys, up to rounding; no gradients. With a narrower `storage` it is lossy: see `losses`.
    Cost: `device_bytes` and `host_bytes`, and on the host one query.
    """

    def __init__(
        self, rooms: Sequence[Room | HeadRoom], *, machine: Machine, streamed: float = 0.0, chunk_tokens: int = CHUNK_TOKENS,
        workers: int = 1, partial: Attend | None = None, storage: torch.dtype | None = None, disk: Disk | None = None,
    ) -> None:  # fmt: skip
        self.machine, self.streamed, self.disk = machine, streamed, disk
        self.gathers: int = 0
        self.layers: list[TieredLayer | HeadLayer] = [
            HeadLayer(index, machine, room, storage, disk)
            if isinstance(room, HeadRoom)
            else TieredLayer(index, machine, room, storage, disk)
            for index, room in enumerate(rooms)
        ]
        self._staging, self._workers = Staging(machine, chunk_tokens), Workers(workers)
        self._partial = partial or _attend
        # One thread for each worker: what the kernel starts on top would be in the way of the others.
        self._partial_host = partial or (_attend if workers == 1 else functools.partial(_attend, threads=1))
        self._fresh: tuple[int, int, Tensor, Tensor] | None = None  # layer, its version, keys and values of its last append
        # A cache that nobody released gives page-locked memory back when it goes: the driver would keep the lock on freed memory.
        weakref.finalize(self, _end, self._workers, self.layers, self._staging, disk)

    @classmethod
    def from_plan(
        cls, plan: Plan, machine: Machine, dtype: torch.dtype, *, workers: int = 1, partial: Attend | None = None,
        storage: torch.dtype | None = None, disk: Disk | None = None,
    ) -> TieredCache:  # fmt: skip
        """The cache of a plan, with all its memory allocated now.

        Args:
            plan: what lies where.
            machine: the device and its host.
            dtype: of keys and values.
            workers, partial: as for `TieredCache`.
            storage: dtype on the host, of the plan's `host_itemsize` bytes; None: `dtype`.
            disk: with room for the plan's `disk_bytes`; None: the plan needs none.

        Raises:
            PlanError: there is less memory than the plan counts on. Nothing stays allocated.
        """
        shape = plan.shape
        storage = None if storage == dtype else storage
        cache = cls(
            [plan.room(layer) for layer in range(shape.layers)], machine=machine, streamed=plan.streamed, chunk_tokens=plan.chunk_tokens,
            workers=workers, partial=partial, storage=storage, disk=disk,
        )  # fmt: skip
        reached = 0
        try:
            for layer in cache.layers:
                reached = layer.index
                layer.reserve(shape.batch, shape.kv_heads, shape.width, shape.value_width, dtype)
            if plan.staging_bytes:
                most = max(plan.host_heads(layer) for layer in range(shape.layers))
                cache._staging.reserve((shape.batch, most, shape.width, shape.value_width), storage or dtype, dtype)
        except (MemoryError, torch.OutOfMemoryError) as error:
            device, host = cache.device_bytes, cache.host_bytes
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
        """Bytes allocated on the host for keys and values, those included that are on their way from the disk."""
        return sum(layer.host_bytes for layer in self.layers) + (self.disk.buffer_bytes if self.disk is not None else 0)

    @property
    def is_lossy(self) -> bool:
        """Something is stored in a narrower dtype than it is computed in."""
        return any(layer.rounding is not None for layer in self.layers)

    @property
    def reason(self) -> str:
        """Why attention is computed here, for people."""
        dtypes = {str(layer.rounding.dtype).removeprefix("torch.") for layer in self.layers if layer.rounding is not None}
        return "part of the keys is on the host" + (f", stored as {', '.join(dtypes)}, which loses something" if dtypes else "")

    @property
    def worst_loss(self) -> Loss | None:
        """The loss of the layer with the largest bound; None where nothing is lost. Waits for the device."""
        return max((loss for loss in self.losses if loss is not None), key=lambda loss: loss.bound, default=None)

    @property
    def losses(self) -> list[Loss | None]:
        """What a narrower storage has cost each layer so far, measured; None where it stores what it was given."""
        return [layer.rounding.loss() if layer.rounding is not None else None for layer in self.layers]

    def append(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens to a layer.

        Args:
            index: of the layer.
            keys: `[B, Hkv, n, D]` on the device.
            values: `[B, Hkv, n, Dv]`.

        Raises:
            BudgetError: neither side has memory for them. All layers hold what they held before this pass.
            DiskFullError, StorageError: the disk has no room, or failed. All layers hold what they held before this pass.
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
            StorageError: the disk failed, or gave other bytes than were written. All layers hold what they held before this pass.
            WorkError: a thread of the host failed. All layers hold what they held before this pass.
        """
        layer = self.layers[index]
        if torch.is_grad_enabled() and q.requires_grad:
            raise errors.ConfigError(
                "a cache with tokens on the host computes no gradients", where=f"layer {index}", fix="Use torch.no_grad(), or no cache."
            )
        fresh, self._fresh = self._fresh, None
        query = Query(
            q=q,
            mask=mask,
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            softcap=softcap,
            sinks=sinks,
            attend=self._partial,
            attend_host=self._partial_host,
        )
        with self._restored(layer, layer.previous):
            try:
                return attend_tiers(
                    layer, query, staging=self._staging, workers=self._workers, streamed=self.streamed,
                    fresh=fresh[2:] if fresh and fresh[:2] == (index, layer.version) else None,
                )  # fmt: skip
            except HostError as error:
                if isinstance(error.__cause__, errors.StorageError):
                    raise error.__cause__ from None
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
        """Rows `index` of the batch in place of all, in every layer.

        Args:
            index: `[B']` integers.

        Raises:
            BudgetError: another number of rows, and no memory for them. The cache is empty: its layers would have different rows.
        """
        for layer in self.layers:
            self.select_in(layer, index)

    def select_in(self, layer: TieredLayer | HeadLayer, index: Tensor) -> None:
        """As `select`, in one layer; the caller sees to it that all others follow."""
        try:
            layer.select(index)
        except (MemoryError, torch.OutOfMemoryError) as error:
            for one in self.layers:
                one.release()
            raise errors.BudgetError(
                f"no memory for {len(index)} rows in place of {layer.batch or 'those before'}: {error}", needed=0, available=0,
                where=f"layer {layer.index}", fix="The cache is empty now. Make it for the largest batch, beams included.",
            ) from error  # fmt: skip

    def release(self) -> None:
        """Give all memory back, end the threads and remove what is on the disk; without a disk, the next append begins anew."""
        self._fresh = None
        _end(self._workers, self.layers, self._staging, self.disk)

    def __getstate__(self) -> None:
        raise TypeError("a cache on two sides has threads and page-locked memory and belongs to one process; begin the sequence anew")

    @contextmanager
    def _restored(self, layer: TieredLayer | HeadLayer, length: int) -> Iterator[None]:
        """On an error every layer is cut back to `length` tokens."""
        try:
            yield
        except BaseException as error:
            self.crop(length)
            if isinstance(error, errors.StorageError):
                error.add_note(f"layer {layer.index}; the cache holds the {length} tokens before this pass")
            raise


def _end(workers: Workers, layers: list[TieredLayer | HeadLayer], staging: Staging, disk: Disk | None) -> None:
    workers.close()
    for layer in layers:
        layer.release()
    staging.release()
    if disk is not None:
        disk.close()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, scale: float, softcap: float | None, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """One partial. On a CPU it comes wider than half types, so that these are rounded to once, after the merge."""
    if q.device.type == "cpu":
        call = checked(q, k, v, mask=mask, scale=scale, softcap=softcap)
        form = None if call.is_empty else decode.form(call)
        if form is not None:
            return decode.partial(call, form, threads)
    return attend(q, k, v, mask=mask, scale=scale, softcap=softcap, return_lse=True)

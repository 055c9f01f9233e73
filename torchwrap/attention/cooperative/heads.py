"""Keys and values of one layer divided by heads: some key heads are on the device with all their tokens, the others on the host.

Two layers of `tiers` side by side, each with its own heads; results are put side by side as well, and nothing has to be merged. No token
ever moves from one side to the other, so there is no spilling and no moving up; what it costs is that shares of the host come in steps of
one head.

Letters: B sequences, Hkv heads, D and Dv widths of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchwrap.attention.cooperative.disk import Disk
from torchwrap.attention.cooperative.machine import Machine
from torchwrap.attention.cooperative.rounding import Rounding
from torchwrap.attention.cooperative.tiers import Room, TieredLayer
from torchwrap.core import errors

__all__ = ["HeadLayer", "HeadRoom"]


@dataclass(frozen=True, slots=True)
class HeadRoom:
    """How much of a layer goes where.

    Attributes:
        heads: key heads that stay on the device, at least 1 and not all.
        kept: room of those.
        moved: room of the others.
    """

    heads: int
    kept: Room
    moved: Room


class HeadLayer:
    """The keys and values of one layer, with the face of a `TieredLayer`.

    Args:
        index: of the layer.
        machine: where memory comes from.
        room: how much goes where.
        storage: dtype on the host and the disk; None: that of the device.
        disk: as for `TieredLayer`.
    """

    def __init__(self, index: int, machine: Machine, room: HeadRoom, storage: torch.dtype | None = None, disk: Disk | None = None) -> None:
        self.index: int = index
        self.machine: Machine = machine
        self.room: HeadRoom = room
        self.kept: TieredLayer = TieredLayer(index, machine, room.kept)
        self.moved: TieredLayer = TieredLayer(index, machine, room.moved, storage, disk)

    @property
    def parts(self) -> tuple[tuple[TieredLayer, int, int], ...]:
        """Both, with their heads."""
        here = self.room.heads
        return (self.kept, 0, here), (self.moved, here, here + self.moved.shape[1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv); zeros before there is memory."""
        batch, heads, width, value_width = self.moved.shape
        return batch, heads + self.room.heads if heads else 0, width, value_width

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values on the device."""
        return self.kept.dtype

    @property
    def rounding(self) -> Rounding | None:
        """What a narrower storage has cost; None: nothing."""
        return self.moved.rounding

    @property
    def length(self) -> int:
        """Tokens held."""
        return min(self.kept.length, self.moved.length)

    @property
    def previous(self) -> int:
        """Tokens held before the last `append`."""
        return min(self.kept.previous, self.moved.previous)

    @property
    def version(self) -> int:
        """Changes whenever the tokens do."""
        return self.kept.version + self.moved.version

    @property
    def batch(self) -> int:
        """B; 0 before there is memory."""
        return self.moved.batch

    @property
    def host_tokens(self) -> int:
        """Tokens of which some heads are in the host's memory."""
        return self.moved.host_tokens

    @property
    def disk_tokens(self) -> int:
        """Tokens of which some heads are on the disk."""
        return self.moved.disk_tokens

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device."""
        return self.kept.device_bytes + self.moved.device_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes allocated on the host."""
        return self.kept.host_bytes + self.moved.host_bytes

    def reserve(self, batch: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype, *, whole: bool = True) -> None:
        """As for `TieredLayer`, with all heads."""
        self.kept.reserve(batch, self.room.heads, width, value_width, dtype, whole=whole)
        self.moved.reserve(batch, kv_heads - self.room.heads, width, value_width, dtype, whole=whole)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """As for `TieredLayer`, with all heads. Where it fails, `crop` to the length before leaves the layer as it was."""
        shape = keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3]
        if self.shape[1] and shape != self.shape:
            raise errors.ConfigError(
                f"new tokens have (batch, heads, width of keys, width of values) {shape}, the cache {self.shape}",
                where=f"layer {self.index}",
                fix="Make the cache for this model and batch size; beams and returned sequences count as batch.",
            )
        here = self.room.heads
        if shape[1] <= here:
            raise errors.ConfigError(
                f"{here} of {shape[1]} key heads on the device leave none for the host", where=f"layer {self.index}", fix="Divide by token."
            )
        self.kept.append(keys[:, :here], values[:, :here])
        self.moved.append(keys[:, here:], values[:, here:])

    def gathered(self, kind: Literal["keys", "values"]) -> Tensor:
        """All of them on the device."""
        return torch.cat([self.kept.gathered(kind), self.moved.gathered(kind)], 1)

    def crop(self, length: int) -> None:
        """Forget tokens from `length` on; memory stays allocated."""
        self.kept.crop(length)
        self.moved.crop(length)

    def select(self, index: Tensor) -> None:
        """Rows `index` of the batch in place of all."""
        self.kept.select(index)
        self.moved.select(index)

    def release(self) -> None:
        """Give all memory back and hold nothing."""
        self.kept.release()
        self.moved.release()

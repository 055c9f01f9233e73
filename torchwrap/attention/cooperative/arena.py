"""Memory for the keys and values of some tokens of one layer, on either side.

Letters: B sequences, Hkv heads, D and Dv widths of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchwrap.attention.cooperative.machine import Machine

__all__ = ["Arena", "Piece", "Tier", "exchange", "make_arena", "selected", "write"]

Tier = Literal["device", "host"]


@dataclass(slots=True, eq=False)
class Arena:
    """Memory for tokens of one layer.

    Attributes:
        keys: `[B, Hkv, capacity, D]`.
        values: `[B, Hkv, capacity, Dv]`.
        count: tokens in it, where it is one of the host's; the layer itself counts those on the device.
    """

    keys: Tensor
    values: Tensor
    count: int = 0

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self.keys.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv)."""
        return self.keys.shape[0], self.keys.shape[1], self.keys.shape[3], self.values.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def span(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens `[first, end)` of this arena, as views."""
        return self.keys[:, :, first:end], self.values[:, :, first:end]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A run of tokens in one memory: `keys[:, :, i]` belongs to token `first + i`."""

    tier: Tier
    first: int
    keys: Tensor
    values: Tensor

    @property
    def end(self) -> int:
        """The token after the last."""
        return self.first + self.keys.shape[2]

    def cut(self, first: int, end: int) -> Piece:
        """Its tokens `[first, end)`, counted from its own first."""
        return Piece(self.tier, self.first + first, self.keys[:, :, first:end], self.values[:, :, first:end])


def make_arena(machine: Machine, tier: Tier, shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> Arena:
    """Memory for so many tokens of (B, Hkv, D, Dv), or the machine's error and nothing."""
    batch, kv_heads, width, value_width = shape
    memory = machine.device_memory if tier == "device" else machine.host_memory
    # A cache outlives the region it is made in, and tensors made in inference mode cannot be written outside it.
    with torch.inference_mode(False):
        keys = memory((batch, kv_heads, tokens, width), dtype)
        try:
            return Arena(keys, memory((batch, kv_heads, tokens, value_width), dtype))
        except BaseException:
            if tier == "host":
                machine.release_host(keys)
            raise


def write(arena: Arena, at: int, keys: Tensor, values: Tensor) -> None:
    """Put tokens at `[at, at + n)`."""
    there = arena.span(at, at + keys.shape[2])
    there[0].copy_(keys)
    there[1].copy_(values)


def exchange(arena: Arena, count: int, rows: list[int]) -> None:
    """Rows of the batch in place, of the first `count` tokens."""
    changed = [row for row, chosen in enumerate(rows) if row != chosen]
    for memory in (arena.keys, arena.values):
        memory[changed, :, :count] = memory[[rows[row] for row in changed], :, :count]


def selected(machine: Machine, tier: Tier, arena: Arena, count: int, rows: list[int]) -> Arena:
    """Another arena with rows of the batch, of the first `count` tokens."""
    made = make_arena(machine, tier, (len(rows), *arena.shape[1:]), arena.capacity, arena.keys.dtype)
    for new, old in ((made.keys, arena.keys), (made.values, arena.values)):
        for row, chosen in enumerate(rows):
            new[row, :, :count] = old[chosen, :, :count]
    made.count = arena.count
    return made

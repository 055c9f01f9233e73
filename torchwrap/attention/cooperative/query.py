"""What a step asks, and which keys it can see.

Letters: B sequences, Hq and Hkv query and key heads, Sq queries, Sk keys, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchwrap.attention.cpu import decode
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.merge import merge
from torchwrap.core import errors

__all__ = ["Attend", "Partial", "Query", "sees"]

Partial = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, "TileMask | None", float, "float | None"], Partial]
PIECE = 1024  # tokens that are widened at a time where the host's kernel does not read their dtype


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Query:
    """What is attended, and how.

    Attributes:
        q: `[B, Hq, Sq, D]` on the device.
        mask: of all keys, `[B | 1, 1, Sq, Sk]`, or None: everything is visible.
        scale, softcap, sinks: as in the contract.
        attend: computes one partial on the device, `(q, k, v, mask, scale, softcap) -> (out, lse)`.
        attend_host: the same on the host.
    """

    q: Tensor
    mask: TileMask | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    attend: Attend
    attend_host: Attend

    def of_heads(self, first: int, end: int, kv_heads: int) -> Query:
        """The same of the query heads that read key heads `[first, end)` of `kv_heads`.

        Raises:
            UnsupportedModelError: these are not all, and the mask differs from head to head.
        """
        if end - first == kv_heads:
            return self
        if self.mask is not None and self.mask.shape[1] > 1:
            raise errors.UnsupportedModelError(
                f"a mask of {self.mask.shape[1]} heads cannot be divided by heads", where="kv_split", fix='Use kv_split="token".'
            )
        group = self.q.shape[1] // kv_heads
        heads = slice(first * group, end * group)
        return replace(self, q=self.q[:, heads], sinks=None if self.sinks is None else self.sinks[heads])

    def over(self, q: Tensor, keys: Tensor, values: Tensor, first: int) -> Partial:
        """The partial over the keys `[first, first + n)`, which `keys` and `values` hold, on the device."""
        return self._over(self.attend, q, keys, values, first)

    def on_host(self, q: Tensor, keys: Tensor, values: Tensor, first: int) -> Partial:
        """The same on the host; what no kernel there reads as it is stored is widened piece by piece, and results are never narrowed."""
        if keys.dtype == q.dtype and (q.dtype == self.q.dtype or self._is_native(keys, values)):
            return self._over(self.attend_host, q, keys, values, first)
        wide = torch.promote_types(q.dtype, torch.float32) if keys.dtype == q.dtype else q.dtype
        found: Partial | None = None
        for at in range(0, keys.shape[2], PIECE):
            k, v = (memory[:, :, at : at + PIECE].to(wide) for memory in (keys, values))
            one = self._over(self.attend_host, q.to(wide), k, v, first + at)
            found = one if found is None else merge(*found, *one)
        assert found is not None
        return found

    def _over(self, attend: Attend, q: Tensor, keys: Tensor, values: Tensor, first: int) -> Partial:
        last = first + keys.shape[2]
        mask = None if self.mask is None or self.sees_all(last) else self.mask.sub(columns=(first, last)).to(q.device)
        with torch.no_grad():  # grad mode belongs to a thread, and a new thread begins with gradients on
            out, lse = attend(q, keys, values, mask, self.scale, self.softcap)  # type: ignore[arg-type]  # Tensor.to: a mask stays one
        return out.to(lse.dtype), lse

    def _is_native(self, keys: Tensor, values: Tensor) -> bool:
        """The native kernel takes it, whose results are float32; any other of a half dtype rounds them to that."""
        ranges = self.mask is None or decode.is_ranges(self.mask)
        return ranges and decode.native_library() is None and max(keys.shape[3], values.shape[3]) <= decode.MOST_WIDTH

    def sees_all(self, length: int) -> bool:
        """Every query sees every one of `length` keys, by a rule that needs no look at the batch."""
        mask = self.mask
        if mask is None or mask.plain == "full":
            return True
        return mask.plain == "causal" and mask.first_query() >= mask.kv_offset + length - 1

    def sees(self, first: int, end: int) -> bool:
        """Some query may see a key of `[first, end)`; where False none does."""
        return sees(self.mask, first, end)


def sees(mask: TileMask | None, first: int, end: int) -> bool:
    """Some query of a mask may see a key of `[first, end)`; where False none does."""
    if mask is None:
        return True
    part = mask.sub(columns=(first, end))
    return any(part.key_range(row) != (0, 0) for row in range(part.shape[0]))

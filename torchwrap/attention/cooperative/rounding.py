"""What is lost when keys and values are stored in a narrower dtype than they are computed in, measured while they are stored.

With keys that are off by at most dk, a query off by dq and values off by dv (lengths of vectors for keys and queries, numbers for values),
no score is off by more than e = scale * (|q| dk + dq (|k| + dk)), so no weight by more than the factor exp(2 e), and no number of the
result by more than

    bound = (exp(2 e) - 1) * max |v| + dv

All of these are maxima over what was really stored and asked; a soft cap only makes scores differ less. It is a bound for one layer's
attention, not for what later layers make of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Loss", "Rounding"]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that attention on the host reads without a copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What a storage dtype has cost one layer so far; everything is measured.

    Attributes:
        dtype: of the storage.
        key_error: largest length of the difference between a key and what is stored of it.
        key_size: largest length of a key stored.
        value_error: largest difference of a number of a value.
        value_size: largest number of any value.
        query_error: largest length of the difference between a query and what attends on the host; 0 where that is the query itself.
        query_size: largest length of a query.
        scale: largest factor of the scores.
    """

    dtype: torch.dtype
    key_error: float
    key_size: float
    value_error: float
    value_size: float
    query_error: float
    query_size: float
    scale: float

    @property
    def bound(self) -> float:
        """No number of an attention result differs by more from that of exact storage (beyond the rounding of sums)."""
        scores = self.scale * (self.query_size * self.key_error + self.query_error * (self.key_size + self.key_error))
        return math.expm1(2 * scores) * self.value_size + self.value_error if scores < 300 else math.inf

    def explain(self) -> str:
        """The record for people."""
        return (
            f"stored as {str(self.dtype).removeprefix('torch.')}: keys off by at most {self.key_error:.3g} of {self.key_size:.3g}, "
            f"values by {self.value_error:.3g} of {self.value_size:.3g}; results of this layer by at most {self.bound:.3g}"
        )


class Rounding:
    """Narrows keys and values of one layer and keeps the largest differences.

    Args:
        dtype: of the storage.

    Cost: some passes over each new token and each query on the device; nothing is waited for until `loss` is asked.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.scale = 0.0
        self._most: dict[str, Tensor] = {}

    def seen(self, values: Tensor) -> None:
        """Values that are stored anywhere: their size counts."""
        if values.numel():
            self._raise("value_size", values.abs().amax())

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the dtype of the storage; what is beyond its largest number becomes that."""
        narrow = _narrowed(keys, self.dtype), _narrowed(values, self.dtype)
        if keys.numel() and values.numel():
            self._raise("key_size", keys.float().norm(dim=-1).amax())
            self._raise("key_error", (keys.float() - narrow[0].float()).norm(dim=-1).amax())
            self._raise("value_error", (values.float() - narrow[1].float()).abs().amax())
        return narrow

    def query(self, q: Tensor, scale: float) -> Tensor:
        """The query as it attends on the host: in the storage's dtype where the host's kernel reads that."""
        self.scale = max(self.scale, abs(scale))
        self._raise("query_size", q.float().norm(dim=-1).amax())
        if self.dtype not in KERNEL_DTYPES:
            return q
        narrow = _narrowed(q, self.dtype)
        self._raise("query_error", (q.float() - narrow.float()).norm(dim=-1).amax())
        return narrow

    def loss(self) -> Loss:
        """The record so far; waits for the device."""
        found = {name: float(most) for name, most in self._most.items()}
        names = ("key_error", "key_size", "value_error", "value_size", "query_error", "query_size")
        return Loss(dtype=self.dtype, scale=self.scale, **{name: found.get(name, 0.0) for name in names})

    def _raise(self, name: str, value: Tensor) -> None:
        before = self._most.get(name)
        value = value.detach().float()
        self._most[name] = value if before is None else torch.maximum(before, value)


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (tensor.clamp(-largest, largest) if largest < torch.finfo(tensor.dtype).max else tensor).to(dtype)

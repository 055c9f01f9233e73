"""What is lost when keys and values are stored in a narrower dtype than they are computed in, measured while they are stored.

With keys that are off by at most dk, a query off by dq and values off by dv (lengths of vectors for keys and queries, numbers for values),
no score is off by more than e = scale * (|q| dk + dq (|k| + dk)). Weights of a softmax whose scores move by at most e move, taken together,
by at most tanh(e / 2) each way (the worst case are two groups of keys, one e up and the other e down), so no number of the result moves by
more than

    bound = 2 tanh(e / 2) max |v| + dv

All of these are maxima over what was really stored and asked, for each key head; a soft cap only makes scores differ less. It is what
cannot be exceeded, not what is likely (errors of a key rarely point along the query), and it is for one layer's attention, not for what
later layers make of it.

Letters: B sequences, Hq and Hkv query and key heads, Sq queries, n tokens, D and Dv widths.
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
    """What a storage dtype has cost one layer so far; everything is measured, in the key head whose bound is largest.

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
        return 2 * math.tanh(scores / 2) * self.value_size + self.value_error

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
        self.scale: float = 0.0
        self._most: dict[str, Tensor] = {}

    def seen(self, values: Tensor) -> None:
        """Values that are stored anywhere, `[B, Hkv, n, Dv]`: their size counts."""
        self._raise("value_size", values.abs())

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the dtype of the storage; what is beyond its largest number becomes that.

        Args:
            keys: `[B, Hkv, n, D]`.
            values: `[B, Hkv, n, Dv]`.
        """
        narrow = _narrowed(keys, self.dtype), _narrowed(values, self.dtype)
        self._raise("key_size", _lengths(keys))
        self._raise("key_error", _lengths(keys.float() - narrow[0].float()))
        self._raise("value_error", (values.float() - narrow[1].float()).abs())
        return narrow

    def query(self, q: Tensor, scale: float, kv_heads: int) -> Tensor:
        """The query as it attends on the host: in the storage's dtype where the host's kernel reads that.

        Args:
            q: `[B, Hq, Sq, D]`.
            scale: factor of the scores.
            kv_heads: Hkv.
        """
        self.scale = max(self.scale, abs(scale))
        groups = (kv_heads, -1)  # query heads that read one key head
        self._raise("query_size", _lengths(q).unflatten(1, groups).flatten(2))
        if self.dtype not in KERNEL_DTYPES:
            return q
        narrow = _narrowed(q, self.dtype)
        self._raise("query_error", _lengths(q.float() - narrow.float()).unflatten(1, groups).flatten(2))
        return narrow

    def loss(self) -> Loss:
        """The record so far; waits for the device."""
        found = {name: most.tolist() for name, most in self._most.items()}
        names = ("key_error", "key_size", "value_error", "value_size", "query_error", "query_size")
        heads = max((len(most) for most in found.values()), default=1)
        return max(
            (
                Loss(dtype=self.dtype, scale=self.scale, **{name: found[name][head] if name in found else 0.0 for name in names})
                for head in range(heads)
            ),
            key=lambda loss: loss.bound,
        )

    def _raise(self, name: str, numbers: Tensor) -> None:
        """Keep the largest of each head, which is dimension 1."""
        if not numbers.numel():
            return
        most = numbers.detach().float().transpose(0, 1).flatten(1).amax(1)
        before = self._most.get(name)
        self._most[name] = most if before is None else torch.maximum(before, most)


def _lengths(vectors: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32)
    return found


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (tensor.clamp(-largest, largest) if largest < torch.finfo(tensor.dtype).max else tensor).to(dtype)

"""Sequences one after the other in one row, each with keys of its own: attention as a server of many requests needs it.

Each sequence has some queries, which are the last of its keys: one when a token is generated, many while a prompt is read, all of them
when it is read at once. A mask over the whole row would be the product of all queries and all keys, and the distance of the band from the
diagonal differs between sequences. So the row is taken apart, once for all layers of a model, into calls that every back end knows:

* sequences of one query become a batch of single queries over the same keys, each with a range of its own, and are one call;
* neighbours whose queries are all of their keys are one packed call;
* any other is a causal or windowed call by itself.

Letters: Hq, Hkv heads, Sq and Sk queries and keys of all sequences, D and Dv widths of keys and values, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor

from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.errors import ConfigError

__all__ = ["Packing", "Part", "assembled", "attend_packed"]

Kind = Literal["single", "fresh", "continued"]


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences that are one call.

    Attributes:
        kind: of one query each ("single"), whose queries are all of their keys ("fresh"), or one with keys before its queries
            ("continued").
        rows: the queries; for "single" their indices, if they are not neighbours.
        columns: first and end of the keys.
        mask: for "single" of shape (N, 1, 1, keys), else (1, 1, queries, keys); None: every query sees every key.
    """

    kind: Kind
    rows: slice | Tensor
    columns: slice
    mask: TileMask | None


@dataclass(frozen=True, slots=True)
class Packing:
    """How packed sequences are taken apart.

    Attributes:
        q_length: queries that belong to a sequence, from the first on.
        kv_length: keys likewise.
        parts: together all of these queries.

    Example:
        >>> from torchwrap.attention.packed import Packing
        >>> lengths = torch.tensor([0, 1, 2, 6]), torch.tensor([0, 5, 12, 16])
        >>> [part.kind for part in Packing.of(*lengths).parts]
        ['single', 'fresh']
    """

    q_length: int
    kv_length: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, q_lengths: Tensor, k_lengths: Tensor, *, window: int | None = None) -> Packing:
        """The parts of sequences of these cumulative lengths.

        Args:
            q_lengths: integers [N + 1], from 0.
            k_lengths: integers [N + 1], from 0; no sequence has fewer keys than queries. A sequence may be empty.
            window: keys that a query sees, its own included; None: all up to its own.

        Raises:
            ConfigError: not such numbers.

        Cost: two reads from the device, O(N).
        """
        queries, keys = _lengths(q_lengths), _lengths(k_lengths)
        if len(queries) != len(keys) or any(b - a > d - c for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True)):
            raise ConfigError(
                f"cumulative lengths of queries are {queries}, of keys {keys}", where="Packing",
                fix="Give as many of keys as of queries, and no sequence fewer keys than queries.",
            )  # fmt: skip
        spans = [_Span(a, b, c, d) for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True) if b > a]
        return cls(queries[-1], keys[-1], tuple(_parts(spans, window, k_lengths.device)))


@dataclass(frozen=True, slots=True)
class _Span:
    """Queries `first` to `end` of a sequence with the keys `k_first` to `k_end`."""

    first: int
    end: int
    k_first: int
    k_end: int

    @property
    def kind(self) -> Kind:
        length = self.end - self.first
        return "single" if length == 1 else "fresh" if length == self.k_end - self.k_first else "continued"


def _lengths(cumulative: Tensor) -> list[int]:
    whole = isinstance(cumulative, Tensor) and cumulative.dim() == 1 and not cumulative.is_floating_point()
    ends: list[int] = cumulative.tolist() if whole else []
    if not ends or ends[0] != 0 or sorted(ends) != ends:
        raise ConfigError(
            f"cumulative lengths are {ends or cumulative}", where="Packing", fix="Give integers [0, n0, n0 + n1, ...], growing."
        )
    return ends


def _parts(spans: list[_Span], window: int | None, device: torch.device) -> Iterator[Part]:
    singles = [span for span in spans if span.kind == "single"]
    if singles:
        yield _single(singles, window, device)
    for kind, group in groupby(spans, key=lambda span: span.kind):
        run = list(group)
        if kind == "fresh" and len(run) > 1:
            yield _fresh(run, window, device)
        elif kind != "single":
            for span in run:
                shape = 1, span.end - span.first, span.k_end - span.k_first
                mask = TileMask.causal(*shape, device=device) if window is None else TileMask.window(*shape, window, device=device)
                yield Part(kind, slice(span.first, span.end), slice(span.k_first, span.k_end), mask)


def _single(spans: list[_Span], window: int | None, device: torch.device) -> Part:
    seen = [(span.k_first if window is None else max(span.k_first, span.k_end - window), span.k_end) for span in spans]
    rows: slice | Tensor = slice(spans[0].first, spans[-1].end)
    if spans[-1].end - spans[0].first > len(spans):
        rows = torch.tensor([span.first for span in spans], device=device)
    columns = slice(seen[0][0], seen[-1][1])
    if len(spans) == 1:
        return Part("single", rows, columns, None)
    first, end = (torch.tensor(numbers, dtype=torch.int32, device=device) - columns.start for numbers in zip(*seen, strict=True))
    return Part("single", rows, columns, TileMask(len(spans), 1, columns.stop - columns.start, kv_start=first, kv_end=end))


def _fresh(run: list[_Span], window: int | None, device: torch.device) -> Part:
    ends = torch.tensor([run[0].first, *(span.end for span in run)], device=device) - run[0].first
    mask = TileMask.from_cu_seqlens(ends, window=window)
    return Part("fresh", slice(run[0].first, run[-1].end), slice(run[0].k_first, run[-1].k_end), mask)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, attend: Callable[..., Tensor]) -> Tensor:
    """Causal attention of packed sequences, each within itself.

    Args:
        q: queries of all sequences.
        k: keys.
        v: values.
        packing: what belongs together; rows behind its last query are padding.
        attend: computes a part: as `torchwrap.attention.attend.attend`, with `mask` by name, all else bound.

    Returns:
        out; zeros for padding.

    Raises:
        ConfigError: there are fewer queries or keys than sequences have, or more than one row.

    Shapes: q (1, Hq, Sq, D), k (1, Hkv, Sk, D), v (1, Hkv, Sk, Dv), any strides; out (1, Hq, Sq, Dv), in memory (1, Sq, Hq, Dv).

    Cost: nothing of Sq * Sk; a copy of single queries that are not neighbours.
    """
    if q.shape[0] != 1 or q.shape[2] < packing.q_length or k.shape[2] < packing.kv_length:
        raise ConfigError(
            f"sequences of {packing.q_length} queries and {packing.kv_length} keys in q {list(q.shape)} and k {list(k.shape)}",
            where="attend_packed", fix="Give all sequences in one row.",
        )  # fmt: skip

    def compute(part: Part, rows: Tensor) -> Tensor:
        keys, values = k[:, :, part.columns], v[:, :, part.columns]
        if part.kind != "single":
            return attend(rows, keys, values, mask=part.mask)
        count = rows.shape[2]
        singles = attend(rows.transpose(0, 2), keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), mask=part.mask)
        return singles.transpose(0, 2)

    return assembled(q, packing, v.shape[3], compute)


def assembled(q: Tensor, packing: Packing, width: int, compute: Callable[[Part, Tensor], Tensor]) -> Tensor:
    """The results of all parts in their places.

    Args:
        q: `(1, Hq, Sq, D)`.
        packing: the parts.
        width: Dv.
        compute: gives the result of a part, `(1, Hq, rows, Dv)`, from its queries, `(1, Hq, rows, D)`.
    """
    found = [compute(part, q[:, :, part.rows]) for part in packing.parts]
    if len(found) == 1 and isinstance(packing.parts[0].rows, slice) and packing.q_length == q.shape[2]:
        return found[0]
    out = q.new_zeros(1, q.shape[2], q.shape[1], width).transpose(1, 2)
    for part, rows in zip(packing.parts, found, strict=True):
        out[:, :, part.rows] = rows
    return out

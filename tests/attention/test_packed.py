"""Packed sequences taken apart: each query against its own keys, one at a time, in float64."""

from __future__ import annotations

import functools
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.packed import Packing, attend_packed
from torchwrap.core.errors import ConfigError

SEQUENCES = {
    "decode": ([1, 1, 1], [5, 9, 3]),
    "mixed": ([1, 4, 1, 0, 3, 2, 1, 5], [7, 4, 1, 0, 9, 2, 30, 5]),
    "fresh": ([3, 4], [3, 4]),
    "one": ([1], [9]),
    "continued": ([6], [20]),
    "nothing": ([0], [0]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "eager": {"backend": "eager"},
}
PADDING = 2


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def made(queries: list[int], keys: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (4, sum(queries) + PADDING, 8), (2, sum(keys) + PADDING, 8), (2, sum(keys) + PADDING, 6)
    q, k, v = (torch.randn(1, *shape, generator=generator) for shape in shapes)
    return q, k, v


def by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: list[int],
    keys: list[int],
    window: int | None,
    *,
    scale: float = 8**-0.5,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    q, k, v = q.double()[0], k.double()[0], v.double()[0]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    for (a, b), (_first, end) in zip(pairwise([0, *accumulate(queries)]), pairwise([0, *accumulate(keys)]), strict=True):
        for row in range(a, b):
            last = end - (b - row)
            first = _first if window is None else max(_first, last - window + 1)
            for head in range(q.shape[0]):
                scores = k[head // 2, first : last + 1] @ q[head, row] * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                scores = scores if sinks is None else torch.cat([scores, sinks[head : head + 1]])
                out[head, row] = scores.softmax(0)[: last + 1 - first] @ v[head // 2, first : last + 1]
    return out[None]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("name", SEQUENCES)
def test_every_sequence_sees_itself_up_to_each_query(name: str, window: int | None, options: str) -> None:
    queries, keys = SEQUENCES[name]
    if window is not None:  # what a sliding cache holds
        keys = [min(all_keys, new + window - 1) for new, all_keys in zip(queries, keys, strict=True)]
    q, k, v = made(queries, keys)
    packing = Packing.of(cumulative(queries), cumulative(keys), window=window)
    out = attend_packed(q, k, v, packing, functools.partial(attend, **OPTIONS[options]))
    expected = by_hand(q, k, v, queries, keys, window, **OPTIONS[options])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


def test_a_window_is_kept_where_the_keys_reach_farther() -> None:
    queries, keys = [1, 3, 4], [30, 20, 4]
    q, k, v = made(queries, keys)
    out = attend_packed(q, k, v, Packing.of(cumulative(queries), cumulative(keys), window=5), attend)
    torch.testing.assert_close(out.double(), by_hand(q, k, v, queries, keys, 5), rtol=1e-5, atol=1e-5)


def test_single_queries_are_one_call_wherever_they_stand() -> None:
    packing = Packing.of(cumulative([1, 4, 1, 0, 1]), cumulative([7, 4, 9, 0, 2]))
    assert [part.kind for part in packing.parts] == ["single", "fresh"]
    assert packing.parts[0].rows.tolist() == [0, 5, 6]  # type: ignore[union-attr]
    calls = []
    q, k, v = made([1, 4, 1, 0, 1], [7, 4, 9, 0, 2])
    attend_packed(q, k, v, packing, lambda q, k, v, mask: calls.append((q.shape[0], k.stride(0))) or attend(q, k, v, mask=mask))
    assert calls == [(3, 0), (1, k.stride(0))]  # the keys of the batch are one memory


@pytest.mark.parametrize(
    ("queries", "keys"),
    [([0, 2, 4], [0, 1, 4]), ([0, 2], [0, 2, 4]), ([1, 2], [0, 2]), ([0, 3, 2], [0, 3, 6]), ([], [])],
    ids=["too-few-keys", "other-count", "not-from-0", "falling", "empty"],
)
def test_lengths_that_are_none(queries: list[int], keys: list[int]) -> None:
    with pytest.raises(ConfigError):
        Packing.of(torch.tensor(queries, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64))


def test_tensors_that_are_shorter_than_the_sequences() -> None:
    packing = Packing.of(cumulative([1, 4]), cumulative([7, 4]))
    q, k, v = made([1, 4], [7, 4])
    for given in ((q[:, :, :4], k, v), (q, k[:, :, :10], v[:, :, :10]), (q.expand(2, -1, -1, -1), k, v)):
        with pytest.raises(ConfigError, match="11 keys"):
            attend_packed(*given, packing, attend)

"""Padding and packed sequences: the same visibility as a loop over sequences, and lengths that come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.attention.masks import whole
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.masks.packing import key_conditions
from torchwrap.core.errors import ConfigError

Tensor = torch.Tensor


def by_sequence(q_ends: list[int], k_ends: list[int], shape: tuple[int, int], causal: bool, window: int | None) -> Tensor:
    """The mask of packed sequences, each aligned at its end: bool [Sq, Sk]."""
    dense = torch.zeros(shape, dtype=torch.bool)
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        for i in range(q0, q1):
            for j in range(k0, k1):
                behind = (i - q1) - (j - k1)
                dense[i, j] = (not causal or behind >= 0) and (window is None or behind < window)
    return dense


BANDS = [(True, None), (False, None), (True, 3), (False, 3)]


@pytest.mark.parametrize(("causal", "window"), BANDS)
@pytest.mark.parametrize(
    ("q_ends", "k_ends"),
    [([0, 4, 4, 9, 10], None), ([0, 2, 5], [0, 7, 11]), ([0, 5, 6], [0, 3, 9]), ([0, 3], [0, 3]), ([0], None)],
    ids=["same", "cached keys", "more queries than keys", "one", "none"],
)
def test_cumulative_lengths_are_separate_sequences(q_ends: list[int], k_ends: list[int] | None, causal: bool, window: int | None) -> None:
    mask = TileMask.from_cu_seqlens(
        torch.tensor(q_ends), None if k_ends is None else torch.tensor(k_ends, dtype=torch.int32), causal=causal, window=window
    )
    expected = by_sequence(q_ends, k_ends or q_ends, (q_ends[-1], (k_ends or q_ends)[-1]), causal, window)
    assert torch.equal(whole(mask)[0, 0], expected)


@pytest.mark.parametrize(("causal", "window"), BANDS)
@pytest.mark.parametrize("k_ends", [None, [0, 7, 11]], ids=["same", "cached keys"])
def test_tokens_after_the_last_sequence_see_nothing(k_ends: list[int] | None, causal: bool, window: int | None) -> None:
    q_ends = [0, 2, 5]
    mask = TileMask.from_cu_seqlens(
        torch.tensor(q_ends), None if k_ends is None else torch.tensor(k_ends), q_length=8, kv_length=None if k_ends is None else 14,
        causal=causal, window=window,
    )  # fmt: skip
    assert torch.equal(whole(mask)[0, 0], by_sequence(q_ends, k_ends or q_ends, (8, 8 if k_ends is None else 14), causal, window))
    assert mask.live_rows().tolist() == [[True] * 5 + [False] * 3]


@pytest.mark.parametrize(("causal", "window"), BANDS)
def test_positions_that_begin_anew_are_separate_sequences(causal: bool, window: int | None) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [5, 6, 7, 8, 9, 2, 3, 4]])
    mask = TileMask.from_position_ids(positions, causal=causal, window=window)
    for row, ends in enumerate(([0, 3, 5, 6, 8], [0, 5, 8])):
        assert torch.equal(whole(mask)[row, 0], by_sequence(ends, ends, (8, 8), causal, window))


def test_positions_of_one_sequence_leave_a_plain_mask() -> None:
    assert TileMask.from_position_ids(torch.arange(6).expand(2, -1)).plain == "causal"


def test_cumulative_lengths_come_back() -> None:
    ends = torch.tensor([0, 4, 9, 10])
    assert [part.tolist() for part in TileMask.from_cu_seqlens(ends).to_cu_seqlens()] == [ends.tolist()] * 2
    queries, keys = TileMask.from_cu_seqlens(torch.tensor([0, 2, 5]), torch.tensor([0, 7, 11]), causal=False).to_cu_seqlens()
    assert queries.tolist() == [0, 2, 5] and keys.tolist() == [0, 7, 11] and queries.dtype == torch.int32
    packed = TileMask.from_position_ids(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert packed.to_cu_seqlens()[0].tolist() == [0, 3, 5, 6, 10]
    assert [part.tolist() for part in TileMask.causal(3, 2, 5).to_cu_seqlens()] == [[0, 2, 4, 6], [0, 5, 10, 15]]


@pytest.mark.parametrize(
    "mask",
    [
        TileMask.padded([1, 2], 4, 4), TileMask(1, 4, 4, chunk=2), TileMask.from_dense(torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        TileMask.full(1, 3, 3, q_segments=torch.tensor([[0, 1, 0]]).int(), k_segments=torch.tensor([[0, 1, 0]]).int()),
        TileMask.full(1, 2, 2, q_segments=torch.tensor([[0, 1]]).int(), k_segments=torch.tensor([[1, 2]]).int()),
    ],
    ids=["padding", "chunks", "dictionary", "segments that come back", "other keys"],
)  # fmt: skip
def test_masks_that_are_no_row_of_sequences_have_no_lengths(mask: TileMask) -> None:
    with pytest.raises(ConfigError, match="whole sequences"):
        mask.to_cu_seqlens()


def test_padding_becomes_an_interval_and_keeps_a_mask_only_for_holes() -> None:
    def found(rows: list[str]) -> tuple[list[str], TileMask, Tensor]:
        valid = torch.tensor([[mark == "x" for mark in row] for row in rows])
        conditions = key_conditions(valid.long())
        return sorted(conditions), TileMask.full(len(rows), 1, valid.shape[1], **conditions), valid

    cases = (["xxxx", "xxxx"], ["..xx", "xxxx"], ["xx..", "xxxx"], [".xx.", "...."], ["x.xx", "xxxx"], [".x.x", "xxxx"])
    wanted: tuple[list[str], ...] = ([], ["kv_start"], ["kv_end"], ["kv_end", "kv_start"], ["key_mask"], ["key_mask", "kv_start"])
    for rows, names in zip(cases, wanted, strict=True):
        given, mask, valid = found(rows)
        assert given == names and torch.equal(whole(mask)[:, 0, 0], valid)
    _, mask, _ = found(["xx..", "...."])
    assert [mask.key_range(0), mask.key_range(1)] == [(0, 2), (0, 0)]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "not from zero": (lambda: TileMask.from_cu_seqlens(torch.tensor([1, 4])), r"\[1, 4\]"),
    "shrinking": (lambda: TileMask.from_cu_seqlens(torch.tensor([0, 4, 3])), r"\[0, 4, 3\]"),
    "none at all": (lambda: TileMask.from_cu_seqlens(torch.tensor([], dtype=torch.int64)), "cu_seqlens"),
    "floating": (lambda: TileMask.from_cu_seqlens(torch.tensor([0.0, 4.0])), "float32"),
    "a list": (lambda: TileMask.from_cu_seqlens([0, 4]), "list"),  # type: ignore[arg-type]
    "longer than the row": (lambda: TileMask.from_cu_seqlens(torch.tensor([0, 4]), q_length=3), "3 tokens"),
    "other number of keys": (lambda: TileMask.from_cu_seqlens(torch.tensor([0, 4]), torch.tensor([0, 2, 4])), "as many"),
    "negative window": (lambda: TileMask.from_cu_seqlens(torch.tensor([0, 4]), window=-1), "-1"),
    "floating positions": (lambda: TileMask.from_position_ids(torch.zeros(1, 4)), "float32"),
    "positions of one row": (lambda: TileMask.from_position_ids(torch.arange(4)), r"\[4\]"),
    "floating padding": (lambda: key_conditions(torch.ones(2, 4)), "float32"),
    "padding of four dimensions": (lambda: key_conditions(torch.ones(2, 1, 4, 4, dtype=torch.bool)), r"\[2, 1, 4, 4\]"),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_lengths_and_positions_are_refused(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()

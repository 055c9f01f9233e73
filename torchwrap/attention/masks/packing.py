"""Padding and packed sequences as conditions of a mask: from 2-D masks, position numbers and cumulative lengths, and back.

A batch with padding says which columns hold keys; a packed row says which tokens belong to one sequence. Both are a few integers per
token. `cu_seqlens` are the cumulative lengths that kernels for sequences of different lengths take: [0, n0, n0 + n1, ...].
Letters: B batch, Sq queries, Sk keys, S both, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchwrap.attention.transforms import beneath
from torchwrap.core.errors import ConfigError

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["cumulative_lengths", "key_conditions", "of_cumulative", "of_lengths", "position_segments", "segments"]


def key_conditions(valid: Tensor) -> dict[str, Tensor]:
    """Conditions of a 2-D padding mask: where rows begin and end if not all do at the edges, and the mask itself only if it has holes.

    Args:
        valid: bool or integer [B, Sk]; True or not 0: the column holds a key.

    Returns:
        Any of `kv_start`, `kv_end` (int32 [B]) and `key_mask` (bool [B, Sk]), for `TileMask(...)`.

    Raises:
        ConfigError: floating, or not of two dimensions.

    Cost: one read from the device.
    """
    if valid.dim() != 2 or valid.is_floating_point() or valid.is_complex():
        raise ConfigError(
            f"A padding mask is {valid.dtype} {list(valid.shape)}", where="padding", fix="Give bool or integers [B, Sk], True for keys."
        )
    valid = beneath(valid if valid.dtype == torch.bool else valid != 0)
    length = valid.shape[1]
    if valid.numel() == 0:
        return {}
    if valid.is_meta:  # has no numbers: whatever they would be
        return {"key_mask": valid}
    some, marks = valid.any(1), valid.to(torch.uint8)
    start = marks.argmax(1) * some
    end = (length - marks.flip(1).argmax(1)) * some
    latest, earliest, missing = torch.stack((start.max(), end.min(), (end - start - valid.sum(1)).max())).tolist()
    found = {"kv_start": start.int()} if latest > 0 else {}
    if earliest < length:
        found["kv_end"] = end.int()
    if missing:
        found["key_mask"] = valid
    return found


def of_lengths(lengths: Sequence[int] | Tensor, kv_length: int, side: str, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Where the keys of rows of such lengths begin and end, of `kv_length` columns padded on one side: int32 [B] each.

    Raises:
        ConfigError: no list of integers, one below 0 or above `kv_length`, or an unknown side.

    Cost: one read from the device.
    """
    lengths = beneath(lengths) if isinstance(lengths, Tensor) else lengths
    try:
        numbers = torch.as_tensor(lengths, device=device)
        whole = numbers.dim() == 1 and not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
        fits = whole and not bool(((numbers < 0) | (numbers > kv_length)).any())
    except (TypeError, ValueError, RuntimeError):  # no numbers at all
        fits = False
    if side not in ("left", "right") or not fits:
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        raise ConfigError(
            f"Lengths {given} padded on side {side!r} to {kv_length} keys", where="TileMask.padded",
            fix='Give one length of 0 ... kv_length per batch row, and side="left" or "right".',
        )  # fmt: skip
    numbers = numbers.int()
    zero, end = torch.zeros_like(numbers), torch.full_like(numbers, kv_length)
    return (end - numbers, end) if side == "left" else (zero, numbers)


def position_segments(positions: Tensor) -> Tensor | None:
    """Numbers of the packed sequences of rows whose positions begin anew: int32 [B, S]; None if no row holds more than one.

    Args:
        positions: integers [B, S]; where a position is not the one before plus 1, another sequence begins.

    Raises:
        ConfigError: not integers of two dimensions.

    Cost: one read from the device.
    """
    if positions.dim() != 2 or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ConfigError(f"Positions are {positions.dtype} {list(positions.shape)}", where="position_ids", fix="Give integers [B, S].")
    positions = beneath(positions)
    begins = torch.zeros_like(positions, dtype=torch.int32)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return begins.cumsum(1, dtype=torch.int32) if bool(begins.any()) else None


def segments(lengths: Tensor, total: int | None, rest: int) -> Tensor:
    """int32 [1, total]: number of the sequence of each token, `rest` after the last.

    Args:
        lengths: integers [N + 1], cumulative, from 0.
        total: tokens; None: as many as there are sequences for.
        rest: number of the tokens that belong to no sequence.

    Raises:
        ConfigError: not cumulative lengths, or more tokens than `total`.
    """
    lengths = beneath(lengths) if isinstance(lengths, Tensor) else lengths
    integers = isinstance(lengths, Tensor) and lengths.dim() == 1 and not lengths.is_floating_point() and lengths.dtype != torch.bool
    ends = lengths.tolist() if integers else []
    if not ends or ends[0] != 0 or sorted(ends) != ends or (total is not None and ends[-1] > total):
        given = ends or (f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__)
        tokens = "" if total is None else f" of {total} tokens"
        raise ConfigError(f"cu_seqlens{tokens} are {given}", where="cu_seqlens", fix="Give integers [0, n0, n0 + n1, ...], growing.")
    counts = lengths.diff()
    numbers = torch.repeat_interleave(torch.arange(len(counts), device=lengths.device, dtype=torch.int32), counts)
    left = ends[-1] if total is None else total
    return torch.cat((numbers, numbers.new_full((left - ends[-1],), rest)))[None]


def of_cumulative(
    q_lengths: Tensor, k_lengths: Tensor | None, q_total: int | None, k_total: int | None, causal: bool, left: int | None
) -> dict[str, Any]:
    """Lengths and conditions of packed sequences, or `function` where their queries end at different distances from row and column."""
    if k_lengths is not None and k_lengths.shape != q_lengths.shape:
        what = f"cu_seqlens of queries are {list(q_lengths.shape)}, of keys {list(k_lengths.shape)}"
        raise ConfigError(what, where="cu_seqlens", fix="Give as many lengths of keys as of queries.")
    # Tokens of no sequence get numbers that no other token has, and that differ between queries and keys.
    queries = segments(q_lengths, q_total, -1)
    keys = segments(q_lengths, q_total, -2) if k_lengths is None else segments(k_lengths, k_total, -2)
    found: dict[str, Any] = {"q_length": queries.shape[1], "kv_length": keys.shape[1], "q_segments": queries, "k_segments": keys}
    if k_lengths is None or bool((k_lengths == q_lengths).all()):
        return found | {"right": 0 if causal else None, "left": left}
    if not causal and left is None:
        return found
    # Queries are the last of their sequence: the band moves from sequence to sequence, which no single offset can say.
    shift = (k_lengths[1:] - q_lengths[1:]).long()
    ahead = torch.cat((shift, shift.new_zeros(1)))[queries[0].long()]  # row -1 is that of tokens of no sequence

    def function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = q + ahead[q]
        visible = k <= at if causal else torch.ones_like(k <= at)
        return visible if left is None else visible & (k >= at - left)

    return found | {"function": function}


def cumulative_lengths(mask: TileMask) -> tuple[Tensor, Tensor]:
    """Cumulative lengths of queries and of keys, batch rows one after the other: int32 [N + 1] each.

    Packed rows give one sequence per run of equal numbers, other rows one each. Bands (causal, window) stay with the caller.

    Raises:
        ConfigError: padding, chunks, a dictionary, or segments of queries and keys that are not the same runs.
    """
    what = next((name for name in ("kv_start", "kv_end", "key_mask", "chunk", "dictionary") if getattr(mask, name) is not None), None)
    batch, _, q_length, kv_length = mask.shape
    if what is None and mask.q_segments is not None and mask.k_segments is not None:
        numbers = [part.expand(batch, -1) for part in (mask.q_segments, mask.k_segments)]
        (q_runs, q_counts), (k_runs, k_counts) = (_run_lengths(part) for part in numbers)
        if q_runs.shape == k_runs.shape and bool((q_runs == k_runs).all()) and mask.spans().exact:
            return _cumulative(q_counts), _cumulative(k_counts)
        what = "q_segments and k_segments of different order"
    if what is not None:
        raise ConfigError(f"A mask with {what} is no row of whole sequences", where="TileMask.to_cu_seqlens", fix="Keep it as a TileMask.")
    ones = torch.ones(batch, dtype=torch.int32, device=mask.device)
    return _cumulative(ones * q_length), _cumulative(ones * kv_length)


def _run_lengths(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Row and number of each run [N, 2], and its length [N]."""
    rows = torch.arange(len(numbers), device=numbers.device, dtype=numbers.dtype)[:, None].expand_as(numbers)
    runs, counts = torch.unique_consecutive(torch.stack((rows, numbers), -1).flatten(0, 1), return_counts=True, dim=0)
    return runs, counts


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

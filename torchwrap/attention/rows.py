"""Probabilities of a few query rows, of which methods that rank keys by attention (HiRED, H2O) need the numbers and not the product.

Attention itself never holds them. With the lse of a row its probabilities are one product away, `exp(score - lse)`, so any rows can be had
after the call at the cost of these rows alone.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.core import errors

__all__ = ["probabilities", "row_numbers"]


def row_numbers(rows: Sequence[int] | Tensor, length: int) -> list[int]:
    """Rows of `length` queries as numbers from 0; negative ones count from the end.

    Args:
        rows: integers, as a sequence or a tensor of one dimension (read from its device).
        length: Sq.

    Raises:
        ConfigError: they are no integers, or no such rows.
    """
    numbers: list[int] | None = None
    if not isinstance(rows, Tensor):
        with contextlib.suppress(TypeError):  # not a sequence, or not of integers
            numbers = [operator.index(row) for row in rows if not isinstance(row, bool)]
            numbers = numbers if len(numbers) == len(rows) else None
    elif rows.dim() == 1 and rows.dtype != torch.bool and not (rows.is_floating_point() or rows.is_complex()):
        numbers = rows.tolist()
    if numbers is None:
        raise errors.ConfigError(
            f"need_rows is {rows if not isinstance(rows, Tensor) else (list(rows.shape), rows.dtype)}", where="attend",
            fix="Give the numbers of query rows: a list of integers, or an integer tensor of one dimension.",
        )  # fmt: skip
    wrong = [row for row in numbers if not -length <= row < length]
    if wrong:
        raise errors.ConfigError(f"need_rows asks for row {wrong[0]} of {length} queries", where="attend", fix="Ask for rows there are.")
    return [row % length for row in numbers]


def probabilities(call: Call, rows: Sequence[int]) -> Tensor:
    """What the softmax of some rows is, before dropout; no gradients.

    Args:
        call: the call.
        rows: numbers in [0, Sq), in any order, possibly repeated.

    Returns:
        `[B, Hq, R, Sk]` in the dtype of q. A row sums to 1, to less where a sink takes its part, and to 0 where it sees no key.

    Cost: four numbers per element of the result in the dtype of sums.
    """
    with torch.no_grad():
        index = torch.tensor(rows, dtype=torch.int64, device=call.q.device)
        wide = call.accumulate
        q = call.q.index_select(2, index).to(wide).unflatten(1, (call.kv_heads, call.group))
        # Each key head with all its query rows: keys are widened once and never repeated.
        scores = q.flatten(2, 3) @ call.k.to(wide).transpose(-1, -2) * call.scale
        scores = scores.view(call.batch, call.heads, len(rows), call.kv_length)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.bias is not None:
            scores = scores + (call.bias if call.bias.shape[2] == 1 else call.bias.index_select(2, index)).to(wide)
        if call.mask is not None and rows:
            columns = (0, call.kv_length)
            seen = torch.cat([call.mask.rectangles((row, row + 1), columns) for row in rows], 2)
            scores = scores.masked_fill(~seen.to(call.q.device), -math.inf)
        if call.sinks is not None:
            scores = torch.cat([scores, call.sinks.to(wide)[:, None, None].expand(call.batch, -1, len(rows), 1)], -1)
        dead = (scores == -math.inf).all(-1, keepdim=True)
        # Not exp(scores - lse): beside -3e38, which hides keys in many models, lse has no room for the logarithm of their number.
        shares = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
        return shares[..., : call.kv_length].to(call.q.dtype)

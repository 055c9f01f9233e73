"""Gradients of rows whose keys are all hidden by a large negative number.

Models hide keys by adding -1e9 or the least number. Where that hides a whole row, lse is as large a number, without room for the logarithm
of the number of keys, and the weights `exp(score - lse)` from which kernels take gradients are 1 for each key; in the softmax of the
definition they are shares of 1. So these rows are left out of the kernel's gradients, and theirs are taken from the softmax itself, some
rows at a time. On CPUs alone: whether there are such rows is read from lse, for which a card would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Backend, Call, Gradients
from torchwrap.attention.reference import attention

__all__ = ["backward", "rows"]

DEPTH = 2.0**13
"""Size of lse from which on its rounding in float32, 2^-10, is larger than that of weights (chosen)."""
_AT_ONCE = 1 << 20  # scores


def rows(lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor | None:
    """Which rows these are, of those that have gradients: bool `[B, Hq, Sq]`; None: none, or they are on a card."""
    if lse.device.type != "cpu" or not lse.numel() or lse.min().item() >= -DEPTH:  # one look, which most calls end with
        return None
    lost = (lse < -DEPTH) & (lse != -torch.inf)
    lost &= grad_out.any(-1) if grad_lse is None else grad_out.any(-1) | (grad_lse != 0)
    return lost if bool(lost.any()) else None


def backward(found: Backend, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """As `found.backward`, with these rows by the definition.

    Cost: a look at lse where there is a bias; for such rows, scores of up to a million at a time.
    """
    looks = call.bias is not None and found.name != "eager" and not call.some_keys  # the softmax is that of all keys
    lost = rows(lse, grad_out, grad_lse) if looks else None
    if lost is None:
        return found.backward(call, out, lse, grad_out, grad_lse)
    rest = grad_out.masked_fill(lost[..., None], 0.0), None if grad_lse is None else grad_lse.masked_fill(lost, 0.0)
    grads = found.backward(call, out, lse, *rest)
    sums = [None if grad is None else grad.to(call.accumulate) for grad in grads]
    for span in _spans(lost, max(1, _AT_ONCE // (call.batch * call.heads * call.kv_length))):
        _add(call, span, lost, grad_out, grad_lse, sums)
    dq, dk, dv, dsinks, dbias = (None if one is None or grad is None else one.to(grad.dtype) for one, grad in zip(sums, grads, strict=True))
    assert dq is not None and dk is not None and dv is not None
    return dq, dk, dv, dsinks, dbias


def _spans(lost: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """First and end of rows that follow each other and hold all that are lost, at most so many."""
    numbers = lost.flatten(0, 1).any(0).nonzero()[:, 0].tolist()
    first = last = numbers[0]
    for number in numbers[1:]:
        if number > last + 1 or number - first == most:
            yield first, last + 1
            first = number
        last = number
    yield first, last + 1


def _add(call: Call, span: tuple[int, int], lost: Tensor, grad_out: Tensor, grad_lse: Tensor | None, sums: list[Tensor | None]) -> None:
    """Add the gradients of the rows of a span that are lost."""
    part = slice(*span)
    bias = call.bias
    assert bias is not None
    of_rows = bias.shape[2] > 1
    given = {"q": call.q[:, :, part], "k": call.k, "v": call.v, "sinks": call.sinks, "bias": bias[:, :, part] if of_rows else bias}
    wanted = [name for (name, tensor), total in zip(given.items(), sums, strict=True) if tensor is not None and total is not None]
    leaves: dict[str, Any] = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in wanted) for name, tensor in given.items()
    }
    here = lost[:, :, part]
    with torch.enable_grad():
        mask = None if call.mask is None else call.mask.sub(rows=span)
        out, lse = attention(replace(call, mask=mask, **leaves), call.accumulate, span[0])
        # What a row that is not lost makes of no gradient may be NaN where it sees no key or holds one.
        outputs, grads = [out[here]], [grad_out[:, :, part][here].to(out.dtype)]
        if grad_lse is not None:
            outputs, grads = [*outputs, lse[here]], [*grads, grad_lse[:, :, part][here].to(lse.dtype)]
    found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], grads)
    for name, total in zip(given, sums, strict=True):
        if name not in wanted or total is None:
            continue
        grad = found[wanted.index(name)]
        (total[:, :, part] if name == "q" or (name == "bias" and of_rows) else total).add_(grad)

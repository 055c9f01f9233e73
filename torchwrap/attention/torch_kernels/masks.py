"""Masks in torch's words: where causal begins, and a tensor for what has no word.

`is_causal` of `F.scaled_dot_product_attention` puts the first query at the first key. Below it, flash kernels put the last query at the
last key, and the efficient one knows both. So each kernel is given a word only where that is what the mask says.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from torchwrap.attention.contract import Call

__all__ = ["Corner", "added", "added_bytes", "corner", "is_causal", "is_full", "masked"]

Corner = Literal["first", "last", "both"]


def is_full(call: Call) -> bool:
    """No mask, or one that hides nothing: that of one query at the last key is causal by name only."""
    if call.mask is None or (plain := call.mask.plain) == "full":
        return True
    return plain == "causal" and call.q_length == 1 and corner(call) in ("last", "both")


def corner(call: Call) -> Corner | None:
    """Where a band lies: its first query at the first key, its last query at the last key, both, or (None) elsewhere.

    Positions that are kept on a card are not read: None.
    """
    mask = call.mask
    if mask is None or (isinstance(mask.q_offset, Tensor) and mask.q_offset.device.type != "cpu"):
        return None
    shift = mask.first_query() - mask.kv_offset
    first, last = shift == 0, shift == call.kv_length - call.q_length
    return "both" if first and last else "first" if first else "last" if last else None


def is_causal(call: Call) -> bool:
    """The mask is what torch calls causal: query i sees keys 0 to i, and no other condition."""
    return call.mask is not None and call.mask.plain == "causal" and corner(call) in ("first", "both")


def masked(call: Call) -> Tensor | None:
    """bool `[B | 1, Sq]`, beside q: rows that see no key; None where every row is known to see one, without asking the mask."""
    mask = call.mask
    if mask is None or mask.plain == "full":
        return None
    # A band whose first row sees a key has no row without one.
    if mask.plain is not None and mask.left is None and corner(call) is not None and mask.first_query() >= mask.kv_offset:
        return None
    return ~mask.live_rows().to(call.q.device)


def added(call: Call, word: bool) -> tuple[Tensor | None, Tensor | None]:
    """What to add to the scores, and which rows see a key.

    Args:
        call: the call.
        word: the kernel has a word for the mask, unless there is a bias as well.

    Returns:
        floating `[B | 1, Hq | 1, Sq | 1, Sk | 1]` in the dtype of q, and bool `[B | 1, Hq | 1, Sq | 1]`; None: nothing, and all.
    """
    if call.bias is None and (word or is_full(call)):
        return None, None
    if call.mask is None or is_full(call):
        assert call.bias is not None
        numbers = _narrowed(call.bias.detach(), call.q.dtype)
    else:
        mask: Any = call.mask.to(call.q.device)
        seen = mask.rectangles((0, call.q_length), (0, call.kv_length))
        numbers = torch.where(seen, 0.0 if call.bias is None else _narrowed(call.bias.detach(), call.q.dtype), -math.inf).to(call.q.dtype)
    return numbers, numbers.amax(-1) != -math.inf


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in another dtype. What was finite stays so: a row whose keys are all hidden by float32's least number has their mean."""
    least, most = torch.finfo(dtype).min, torch.finfo(dtype).max
    if torch.finfo(bias.dtype).max <= most:
        return bias.to(dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(least, most)).to(dtype)


def added_bytes(call: Call, word: bool) -> int:
    """Memory of what `added` makes."""
    if is_full(call) or call.mask is None or (word and call.bias is None):
        return 0
    heads = max(call.mask.shape[1], 1 if call.bias is None else call.bias.shape[1])
    batch = max(call.mask.shape[0], 1 if call.bias is None else call.bias.shape[0])
    return batch * heads * call.q_length * call.kv_length * (call.q.element_size() + 1)

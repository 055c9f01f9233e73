"""Kinds of calls: what makes one back end faster than another, as a key of few values.

Lengths and numbers of heads enter as powers of two (the least that is not smaller), so that a model's calls are of few kinds.
"""

from __future__ import annotations

from typing import Literal

import torch

from torchwrap.attention.contract import Call

__all__ = ["Doing", "Kind", "kind_of", "mask_kind", "said"]

Doing = Literal["forward", "backward"]
Kind = tuple[str | int, ...]
"""What is computed, dtype, mode, D, Dv, G, mask and features, B * Hkv, Sq and Sk as powers of two, threads (0 on cards)."""

_CONDITIONS = {
    "chunk": "chunks", "kv_start": "padded", "kv_end": "padded", "key_mask": "padded", "q_segments": "packed", "dictionary": "tiles",
}  # fmt: skip
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def kind_of(call: Call, doing: Doing) -> Kind:
    """The kind of a call; equal for calls of which the same back end may be expected to be the fastest."""
    # Once each: this is asked in every call where figures are known, and a shape is a new object each time.
    (batch, heads, rows, width), (_, kv_heads, columns, _), value_width = call.q.shape, call.k.shape, call.v.shape[3]
    mode = "decode" if rows == 1 else "chunked" if rows < columns else "prefill"
    threads = torch.get_num_threads() if call.q.is_cpu else 0
    return (
        doing, _NAMES[call.q.dtype], mode, width, value_width, heads // max(kv_heads, 1), mask_kind(call),
        max(batch * kv_heads - 1, 0).bit_length(), max(rows - 1, 0).bit_length(), max(columns - 1, 0).bit_length(), threads,
    )  # fmt: skip


def said(kind: Kind) -> str:
    """A kind for people."""
    doing, dtype, mode, width, value_width, group, mask, tasks, rows, columns, threads = kind
    widths = f"{width}" if width == value_width else f"{width}/{value_width}"
    heads = f"{2 ** int(tasks)} key heads in all x {group}"
    return f"{doing}, {mode}, {dtype}, {mask}, width {widths}, {heads}, {2 ** int(rows)} x {2 ** int(columns)}" + (
        f", {threads} threads" if threads else ""
    )


def mask_kind(call: Call) -> str:
    """What hides keys, and what else a back end may lack."""
    mask = call.mask
    if mask is None:
        found = ["full"]
    elif (plain := mask.plain) is not None:
        # How wide a window is decides how much of the square is left.
        found = [plain if plain != "window" else f"window {_power(1 + sum(reach or 0 for reach in (mask.left, mask.right)))}"]
    else:
        found = list(dict.fromkeys(word for name, word in _CONDITIONS.items() if getattr(mask, name) is not None))
        found += ["window"] if mask.left is not None else ["causal"] if mask.right is not None else []
    if call.softcap is not None:
        found.append("softcap")
    if call.sinks is not None:
        found.append("sinks")
    if call.bias is not None:
        found.append("bias with gradient" if call.bias.requires_grad else "bias")
    if call.dropout:
        found.append("dropout")
    return "+".join(found)


def _power(number: int) -> int:
    return max(number - 1, 0).bit_length()

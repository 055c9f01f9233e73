"""The order in which back ends are asked where nothing was measured: one row for each generation of cards and kind of work.

Chosen from published figures of the generations named (none of them taken with this library), not measured. Torch's own kernels come first
where they do all there is to do; ours where theirs would compute hidden pairs or store a mask. Volta and Turing start with torch's
efficient kernel: ours are taken there when `tune` measured them faster on that card. Triton compiles for cards before 8.0 without tensor
cores and is never first there. FlexAttention and the package flash-attn are in no row: they are taken where they were measured faster, or
by name.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch

from torchwrap.attention.contract import Call

__all__ = ["CANDIDATES", "MASK_BYTES", "Work", "first_choices", "work_of"]

Work = Literal["dense", "decode", "masked"]

CANDIDATES = {
    "cpu": ("cpu", "sdpa"),
    "cuda": ("triton", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "cuda_mma", "flash_attn", "flex"),
}
"""Which back ends are measured where. FlexAttention on CPUs compiles for seconds: it is measured when `tune` is told to."""

MASK_BYTES = 256 << 20
"""A back end that would make a mask of more bytes is asked last, and not measured. Chosen: what any machine has to spare."""

_CPU = ("cpu", "sdpa", "eager")
_OTHER = ("sdpa", "eager")
_OLD = ("sdpa-efficient", "cuda_mma", "triton", "eager")
_AMPERE: dict[Work, tuple[str, ...]] = {
    "dense": ("sdpa-flash", "triton", "sdpa-efficient", "sdpa-cudnn", "cuda_mma", "eager"),
    "decode": ("triton", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "cuda_mma", "eager"),
    "masked": ("triton", "sdpa-flash", "sdpa-efficient", "cuda_mma", "eager"),
}
_CUDA: tuple[tuple[tuple[int, int], dict[Work, tuple[str, ...]]], ...] = (
    ((11, 0), _AMPERE),  # 12.0 is a card for games, where torch does not prefer cuDNN either
    ((9, 0), {**_AMPERE, "dense": ("sdpa-cudnn", "sdpa-flash", "triton", "sdpa-efficient", "cuda_mma", "eager")}),
    ((8, 0), _AMPERE),
    ((0, 0), {"dense": _OLD, "decode": _OLD, "masked": _OLD}),
)


def first_choices(call: Call) -> tuple[str, ...]:
    """Names of back ends, best first by the table; all of those that might compute such a call."""
    device = call.q.device
    if device.type == "cuda":
        return _row(device, work_of(call))
    return _CPU if device.type == "cpu" else _OTHER


def work_of(call: Call) -> Work:
    """What a card has to do: everything or a triangle, one row, or less than that."""
    if call.mode == "decode":
        return "decode"
    plain = call.mask is None or call.mask.plain in ("full", "causal")
    return "dense" if plain and call.softcap is None and call.bias is None and not call.dropout else "masked"


@functools.cache
def _row(device: torch.device, work: Work) -> tuple[str, ...]:
    capability = torch.cuda.get_device_capability(device)
    return next(row[work] for least, row in _CUDA if capability >= least)

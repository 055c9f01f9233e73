"""Calls of a kind that was computed before: what was checked and chosen for tensors of one layout is not checked and chosen again.

Everything that a check or a choice depends on is in the key: sizes, strides and dtypes, the numbers, who asked for which settings, the
number of threads, whether gradients are wanted, and how many back ends have failed or were measured since. What depends on a mask is kept
at the mask, which never changes. Tensors of other classes or devices, under transforms or a compiler take the whole way, and so does every
call that no back end has prepared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from torchwrap.attention.contract import Drawing, Prepared, checked
from torchwrap.attention.dispatch import prepare, revision
from torchwrap.attention.settings import Settings
from torchwrap.attention.transforms import is_traced, transformed
from torchwrap.native.threads import stuck

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["MOST", "forget", "prepared"]

MOST = 512
"""Layouts that are kept, of calls without a mask and of each mask (chosen: a model has few, and each new length of a cache is one)."""

_plain: dict[Any, Prepared | None] = {}
_modes = torch._C._len_torch_dispatch_stack  # torch 2.13: such as that of fake tensors, whose new tensors have no memory
_threads, _learns = torch.get_num_threads, torch.is_grad_enabled


def prepared(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask | Tensor | None, scale: float | None, softcap: float | None, dropout: float,
    backend: str | Settings, name: Literal["mask", "bias"] = "mask",
) -> Prepared | None:  # fmt: skip
    """What computes this call, known from another one of its layout or made now; None: take the whole way.

    Args:
        q: queries, and so on as in `attend`, unchecked.
        k: keys.
        v: values.
        mask: what each query sees.
        scale: factor of the scores.
        softcap: bound of the scores.
        dropout: of weights.
        backend: name or settings.
        name: what the mask was called; a bias is a floating one that is a tensor.

    Raises:
        ConfigError, UnsupportedModelError: as `attend`.
    """
    if not (type(q) is type(k) is type(v) is Tensor and q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if transformed() or is_traced() or _modes() or stuck() or q.is_neg() or k.is_neg() or v.is_neg():
        return None
    kinds = type(scale), type(softcap), type(dropout)
    if kinds not in _NUMBERS or not 0.0 <= dropout < 1.0:
        return None
    held, rule = (_plain, None) if mask is None else _of(mask, q)
    if held is None:
        return None
    said = backend.text if type(backend) is Settings else backend
    trains = _learns() and (q.requires_grad or k.requires_grad or v.requires_grad)
    try:
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            rule, scale, softcap, dropout, said, trains, _threads(), revision(),
        )  # fmt: skip
        found = held.get(key, _NEW)
    except (RuntimeError, TypeError):  # sparse and nested tensors have no strides; what is no name of a back end may have no hash
        return None
    if found is _NEW:
        given: dict[str, Any] = {name: mask}
        call = checked(q, k, v, **given, scale=scale, softcap=softcap, wants_lse=trains)
        call = replace(call, dropout=dropout) if dropout else call  # without a seed: each call draws its own
        found = prepare(call, backend, trains, mask if type(mask) is Tensor else None)
        if len(held) >= MOST:
            held.clear()
        held[key] = found
    # Zeros have no memory.
    if found is None or not (q.data_ptr() and k.data_ptr() and v.data_ptr()):
        return None
    return cast(Drawing, found).drawn() if dropout else found


_NEW: Any = object()
_NUMBERS = {(scale, softcap, float) for scale in (float, type(None)) for softcap in (float, type(None))}


def _of(mask: Any, q: Tensor) -> tuple[dict[Any, Prepared | None] | None, object]:
    """Where it is kept what was prepared for a mask, and the mask's part of the key.

    A rule without tensors is the same as any other that says so, since masks are made anew for each step. Of a tensor only the layout is
    known, as it may be written to.
    """
    if type(mask) is Tensor:
        known = mask.is_cpu and not (mask.requires_grad or mask.is_neg()) and mask.layout == torch.strided and not mask.is_nested
        return (_plain, (mask.shape, mask.stride(), mask.dtype)) if known else (None, None)
    found = getattr(mask, "_found", None)
    if found is None or mask.device.type != "cpu":
        return None, None
    pair: tuple[dict[Any, Prepared | None], object] | None = found.get("prepared")
    if pair is None:
        plain = mask.plain is not None
        rule = (tuple(mask.shape), mask.right, mask.left, mask.first_query() - mask.kv_offset) if plain else None
        pair = found["prepared"] = (_plain if plain else {}, rule)
    return pair


def forget() -> None:
    """Drop what is kept for calls without a mask, as after a change that the key does not know: another library, a test."""
    _plain.clear()

"""Calls of a kind that was computed before: what was checked and chosen for tensors of one layout is not checked and chosen again.

Everything that a check or a choice depends on is in the key: sizes, strides and dtypes, the numbers, who asked for which settings, the
number of threads, whether gradients are wanted, and how many back ends have failed or were measured since. What depends on a mask is kept
at the mask, which never changes. Tensors of other classes or devices, under transforms or a compiler take the whole way, and so does every
call that no back end has prepared.

Of the last layouts torch itself tells whether tensors are laid out so, by the guards that its compiler makes, in half the time of
making a key: their check covers class, dtype, device, sizes, strides, requires_grad, and all that would change what operators do (autocast,
transforms, signs still to be applied). Without them every call makes its key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchwrap.attention.contract import Drawing, Prepared, checked
from torchwrap.attention.dispatch import prepare, revision
from torchwrap.attention.settings import Settings
from torchwrap.attention.transforms import is_traced, makes_others, recorded, transformed
from torchwrap.native.threads import stuck

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["MOST", "forget", "prepared"]

MOST = 512
"""Layouts that are kept, of calls without a mask and of each mask (chosen: a model has few, and each new length of a cache is one)."""

_Held = tuple[Prepared | None, Callable[..., bool] | None]
LAST = 2
"""Layouts that guards are kept for (chosen: self-attention and cross-attention take turns)."""

_Guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)  # torch 2.13
_plain: dict[Any, _Held] = {}
_modes = torch._C._len_torch_dispatch_stack  # torch 2.13
_threads, _learns, _tracing = torch.get_num_threads, torch.is_grad_enabled, torch._C._is_tracing


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
    global _last
    said = backend.text if type(backend) is Settings else backend
    kinds = type(scale), type(softcap), type(dropout)
    of_tensor = type(mask) is Tensor  # as it may be written to, its layout is known as that of q, k and v
    if kinds[2] is float and dropout == 0.0:
        now = kinds, scale, softcap, said, name, of_tensor, _learns(), _threads(), revision()
        try:
            # Torch's guards end the process over the strides of nested tensors.
            dense = not (q.is_nested or k.is_nested or v.is_nested or (of_tensor and mask.is_nested))  # type: ignore[union-attr]
        except AttributeError:  # no tensors, which the contract refuses by name
            return None
        for last in _last if dense else ():
            # Fake tensors are of a class of their own, but what a dispatch mode does to others is not in the guards.
            if (
                last.now == now
                and (of_tensor or (last.mask is _no_mask if mask is None else last.mask() is mask))  # one that is gone is None too
                and (last.fits(q, k, v, mask) if of_tensor else last.fits(q, k, v))
                and not ((_modes() and _interfered(q)) or forward_ad._current_level >= 0 or _tracing() or stuck())
            ):
                return last.work if q.data_ptr() and k.data_ptr() and v.data_ptr() else None
    if not (type(q) is type(k) is type(v) is Tensor and q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if transformed() or is_traced() or (_modes() and _interfered(q)) or stuck() or q.is_neg() or k.is_neg() or v.is_neg():
        return None
    if kinds not in _NUMBERS or not 0.0 <= dropout < 1.0:
        return None
    held, rule = (_plain, None) if mask is None else _of(mask)
    if held is None:
        return None
    laid_out = (q, k, v, mask) if of_tensor else (q, k, v)
    trains = _learns() and (q.requires_grad or k.requires_grad or v.requires_grad)
    try:
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            rule, scale, softcap, dropout, said, trains, _threads(), revision(),
        )  # fmt: skip
        kept: _Held = held.get(key, _NEW)
        found, fits = kept
    except (RuntimeError, TypeError):  # sparse and nested tensors have no strides; what is no name of a back end may have no hash
        return None
    if found is _NEW[0]:
        given: dict[str, Any] = {name: mask}
        call = checked(q, k, v, **given, scale=scale, softcap=softcap, wants_lse=trains)
        call = replace(call, dropout=dropout) if dropout else call  # without a seed: each call draws its own
        found = prepare(call, backend, trains, mask if type(mask) is Tensor else None)
        if len(held) >= MOST:
            held.clear()
        fits = None if dropout or found is None else _guards(*laid_out)
        held[key] = found, fits
    elif fits is not None and not fits(*laid_out):
        # Which tensors ask for gradients is in the guards, and in the key no more than whether this call has any.
        fits = _guards(*laid_out)
        held[key] = found, fits
    # Zeros have no memory.
    if found is None or not (q.data_ptr() and k.data_ptr() and v.data_ptr()):
        return None
    if dropout:
        return cast(Drawing, found).drawn()
    if fits is not None:
        _last = (_Last(now, _no_mask if mask is None or of_tensor else weakref.ref(mask), fits, found), *_last[: LAST - 1])
    return found


def _interfered(like: Tensor) -> bool:
    """Whether the dispatch modes at work record, or make tensors of their own.

    One that only looks is no reason for another way: with checkpointing the forward may run below it and be computed again without, and
    then has to save the same tensors.
    """
    return recorded() or makes_others(like)


class _Last(NamedTuple):
    """A call that was prepared: numbers and settings, its mask, whether tensors are laid out as its own were, what computes it."""

    now: tuple[Any, ...]
    mask: Callable[[], object]
    fits: Callable[..., bool]
    work: Prepared


_last: tuple[_Last, ...] = ()


def _guards(*tensors: Tensor) -> Callable[..., bool] | None:
    """Whether as many tensors are laid out as these, as a function; None: torch has no guards to make it of."""
    if _Guards is None:
        return None
    sizes, strides = ([list(of(tensor)) for tensor in tensors] for of in (Tensor.size, Tensor.stride))
    fits: Callable[..., bool] = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return fits


def _no_mask() -> None:
    return None


_NEW: Any = object(), None
_NUMBERS = {(scale, softcap, float) for scale in (float, type(None)) for softcap in (float, type(None))}


def _of(mask: Any) -> tuple[dict[Any, _Held] | None, object]:
    """Where it is kept what was prepared for a mask, and the mask's part of the key.

    A rule without tensors is the same as any other that says so, since masks are made anew for each step. Of a tensor only the layout is
    known, as it may be written to.
    """
    if type(mask) is Tensor:
        known = mask.is_cpu and not (mask.requires_grad or mask.is_neg()) and mask.layout == torch.strided and not mask.is_nested
        known = known and not mask._is_zerotensor()  # which is read as a copy, laid out otherwise
        return (_plain, (mask.shape, mask.stride(), mask.dtype)) if known else (None, None)
    found = getattr(mask, "_found", None)
    if found is None or mask.device.type != "cpu":
        return None, None
    pair: tuple[dict[Any, _Held], object] | None = found.get("prepared")
    if pair is None:
        plain = mask.plain is not None
        rule = (tuple(mask.shape), mask.right, mask.left, mask.first_query() - mask.kv_offset) if plain else None
        pair = found["prepared"] = (_plain if plain else {}, rule)
    return pair


def forget() -> None:
    """Drop what is kept for calls without a mask, as after a change that the key does not know: another library, a test."""
    global _last
    _plain.clear()
    _last = ()

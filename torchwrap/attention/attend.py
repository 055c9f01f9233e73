"""`attend`: attention as one function, with gradients, by whatever computes it best here.

A call of a layout that was computed before goes to what computed it (`prepared`); any other is checked, and a back end chosen. Without
gradients that is the back end's forward and nothing else. With them, and under the transforms of `torch.func`, it is one node of autograd
(`node`). Under `torch.compile` it is one operator, `torchwrap::attend`, with the mask as its tensors and numbers, so that no graph is
broken; masks themselves are made outside of compiled code. Under both at once the graph ends at the call. Second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast, overload

import torch
from torch import Tensor

from torchwrap.attention import node, operator
from torchwrap.attention.autocast import autocast, exact_dtypes
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.attention.dispatch import attempt
from torchwrap.attention.prepared import prepared
from torchwrap.attention.rows import probabilities, row_numbers
from torchwrap.attention.settings import Settings
from torchwrap.attention.transforms import is_forward_mode, is_mapped, is_traced, keeps_results, recorded, transformed, unseen
from torchwrap.core import errors
from torchwrap.native.threads import one_thread, stuck

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["attend"]

_autocasts = torch._C._is_any_autocast_enabled  # torch 2.13
_modes = torch._C._len_torch_dispatch_stack  # torch 2.13


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., bias: Tensor | None = ..., dropout: float = ..., backend: str | Settings = ...,
    return_lse: Literal[False] = ...,
    need_rows: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., bias: Tensor | None = ..., dropout: float = ..., backend: str | Settings = ..., return_lse: Literal[True],
    need_rows: None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., bias: Tensor | None = ..., dropout: float = ..., backend: str | Settings = ..., return_lse: bool,
    need_rows: None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., bias: Tensor | None = ..., dropout: float = ..., backend: str | Settings = ...,
    return_lse: Literal[False] = ..., need_rows: Sequence[int] | Tensor,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., bias: Tensor | None = ..., dropout: float = ..., backend: str | Settings = ..., return_lse: Literal[True],
    need_rows: Sequence[int] | Tensor,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: TileMask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | Settings = "auto",
    return_lse: bool = False,
    need_rows: Sequence[int] | Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Exact attention: `softmax(cap(scale * q @ k^T) + bias) @ v` over the keys that each query sees.

    Args:
        q: queries.
        k: keys; each serves Hq / Hkv query heads and is never copied for them.
        v: values.
        mask: what each query sees: a `TileMask`, a bool tensor that broadcasts to (B, Hq, Sq, Sk), or a float tensor, which is added.
        scale: factor of the scores; None: `1 / sqrt(D)`.
        softcap: scores are bounded to it by `softcap * tanh(score / softcap)`.
        sinks: a logit for each query head that takes probability and gives nothing.
        bias: added to the scores.
        dropout: probability with which a weight is dropped, by torch's default generator.
        backend: "auto", a name of `dispatch.BACKENDS`, or `Settings`, which say more.
        return_lse: return lse as well.
        need_rows: numbers of query rows whose probabilities are returned as well, negative ones from the end.

    Returns:
        out, or (out, lse), and then the probabilities of `need_rows` if they are asked for: (B, Hq, R, Sk) in the dtype of q, before
        dropout and without gradients. Rows that see no key: out 0, lse -inf (with a sink: lse = sink), probabilities 0.

    Raises:
        ConfigError: shapes, dtypes or numbers do not fit together; nothing was computed.
        UnsupportedModelError: the back end that was asked for cannot compute this call.

    Shapes: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), sinks (Hq), bias (B | 1, Hq | 1, Sq | 1, Sk | 1); out (B, Hq, Sq, Dv)
        in the dtype of q; lse (B, Hq, Sq), natural logarithm, float32 (float64 for float64).

    Dtypes: under `torch.autocast`, q, k and v are cast to its dtype first, as torch's own attention does.

    Exactness: no farther from float64 than twice torch's own error in the same dtype, gradients included. lse is within 1e-5 of it for
        scores of ordinary size, and within 1e-4 in float16 and bfloat16 where torch's fused CPU kernel computes it (`cpu.kernel`).

    Processes: a forked child computes on one thread, as torch's own threads do not outlive fork().

    Cost: memory grows with Sq + Sk, forward and backward, unless the back end is "eager" or "sdpa"; R rows take R * Sk more for each head.

    Source: Tri Dao, "FlashAttention-2", 2023; H. Lin et al., "FastAttention", 2024.

    Example:
        >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
        >>> attend(q, k, k).shape
        torch.Size([1, 4, 6, 8])
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_dynamo_compiling() and transformed():  # torch 2.13: operators of Python cannot have rules for gradients there
            from torchwrap.attention.untraced import untraced  # slow

            if is_forward_mode():
                node.refuse_forward_mode()
            options = dict(mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, backend=backend)
            found: Tensor | tuple[Tensor, ...] = untraced(attend, q, k, v, **options, return_lse=return_lse, need_rows=need_rows)
            return found
    elif _modes() and keeps_results():
        options = dict(mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, backend=backend)
        with unseen():
            return cast(Callable[..., Tensor], attend)(q, k, v, **options, return_lse=return_lse, need_rows=need_rows)
    elif sinks is need_rows is None:
        only_bias = bias is not None and mask is None and type(bias) is Tensor and bias.is_floating_point()
        if bias is None or only_bias:
            changes, (cast_q, cast_k, cast_v) = bias if only_bias else mask, autocast(q, k, v) if _autocasts() else (q, k, v)
            known = prepared(cast_q, cast_k, cast_v, changes, scale, softcap, dropout, backend, "bias" if only_bias else "mask")
            if known is not None:
                found, of_rows = node.prepared(known, cast_q, cast_k, cast_v, changes, return_lse)
                return found if of_rows is None or not return_lse else (found, of_rows)
    if not recorded() and stuck():
        options = dict(mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, backend=backend)
        with one_thread():
            return cast(Callable[..., Tensor], attend)(q, k, v, **options, return_lse=return_lse, need_rows=need_rows)
    if isinstance(k, TieredTensor):  # part of the keys is on the host
        out, lse = k.attend(q, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout)
        if need_rows is not None:
            raise errors.UnsupportedModelError(
                "probabilities of rows are not computed from keys on two sides",
                where="attend",
                fix="Use a cache on one device for this call.",
            )
        return (out, lse) if return_lse else out
    q, k, v = autocast(q, k, v)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and _has_no_tiles(mask, need_rows is not None):
        mask = node.added(mask, q)
    wants_lse = return_lse or torch.is_grad_enabled() or transformed() or recorded()
    call = checked(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, wants_lse=wants_lse)
    rows = None if need_rows is None else row_numbers(need_rows, call.q_length)
    if recorded() and not transformed():
        if is_forward_mode():
            node.refuse_forward_mode()
        out, lse = operator.apply(call, backend if isinstance(backend, str) else backend.text)
    elif _needs_grad(call) or transformed():
        out, lse = node.apply(call, backend)
    else:
        with exact_dtypes(call.q):
            out, lse = attempt(call, backend, lambda found: found.forward(call))
    if rows is None:
        return (out, lse) if return_lse else out
    with exact_dtypes(call.q):
        shares = probabilities(call, rows)
    return (out, lse, shares) if return_lse else (out, shares)


def _has_no_tiles(mask: Tensor, with_rows: bool) -> bool:
    """Whether a mask of booleans can be sorted into tiles neither now nor by the operator that stands in a graph for this call.

    Nobody can look at the numbers of what is mapped over; those of a graph are others when it runs, and only the operator sees them.
    """
    unseen = is_mapped(mask) or is_traced() or (recorded() and (with_rows or transformed()))
    return unseen and not hasattr(mask, "_found") and mask.layout == torch.strided


def _needs_grad(call: Call) -> bool:
    tensors = (call.q, call.k, call.v, call.sinks, call.bias)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

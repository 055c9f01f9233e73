"""`attend` as one operator of torch, `torchwrap::attend`, so that compiled graphs need no break.

Operators take tensors and numbers: a mask enters as the tensors of its conditions and a list of integers, and is put together again
inside. The back end is chosen when the operator runs, when sizes and devices are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchwrap.attention import drowned
from torchwrap.attention.autocast import exact_dtypes
from torchwrap.attention.contract import Call
from torchwrap.attention.dispatch import attempt
from torchwrap.attention.masks.dictionary import TileDictionary
from torchwrap.attention.masks.fields import TENSOR_FIELDS
from torchwrap.attention.transforms import autograd_allowed, is_traced
from torchwrap.core import errors

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["apply", "gradients", "mask_of", "taken_apart"]

_ABSENT, _DENSE = -1, -2
_NUMBERS = ("right", "left", "chunk")
_TENSORS = (*TENSOR_FIELDS, "q_offset")


def taken_apart(mask: TileMask | None) -> tuple[list[Tensor], list[int]]:
    """A mask as tensors and integers, of which `mask_of` makes it again; None is one negative number."""
    if mask is None:
        return [], [_ABSENT]  # not an empty list: torch 2.13 counts that among the lists of tensors in a backward
    given = [getattr(mask, name) for name in _TENSORS]
    is_tensor = [isinstance(value, Tensor) for value in given]
    tensors = [value for value in given if isinstance(value, Tensor)]
    numbers = [_ABSENT if value is None else value for value in (getattr(mask, name) for name in _NUMBERS)]
    numbers += [mask.kv_offset, 0 if is_tensor[-1] else given[-1], *map(int, is_tensor)]
    if mask.dictionary is not None:
        tensors += [mask.dictionary.codes, mask.dictionary.tiles]
        numbers += [*mask.dictionary.block, *mask.dictionary.start]
    return tensors, [mask.shape[0], mask.shape[2], mask.shape[3], *numbers]


def mask_of(tensors: Sequence[Tensor], numbers: Sequence[int]) -> TileMask | None:
    """The mask that `taken_apart` took apart."""
    if numbers[0] == _ABSENT:
        return None
    from torchwrap.attention.masks.mask import TileMask  # here: masks import dictionaries, and this module is imported by both

    if numbers[0] == _DENSE:
        return TileMask.from_dense(tensors[0].expand(-1, -1, *numbers[1:]))
    batch, q_length, kv_length, *rest = numbers
    values: dict[str, Any] = {name: None if value == _ABSENT else value for name, value in zip(_NUMBERS, rest, strict=False)}
    kv_offset, q_offset, *rest = rest[len(_NUMBERS) :]
    left = list(tensors)
    values.update({name: left.pop(0) if there else None for name, there in zip(_TENSORS, rest, strict=False)})
    if values["q_offset"] is None:
        values["q_offset"] = q_offset
    layout = rest[len(_TENSORS) :]
    if layout:
        values["dictionary"] = TileDictionary(block=(layout[0], layout[1]), codes=left[0], tiles=left[1], start=(layout[2], layout[3]))
    return TileMask(batch, q_length, kv_length, kv_offset=kv_offset, **values)


def apply(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """The call by the operator; gradients included."""
    if call.mask is not None and is_traced():
        raise errors.UnsupportedModelError(
            "torch.jit.trace cannot record a TileMask",
            where="attend",
            fix="Use torch.export or torch.compile, or give the mask as a tensor of booleans, which is added to the scores then.",
        )
    wants_bias = call.bias is not None and call.bias.requires_grad  # graphs hold tensors that have forgotten it
    out, lse = _attend(*_given(call), wants_bias, backend)
    return out, lse


def gradients(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wants_bias: bool, backend: str
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, the sinks and the bias of the call, by the operator of the backward; None where the call has none."""
    given = _given(call)
    grads = _attend_backward(grad_out, grad_lse, out, lse, *given, wants_bias, backend)
    return tuple(None if tensor is None else grad for tensor, grad in zip(given[:5], grads, strict=True))


def _given(call: Call) -> tuple[Any, ...]:
    """The call as both operators take it."""
    bias, (tensors, numbers) = call.bias, taken_apart(call.mask)
    if bias is not None and bias.dtype == torch.bool:  # a mask that nobody could look at while the graph was recorded
        tensors, numbers, bias = [bias], [_DENSE, call.q_length, call.kv_length], None
    return call.q, call.k, call.v, call.sinks, bias, call.seed, tensors, numbers, call.scale, call.softcap, call.dropout


def _call(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    tensors: Sequence[Tensor], numbers: Sequence[int], scale: float, softcap: float | None, dropout: float,
) -> Call:  # fmt: skip
    mask = mask_of(tensors, numbers)
    return Call(q=q, k=k, v=v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, seed=seed)


@torch.library.custom_op("torchwrap::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, seed: Tensor | None, tensors: Sequence[Tensor],
    numbers: Sequence[int], scale: float, softcap: float | None, dropout: float, wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _call(q, k, v, sinks, bias, seed, tensors, numbers, scale, softcap, dropout)
    with exact_dtypes(q):
        out, lse = attempt(call, backend, lambda found: found.forward(call))
    # Operators may not return views of their inputs or of each other, and compiled code counts on the strides of the fake result.
    return out.contiguous(), lse.contiguous()


@_attend.register_fake
def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, seed: Tensor | None, tensors: Sequence[Tensor],
    numbers: Sequence[int], scale: float, softcap: float | None, dropout: float, wants_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulate)


@torch.library.custom_op("torchwrap::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, tensors: Sequence[Tensor], numbers: Sequence[int], scale: float, softcap: float | None,
    dropout: float, wants_bias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(q, k, v, sinks, bias, seed, tensors, numbers, scale, softcap, dropout).for_gradients(wants_bias)
    with exact_dtypes(q), autograd_allowed():
        found = attempt(call, backend, lambda chosen: drowned.backward(chosen, call, out, lse, grad_out, grad_lse), "backward")
    dq, dk, dv, dsinks, dbias = (q.new_empty(0) if grad is None else grad.contiguous() for grad in found)
    return dq, dk, dv, dsinks, dbias


@_attend_backward.register_fake
def _attend_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, tensors: Sequence[Tensor], numbers: Sequence[int], scale: float, softcap: float | None,
    dropout: float, wants_bias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dsinks, dbias = (q.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in (q, k, v, sinks, bias))
    return dq, dk, dv, dsinks, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *optional, tensors, numbers, scale, softcap, dropout, wants_bias, backend = inputs
    ctx.save_for_backward(*optional, *tensors, *output)
    ctx.count, ctx.rest = len(optional), (numbers, scale, softcap, dropout, wants_bias, backend)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    optional, tensors = inputs[: ctx.count], inputs[ctx.count :]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _attend_backward(grad_out, grad_lse, out, lse, *optional, tensors, *ctx.rest)
    given = [None if tensor is None else grad for tensor, grad in zip(optional[:5], grads, strict=True)]
    return *given, None, [None] * len(tensors), None, None, None, None, None, None


torch.library.register_autograd("torchwrap::attend", _gradient, setup_context=_keep)

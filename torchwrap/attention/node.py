"""`attend` as a node of autograd and under the transforms of `torch.func`.

One node saves the inputs, out and lse; its backward is a node of its own, because `torch.func.grad` keeps a graph of every backward. Under
`torch.func.vmap` a call is computed for one element after the other: kernels take memory, and a batched tensor has none of that shape.
Forward-mode derivatives and derivatives of derivatives do not exist here, and are refused by name.

Letters: N elements of a mapped dimension, the others as in `contract`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchwrap.attention import drowned, operator
from torchwrap.attention.autocast import exact_dtypes
from torchwrap.attention.contract import Call, Prepared
from torchwrap.attention.dispatch import attempt
from torchwrap.attention.settings import Settings
from torchwrap.attention.transforms import recorded, transformed
from torchwrap.core.errors import UnsupportedModelError
from torchwrap.native.threads import one_thread, stuck

__all__ = ["added", "apply", "prepared", "refuse_forward_mode"]


def apply(call: Call, backend: str | Settings) -> tuple[Tensor, Tensor]:
    """Out and lse of a call, with gradients for what asks for them."""
    tensors = (call.q, call.k, call.v, call.sinks, call.bias, call.seed)
    # A level of transforms hides what those around it want.
    wants_bias = call.bias is not None and (call.bias.requires_grad or transformed())
    node = _Transformed if transformed() else _Attend
    found: tuple[Tensor, Tensor] = node.apply(_without(call), backend, wants_bias, *tensors)  # type: ignore[no-untyped-call]
    return found


def added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of booleans that is mapped over, as one that is added to the scores: it cannot be sorted into tiles."""
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask


def _without(call: Call) -> Call:
    """The call without its tensors: autograd saves those itself, and so notices changes in place."""
    return replace(call, q=call.q[:0], k=call.k[:0], v=call.v[:0], sinks=None, bias=None, seed=None)


def _with(rest: Call, tensors: tuple[Tensor | None, ...]) -> Call:
    q, k, v, sinks, bias, seed = tensors
    assert q is not None and k is not None and v is not None
    return replace(rest, q=q, k=k, v=v, sinks=sinks, bias=bias, seed=seed)


def _forward(rest: Call, backend: str | Settings, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_dynamo_compiling():  # compiled around a transform, which runs this outside of itself
        from torchwrap.attention.untraced import untraced  # slow

        found: tuple[Tensor, Tensor] = untraced(_forward, rest, backend, tensors)
        return found
    call = _with(rest, tensors)
    if recorded():
        return operator.apply(call, backend if isinstance(backend, str) else backend.text)
    with exact_dtypes(call.q):
        return attempt(call, backend, lambda found: found.forward(call))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.rest = inputs[:3]
    ctx.save_for_backward(*inputs[3:], *output)
    ctx.set_materialize_grads(False)


class _Attend(torch.autograd.Function):
    """The forward: (rest of the call, back end, is the bias's gradient wanted, q, k, v, sinks, bias, seed) -> (out, lse)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(inputs[0], inputs[1], inputs[3:])
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        # A node of its own only where somebody may ask for its gradient: then it says that there is none.
        gradients = _Gradients.apply if torch.is_grad_enabled() or transformed() else _Gradients.forward
        try:
            return None, None, None, *gradients(*ctx.rest, out, lse, grad_out, grad_lse, *tensors), None
        except RuntimeError:
            _refuse_mapped(grad_out, grad_lse)
            raise


def prepared(
    work: Prepared, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool = False
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Out and, if it is wanted, lse of a call that was prepared, with gradients for what asks for them."""
    if not work.trains:
        return work.forward(q, k, v, mask, wants_lse)
    found: Any = _apply(work, wants_lse, q, k, v, mask)
    return found if wants_lse else (found, None)


_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # torch 2.13
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype] | None


def _layout(tensor: Tensor | None) -> _Layout:
    """What kernels that were prepared count on."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _mark(q: Tensor) -> Tensor:
    """Something of a shape that nothing else of attention has.

    What a checkpoint computes again is compared with what was kept by shapes and order, and torch's own attention keeps k, q and v first:
    computed again by that, where a block or a wrapped model has ended, it would be taken for q, k and v.
    """
    return q.new_zeros((1,) * 5)


def _laid_out(tensor: Tensor | None, layout: _Layout) -> Tensor | None:
    """The numbers of a tensor in such a layout.

    Raises:
        UnsupportedModelError: it is another tensor than was kept.
    """
    if tensor is None or layout is None or _layout(tensor) == layout:
        return tensor
    shape, strides, dtype = layout
    if tensor.shape != shape:
        raise UnsupportedModelError(
            f"a checkpoint computed something else again than was computed in the forward: {list(tensor.shape)} in place of {list(shape)}",
            where="attend",
            fix="Call backward() where the forward was called: inside of the block, and before the model is unwrapped or disabled.",
        )
    once = tensor[tuple(slice(None) if stride else slice(1) for stride in strides)]  # of what is expanded, numbers are there once
    made = torch.empty_strided(once.shape, strides, dtype=dtype, device=tensor.device).copy_(once)
    return made.expand(tensor.shape)


class _Last(torch.autograd.Function):
    """A function of which there is no gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        _refuse("derivatives of derivatives")


class _Prepared(torch.autograd.Function):
    """(what computes the call, is lse wanted, q, k, v, mask) -> (out, lse) or out."""

    @staticmethod
    def forward(
        ctx: Any, work: Prepared, wants_lse: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = work.forward(q, k, v, mask, wants_lse or not work.again)
        ctx.work, mask = work, mask if type(mask) is Tensor else None
        kept: tuple[Tensor | None, ...] = (q, k, v, mask) if work.again else (q, k, v, mask, out, lse)
        ctx.layouts = None
        if _hooks(True) is not None:  # they may bring back copies that are laid out otherwise, or what is computed again
            kept = _mark(q), *kept
            ctx.layouts = [_layout(tensor) for tensor in kept]
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        if not wants_lse:
            return out
        assert lse is not None
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        work, saved = ctx.work, ctx.saved_tensors
        if ctx.layouts is not None:
            saved = tuple(_laid_out(tensor, layout) for tensor, layout in zip(saved, ctx.layouts, strict=True))[1:]
        q, k, v, mask, out, lse = (*saved, None, None) if work.again else saved
        grad_out = q.new_zeros(*q.shape[:3], v.shape[3]) if grad_out is None else grad_out
        try:
            if not (torch.is_grad_enabled() or stuck() or transformed()):
                return None, None, *work.backward(q, k, v, out, lse, grad_out, grad_lse, mask), None
            gradients = _PreparedGradients.apply if torch.is_grad_enabled() or transformed() else _PreparedGradients.forward
            with one_thread() if stuck() else nullcontext():
                return None, None, *gradients(work, q, k, v, out, lse, grad_out, grad_lse, mask), None
        except RuntimeError:
            _refuse_mapped(grad_out, grad_lse)
            raise


# Straight to the node (torch 2.13): no search for tensors of transforms that are over, and for a signature; nothing prepared has either.
_apply: Any = super(torch.autograd.Function, _Prepared).apply
_of_node: Any = _Prepared._backward_cls
_of_node.apply = _Prepared.backward


class _PreparedGradients(_Last):
    """The backward of `_Prepared`, for who may ask for its gradient."""

    @staticmethod
    def forward(work: Prepared, *tensors: Any) -> tuple[Tensor, ...]:
        return work.backward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_PreparedGradients, info.batch_size, in_dims, inputs)


class _Transformed(torch.autograd.Function):
    """As `_Attend`, in the form that `torch.func` wants; not for all, because torch then reads the signature in every call."""

    @staticmethod
    def forward(rest: Call, backend: str | Settings, wants_bias: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _forward(rest, backend, tensors)

    setup_context = staticmethod(_keep)
    backward = staticmethod(_Attend.backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Transformed, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode()


class _Gradients(_Last):
    """The backward: (as of the forward, out, lse, grad_out, grad_lse, tensors of the call) -> gradients of q, k, v, sinks and bias."""

    @staticmethod
    def forward(
        rest: Call, backend: str | Settings, wants_bias: bool, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        if torch.compiler.is_dynamo_compiling():  # as in `_forward`
            from torchwrap.attention.untraced import untraced  # slow

            given = (rest, backend, wants_bias, out, lse, grad_out, grad_lse, *tensors)
            found: tuple[Tensor | None, ...] = untraced(_Gradients.forward, *given)
            return found
        call = _with(rest, tensors).for_gradients(wants_bias)
        if recorded():  # make_fx around a transform, which has run its rules by now
            text = backend if isinstance(backend, str) else backend.text
            return operator.gradients(call, out, lse, grad_out, grad_lse, wants_bias, text)
        with exact_dtypes(call.q):
            # Whoever computed the forward: out and lse are the same for all.
            return attempt(call, backend, lambda found: drowned.backward(found, call, out, lse, grad_out, grad_lse), "backward")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Gradients, info.batch_size, in_dims, inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse("derivatives of derivatives")


def _one_by_one(function: Any, count: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The results for N elements, stacked in a new first dimension."""
    each = []
    for index in range(count):
        given = (value if dim is None else value.select(dim, index) for value, dim in zip(inputs, in_dims, strict=True))
        each.append(function.apply(*given))
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))
    return stacked, tuple(None if value is None else 0 for value in stacked)


def refuse_forward_mode() -> NoReturn:
    """For calls under `torch.func.jvp` and its kind.

    Raises:
        UnsupportedModelError: always.
    """
    _refuse("forward-mode derivatives (torch.func.jvp, jacfwd, hessian, linearize)")


def _refuse_mapped(*grads: Tensor | None) -> None:
    """For gradients that the older kind of vmap maps over: their numbers are at no address, and no node is told of it (torch 2.13)."""
    if any(grad is not None and "Batched" in repr(torch._C._dispatch_keys(grad)) for grad in grads):
        _refuse("gradients that are mapped over by is_grads_batched or jacobian(vectorize=True), only by torch.func.vmap and jacrev")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"attention of torchwrap has no {what}",
        where="attend",
        fix='Use the model\'s own attention for this call: torchwrap.disabled(model, "fast_attention"), or torchwrap.unwrap(model).',
    )

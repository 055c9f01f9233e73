"""The native kernels for tensors of one layout: what a call comes down to when all that does not depend on its numbers is done.

A call of few tokens takes the kernels microseconds, and several times as long to check, to choose for and to put into their words. So that
is done once for each layout of tensors, and `torchwrap.attention.prepared` keeps the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchwrap.attention import drowned
from torchwrap.attention.autocast import exact_dtypes
from torchwrap.attention.contract import Call, Prepared
from torchwrap.attention.cpu import decode, prefill
from torchwrap.attention.cpu.backend import Composed
from torchwrap.native.decode import Prepared as Decode
from torchwrap.native.prefill import Backward, Forward, Hidden, in_memory, readable

__all__ = ["Drawn", "Few", "Many"]


class Few:
    """A few queries by `torchwrap.native.decode`, as `decode.forward`, and their gradients, as `prefill.backward`.

    Args:
        call: one that `decode.form` calls "native".
        trains: as in `Prepared`.
        mask: one of the layout, of numbers where there are several queries; None: that of the call.
    """

    name = "cpu"
    __slots__ = (
        "_alike", "_backward", "_biased", "_copies", "_dtype", "_limits", "_limits_at", "_many", "_shape", "_work",
        "again", "kind", "trains",
    )  # fmt: skip

    def __init__(self, call: Call, trains: bool, mask: Tensor | None = None) -> None:
        self.kind, self.trains = "", trains
        q, k, v = call.q, call.k, call.v
        # The rows of a group have to follow each other.
        self._copies = call.q_length > 1 and call.group > 1 and not q.is_contiguous()
        batch, head, row = (q.contiguous() if self._copies else q).stride()[:3]
        bias = decode.one_bias(call) if mask is None else readable(mask)
        if mask is not None:
            call = replace(call, mask=None, bias=None)
        self._biased = bias if mask is None else None
        self._work = Decode(
            call.batch, call.kv_heads, call.group * call.q_length, call.kv_length, call.width, call.value_width,
            strides=(batch, call.group * head, head if call.q_length == 1 else row, *k.stride()[:3], *v.stride()[:3]),
            dtype=q.dtype, scale=call.scale, softcap=call.softcap or 0.0, bias=None if bias is None else decode.by_group(bias, call),
            out_dtype=q.dtype,
        )  # fmt: skip
        limits = decode.limits(call)
        self._limits = None if limits is None else limits.contiguous()
        self._limits_at = 0 if self._limits is None else self._limits.data_ptr()
        self._dtype, self._shape = q.dtype, (*q.shape[:3], call.value_width)
        # Memory in the order of q is had in less time than memory of a shape that is said.
        self._alike = q.shape == self._shape and _in_order(torch.empty_like(q))
        self.again = trains and prefill.is_few(call)
        self._backward = _few_backward(call) if self.again else None
        self._many = Many(call, True, mask) if trains and not self.again else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Out and lse."""
        if self._copies:
            q = q.contiguous()
        bias = self._bias(mask)
        out = torch.empty_like(q) if self._alike else torch.empty(self._shape, dtype=self._dtype, device=q.device)
        lse = torch.empty(self._shape[:3], dtype=torch.float32, device=q.device) if wants_lse else None
        at, of_bias = 0 if lse is None else lse.data_ptr(), 0 if bias is None else bias.data_ptr()
        self._work(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), at, 0, 0, self._limits_at, 0, 0, of_bias)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        if self._backward is not None:
            return self._backward(q, k, v, None, None, grad_out, grad_lse, self._bias(mask))
        # From a forward of its own order of sums.
        assert self._many is not None
        out, lse = self._many.forward(q, k, v, mask, True)
        return self._many.backward(q, k, v, out, lse, grad_out, grad_lse, mask)

    def _bias(self, mask: Tensor | None) -> Tensor | None:
        return self._biased if self._biased is not None else _added(mask)


def _in_order(tensor: Tensor) -> bool:
    """Contiguous but for strides of dimensions that have one place, which nothing steps over."""
    sizes, strides, whole = tensor.shape, tensor.stride(), torch.empty(tensor.shape, device="meta").stride()
    return all(size == 1 or stride == full for size, stride, full in zip(sizes, strides, whole, strict=True))


class _Backward:
    """`torchwrap.native.prefill.Backward` for gradients of any strides, those of the last call kept.

    Args:
        how: of it, in each call.
    """

    __slots__ = ("_held", "_how")

    def __init__(self, **how: Any) -> None:
        self._how = how
        self._held: tuple[tuple[int, ...], Backward] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
        bias: Tensor | None = None, shown: Tensor | None = None, seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        grad_out = in_memory(grad_out)
        strides = grad_out.stride()
        if strides[3] != 1:
            grad_out = grad_out.contiguous()
            strides = grad_out.stride()
        held = self._held
        if held is None or held[0] != strides:
            work = Backward(q, k, v, grad_out if out is None else out, grad_out, bias=bias, **self._how)
            held = self._held = strides, work
        of_lse = None if grad_lse is None else in_memory(grad_lse).contiguous()
        return held[1].of_tensors(q, k, v, out, lse, grad_out, of_lse, bias, shown, seed)


class Many:
    """Many queries by `torchwrap.native.prefill`, and their gradients, as `prefill.forward` and `prefill.backward`.

    The kernels read a mask that is a tensor where it is.

    Args:
        call: one that `prefill.refuses` does not refuse, without sinks.
        trains: as in `Prepared`.
        mask: one of the layout; None: that of the call.
    """

    name = "cpu"
    __slots__ = ("_backward", "_forward", "_numbers", "again", "kind", "trains")

    def __init__(self, call: Call, trains: bool, mask: Tensor | None = None) -> None:
        self.trains, self.kind = trains, ""
        self._numbers: dict[str, Any] = dict(scale=call.scale, softcap=call.softcap, dropout=call.dropout)
        how: dict[str, Any] = {**self._numbers}
        bias = None
        if mask is None:
            how |= dict(limits=prefill.limits(call.mask), hidden=prefill.hidden(call))
        elif mask.dtype == torch.bool:
            shape = call.batch, call.heads, call.q_length, call.kv_length
            # Without memory, which would be kept.
            how["hidden"] = Hidden(shown=torch.empty_strided(shape, mask.expand(shape).stride(), dtype=torch.bool, device="meta"))
        else:
            bias = readable(mask)
        self._forward = Forward(call.q, call.k, call.v, bias=bias, **how)
        self.again = trains and prefill.is_few(call)
        self._backward = _few_backward(call) if self.again else _Backward(**how)

    def drawn(self) -> Prepared:
        """For one call with dropout."""
        return Drawn(self)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool, seed: int = 0
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Out and lse."""
        bias, shown = _read(mask)
        return self._forward(q, k, v, bias=bias, shown=shown, wants_lse=wants_lse, seed=seed)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
        mask: Tensor | None = None, seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        bias, shown = (_added(mask), None) if self.again else _read(mask)
        if bias is not None and lse is not None and not self.again and drowned.rows(lse, grad_out, grad_lse) is not None:
            assert out is not None and mask is not None
            drawn = torch.tensor(seed, device="cpu") if self._numbers["dropout"] else None
            call = Call(q=q, k=k, v=v, bias=mask[(None,) * (4 - mask.dim())], seed=drawn, **self._numbers)
            with exact_dtypes(q):
                return drowned.backward(Composed(), call, out, lse, grad_out, grad_lse)[:3]
        return self._backward(q, k, v, out, lse, grad_out, grad_lse, bias, shown, seed)


def _few_backward(call: Call) -> _Backward:
    """Of a call that `prefill.is_few` names."""
    seen = None if call.mask is None or not decode.is_ranges(call.mask) else prefill.limits(call.mask)
    return _Backward(limits=seen, scale=call.scale, few=True)


def _added(mask: Tensor | None) -> Tensor | None:
    """A mask that is a tensor as the kernels for few rows read it; a `TileMask` is none."""
    return readable(mask) if type(mask) is Tensor else None


def _read(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask that is a tensor as bias or as what is shown, for the kernels."""
    if type(mask) is not Tensor:
        return None, None
    return (None, in_memory(mask)) if mask.dtype == torch.bool else (readable(mask), None)


class Drawn:
    """One call of `Many` with dropout; forward and backward take the weights of one seed, drawn as `contract.checked` draws it."""

    name, again = "cpu", False
    __slots__ = ("_many", "_seed", "trains")

    def __init__(self, many: Many) -> None:
        self._many, self.trains = many, many.trains
        self._seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))

    @property
    def kind(self) -> str:
        """That of all calls of the layout."""
        return self._many.kind

    @kind.setter
    def kind(self, kind: str) -> None:
        self._many.kind = kind

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Out and lse."""
        return self._many.forward(q, k, v, mask, wants_lse, self._seed)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        return self._many.backward(q, k, v, out, lse, grad_out, grad_lse, mask, self._seed)

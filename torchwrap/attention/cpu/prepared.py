"""The native kernels for tensors of one layout: what a call comes down to when all that does not depend on its numbers is done.

A call of few tokens takes the kernels microseconds, and several times as long to check, to choose for and to put into their words. So that
is done once for each layout of tensors, and `torchwrap.attention.prepared` keeps the result.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from torchwrap.attention.contract import Call, Prepared
from torchwrap.attention.cpu import decode, kernel, prefill
from torchwrap.attention.torch_kernels.masks import added, is_causal
from torchwrap.native.decode import Prepared as Decode
from torchwrap.native.prefill import Backward, Forward, Hidden, in_memory, readable, unread

__all__ = ["Drawn", "Few", "Many", "Masked", "MaskedOne", "One", "Recomputed"]


class _Untrained:
    """What computes calls without gradients."""

    name, trains = "cpu", False
    __slots__ = ("kind",)

    def __init__(self) -> None:
        self.kind = ""

    def backward(self, *_: Any) -> NoReturn:
        """Not for calls that train."""
        raise NotImplementedError


class Few(_Untrained):
    """A few queries by `torchwrap.native.decode`, as `decode.forward`; no gradients.

    Args:
        call: one that `decode.form` calls "native".
    """

    __slots__ = ("_alike", "_copies", "_dtype", "_limits", "_limits_at", "_shape", "_unread", "_work")

    def __init__(self, call: Call) -> None:
        super().__init__()
        q, k, v = call.q, call.k, call.v
        # The rows of a group have to follow each other.
        self._copies = call.q_length > 1 and call.group > 1 and not q.is_contiguous()
        batch, head, row = (q.contiguous() if self._copies else q).stride()[:3]
        self._work = Decode(
            call.batch, call.kv_heads, call.group * call.q_length, call.kv_length, call.width, call.value_width,
            strides=(batch, call.group * head, head if call.q_length == 1 else row, *k.stride()[:3], *v.stride()[:3]),
            dtype=q.dtype, scale=call.scale, softcap=call.softcap or 0.0,
        )  # fmt: skip
        limits = decode.limits(call)
        self._limits = None if limits is None else limits.contiguous()
        self._limits_at = 0 if self._limits is None else self._limits.data_ptr()
        self._dtype, self._shape, self._unread = q.dtype, (*q.shape[:3], call.value_width), unread(q.shape[:3].numel())
        # Memory in the order of q is had in less time than memory of a shape that is said.
        self._alike = q.dtype == torch.float32 and q.shape == self._shape and _in_order(torch.empty_like(q))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Out and lse."""
        if self._copies:
            q = q.contiguous()
        out = torch.empty_like(q) if self._alike else torch.empty(self._shape, dtype=torch.float32)
        lse = torch.empty(self._shape[:3], dtype=torch.float32) if wants_lse or not self._unread else None
        at = self._unread if lse is None else lse.data_ptr()
        self._work(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), at, 0, 0, self._limits_at)
        return out if self._dtype == torch.float32 else out.to(self._dtype), lse


def _in_order(tensor: Tensor) -> bool:
    """Contiguous but for strides of dimensions that have one place, which nothing steps over."""
    sizes, strides, whole = tensor.shape, tensor.stride(), torch.empty(tensor.shape, device="meta").stride()
    return all(size == 1 or stride == full for size, stride, full in zip(sizes, strides, whole, strict=True))


class Masked(_Untrained):
    """Many queries and a mask that is a tensor, without gradients; the kernel reads the mask where it is.

    Args:
        call: one that `prefill.refuses` does not refuse, without sinks.
        mask: one of the layout.
    """

    __slots__ = ("_forward",)

    def __init__(self, call: Call, mask: Tensor) -> None:
        super().__init__()
        how: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap}
        if mask.dtype == torch.bool:
            strides = mask.expand(call.batch, call.heads, call.q_length, call.kv_length).stride()
            # Without memory, which would be kept.
            shown = torch.empty_strided((call.batch, call.heads, call.q_length, call.kv_length), strides, dtype=torch.bool, device="meta")
            self._forward = Forward(call.q, call.k, call.v, hidden=Hidden(shown=shown), **how)
        else:
            self._forward = Forward(call.q, call.k, call.v, bias=readable(mask), **how)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Out and lse."""
        assert mask is not None
        if mask.dtype == torch.bool:
            return self._forward(q, k, v, shown=in_memory(mask), wants_lse=wants_lse)
        return self._forward(q, k, v, bias=readable(mask), wants_lse=wants_lse)


class MaskedOne:
    """One query and a mask that is a tensor, without gradients: one call of torch's kernel.

    Args:
        call: one that `prefill.is_one_changed` names.
    """

    name, trains = "cpu", False
    __slots__ = ("_scale", "_shape", "kind")

    def __init__(self, call: Call) -> None:
        self._scale, self.kind = call.scale, ""
        self._shape = call.batch, call.heads, 1, call.kv_length

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Out and lse."""
        assert mask is not None
        mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
        if not wants_lse and mask.dim() > 1:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self._scale), None
        numbers = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else mask
        live = (numbers.amax(-1) != -math.inf).expand(self._shape[:3])
        return kernel.forward(q, k, v, self._scale, added=numbers.expand(self._shape), live=live)

    def backward(self, *_: Any) -> NoReturn:
        """Not for calls that train."""
        raise NotImplementedError


class Many:
    """Many queries by `torchwrap.native.prefill`, and their gradients, as `prefill.forward` and `prefill.backward`.

    Args:
        call: one that `prefill.refuses` does not refuse, without sinks.
        trains: as in `Prepared`.
    """

    name = "cpu"
    __slots__ = ("_backward", "_forward", "_how", "kind", "trains")

    def __init__(self, call: Call, trains: bool) -> None:
        self.trains, self.kind = trains, ""
        self._how: dict[str, Any] = dict(
            limits=prefill.limits(call.mask), hidden=prefill.hidden(call), scale=call.scale, softcap=call.softcap, dropout=call.dropout
        )  # fmt: skip
        self._forward = Forward(call.q, call.k, call.v, **self._how)
        self._backward: tuple[tuple[int, ...], Backward] | None = None  # for gradients of these strides

    def drawn(self) -> Prepared:
        """For one call with dropout."""
        return Drawn(self)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool, seed: int = 0
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Out and lse."""
        return self._forward(q, k, v, wants_lse=wants_lse, seed=seed)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        grad_out = in_memory(grad_out)
        if grad_out.stride(3) != 1:
            grad_out = grad_out.contiguous()
        held, strides = self._backward, grad_out.stride()
        if held is None or held[0] != strides:
            held = self._backward = strides, Backward(q, k, v, out, grad_out, **self._how)
        dq, dk, dv, *_ = held[1](q, k, v, out, lse, grad_out, None if grad_lse is None else in_memory(grad_lse).contiguous(), seed=seed)
        return dq, dk, dv


class Drawn:
    """One call of `Many` with dropout; forward and backward take the weights of one seed, drawn as `contract.checked` draws it."""

    name = "cpu"
    __slots__ = ("_many", "_seed", "trains")

    def __init__(self, many: Many) -> None:
        self._many, self.trains = many, many.trains
        self._seed = int(torch.randint(2**62, (), dtype=torch.int64))

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
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        return self._many.backward(q, k, v, out, lse, grad_out, grad_lse, self._seed)


class Recomputed:
    """Few queries with gradients: a forward of the same bits as without, and a backward from a forward of its own order of sums.

    Args:
        few: the forward.
        many: the other, with its backward.
    """

    name, trains = "cpu", True
    __slots__ = ("_few", "_many", "kind")

    def __init__(self, few: Few, many: Many) -> None:
        self._few, self._many, self.kind = few, many, ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Out and lse."""
        return self._few.forward(q, k, v, mask, wants_lse)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        again, again_lse = self._many.forward(q, k, v, None, True)
        assert again_lse is not None
        return self._many.backward(q, k, v, again, again_lse, grad_out, grad_lse)


class One(Recomputed):
    """One query in float32, with gradients by torch's kernel, whose backward needs no blocks of keys.

    Args:
        call: one that `prefill.is_one` names, without dropout.
    """

    __slots__ = ("_added", "_few_keys", "_live", "_scale")

    def __init__(self, call: Call) -> None:
        super().__init__(Few(call), Many(call, True))
        self._scale, self._few_keys = call.scale, call.kv_length < kernel.FEWEST
        numbers, live = added(call, is_causal(call))
        self._added = None if numbers is None else numbers.expand(call.batch, call.heads, 1, call.kv_length)
        self._live = None if live is None or bool(live.all()) else live

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, from the forward of the kernel whose backward it is."""
        if grad_lse is not None:
            return super().backward(q, k, v, out, lse, grad_out, grad_lse)
        if grad_out.stride(3) != 1:
            grad_out = grad_out.contiguous()
        out, again = kernel.flash(q, k, v, 0.0, False, attn_mask=self._added, scale=self._scale)
        if self._few_keys:
            again = again.add(lse, alpha=0)  # no numbers stay none: the kernel loses them
        if self._live is not None:
            again = torch.where(self._live, again, 0.0)
        dq, dk, dv = kernel.flash_backward(grad_out, q, k, v, out, again, 0.0, False, attn_mask=self._added, scale=self._scale)
        return dq, dk, dv

"""The back end "sdpa": what `F.scaled_dot_product_attention` runs, with the lse it does not return.

On CUDA that is the first of torch's kernels that can, in torch's own order of preference; each is also a back end by itself. On CPUs there
is one kernel. Its meaning differs from the contract in three places, which are checked or mended here: `is_causal` puts the first query at
the first key (so it is used only where that is what the mask says), rows without a key get lse 0, and a mask must be a tensor. A mask that
torch has no word for is therefore made: B * Sq * Sk elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cpu import kernel, tiled
from torchwrap.attention.merge import grad_of_sinks, with_sinks
from torchwrap.attention.torch_kernels.card import CardKernel
from torchwrap.attention.torch_kernels.cudnn import Cudnn
from torchwrap.attention.torch_kernels.efficient import Efficient
from torchwrap.attention.torch_kernels.flash import Flash
from torchwrap.attention.torch_kernels.masks import added, added_bytes, is_causal

__all__ = ["TorchSdpa"]

_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))
"""Capabilities for which torch 2.13 prefers cuDNN (aten/native/transformers/cuda/sdp_utils.cpp)."""


class TorchSdpa:
    """What `F.scaled_dot_product_attention` of torch runs.

    Memory: with a mask that is neither absent nor causal, B * Sq * Sk elements of the dtype of q.
    """

    name = "sdpa"

    def __init__(self) -> None:
        self._kernels: tuple[CardKernel, ...] = (Flash(), Efficient(), Cudnn())

    def refuses(self, call: Call) -> str | None:
        """Whether one of torch's kernels has all that the call needs."""
        if call.q.device.type == "cuda":
            found = self._kernel(call)
            return found if isinstance(found, str) else None
        if call.q.device.type != "cpu":
            return f"tensors are on {call.q.device}, and torch's kernels on CPUs and CUDA return what the contract asks for"
        if call.softcap is not None:
            return f"softcap={call.softcap}, which torch's kernel does not have"
        if call.dropout:
            return f"dropout={call.dropout}: torch would draw other weights than the contract's"
        if call.bias is not None and call.bias.requires_grad:
            return "the bias needs a gradient, which torch's kernel does not give"
        return None

    @property
    def deterministic(self) -> bool:
        """As `CardKernel.deterministic` on CUDA; the CPU kernel always is."""
        return torch.version.cuda is None or torch.are_deterministic_algorithms_enabled()

    def memory(self, call: Call) -> int:
        """Bytes beyond inputs and results that grow with Sq * Sk."""
        if call.q.device.type == "cuda":
            found = self._kernel(call)
            return 0 if isinstance(found, str) else found.memory(call)
        return added_bytes(call, is_causal(call))

    def describe(self, call: Call) -> str:
        """By which kernel, for people."""
        found = self._kernel(call) if call.q.device.type == "cuda" else None
        return f"torch's kernel {found.name}" if isinstance(found, CardKernel) else "torch's kernel for CPUs"

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out and lse from one call of a kernel."""
        if call.is_empty:
            return call.empty_result()
        if call.q.device.type == "cuda":
            return self._chosen(call).forward(call)
        numbers, live = _added(call)
        out, lse = kernel.forward(call.q, call.k, call.v, call.scale, causal=_uses_causal(call), added=numbers, live=live)
        return with_sinks(out, lse, call.sinks)

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """Gradients from one call of a kernel's backward; by tiles of our own if lse has a gradient, or nothing is there."""
        if call.q.device.type == "cuda" and not call.is_empty:
            return self._chosen(call).backward(call, out, lse, grad_out, grad_lse)
        if call.is_empty or (grad_lse is not None and bool(grad_lse.any())):
            return tiled.backward(call, out, lse, grad_out, grad_lse)
        numbers, _ = _added(call)
        finite = torch.where(lse == -math.inf, 0.0, lse)
        dq, dk, dv = kernel.backward(grad_out, call.q, call.k, call.v, out, finite, call.scale, causal=_uses_causal(call), added=numbers)
        delta = (grad_out.to(lse.dtype) * out).sum(-1)
        return dq, dk, dv, None if call.sinks is None else grad_of_sinks(call.sinks, lse, delta), None

    def _kernel(self, call: Call) -> CardKernel | str:
        """The kernel for CUDA, or why there is none."""
        flash, efficient, cudnn = self._kernels
        first = torch.cuda.get_device_capability(call.q.device) in _CUDNN_FIRST
        reasons = []
        for one in (cudnn, flash, efficient) if first else (flash, efficient, cudnn):
            reason = one.refuses(call)
            if reason is None:
                return one
            reasons.append(f"{one.name}: {reason}")
        return "; ".join(dict.fromkeys(reasons))

    def _chosen(self, call: Call) -> CardKernel:
        found = self._kernel(call)
        assert isinstance(found, CardKernel)  # `refuses` has been asked
        return found


def _uses_causal(call: Call) -> bool:
    return call.bias is None and is_causal(call)


def _added(call: Call) -> tuple[Tensor | None, Tensor | None]:
    numbers, live = added(call, is_causal(call))
    return None if numbers is None else numbers.expand(call.batch, call.heads, call.q_length, call.kv_length), live

"""The back end "sdpa-cudnn": NVIDIA's cuDNN through torch, the fastest dense attention of cards from 9.0.

Taken for calls without a mask, or causal ones of as many queries as keys, where all conventions about corners agree.
Source: PyTorch 2.13, aten/native/cudnn/MHA.cpp; the lse (cuDNN's softmax statistics) is a natural logarithm. Releases differ in whether
it has a last dimension of 1, and backward takes it as that release's forward gives it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.torch_kernels.card import CardKernel, filled, outline, permits
from torchwrap.attention.torch_kernels.masks import corner, is_full

__all__ = ["Cudnn"]

_aten = torch.ops.aten
_LENGTHS_BEFORE, _STEP = 91500, 128


class Cudnn(CardKernel):
    """`aten::_scaled_dot_product_cudnn_attention` and its backward.

    Cost: nothing beyond the results.
    """

    name = "sdpa-cudnn"

    @property
    def deterministic(self) -> bool:
        """Never: torch only warns when it was told to be (aten/native/transformers/cuda/attention_backward.cu)."""
        return False

    def cannot(self, call: Call) -> str | None:
        """Masks, a bias, and what torch refuses."""
        if call.bias is not None:
            return "a bias, which is not asked of cuDNN here"
        if not is_full(call) and not _causal(call):
            return "a mask that is not causal over as many queries as keys"
        version = torch.backends.cudnn.version() or 0
        if version <= _LENGTHS_BEFORE and (call.q_length % _STEP or call.kv_length % _STEP):
            return f"cuDNN is {version}, and until {_LENGTHS_BEFORE} lengths that are no multiples of {_STEP} went wrong (pytorch #169849)"
        q, k, v = (outline(tensor, -(-tensor.shape[3] // 8) * 8) for tensor in (call.q, call.k, call.v))
        return permits("cudnn", q, k, v, None, _causal(call))

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """One call of cuDNN."""
        q, k, v = _laid_out(call)
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, _causal(call), False, scale=call.scale)
        return out.narrow(-1, 0, call.value_width), lse.reshape(out.shape[:3])

    def run_backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One call of cuDNN's backward."""
        q, k, v = _laid_out(call)
        out, grad_out = (filled(tensor, v.shape[3]) for tensor in (out, grad_out))
        none = torch.empty((), dtype=torch.int64, device=q.device)  # state of dropout, of which there is none
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, _statistics(lse, q), none, none, None, None, None, call.q_length, call.kv_length, 0.0,
            _causal(call), scale=call.scale,
        )  # fmt: skip
        return dq.narrow(-1, 0, call.width), dk.narrow(-1, 0, call.width), dv.narrow(-1, 0, call.value_width)


def _statistics(lse: Tensor, q: Tensor) -> Tensor:
    """The lse in the form that backward takes."""
    return (lse if _dimensions(q.device, q.dtype) == 3 else lse.unsqueeze(-1)).contiguous()


@functools.cache
def _dimensions(device: torch.device, dtype: torch.dtype) -> int:
    """Of the lse, as one small forward gives it."""
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    found: Tensor = _aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, False, False, scale=1.0)[1]
    return found.dim()


def _causal(call: Call) -> bool:
    return call.mask is not None and call.mask.plain == "causal" and corner(call) == "both"


def _laid_out(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (filled(tensor, -(-tensor.shape[3] // 8) * 8) for tensor in (call.q, call.k, call.v))
    return q, k, v

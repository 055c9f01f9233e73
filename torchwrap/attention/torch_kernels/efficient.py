"""The back end "sdpa-efficient": torch's memory-efficient kernel: the only one of torch's for cards before 8.0, or with masks.

Query heads that share keys: without a mask they become more rows of one head, with one they become a batch whose heads read the same
keys through a stride of 0. Nothing is copied but what is not contiguous, and no release's own support of groups is counted on.
A mask without a word is a tensor of B * Sq * Sk elements (`memory`).
Source: F. Massa et al., xFormers, 2022; PyTorch 2.13, aten/native/transformers/cuda/mem_eff_attention. Facts of that kernel: the lse is the
natural logarithm, its rows are filled up to 32, with +inf; strides of what is added must be multiples of 16 bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchwrap.attention.contract import Call
from torchwrap.attention.torch_kernels.card import CardKernel, filled, outline, permits
from torchwrap.attention.torch_kernels.masks import added, added_bytes, corner, is_full

__all__ = ["Efficient"]

_aten = torch.ops.aten
_NONE, _FIRST, _LAST = 0, 1, 2
_LSE_ROWS, _ADDED_COLUMNS = 32, 16


class Efficient(CardKernel):
    """`aten::_efficient_attention_forward` and its backward.

    Cost: with a mask that is neither absent nor causal from a corner, B * Sq * Sk elements of the dtype of q; in backward gradients of keys
    and values for every query head where heads share keys under a mask.
    """

    name = "sdpa-efficient"

    def cannot(self, call: Call) -> str | None:
        """What torch refuses."""
        width, value_width = -(-call.width // 8) * 8, -(-call.value_width // 8) * 8
        q, k, v = outline(call.q.narrow(1, 0, call.kv_heads), width), outline(call.k, width), outline(call.v, value_width)
        shape = call.batch, call.kv_heads, call.q_length, call.kv_length
        mask = None if _word(call) is not None else call.q.new_empty(call.kv_length).expand(shape)
        return permits("efficient", q, k, v, mask, False)

    def memory(self, call: Call) -> int:
        """That of the mask as a tensor."""
        return added_bytes(call, _word(call) is not None)

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """One call of the kernel."""
        numbers, live = added(call, _word(call) is not None)
        q, k, v = _folded(call, *_laid_out(call))
        out, lse, *_ = _aten._efficient_attention_forward(
            q, k, v, _aligned(call, numbers), None, None, None, None, 0.0, _word(call) or _NONE, True, scale=call.scale
        )
        out, lse = _unfolded(call, out.transpose(1, 2)), lse.narrow(2, 0, q.shape[1]).unsqueeze(-1)
        lse = _unfolded(call, lse).squeeze(-1)
        if live is not None:  # a bias may hide what the mask does not
            out, lse = out.masked_fill(~live.unsqueeze(-1), 0.0), lse.masked_fill(~live, -math.inf)
        return out.narrow(-1, 0, call.value_width), lse

    def run_backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One call of the kernel's backward, and the sum over query heads where each has gradients of its own."""
        numbers, _ = added(call, _word(call) is not None)
        wide = _laid_out(call)
        q, k, v = _folded(call, *wide)
        out, grad_out = (_rows(call, filled(tensor, wide[2].shape[3])).transpose(1, 2) for tensor in (out, grad_out))
        # Its rows are read as if they were those that the kernel itself wrote, whatever the strides say (kernel_backward.h, o_strideM).
        out = out.contiguous()
        lse = _rows(call, lse.unsqueeze(-1)).squeeze(-1)
        lse = F.pad(lse, (0, -lse.shape[2] % _LSE_ROWS), value=math.inf).contiguous()
        none = torch.empty((), dtype=torch.int64, device=q.device)  # state of dropout, of which there is none
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            grad_out, q, k, v, _aligned(call, numbers), out, None, None, q.shape[1], k.shape[1], lse, 0.0, none, none,
            _word(call) or _NONE, False, scale=call.scale,
        )  # fmt: skip
        dq = _unfolded(call, dq.transpose(1, 2)).narrow(-1, 0, call.width)
        dk, dv = (_of_keys(call, grad.transpose(1, 2), width) for grad, width in ((dk, call.width), (dv, call.value_width)))
        return dq, dk, dv


def _word(call: Call) -> int | None:
    """The kernel's own word for the mask; None: there is none, and a tensor has to be made."""
    if call.bias is not None:
        return None
    if is_full(call) or call.mask is None:
        return _NONE
    if call.mask.plain != "causal":
        return None
    return {"first": _FIRST, "both": _FIRST, "last": _LAST, None: None}[corner(call)]


def _laid_out(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with widths that are multiples of 8."""
    width, value_width = -(-call.width // 8) * 8, -(-call.value_width // 8) * 8
    return filled(call.q, width), filled(call.k, width), filled(call.v, value_width)


def _alike(call: Call) -> bool:
    """All rows see all keys, so that heads can become rows."""
    return _word(call) == _NONE


def _rows(call: Call, tensor: Tensor) -> Tensor:
    """`[B, Hq, Sq, X]` as the kernel's heads: `[B, Hkv, G * Sq, X]`, or `[B * Hkv, G, Sq, X]` under a mask."""
    if call.group == 1:
        return tensor
    by_head: Tensor = tensor.unflatten(1, (call.kv_heads, call.group))
    return by_head.flatten(2, 3) if _alike(call) else by_head.flatten(0, 1)


def _unfolded(call: Call, tensor: Tensor) -> Tensor:
    """What `_rows` made, as `[B, Hq, Sq, X]` again."""
    if call.group == 1:
        return tensor
    dim, sizes = (2, (call.group, call.q_length)) if _alike(call) else (0, (call.batch, call.kv_heads))
    by_head: Tensor = tensor.unflatten(dim, sizes)
    return by_head.flatten(1, 2)


def _folded(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's arguments, `[B, S, H, D]`."""
    if call.group > 1 and not _alike(call):
        k, v = (tensor.flatten(0, 1).unsqueeze(1).expand(-1, call.group, -1, -1) for tensor in (k, v))
    return _rows(call, q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _of_keys(call: Call, grad: Tensor, width: int) -> Tensor:
    """Gradients as the kernel gives them, as those of `[B, Hkv, Sk, width]`."""
    if call.group > 1 and not _alike(call):
        grad = grad.sum(1, dtype=torch.float32).to(grad.dtype).unflatten(0, (call.batch, call.kv_heads))
    return grad.narrow(-1, 0, width)


def _aligned(call: Call, numbers: Tensor | None) -> Tensor | None:
    """What is added to the scores, for the kernel's heads, in rows whose strides the kernel takes; what is one for many is expanded."""
    if numbers is None:
        return None
    batch, heads = call.batch, call.heads
    if call.group > 1:
        batch, heads = batch * call.kv_heads, call.group
        own = numbers.shape[1] > 1
        by_head = numbers.unflatten(1, (call.kv_heads, call.group)) if own else numbers.unsqueeze(2)
        one = by_head.shape[0] == by_head.shape[1] == 1
        numbers = by_head.select(1, 0) if one else by_head.expand(call.batch, call.kv_heads, -1, -1, -1).flatten(0, 1)
    numbers = numbers.expand(-1, -1, -1, call.kv_length)
    numbers = F.pad(numbers, (0, -call.kv_length % _ADDED_COLUMNS)).contiguous().narrow(-1, 0, call.kv_length)
    return numbers.expand(batch, heads, call.q_length, call.kv_length)

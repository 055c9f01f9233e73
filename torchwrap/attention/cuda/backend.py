"""The back end "cuda_mma": which calls the Volta and Turing kernels take, and how a call becomes launches.

Many queries: one block per query tile and head. Few (at most `_FOLDED` rows with the group folded in): blocks share the keys, and their
partial results are merged, so that decoding fills the card. Backward: one pass for q, one or two for k and v, without atomics: two runs
give the same bits.

Accuracy: products of fp16 summed in float32; probabilities and score gradients are rounded to fp16 as operands of the second product.
Memory: lse; for few queries `4 * splits * G * Sq * (D + 1)` floats for each key head; backward one float for each row.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cuda import nvrtc, variants
from torchwrap.attention.cuda.driver import Card
from torchwrap.attention.cuda.params import Params, aligned, of_call, rows_of
from torchwrap.attention.cuda.variants import Family, Variant
from torchwrap.attention.merge import grad_of_sinks

__all__ = ["CudaMma", "Machine", "run_backward", "run_forward"]

# chosen: below it tiles of the forward form would be mostly empty rows
_FOLDED = 64
# A block of the split form should have at least this many keys, or merging costs more than it gains.
_LEAST_KEYS = 256
_GRID_LIMIT = 65_535


class Machine(Protocol):
    """What runs a kernel: a card, or the host emulation of the tests."""

    @property
    def multiprocessors(self) -> int:
        """How many blocks run at a time, at least."""

    def launch(self, variant: Variant, grid: tuple[int, int, int], params: Params) -> None:
        """Run one kernel over a grid of blocks."""


class CudaMma:
    """Tensor cores of Volta and Turing, through kernels of our own."""

    name = "cuda_mma"

    def refuses(self, call: Call) -> str | None:
        """The first check that fails, with its value; None: the call can run.

        Cost: no kernel is compiled; the first question loads NVRTC.
        """
        if call.q.device.type != "cuda":
            return f"cuda_mma needs a CUDA device, the tensors are on {call.q.device}"
        if torch.version.hip is not None:
            return f"cuda_mma is for NVIDIA's cards, this torch is built for ROCm {torch.version.hip}"
        capability = torch.cuda.get_device_capability(call.q.device)
        if variants.family_of(capability) is None:
            return f"cuda_mma needs tensor cores (compute capability 7.0), this card has {capability[0]}.{capability[1]}"
        return unsupported(call) or nvrtc.unavailable(10 * capability[0] + capability[1])

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out `[B, Hq, Sq, D]` in fp16 and lse `[B, Hq, Sq]` in float32.

        Raises:
            KernelError: compiler or driver failed; nothing was computed.
        """
        card = _card(call.q.device)
        return run_forward(call, card, _family(card))

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """Gradients in the dtypes of what they belong to; none for a bias, which `refuses` has refused.

        Raises:
            KernelError: as in `forward`.
        """
        card = _card(call.q.device)
        return run_backward(call, out, lse, grad_out, grad_lse, card, _family(card))


def unsupported(call: Call) -> str | None:
    """What the kernels do not do whatever the card, or None."""
    if call.q.dtype != torch.float16:
        return f"cuda_mma computes fp16, the tensors are {str(call.q.dtype).removeprefix('torch.')}"
    if call.width not in variants.HEAD_WIDTHS or call.value_width != call.width:
        return f"cuda_mma has kernels for heads of 64 and 128, q is {call.width} and v {call.value_width} wide"
    if call.bias is not None:
        return "cuda_mma has no bias"
    if call.dropout:
        return f"cuda_mma has no dropout, {call.dropout} was asked for"
    if max(call.batch, call.heads) > _GRID_LIMIT:
        return f"cuda_mma takes at most {_GRID_LIMIT} batch rows and heads, got {call.batch} and {call.heads}"
    if call.mask is not None:
        for name in ("chunk", "key_mask", "q_segments", "dictionary"):
            if getattr(call.mask, name) is not None:
                return f"cuda_mma masks by position and one range of columns for each batch row; this mask has {name}"
    return None


def run_forward(call: Call, machine: Machine, family: Family) -> tuple[Tensor, Tensor]:
    """The launches of a forward pass. Arguments and result as in `CudaMma.forward`."""
    if call.is_empty:
        return call.empty_result()
    params, kept = of_call(call)
    out = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    lse = call.q.new_empty(out.shape[:3], dtype=torch.float32)
    params.out, params.lse = rows_of(out), lse.data_ptr()
    rows, capped = call.group * call.q_length, call.softcap is not None
    if rows > _FOLDED:
        variant = variants.forward(family, call.width, capped)
        machine.launch(variant, (-(-call.q_length // variant.rows), call.heads, call.batch), params)
        return out, lse
    variant = variants.split(family, call.width, capped)
    tiles = -(-rows // variant.rows)
    wanted = -(-2 * machine.multiprocessors // (call.batch * call.kv_heads * tiles))
    params.splits = max(1, min(wanted, -(-call.kv_length // _LEAST_KEYS)))
    params.partials = params.splits * variant.key_warps
    partial_lse = lse.new_empty(params.partials, call.batch, call.kv_heads, rows)
    partial_out = lse.new_empty(*partial_lse.shape, call.width)
    kept += [partial_lse, partial_out]
    params.partial_lse, params.partial_out = partial_lse.data_ptr(), partial_out.data_ptr()
    machine.launch(variant, (tiles * params.splits, call.kv_heads, call.batch), params)
    machine.launch(variants.combine(family, call.width), (rows, call.kv_heads, call.batch), params)
    return out, lse


def run_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, machine: Machine, family: Family
) -> Gradients:
    """The launches of a backward pass. Arguments and result as in `CudaMma.backward`."""
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (call.q, call.k, call.v)]
    delta = (grad_out.float() * out.float()).sum(-1)
    delta = (delta if grad_lse is None else delta - grad_lse).contiguous()
    grad_sinks = None if call.sinks is None else grad_of_sinks(call.sinks, lse, delta)
    if call.is_empty:
        for grad in grads:
            grad.zero_()
        return grads[0], grads[1], grads[2], grad_sinks, None
    params, kept = of_call(call)
    grad_out, lse = aligned(grad_out.to(torch.float16)), lse.contiguous()
    kept += [grad_out, lse, delta]
    params.grad_out, params.lse, params.delta = rows_of(grad_out), lse.data_ptr(), delta.data_ptr()
    params.grad_q, params.grad_k, params.grad_v = (rows_of(grad) for grad in grads)
    capped = call.softcap is not None
    of_q = variants.backward_rows(family, call.width, capped)
    machine.launch(of_q, (-(-call.q_length // of_q.rows), call.heads, call.batch), params)
    for variant in variants.backward_keys(family, call.width, capped):
        machine.launch(variant, (-(-call.kv_length // variant.rows), call.kv_heads, call.batch), params)
    return grads[0], grads[1], grads[2], grad_sinks, None


@functools.cache
def _card_of(index: int) -> Card:
    return Card(torch.device("cuda", index))


def _card(device: torch.device) -> Card:
    return _card_of(torch.cuda.current_device() if device.index is None else device.index)


def _family(card: Card) -> Family:
    family = variants.family_of(divmod(card.arch, 10))
    assert family is not None  # `refuses` has asked
    return family

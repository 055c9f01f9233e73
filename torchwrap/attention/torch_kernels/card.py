"""What torch's kernels for CUDA have in common: torch says whether one can run, and what they leave to their caller.

They are the functions that `F.scaled_dot_product_attention` runs, called below it, where they return the lse. Their backward takes out
and lse as arguments: given those of the whole call, sinks included, the gradients are those of the whole call. Widths are filled up with
zeros to what a kernel takes. Rows without a key get an lse of each kernel's own making, which is replaced.

None of it has run on a card yet; the tests check each call against the function's schema and torch's fake registrations, and the
arithmetic around it against kernels emulated on the CPU (tests/attention/test_torch_kernels.py), and tests/gpu runs it on a card.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cpu import tiled
from torchwrap.attention.merge import grad_of_sinks, with_sinks
from torchwrap.attention.torch_kernels.masks import masked
from torchwrap.core import errors

__all__ = ["CardKernel", "filled", "on_card", "outline", "permits"]

_lock = threading.Lock()


def on_card(call: Call) -> str | None:
    """Why the call is not on a CUDA card, or None."""
    if call.q.device.type != "cuda":
        return f"q is on {call.q.device}, and this kernel is for CUDA"
    return None if torch.version.hip is None else "this is a ROCm build of torch, on which this kernel's lse has never been looked at"


class CardKernel:
    """One of torch's kernels for CUDA; subclasses say which."""

    name: ClassVar[str]

    @property
    def deterministic(self) -> bool:
        """Whether gradients are the same bits in every run: these kernels add in any order, unless torch was told not to."""
        return torch.are_deterministic_algorithms_enabled()

    def refuses(self, call: Call) -> str | None:
        """The first check that fails, the last of which is torch's own; None: the call can run."""
        elsewhere = on_card(call)
        if elsewhere is not None:
            return elsewhere
        if call.q.dtype == torch.float64:
            return "float64, which torch's kernels do not compute"
        if call.softcap is not None:
            return f"softcap={call.softcap}, which torch's kernels do not have"
        if call.dropout:
            return f"dropout={call.dropout}: torch would draw other weights than the contract's"
        if call.bias is not None and call.bias.requires_grad:
            return "the bias needs a gradient, which is not asked of torch's kernels"
        return None if call.is_empty else self.cannot(call)

    def memory(self, call: Call) -> int:
        """Bytes beyond inputs and results that grow with Sq * Sk."""
        return 0

    def cannot(self, call: Call) -> str | None:
        """What this kernel lacks."""
        raise NotImplementedError

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out `[B, Hq, Sq, Dv]` and lse `[B, Hq, Sq]` without sinks; rows without a key have any values."""
        raise NotImplementedError

    def run_backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v; lse is +inf in rows without a key, so that `exp(score - lse)` is 0."""
        raise NotImplementedError

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out and lse, as in `contract`.

        Raises:
            KernelError: the kernel refused what the checks had let through.
        """
        if call.is_empty:
            return call.empty_result()
        with self._refusals(call):
            out, lse = self.run(call)
        dead = masked(call)
        if dead is not None:
            out, lse = out.masked_fill(dead[:, None, :, None], 0.0), lse.masked_fill(dead[:, None], -math.inf)
        return with_sinks(out, lse, call.sinks)

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """Gradients; by tiles of our own if lse has a gradient, which torch's kernels do not take.

        Raises:
            KernelError: as in `forward`.
        """
        if call.is_empty or grad_lse is not None:
            return tiled.backward(call, out, lse, grad_out, grad_lse)
        with self._refusals(call):
            dq, dk, dv = self.run_backward(call, out, torch.where(lse == -math.inf, math.inf, lse), grad_out)
        delta = (grad_out.to(lse.dtype) * out).sum(-1) if call.sinks is not None else None
        return dq, dk, dv, None if call.sinks is None or delta is None else grad_of_sinks(call.sinks, lse, delta), None

    @contextmanager
    def _refusals(self, call: Call) -> Iterator[None]:
        """Turns a refusal (a build without windows, no plan of cuDNN's) into what the dispatcher goes on from; nothing else."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "CUDA error" in str(error):  # the card itself: nothing runs on it any more
                raise
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise errors.KernelError(f"{self.name} refused the call: {first[0]}", where=str(call.q.device)) from error


def filled(tensor: Tensor, width: int) -> Tensor:
    """With zeros behind each vector, up to a width that is a multiple of 8, and laid out as kernels read: in steps of 16 bytes."""
    if tensor.shape[-1] < width:
        return F.pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def outline(tensor: Tensor, width: int) -> Tensor:
    """What torch's checks look at: a tensor shaped as `filled` makes it, without the work."""
    if tensor.shape[-1] == width and _is_aligned(tensor):
        return tensor
    return tensor.new_empty(width).expand(*tensor.shape[:-1], width).requires_grad_(tensor.requires_grad)


def _is_aligned(tensor: Tensor) -> bool:
    # Slices of caches and of joined projections may begin anywhere; not every release of torch checks it (sdp_utils.cpp).
    step = 16 // tensor.element_size()
    strides = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    return tensor.stride(-1) == 1 and tensor.storage_offset() % step == 0 and all(s % step == 0 or size == 1 for s, size in strides)


def permits(kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """What torch's own check says against a kernel, or None.

    Args:
        kernel: "flash", "efficient" or "cudnn".
        q: `[B, Hq, Sq, D]`.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, Dv]`.
        mask: what is added to the scores.
        causal: `is_causal` of torch's function.
    """
    parameters = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, causal, q.shape[1] != k.shape[1])
    with _on(q.device):
        if getattr(torch.backends.cuda, f"can_use_{kernel}_attention")(parameters):
            return None
    return _reason(kernel, q.device, q.dtype, q.shape, k.shape, v.shape, mask is not None, causal)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The checks look at the current card, whatever card the tensors are on."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else nullcontext()


@functools.lru_cache(maxsize=256)
def _reason(
    kernel: str, device: torch.device, dtype: torch.dtype, q: torch.Size, k: torch.Size, v: torch.Size, mask: bool, causal: bool
) -> str:
    """What torch warns of when it is asked to explain its refusal."""
    # One row for all: checks look at sizes and at the last stride.
    query, key, value = (torch.empty(shape[-1], dtype=dtype, device=device).expand(shape) for shape in (q, k, v))
    added = torch.empty(k[2], dtype=dtype, device=device).expand(q[0], q[1], q[2], k[2]) if mask else None
    parameters = torch.backends.cuda.SDPAParams(query, key, value, added, 0.0, causal, q[1] != k[1])
    with _lock, _on(device), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        getattr(torch.backends.cuda, f"can_use_{kernel}_attention")(parameters, debug=True)
    reasons = [str(one.message).split(" (Triggered internally")[0] for one in said]
    return f"torch's check of its {kernel} kernel says: {' '.join(reasons) or 'no'}"

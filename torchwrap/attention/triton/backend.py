"""The back end "triton": what it refuses, and how it runs what it does not."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.triton import launches
from torchwrap.attention.triton.blocks import PASSES, Blocks, Fixed, card_of, choose, excess, interpreted
from torchwrap.core import errors

__all__ = ["Triton", "forward_pages"]

OLDEST = (3, 4)
"""Version of triton from which tuples in a kernel may hold None."""

WIDEST = 256
"""Elements of a vector: wider ones leave no room for two tiles."""


_SAID = {"queries": "block_m", "keys": "block_n", "warps": "num_warps", "stages": "num_stages"}


class Triton:
    """Attention by tiles on CUDA cards from compute capability 6.0; on matrix units from 8.0.

    Args:
        blocks: tiles to start from in every pass, or what of them is fixed; None: the table of `blocks`.

    Exactness: sums in float32; float32 inputs by three TF32 products from 8.0 (one, where torch may), else in float32. Gradients are the
    same bits in every run.
    Cost: forward O(B * Hq * Sq) beside out, with split keys `parts` copies of out in float32; backward one float32 number per row.
    """

    name = "triton"

    def __init__(self, blocks: Blocks | Fixed | None = None) -> None:
        self.blocks = blocks

    def refuses(self, call: Call) -> str | None:
        """Why this call cannot be computed here: the failed check with its value, or None."""
        missing = _missing()
        if missing is not None:
            return missing
        device = call.q.device
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"q is on {device}; a CUDA device is needed (or TRITON_INTERPRET=1, for tests)"
        if torch.version.hip is not None:
            return "this is a ROCm build of torch, on which the kernels have never been run"
        if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{call.q.dtype} is neither float16, bfloat16 nor float32"
        if max(call.width, call.value_width) > WIDEST:
            return f"vectors of {max(call.width, call.value_width)} elements, and at most {WIDEST} fit"
        card = card_of(device)
        if 0 < card.capability < 60:
            return f"compute capability {card.capability / 10}, and 6.0 is the oldest that triton compiles for"
        for kind in PASSES:
            if choose(kind, card, call.q.dtype, call.width, call.value_width, call.q_length, self.blocks) is None:
                fixed = self.blocks if isinstance(self.blocks, Fixed) else Fixed()
                needed = excess(kind, card, call.q.dtype, call.width, call.value_width, fixed)
                said = ", ".join(f"{_SAID[name]}={value}" for name, value in fixed.given.items()) or "the smallest tile"
                return f"{said}: the {kind} pass needs {needed} bytes of shared memory, of which a program has {card.shared_bytes} bytes"
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """The result.

        Returns:
            out `[B, Hq, Sq, Dv]` and lse `[B, Hq, Sq]` float32.
        """
        if call.is_empty:
            return call.empty_result()
        call = _prepared(call)
        steps, out, lse = launches.forward(call, card_of(call.q.device), self.blocks)
        _run(steps, call.q.device)
        return out, lse

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """The gradients of everything; None for a bias that is known to require none.

        Args:
            call: as given to `forward`.
            out: what `forward` returned.
            lse: what `forward` returned.
            grad_out: gradient of out.
            grad_lse: gradient of lse; None: zeros.
        """
        if call.is_empty:
            sinks = None if call.sinks is None else _of_empty(call, grad_lse)
            bias = None if call.bias is None else torch.zeros_like(call.bias)
            return torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v), sinks, bias
        call = _prepared(call)
        card = card_of(call.q.device)
        steps, delta, (grad_q, grad_k, grad_v, grad_bias) = launches.backward(
            call, card, _unit(out), lse.contiguous(), _unit(grad_out), grad_lse, self.blocks
        )
        _run(steps, call.q.device)
        grad_sinks = None
        if call.sinks is not None:
            share = torch.exp(call.sinks.detach().float()[:, None] - torch.where(lse == -math.inf, math.inf, lse))
            grad_sinks = -(share * delta).sum((0, 2)).to(call.sinks.dtype)
        if call.bias is not None and grad_bias is not None:
            grad_bias = grad_bias.sum(-1, keepdim=True) if call.bias.shape[3] == 1 else grad_bias
            grad_bias = grad_bias.to(call.bias.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, grad_bias


def forward_pages(call: Call, rows: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The forward over keys that lie in pages.

    Args:
        call: its k and v are the memory, `[B, Hkv, S, D]` expanded, and its mask is of the keys in `rows`; `refuses` has said None of it.
        rows: int32 [keys], rows of the memory.
        longest: keys that a query sees at most.

    Returns:
        out `[B, Hq, Sq, Dv]` and lse `[B, Hq, Sq]` float32.
    """
    call = _prepared(call)
    steps, out, lse = launches.forward(call, card_of(call.q.device), table=rows, longest=longest)
    _run(steps, call.q.device)
    return out, lse


@functools.lru_cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton  # an optional package, and slow to import

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= OLDEST else f"triton is {triton.__version__}, and {OLDEST[0]}.{OLDEST[1]} is the oldest that works"


def _prepared(call: Call) -> Call:
    """The call with unit last strides and its mask beside q."""
    mask: Any = call.mask if call.mask is None or call.mask.device == call.q.device else call.mask.to(call.q.device)
    sinks = None if call.sinks is None else call.sinks.contiguous()
    return replace(call, q=_unit(call.q), k=_unit(call.k), v=_unit(call.v), mask=mask, sinks=sinks)


def _unit(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _of_empty(call: Call, grad_lse: Tensor | None) -> Tensor:
    """Gradient of sinks that are all a row has: lse is the sink."""
    assert call.sinks is not None
    return torch.zeros_like(call.sinks) if grad_lse is None else grad_lse.sum((0, 2)).to(call.sinks.dtype)


def _run(steps: list[launches.Launch], device: torch.device) -> None:
    from triton.compiler.errors import CompilationError  # an optional package, and slow to import
    from triton.runtime.errors import TritonError

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for step in steps:
            try:
                step.run()
            except (CompilationError, TritonError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not str(error).startswith("Triton Error"):  # what its driver says
                    raise
                raise errors.KernelError(f"triton cannot run the kernel: {error}", where=str(device)) from error

"""The back end "flex": FlexAttention, which generates a kernel for any mask and any change of the scores.

Torch compiles it on first use: seconds for each kind of call (dtype, width, which conditions the mask has), and again, once, when lengths
change. Numbers within masks, caps and biases are tensors to it, so other windows and offsets need no compilation. Not compiled, it would
store all scores; it is always compiled here. Sinks are merged in afterwards.

On CPUs the compiled kernel returns no lse and has no backward (torch 2.13, `_inductor/kernel/flex/flex_cpu.py`): calls are taken that want
neither. On cards backward runs the forward again, because torch keeps what it needs inside its own graph.
Source: J. Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024.
"""

from __future__ import annotations

import functools
import inspect
import math
import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from torchwrap.attention.contract import Call, Gradients
from torchwrap.attention.cpu import tiled
from torchwrap.attention.merge import grad_of_sinks, with_sinks
from torchwrap.core import errors

__all__ = ["Flex"]

BLOCK = 128
"""Rows and columns of a block of the mask: what torch's kernels are tuned for."""
_LEAST_WIDTH = 16


class Flex:
    """`torch.nn.attention.flex_attention`.

    Args:
        compiled: False: torch's definition of it, which stores all scores; for tests.

    Cost: forward, four int32 for each block of the mask; backward on cards a second forward.
    """

    name = "flex"

    def __init__(self, compiled: bool = True) -> None:
        self.compiled = compiled

    @property
    def deterministic(self) -> bool:
        """Whether gradients are the same bits in every run: torch makes no promise."""
        return False

    def refuses(self, call: Call) -> str | None:
        """The first check that fails, with its value; None: the call can run."""
        device = call.q.device.type
        if device not in ("cpu", "cuda"):
            return f"q is on {call.q.device}, and FlexAttention is asked on CPUs and CUDA"
        if call.dropout:
            return f"dropout={call.dropout}, which FlexAttention does not have"
        if call.bias is not None and call.bias.requires_grad:
            return "the bias needs a gradient, which is not asked of FlexAttention"
        if not self.compiled:
            return None
        if call.q.dtype == torch.float64:
            return "float64, for which FlexAttention has no compiled kernel"
        if device == "cpu" and call.wants_lse:
            return "on CPUs FlexAttention returns no lse and no gradients (torch 2.13); it is for calls without gradients and return_lse"
        if device == "cpu" and call.sinks is not None:
            return "sinks, which need the lse that FlexAttention does not return on CPUs (torch 2.13)"
        if device == "cpu" and not _compiler():
            return "no C++ compiler (g++ or clang++), with which torch compiles FlexAttention for CPUs"
        if device == "cuda" and torch.cuda.get_device_capability(call.q.device) < (7, 0):
            return "torch compiles for CUDA cards from compute capability 7.0"
        if device == "cuda" and min(call.width, call.value_width) < _LEAST_WIDTH:
            return f"vectors of {min(call.width, call.value_width)} elements, and FlexAttention takes at least {_LEAST_WIDTH}"
        return None

    def memory(self, call: Call) -> int:
        """All scores where it is not compiled."""
        return 0 if self.compiled else call.batch * call.heads * call.q_length * call.kv_length * 4

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out and lse; lse is empty where `wants_lse` is False.

        Raises:
            KernelError: torch cannot compile it.
        """
        if call.is_empty:
            return call.empty_result()
        out, lse = self._run(call, call.q, call.k, call.v)
        return (out, call.q.new_empty(0)) if lse is None else with_sinks(out, lse, call.sinks)

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """By autograd from a second forward on cards, by tiles of our own on CPUs.

        Raises:
            KernelError: torch cannot compile it.
        """
        if call.q.device.type != "cuda" or call.is_empty:
            return tiled.backward(call, out, lse, grad_out, grad_lse)
        leaves = [tensor.detach().requires_grad_() for tensor in (call.q, call.k, call.v)]
        with torch.enable_grad():
            again, sums = self._run(call, leaves[0], leaves[1], leaves[2])
            assert sums is not None
            again, sums = with_sinks(again, sums, call.sinks)
        dead = lse == -math.inf
        outputs, given = ([again], [grad_out]) if grad_lse is None else ([again, sums], [grad_out, grad_lse.masked_fill(dead, 0.0)])
        dq, dk, dv = torch.autograd.grad(outputs, leaves, given)
        if call.sinks is None:
            return dq, dk, dv, None, None
        delta = (grad_out.to(lse.dtype) * out).sum(-1)
        return dq, dk, dv, grad_of_sinks(call.sinks, lse, delta if grad_lse is None else delta - grad_lse), None

    def _run(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        mask: Any = None if call.mask is None or call.mask.plain == "full" else call.mask.to(q.device)
        wants = call.wants_lse or q.device.type == "cuda" or call.sinks is not None
        options: dict[str, Any] = {
            "score_mod": _change(call), "block_mask": None if mask is None else mask.to_block_mask(BLOCK), "scale": call.scale,
            "enable_gqa": call.group > 1,
        }  # fmt: skip
        try:
            if not wants:
                return _function(self.compiled)(q, k, v, **options), None
            out, rest = _function(self.compiled)(q, k, v, **options, **_asking_for_lse())
        except _failures() as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise errors.KernelError(f"torch cannot compile FlexAttention: {first[0]}", where=str(q.device)) from error
        lse: Tensor = rest if isinstance(rest, Tensor) else rest.lse
        return out, lse.to(call.accumulate)


def _change(call: Call) -> Callable[..., Tensor] | None:
    """Cap and bias as a function of one score and its indices; None: neither."""
    cap = None if call.softcap is None else torch.tensor(call.softcap, device=call.q.device)
    bias = None if call.bias is None else call.bias.detach()
    if bias is None and cap is None:
        return None
    own = (False,) * 4 if bias is None else tuple(size > 1 for size in bias.shape)

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias is not None:
            score = score + bias[b if own[0] else 0 * b, h if own[1] else 0 * h, q if own[2] else 0 * q, k if own[3] else 0 * k]
        return score

    return changed


@functools.cache
def _function(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # slow import, for one back end

    # Beyond Dynamo's limit of compilations a graph of several parts would run the definition, which stores all scores; this raises.
    made: Any = torch.compile(flex_attention, fullgraph=True) if compiled else flex_attention
    return cast(Callable[..., Any], made)


@functools.cache
def _asking_for_lse() -> dict[str, Any]:
    from torch.nn.attention import flex_attention as room

    # return_aux came with torch 2.9; return_lse is deprecated since
    if "return_aux" in inspect.signature(room.flex_attention).parameters:
        return {"return_aux": room.AuxRequest(lse=True)}
    return {"return_lse": True}


@functools.cache
def _failures() -> tuple[type[BaseException], ...]:
    """What compiling raises; some of it is newer than torch 2.6, some no RuntimeError."""
    from torch._dynamo import exc

    return (exc.TorchDynamoException, NotImplementedError, getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException))


@functools.cache
def _compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))

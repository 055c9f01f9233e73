"""The structure `kernels/params.cuh` as ctypes: the same fields in the same order, filled from a call.

Letters as in `contract.py`. Addresses are only valid while the tensors live; a launch holds them until it is queued.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from torchwrap.attention.contract import Call

__all__ = ["Params", "Rows", "aligned", "of_call", "rows_of"]

# Far outside any sequence and far inside an int32, so that adding a position cannot overflow.
_FAR = 1 << 30
_LOG2E = math.log2(math.e)


class Rows(ctypes.Structure):
    """fp16 rows `[B, H, S, D]`: address and strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_longlong), ("head", ctypes.c_longlong), ("row", ctypes.c_longlong)]


class Params(ctypes.Structure):
    """Every argument of every kernel; a kernel reads those it needs."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("lse", "delta", "sinks", "kv_start", "kv_end", "partial_out", "partial_lse")),
        *((name, ctypes.c_int) for name in ("batch", "heads", "kv_heads", "group", "q_length", "kv_length", "lower", "upper")),
        *((name, ctypes.c_int) for name in ("splits", "partials")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "inner", "outer")),
    ]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose rows can be read 16 bytes at a time."""
    fits = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1])
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def rows_of(tensor: Tensor) -> Rows:
    """Where the rows of an aligned tensor lie."""
    return Rows(tensor.data_ptr(), *tensor.stride()[:3])


def of_call(call: Call) -> tuple[Params, list[Tensor]]:
    """The fields that forward and backward share, and the tensors whose addresses are in them.

    A row i sees the columns i + lower ... i + upper of those its batch row has.
    """
    q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
    params = Params(q=rows_of(q), k=rows_of(k), v=rows_of(v))
    params.batch, params.heads, params.kv_heads, params.group = call.batch, call.heads, call.kv_heads, call.group
    params.q_length, params.kv_length = call.q_length, call.kv_length
    params.scale, params.softcap = call.scale, call.softcap or 0.0
    params.inner = call.scale / call.softcap if call.softcap else call.scale * _LOG2E
    params.outer = call.softcap * _LOG2E if call.softcap else 0.0
    params.lower, params.upper = -_FAR, _FAR
    kept = [q, k, v]
    if call.sinks is not None:
        kept.append(call.sinks.detach().to(torch.float32).contiguous())
        params.sinks = kept[-1].data_ptr()
    if call.mask is not None:
        first = call.mask.first_query() - call.mask.kv_offset
        if call.mask.left is not None:
            params.lower = _within(first - call.mask.left)
        if call.mask.right is not None:
            params.upper = _within(first + call.mask.right)
        for name in ("kv_start", "kv_end"):
            columns = getattr(call.mask, name)
            if columns is not None:
                kept.append(columns.to(call.q.device).expand(call.batch).contiguous())
                setattr(params, name, kept[-1].data_ptr())
    return params, kept


def _within(column: int) -> int:
    return max(-_FAR, min(_FAR, column))

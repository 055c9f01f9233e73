"""What is launched for a call: kernels with their grids, arguments and options, as data.

Nothing here needs a card. The tests compile every launch for cards that are not there, with the very arguments it would get, and run it in
Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call
from torchwrap.attention.triton import conditions
from torchwrap.attention.triton.blocks import Blocks, Card, Fixed, Pass, choose, padded_width, precision, widen

__all__ = ["Launch", "backward", "forward", "packed_heads", "splits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel to run.

    Attributes:
        kernel: a function under `triton.jit`.
        grid: programs along each axis.
        arguments: of the kernel, by name.
        warps: warps of a program.
        stages: tiles in flight.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        """Runs the kernel on the current device."""
        # Products and sums are one instruction by request: the default of triton changes with 3.10.
        self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)


def packed_heads(call: Call) -> int:
    """Heads whose queries share a tile: the whole group where one head would leave most of the tile empty."""
    return call.group if call.q_length < 64 else 1


def splits(call: Call, card: Card, programs: int, longest: int | None = None) -> int:
    """Parts that keys are cut into: two programs for each multiprocessor, but no part below 256 keys, of the `longest` row if known."""
    reach = call.kv_length if longest is None else longest
    if call.mask is not None and call.mask.left is not None and call.mask.right is not None:
        reach = min(reach, call.mask.left + call.mask.right + call.q_length)
    if programs >= card.processors:
        return 1
    return max(1, min(math.ceil(2 * card.processors / programs), math.ceil(reach / 256), 128))


def forward(
    call: Call, card: Card, wanted: Blocks | Fixed | None = None, parts: int | None = None, table: Tensor | None = None,
    longest: int | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:  # fmt: skip
    """The launches of a forward, and where they write.

    Args:
        call: the call; the last stride of q, k and v is 1.
        card: where it runs.
        wanted: tiles to start from, or what of them is fixed.
        parts: parts that keys are cut into; None: by `splits`.
        table: int32 [keys], rows of k and v in which the keys lie that the mask speaks of; None: they are k and v.
        longest: keys that a query sees at most, if known.

    Returns:
        the launches in order, out `[B, Hq, Sq, Dv]` (in memory `[B, Sq, Hq, Dv]`, as models want it next) and lse `[B, Hq, Sq]`.
    """
    from torchwrap.attention.triton._forward import combine_kernel, forward_kernel  # triton is an optional package

    pack = packed_heads(call)
    rows = call.q_length * pack
    blocks = _blocks("forward", call, card, wanted, rows)
    out = call.q.new_empty(call.batch, call.q_length, call.heads, call.value_width).transpose(1, 2)
    lse = call.q.new_empty(call.batch, call.heads, call.q_length, dtype=torch.float32)
    programs = math.ceil(rows / blocks.queries) * call.batch * (call.heads // pack)
    count = splits(call, card, programs, longest) if parts is None else parts
    partial, partial_lse = out, lse
    if count > 1:
        partial = call.q.new_empty(count, call.batch, call.heads, call.q_length, call.value_width, dtype=torch.float32)
        partial_lse = lse.new_empty(count, *lse.shape)
    stride_ob, stride_oh, stride_oi, _ = partial.stride()[-4:]
    arguments = {
        **_common(call, card, blocks), **conditions.arguments(call, blocks.queries, blocks.keys, pack),
        "table": table, "out": partial, "lse": partial_lse, "sinks": call.sinks, "stride_os": partial.stride(0) if count > 1 else 0,
        "stride_ls": lse.numel(), "stride_ob": stride_ob, "stride_oh": stride_oh, "stride_oi": stride_oi,
        "PACK": pack, "PARTIAL": count > 1,
    }  # fmt: skip
    if table is not None:
        arguments["kv_length"] = table.shape[0]
    launches = [Launch(kernel=forward_kernel, grid=(programs, count), arguments=arguments, warps=blocks.warps, stages=blocks.stages)]
    if count > 1:
        merge = {
            "partial": partial, "partial_lse": partial_lse, "out": out, "lse": lse, "sinks": call.sinks, "stride_ps": partial.stride(0),
            "stride_ls": lse.numel(), "stride_ob": out.stride(0), "stride_oh": out.stride(1), "stride_oi": out.stride(2),
            "q_length": call.q_length, "splits": count, "HEADS": call.heads, "DV": call.value_width,
            "BLOCK_DV": padded_width(call.value_width), "BLOCK_S": 1 << (count - 1).bit_length(),
        }  # fmt: skip
        launches.append(Launch(kernel=combine_kernel, grid=(lse.numel(),), arguments=merge, warps=1))
    return launches, out, lse


def backward(
    call: Call, card: Card, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, wanted: Blocks | Fixed | None = None
) -> tuple[list[Launch], Tensor, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The launches of a backward, and where they write.

    Args:
        call: the call; the last stride of q, k and v is 1, as that of out and grad_out.
        card: where it runs.
        out: what the forward gave, of the whole attention where this call is one part of it.
        lse: likewise.
        grad_out: gradient of out.
        grad_lse: gradient of lse, or None.
        wanted: tiles to start from, or what of them is fixed.

    Returns:
        the launches in order, delta `[B, Hq, Sq]` float32, and the gradients of q, k, v and the bias (float32, keys not shared).
    """
    from torchwrap.attention.triton._backward import bias_kernel, keys_kernel, prepare_kernel, queries_kernel  # triton is optional

    delta = torch.empty_like(lse)
    steps = [Launch(kernel=prepare_kernel, grid=(math.ceil(call.q_length / 64) * call.batch * call.heads,), arguments={
        "out": out, "grad_out": grad_out, "grad_lse": grad_lse, "delta": delta, **_strides("o", out), **_strides("g", grad_out),
        **dict(zip(("stride_lb", "stride_lh", "stride_li"), (0, 0, 0) if grad_lse is None else grad_lse.stride(), strict=True)),
        "q_length": call.q_length, "HEADS": call.heads, "DV": call.value_width, "BLOCK_DV": padded_width(call.value_width), "BLOCK_M": 64,
    })]  # fmt: skip
    grad_q, grad_k, grad_v = torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v)
    given = {"grad_out": grad_out, "lse": lse, "delta": delta, **_strides("g", grad_out)}

    def step(kernel: Any, programs: int, blocks: Blocks, **results: Any) -> None:
        arguments = {**_common(call, card, blocks), **conditions.arguments(call, blocks.queries, blocks.keys), **given, **results}
        steps.append(Launch(kernel=kernel, grid=(programs,), arguments=arguments, warps=blocks.warps, stages=blocks.stages))

    blocks = _blocks("keys", call, card, wanted, call.q_length)
    programs = math.ceil(call.kv_length / blocks.keys) * call.batch * call.kv_heads
    step(keys_kernel, programs, blocks, grad_k=grad_k, grad_v=grad_v, **_strides("dk", grad_k), **_strides("dv", grad_v))
    blocks = _blocks("queries", call, card, wanted, call.q_length)
    programs = math.ceil(call.q_length / blocks.queries) * call.batch * call.heads
    step(queries_kernel, programs, blocks, grad_q=grad_q, **_strides("dq", grad_q))
    grad_bias = None
    if call.bias is not None and call.bias.requires_grad:
        owners, heads, length, _ = call.bias.shape
        blocks = _blocks("bias", call, card, wanted, call.q_length)
        grad_bias = call.q.new_empty(owners, heads, length, call.kv_length, dtype=torch.float32)
        tiles = math.ceil(call.kv_length / blocks.keys) * (math.ceil(length / blocks.queries))
        step(
            bias_kernel, tiles * owners * heads, blocks, grad_bias=grad_bias, batch=call.batch, owners=owners,
            shared_heads=call.heads // heads, ONE_ROW=length == 1,
        )  # fmt: skip
    return steps, delta, (grad_q, grad_k, grad_v, grad_bias)


def _blocks(kind: Pass, call: Call, card: Card, wanted: Blocks | Fixed | None, rows: int) -> Blocks:
    blocks = choose(kind, card, call.q.dtype, call.width, call.value_width, rows, wanted)
    if blocks is None:
        raise RuntimeError(f"no tile of the {kind} pass fits {card.shared_bytes} bytes of shared memory; `refuses` was not asked")
    return blocks


def _common(call: Call, card: Card, blocks: Blocks) -> dict[str, Any]:
    """The arguments of every pass over tiles, without the mask's."""
    bias = None if call.bias is None else call.bias.expand(call.batch, call.heads, call.q_length, call.kv_length)
    drop = call.seed is not None
    seed = 0 if call.seed is None else int(call.seed)
    return {
        "q": call.q, "k": call.k, "v": call.v, **_strides("q", call.q), **_strides("k", call.k), **_strides("v", call.v), "bias": call.bias,
        **dict(zip(("bias_b", "bias_h", "bias_i", "bias_j"), (0, 0, 0, 0) if bias is None else bias.stride(), strict=True)),
        "scale": call.scale, "softcap": call.softcap, "keep": 1 / (1 - call.dropout) if drop else None, "seed_low": _signed(seed),
        "seed_high": _signed(seed >> 32), "threshold": _signed(int(call.dropout * 2**32)), "HEADS": call.heads, "GROUP": call.group,
        "D": call.width, "DV": call.value_width, "BLOCK_D": padded_width(call.width), "BLOCK_DV": padded_width(call.value_width),
        "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "PRECISION": precision(call.q.dtype, card), "WIDEN": widen(call.q.dtype, card),
    }  # fmt: skip


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    letter = "j" if name in ("k", "v", "dk", "dv") else "i"
    return {f"stride_{name}{axis}": stride for axis, stride in zip(("b", "h", letter), tensor.stride()[:3], strict=True)}


def _signed(number: int) -> int:
    """The lowest 32 bits as a signed number: larger ones would be 64-bit arguments."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >= 1 << 31 else number

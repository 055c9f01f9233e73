"""Tensor-parallel attention whose all-reduce runs while it computes: rows in blocks, each reduced as soon as it is projected.

Each process holds some heads and the columns of the output projection that belong to them; the projections of all processes add up to
the result. Done as usual, the network waits until attention is complete and then everybody waits for the network. Here the rows are cut
into blocks. A block goes through attention with all local heads and through the projection, its sum starts, and the next block is computed
meanwhile; sums are waited for in order. Time is about the larger of computing and communicating and one block (blocks.py), not their sum.

Backward, nothing is to be added in front of the projection: the gradient of a sum goes to every summand. The sum comes where the input was
copied to all processes, before the q, k and v projections; `TiledColumnParallel` overlaps that one in the same way.
Source: H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024, tiling-AllReduce (forward); the two
conjugate operations are those of Shoeybi et al., "Megatron-LM", 2019, section 3; the tiled backward is ours.

Letters: B batch, S tokens, E model width, Hq and Hkv local heads, D and Dv widths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from torchwrap.attention.attend import attend
from torchwrap.attention.distributed.blocks import best_count, equal_work, measure_link
from torchwrap.attention.distributed.works import Group, Outstanding, Work, group_size, start_sum
from torchwrap.attention.masks.mask import TileMask

__all__ = ["TiledColumnParallel", "TiledRowParallel"]

StartSum = Callable[[Tensor, Group], Work]


class TiledRowParallel(nn.Module):
    """Attention, output projection and sum over the group, in blocks of rows.

    Args:
        weight: this process' columns of the output projection, `[E, Hq * Dv]`; used as it is, so that it stays the model's parameter.
        bias: `[E]`, the same on every process, added once; or None.
        group: of processes; None: the default one.
        blocks: number of blocks; 1 is the usual order. "auto": measured at the first call of each shape (every process must make it).
        timeout_s: longest wait for one block's sum in seconds; None: what the process group allows.
        start: begins a sum over the group in place and returns its work; None: `torch.distributed.all_reduce`.

    Exactness: of `[B, S, E]` sums over processes, which add in the order of the back end; rows are independent of the blocks but for the
        rounding of products of other heights.
    Cost: `2 * B * S * E` numbers, as blocks and as the whole.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, group: Group = None, blocks: int | Literal["auto"] = 8,
        timeout_s: float | None = None, start: StartSum | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight: Tensor = weight
        self.bias: Tensor | None = bias
        self.group: Group = group
        self.blocks: int | Literal["auto"] = blocks
        self.timeout_s: float | None = timeout_s
        self._start: StartSum = start or start_sum
        self._chosen: dict[tuple[int, ...], int] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | None = None, **options: Any) -> Tensor:
        """The layer's output, complete on every process.

        Args:
            q: `[B, Hq, S, D]`, the local heads.
            k: `[B, Hkv, Sk, D]`.
            v: `[B, Hkv, Sk, Dv]`.
            mask: `[B | 1, 1, S, Sk]`, or None.
            options: `scale`, `softcap`, `sinks`, `backend` of `attend`.

        Returns:
            `[B, S, E]`.

        Raises:
            WorkError: a sum failed or did not end in time; the message names its block. Everything started was waited for.
        """
        group_size(self.group)
        count = self._count(q, k, v, mask, options) if self.blocks == "auto" else self.blocks
        parts = []
        with Outstanding("the all-reduce", timeout_s=self.timeout_s) as works:
            runs = equal_work(q.shape[2], k.shape[2], count, mask=mask, row_cost=self.weight.shape[0] / 2)
            for block, (first, end) in enumerate(runs):
                part = self._block(q, k, v, mask, options, first, end)
                parts.append(_Sum.apply(part, works, block, self._start, self.group))  # type: ignore[no-untyped-call]
        out = torch.cat(parts, 1) if parts else q.new_zeros(q.shape[0], 0, self.weight.shape[0])
        return out if self.bias is None else out + self.bias

    def _block(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, options: dict[str, Any], first: int, end: int
    ) -> Tensor:
        """This process' summand for the rows `[first, end)`: `[B, end - first, E]`."""
        seen = None if mask is None else mask.sub(rows=(first, end))
        out = attend(q[:, :, first:end], k, v, mask=seen, **options)
        return linear(out.transpose(1, 2).flatten(2), self.weight)

    def _count(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, options: dict[str, Any]) -> int:
        """The best number of blocks for calls of this shape: the same on every process, or sums would not match."""
        key = (*q.shape, *k.shape)
        if key not in self._chosen:
            with torch.no_grad():
                begin = time.perf_counter()
                part = self._block(q, k, v, mask, options, 0, q.shape[2])
                float(part.flatten()[:1].sum())  # waits for a device
                taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=q.device)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self.group)
            link = measure_link(self.group, q.device)
            self._chosen[key] = best_count(float(taken), part.nbytes, link)
        return self._chosen[key]


class TiledColumnParallel(nn.Module):
    """A linear layer whose outputs are divided among processes and whose input is the same on all; its backward sums in blocks.

    Args:
        weight: this process' rows, `[O, E]`.
        bias: this process' part, `[O]`, or None.
        group, blocks, timeout_s, start: as for `TiledRowParallel`.

    Exactness: as the plain layer with an all-reduce of the input's gradient.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, group: Group = None, blocks: int = 8, timeout_s: float | None = None,
        start: StartSum | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight: Tensor = weight
        self.bias: Tensor | None = bias
        self.group: Group = group
        self.blocks: int = blocks
        self.timeout_s: float | None = timeout_s
        self._start: StartSum = start or start_sum

    def forward(self, x: Tensor) -> Tensor:
        """This process' outputs. Shapes: x `[B, S, E]`, result `[B, S, O]`."""
        group_size(self.group)
        found: Tensor = _ColumnLinear.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return found


class _Sum(torch.autograd.Function):
    """Starts a sum in place; its gradient goes to every summand as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, works: Outstanding, block: int, start: StartSum, group: Group) -> Tensor:
        ctx.mark_dirty(part)
        works.start(block, lambda: start(part, group))
        return part

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None


class _ColumnLinear(torch.autograd.Function):
    """`x @ weight.T + bias`; backward, the sums of the input's gradient run beside its later blocks and the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: TiledColumnParallel) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.has_bias = layer, bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), layer, grad = ctx.saved_tensors, ctx.layer, grads[0]
        parts, grad_weight, grad_bias = [], None, None
        with Outstanding("the backward all-reduce", timeout_s=layer.timeout_s) as works:
            if ctx.needs_input_grad[0]:
                for block, (first, end) in enumerate(equal_work(grad.shape[1], 1, layer.blocks)):
                    parts.append(grad[:, first:end] @ weight)
                    works.start(block, lambda: layer._start(parts[-1], layer.group))
            if ctx.needs_input_grad[1]:
                grad_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = grad.sum((0, 1))
        return torch.cat(parts, 1) if parts else None, grad_weight, grad_bias, None

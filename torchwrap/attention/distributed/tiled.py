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
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from torchwrap.attention.attend import attend
from torchwrap.attention.distributed.agreement import compare
from torchwrap.attention.distributed.blocks import Link, best_count, equal_work, measure_link
from torchwrap.attention.distributed.works import Group, Outstanding, StartSum, resolved, start_sum
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors

__all__ = ["Rows", "TiledColumnParallel", "TiledRowParallel", "Tiling"]


_TRIED = 8  # blocks, to see what one more costs


class Tiling:
    """How rows are cut and their sums run, for all layers of a model: counts and the link are measured once for all of them.

    Args:
        group: of processes, or its name; None: the default one.
        blocks: number of blocks; 1 is the usual order. "auto": measured at the first call of each class of sizes (powers of two of queries
            and keys), which every process must make.
        timeout_s: longest wait for one block's sum in seconds; None: what the process group allows.
        start: begins a sum over the group in place and returns its work; None: `torch.distributed.all_reduce`.

    Cost: measuring computes the call six times more, once for each class of sizes. Before the first call all processes compare a few
        integers: where they cut differently, sums of other sizes meet, over which gloo ends a process.

    Attributes:
        chosen: measured numbers of blocks, by (batch, bits of queries, bits of keys, model width).
    """

    def __init__(
        self, group: Group = None, blocks: int | Literal["auto"] = "auto", timeout_s: float | None = None, start: StartSum | None = None
    ) -> None:
        self.group: Group = group
        self.blocks: int | Literal["auto"] = blocks
        self.timeout_s: float | None = timeout_s
        self.start: StartSum = start or start_sum
        self.chosen: dict[tuple[int, ...], int] = {}
        self._link: Link | None = None
        self._compared = False

    def count(self, rows: Rows, weight: Tensor) -> int:
        """Number of blocks for this call: the same on every process, or sums would not match.

        Raises:
            ConfigError: at the first call, in every process: one came with other sizes, another dtype, band of the mask or `blocks`.
            WorkError: measuring failed, in one of the processes.
        """
        if not self._compared:
            compare("the all-reduce", self._facts(rows, weight), self.group, rows.q.device, timeout_s=self.timeout_s)
            self._compared = True
        batch, _, queries, _ = rows.q.shape
        if self.blocks != "auto" or queries <= 1:
            return 1 if self.blocks == "auto" else min(self.blocks, max(queries, 1))
        # Not the numbers of heads: processes may have different ones, and all must measure together.
        key = (batch, queries.bit_length(), rows.k.shape[2].bit_length(), weight.shape[0])
        if key not in self.chosen:
            self.chosen[key] = self._measured(rows, weight)
        return min(self.chosen[key], queries)

    def _facts(self, rows: Rows, weight: Tensor) -> dict[str, object]:
        """On what the sizes of the sums depend."""
        mask = rows.mask if isinstance(rows.mask, TileMask) else None
        sizes = (rows.q.shape[0], rows.q.shape[2], rows.k.shape[2], weight.shape[0], rows.q.dtype)
        band = None if mask is None else (mask.right, mask.left, mask.first_query() - mask.kv_offset)
        return {"size or dtype": sizes, "band of the mask": band, "number of blocks": self.blocks}

    def _measured(self, rows: Rows, weight: Tensor) -> int:
        group, rows = resolved(self.group), rows.without_dropout()
        with torch.no_grad():
            whole, cut = (min(_seconds(rows, count, weight) for _ in range(3)) for count in (1, _TRIED))
        taken = torch.tensor([whole, max(cut - whole, 0.0) / (_TRIED - 1)], dtype=torch.float64, device=rows.q.device)
        with Outstanding("measuring the all-reduce", group=group, timeout_s=self.timeout_s) as works:
            works.start(0, lambda: dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group, async_op=True))
            works.wait()
            try:
                self._link = self._link or measure_link(group, taken.device, start=self.start)
            except RuntimeError as error:
                raise errors.WorkError(f"measuring the all-reduce failed: {error}", where="measure_link") from error
        nbytes = rows.q.shape[0] * rows.q.shape[2] * weight.shape[0] * rows.q.element_size()
        return best_count(float(taken[0]), nbytes, self._link, float(taken[1]))

    def summed(self, rows: Rows, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        """Attention, projection and sum: `[B, S, E]`, complete on every process.

        Raises:
            WorkError: a sum failed or did not end in time; the message names its block. Everything started was waited for.
        """
        group = resolved(self.group)
        parts = []
        with Outstanding("the all-reduce", group=group, timeout_s=self.timeout_s) as works:
            for block, (first, end) in enumerate(rows.cut(count, weight.shape[0])):
                part = rows.part(first, end, weight)
                parts.append(_Sum.apply(part, works, block, self.start, group))  # type: ignore[no-untyped-call]
        out = torch.cat(parts, 1) if parts else rows.q.new_zeros(rows.q.shape[0], 0, weight.shape[0])
        return out if bias is None else out + bias


@dataclass(frozen=True)
class Rows:
    """One call of attention over local heads, of which any rows can be computed by themselves.

    Attributes:
        q: `[B, Hq, S, D]`.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, Dv]`.
        mask: `[B | 1, 1, S, Sk]`, a tensor that broadcasts to it, or None.
        options: others of `attend`; of these `bias` is cut as well.
        attend: who computes attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: TileMask | Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    attend: Callable[..., Tensor] = attend

    def cut(self, count: int, width: int) -> list[tuple[int, int]]:
        """At most `count` runs of rows of about equal work, for a projection to `width` numbers."""
        mask = self.mask if isinstance(self.mask, TileMask) else None
        return equal_work(self.q.shape[2], self.k.shape[2], count, mask=mask, row_cost=width / 2)

    def heads(self, first: int, end: int) -> Tensor:
        """Attention of the rows `[first, end)`: `[B, Hq, end - first, Dv]`."""
        if (first, end) == (0, self.q.shape[2]):
            return self.attend(self.q, self.k, self.v, mask=self.mask, **self.options)
        options = dict(self.options)
        if options.get("bias") is not None:
            options["bias"] = _cut(options["bias"], first, end)
        return self.attend(self.q[:, :, first:end], self.k, self.v, mask=_cut(self.mask, first, end), **options)

    def part(self, first: int, end: int, weight: Tensor) -> Tensor:
        """This process' summand for these rows: `[B, end - first, E]`."""
        return linear(self.heads(first, end).transpose(1, 2).flatten(2), weight)

    def without_dropout(self) -> Rows:
        """The same call for measuring, which must not draw random numbers."""
        return replace(self, options=self.options | {"dropout": 0.0}) if self.options.get("dropout") else self


def _seconds(rows: Rows, count: int, weight: Tensor) -> float:
    """To compute everything in so many blocks, without sums. The first call may load or tune something."""
    begin = time.perf_counter()
    for first, end in rows.cut(count, weight.shape[0]):
        part = rows.part(first, end, weight)
    float(part.flatten()[:1].sum())  # waits for a device
    return time.perf_counter() - begin


def _cut(x: TileMask | Tensor | None, first: int, end: int) -> TileMask | Tensor | None:
    if isinstance(x, TileMask):
        return x.sub(rows=(first, end))
    return x if x is None or x.dim() < 2 or x.shape[-2] == 1 else x[..., first:end, :]


class TiledRowParallel(nn.Module):
    """Attention, output projection and sum over the group, in blocks of rows.

    Args:
        weight: this process' columns of the output projection, `[E, Hq * Dv]`; used as it is, so that it stays the model's parameter.
        bias: `[E]`, the same on every process, added once; or None.
        group, blocks, timeout_s, start: as for `Tiling`.

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
        self.tiling: Tiling = Tiling(group, blocks, timeout_s, start)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | None = None, **options: Any) -> Tensor:
        """The layer's output, complete on every process.

        Args:
            q: `[B, Hq, S, D]`, the local heads.
            k: `[B, Hkv, Sk, D]`.
            v: `[B, Hkv, Sk, Dv]`.
            mask: `[B | 1, 1, S, Sk]`, or None.
            options: `scale`, `softcap`, `sinks`, `bias`, `dropout`, `backend` of `attend`.

        Returns:
            `[B, S, E]`.

        Raises:
            ConfigError: at the first call, in every process: one came with other sizes, another dtype, band of the mask or `blocks`.
            WorkError: a sum failed or did not end in time; the message names its block. Everything started was waited for.
        """
        rows = Rows(q, k, v, mask, options)
        return self.tiling.summed(rows, self.weight, self.bias, self.tiling.count(rows, self.weight))


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
        resolved(self.group)
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
        group = resolved(layer.group)
        with Outstanding("the backward all-reduce", group=group, timeout_s=layer.timeout_s) as works:
            if ctx.needs_input_grad[0]:
                for block, (first, end) in enumerate(equal_work(grad.shape[1], 1, layer.blocks)):
                    parts.append(grad[:, first:end] @ weight)
                    works.start(block, lambda: layer._start(parts[-1], group))
            if ctx.needs_input_grad[1]:
                grad_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = grad.sum((0, 1))
        return torch.cat(parts, 1) if parts else None, grad_weight, grad_bias, None

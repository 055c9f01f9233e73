"""Sequence-parallel attention by exchanging heads for tokens: each process attends some heads over the whole sequence.

Two all-to-alls: before, each process has all heads of its part of the sequence and gives away all but some; after, the reverse. Attention
itself is untouched, with any mask. It needs at least as many key heads as processes; beyond, ring attention (ring.py).
Source: Jacobs et al., "DeepSpeed Ulysses", 2023, section 3.

Letters: B batch, H heads, T processes, S tokens of the whole sequence, D a width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchwrap.attention.attend import attend
from torchwrap.attention.autocast import autocast
from torchwrap.attention.contract import checked
from torchwrap.attention.distributed.agreement import same_everywhere
from torchwrap.attention.distributed.works import Group, Outstanding, group_size, resolved
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors

__all__ = ["ulysses_attend"]


def ulysses_attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | None = None, sinks: Tensor | None = None, group: Group = None,
    timeout_s: float | None = None, agreed: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """Attention over a sequence of which each process has the part of its number, in order.

    Args:
        q: `[B, Hq, S / T, D]`.
        k: `[B, Hkv, S / T, D]`, Hkv a multiple of T.
        v: `[B, Hkv, S / T, Dv]`.
        mask: of the whole sequence, `[B | 1, 1, S, S]`, the same on every process; None: everything is visible.
        sinks: `[Hq]`, the same on every process.
        group: of processes; None: the default one.
        timeout_s: longest wait for one exchange in seconds; None: what the process group allows.
        options: `scale`, `softcap`, `backend` of `attend`.

    Returns:
        `[B, Hq, S / T, Dv]`. Gradients flow back through the reverse exchanges.

    Raises:
        ConfigError: the heads cannot be divided among the processes, or a process came with other sizes or another dtype, mask, scale or
            cap.
        WorkError: an exchange failed or did not end in time.

    Exactness: as `attend`; nothing is added up between processes. Gradients of sinks are this process' share.
    """
    rank, size = group_size(group)
    if k.shape[1] % size or q.shape[1] % size:
        raise errors.ConfigError(
            f"{q.shape[1]} query and {k.shape[1]} key heads cannot be divided among {size} processes",
            where="ulysses_attend",
            fix="Use ring attention, or a group of as many processes as divide the key heads.",
        )
    q, k, v = autocast(q, k, v)
    call = checked(q, k, v, **{name: options[name] for name in ("scale", "softcap", "dropout") if name in options})
    if not agreed:
        also = {"mask": mask, "scale": call.scale, "softcap": call.softcap, "dropout": call.dropout, "choice of sinks": sinks is not None}
        same_everywhere("ulysses_attend", q, k, v, group, also=also, timeout_s=timeout_s)
    gathered = [_exchange(one, True, group, timeout_s, block) for block, one in enumerate((q, k, v))]
    mine = None if sinks is None else sinks.chunk(size)[rank]
    out = attend(*gathered, mask=mask, sinks=mine, **options)
    return _exchange(out, False, group, timeout_s, 3)


def _exchange(x: Tensor, *settings: Any) -> Tensor:
    found: Tensor = _Exchange.apply(x, *settings)  # type: ignore[no-untyped-call]
    return found


class _Exchange(torch.autograd.Function):
    """All heads of some tokens for some heads of all tokens (`gather`), or the reverse. Each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: bool, group: Group, timeout_s: float | None, block: int) -> Tensor:
        ctx.settings = (gather, group, timeout_s, block)
        return _exchanged(x, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gather, *others = ctx.settings
        return _exchanged(grads[0], not gather, *others), None, None, None, None


def _exchanged(x: Tensor, gather: bool, group: Group, timeout_s: float | None, block: int) -> Tensor:
    _, size = group_size(group)
    from_dim, to_dim = (1, 2) if gather else (2, 1)
    out = torch.stack(x.chunk(size, from_dim))
    into = torch.empty_like(out)
    found = resolved(group)
    with Outstanding("the exchange of heads", group=found, timeout_s=timeout_s) as works:
        works.start(block, lambda: dist.all_to_all_single(into, out, group=found, async_op=True))
    return torch.cat(into.unbind(), to_dim)

"""Single queries of many sequences over keys and values that lie in pages of one memory, read where they lie.

A server of many requests keeps keys and values in pages that are shared and reused, so a sequence is a list of runs of rows, in any
order. Other kernels want the rows of a sequence side by side: gathering reads and writes everything that attention then reads once. The
native kernel takes the runs (`torchwrap.native.decode.decode_runs`), Triton's forward the row of each key; where neither can, the caller
gathers the rows.
Letters: N sequences, Hq and Hkv query and key heads, D and Dv widths, S rows of the memory, P runs.

Source: Woosuk Kwon and others, "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchwrap import native
from torchwrap.attention.contract import Call
from torchwrap.attention.dispatch import backend
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.merge import with_sinks
from torchwrap.native.decode import MAX_ROWS, MAX_WIDTH, run

__all__ = ["LONGEST", "Pages", "attend_pages", "reader", "refuses"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 1024
"""Rows of one run: the work of a long page is shared out to threads (chosen)."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the keys of some sequences lie.

    Attributes:
        rows: rows of the memory, one sequence after the other, int32 [keys].
        mask: which of them are of which sequence, of shape (N, 1, 1, keys).
        longest: keys of the longest sequence.
        runs: on the CPU, first row of the memory and the one behind the last, int32 [P, 2].
        run_of: on the CPU, sequence n has the runs from `run_of[n]` to `run_of[n + 1] - 1`, int32 [N + 1].
    """

    rows: Tensor
    mask: TileMask
    longest: int
    runs: Tensor
    run_of: Tensor

    @classmethod
    def of(cls, rows: Tensor, first: Tensor, end: Tensor) -> Pages:
        """From the row of every key.

        Args:
            rows: integers [keys], the rows of the keys of all sequences.
            first: integers [N], growing: the keys of sequence n are `rows[first[n]:end[n]]`.
            end: integers [N]; no key belongs to two sequences, a row may.

        Cost: one read from the device.

        Example:
            >>> from torchwrap.attention.pages import Pages
            >>> Pages.of(torch.tensor([8, 9, 4, 5, 8, 9]), torch.tensor([0, 4]), torch.tensor([4, 6])).runs.tolist()
            [[8, 10], [4, 6], [8, 10]]
        """
        mask = TileMask(len(first), 1, len(rows), kv_start=first.int(), kv_end=end.int())
        longest = int((end - first).max()) if len(first) else 0
        none = rows.new_zeros(0, dtype=torch.int32)
        runs, run_of = _runs(rows, first.to(torch.int64), end.to(torch.int64)) if rows.device.type == "cpu" else (none, none)
        return cls(rows.int(), mask, longest, runs, run_of)


def _runs(rows: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """`runs` and `run_of` of `Pages`."""
    apart = torch.nonzero(rows.diff() != 1)[:, 0] + 1
    length = torch.arange(0, len(rows), LONGEST, device=rows.device)
    begin = torch.unique(torch.cat([first, end, apart, length]))  # sorted
    begin = begin[begin < len(rows)]
    size = torch.cat([begin, begin.new_tensor([len(rows)])]).diff()
    owner = torch.searchsorted(first, begin, right=True) - 1
    held = owner >= 0
    held &= begin < end[owner.clamp(min=0)]
    begin, size, owner = begin[held], size[held], owner[held]
    counts = torch.bincount(owner, minlength=len(first)).cumsum(0)
    at = rows[begin]
    return torch.stack([at, at + size], 1).int(), torch.cat([counts.new_zeros(1), counts]).int()


def reader(q: Tensor) -> str:
    """Which back end reads pages on the device of q."""
    return "cpu" if q.device.type == "cpu" else "triton"


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why keys in pages cannot be read where they lie, or None.

    Args:
        q: as in `attend_pages`, and so on.
        k: keys.
        v: values.
    """
    if not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in (*q.shape, *v.shape) or not k.stride(2) == v.stride(2) == 1:
        return f"q {list(q.shape)}, values {list(v.shape)}, strides {k.stride()} and {v.stride()}"
    if reader(q) == "triton":
        return backend("triton").refuses(_call(q, k, v, None, None, None, None))
    if not native.available():
        return native.reason()
    if q.dtype not in _DTYPES or q.shape[1] // k.shape[1] > MAX_ROWS or max(q.shape[3], v.shape[2]) > MAX_WIDTH:
        return f"{q.dtype}, q {list(q.shape)} and values {list(v.shape)}"
    return None


def attend_pages(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, *, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention of one query of each sequence over all of its keys. No gradients.

    Args:
        q: queries.
        k: the memory of keys; `refuses` has said None of it.
        v: that of values.
        pages: rows of each sequence; those that lie outside the memory are read as addresses.
        scale: factor of the scores; None: `1 / sqrt(D)`.
        softcap: as in `attend`.
        sinks: as in `attend`.

    Returns:
        out, in the dtype of q.

    Raises:
        KernelError: a card cannot run the kernel.

    Shapes: q (N, Hq, 1, D), k (S, Hkv, D), v (S, Hkv, Dv), sinks (Hq); out (N, Hq, 1, Dv).

    Exactness: as the back end that reads them.

    Cost: reads the keys and values of each sequence once.
    """
    call = _call(q, k, v, pages.mask, scale, softcap, sinks)
    if reader(q) == "triton":
        from torchwrap.attention.triton.backend import forward_pages  # only where there is a card

        return forward_pages(call, pages.rows, pages.longest)[0]
    rows = q.reshape(call.batch, call.kv_heads, call.group, call.width)
    out, lse = run(rows, call.k, call.v, None, None, None, call.scale, softcap or 0.0, runs=(pages.runs, pages.run_of))
    shape = call.batch, call.heads, 1
    out, _ = with_sinks(out.reshape(*shape, call.value_width), lse.reshape(shape), sinks)
    return out.to(q.dtype)


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> Call:
    """Every sequence over the whole memory; its mask is of the columns of the table, not of the memory."""
    k, v = (tensor.transpose(0, 1).expand(q.shape[0], -1, -1, -1) for tensor in (k, v))
    return Call(q=q, k=k, v=v, mask=mask, scale=q.shape[3] ** -0.5 if scale is None else scale, softcap=softcap, sinks=sinks)

"""Attention of a few rows of queries against a long cache of keys and values: the step of token generation.

The rows that share a key/value head (its group of query heads, times the query tokens) go through the cache together, so it is read
from memory once. The keys are cut into pieces that depend on the sizes alone; partial results are merged by their log-sum-exp.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from torchwrap.core.errors import BudgetError, ConfigError, UnsupportedModelError
from torchwrap.native.library import library, number_of
from torchwrap.native.prefill import in_memory
from torchwrap.native.reference import decode_reference

__all__ = ["MAX_ROWS", "MAX_WIDTH", "Prepared", "decode", "decode_runs", "run"]

MAX_ROWS, MAX_WIDTH = 64, 512
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BIAS_DTYPES = {**_DTYPES, torch.bool: 3}


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None = None,
    end: Tensor | None = None,
    limits: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of R rows per key/value head over S keys, with the log-sum-exp that merging needs.

    A row sees column j when `first[b] <= j < end[b]` and `limits[b, r, 0] <= j < limits[b, r, 1]`; what is outside [0, S) is cut off. Keys
    and values before the first and behind the last column that a batch entry's rows see are never read.

    Args:
        q: rows of queries.
        k: keys.
        v: values.
        first: first column of each batch entry that holds a key; None: 0.
        end: the column behind its last key; None: S.
        limits: first visible column and the one behind the last, per row; None: all.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`; None: they stay.

    Returns:
        `(out, lse)`, both float32: rows without a visible key have out 0 and lse -inf; lse is the natural logarithm.

    Raises:
        ConfigError: shapes, types, devices or strides are not as below.
        UnsupportedModelError: the native library is not available.

    Shapes: q (B, Hkv, R, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), all float32, bfloat16 or float16 on the CPU, any strides but the last
        dimension contiguous; R <= 64, D and Dv <= 512. first, end (B,) int32; limits (B, R, 2) int32. out (B, Hkv, R, Dv),
        lse (B, Hkv, R).

    Exactness: products and sums in float32, weights never rounded to a half type. Independent of the number of threads and of strides,
        not of the instruction set: sums are in another order.

    Cost: reads what is seen of K and V once; `R * (Dv + 2) * 4` bytes for each piece of at least 256 keys. Threads: as
        torch.get_num_threads(), one below 128 KiB.

    Source: Tri Dao and others, "Flash-Decoding for long-context inference", 2023.
    """
    _check(q, k, v, first, end, limits, softcap)
    out: Tensor
    lse: Tensor
    out, lse = _decode_op(q, k, v, first, end, limits, scale, softcap or 0.0)
    return out, lse


def decode_runs(
    q: Tensor, k: Tensor, v: Tensor, runs: Tensor, run_of: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `decode`, with keys and values of many sequences in pages of one memory, read where they lie. No gradients.

    Args:
        q: rows of queries of each sequence.
        k: the memory of keys.
        v: that of values.
        runs: first row of the memory and the one behind the last, of each run of neighbouring keys; runs are cut no further.
        run_of: sequence b has the runs `run_of[b]` to `run_of[b + 1] - 1`, in any order.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`; None: they stay.

    Returns:
        `(out, lse)`, as `decode`.

    Raises:
        ConfigError: shapes, types, devices or strides are not as below, or a run lies outside the memory.
        UnsupportedModelError: the native library is not available.

    Shapes: q (B, Hkv, R, D), k (Hkv, S, D), v (Hkv, S, Dv), of types and strides as for `decode`; runs (P, 2), run_of (B + 1), int32.

    Cost: reads the runs of K and V once; `R * (Dv + 2) * 4` bytes for each run and head.

    Source: Woosuk Kwon and others, "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
    """
    if k.dim() != 3 or v.dim() != 3:
        raise _refuse(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}", "Give three dimensions: key/value heads, rows, width.")
    batch, rows = q.shape[0], k.shape[1]
    k, v = (tensor.expand(batch, -1, -1, -1) for tensor in (k, v))
    _check(q, k, v, None, None, None, softcap)
    whole = all(tensor.dtype == torch.int32 and tensor.device.type == "cpu" for tensor in (runs, run_of))
    if not whole or runs.dim() != 2 or runs.shape[1] != 2 or run_of.shape != (batch + 1,):
        raise _refuse(
            f"runs are {runs.dtype} {tuple(runs.shape)}, run_of {run_of.dtype} {tuple(run_of.shape)}",
            f"Give int32 of shapes (P, 2) and ({batch + 1},) on the CPU.",
        )
    ends = run_of.tolist()
    if ends[0] != 0 or ends[-1] != len(runs) or sorted(ends) != ends:
        raise _refuse(f"run_of is {ends} for {len(runs)} runs", "Give [0, n0, n0 + n1, ...] up to the number of runs.")
    first, end = runs.unbind(1)
    if bool(((first < 0) | (first > end) | (end > rows)).any()):
        raise _refuse(f"runs leave the {rows} rows of the memory", "Give 0 <= first <= end <= rows.")
    return run(q, k, v, None, None, None, scale, softcap or 0.0, runs=(runs, run_of))


def _refuse(what: str, fix: str) -> ConfigError:
    return ConfigError(what, where="torchwrap.native.decode", fix=fix)


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, end: Tensor | None, limits: Tensor | None, softcap: float | None) -> None:
    """All that the C++ side takes for granted: it gets addresses."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise _refuse(f"{name} has shape {tuple(tensor.shape)}", "Give four dimensions: batch, key/value heads, rows or keys, width.")
        if tensor.device.type != "cpu":
            raise _refuse(f"{name} is on {tensor.device}", "The kernel runs on the CPU.")
        if tensor.dtype != q.dtype or tensor.dtype not in _DTYPES:
            raise _refuse(f"{name} is {tensor.dtype}, q {q.dtype}", "Give all three in one of float32, bfloat16, float16.")
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise _refuse(f"{name} has strides {tensor.stride()}", "Its last dimension has to be contiguous.")
    (batch, heads, rows, width), keys, value_width = q.shape, k.shape[2], v.shape[3]
    if k.shape != (batch, heads, keys, width) or v.shape[:3] != k.shape[:3]:
        raise _refuse(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together",
            "Give (B, Hkv, R, D), (B, Hkv, S, D) and (B, Hkv, S, Dv).",
        )
    if rows > MAX_ROWS or not 0 < width <= MAX_WIDTH or not 0 < value_width <= MAX_WIDTH:
        raise _refuse(
            f"{rows} rows of width {width} and values of width {value_width}",
            f"At most {MAX_ROWS} rows; widths from 1 to {MAX_WIDTH}.",
        )
    if keys >= 2**31:
        raise _refuse(f"{keys} keys", "Columns are int32: at most 2**31 - 1 keys.")
    if softcap is not None and not softcap > 0:
        raise _refuse(f"softcap is {softcap}", "Give a positive number, or None.")
    for name, columns, shape in (("first", first, (batch,)), ("end", end, (batch,)), ("limits", limits, (batch, rows, 2))):
        if columns is None:
            continue
        if columns.shape != shape or columns.dtype != torch.int32 or columns.device.type != "cpu":
            raise _refuse(
                f"{name} is {columns.dtype} of shape {tuple(columns.shape)} on {columns.device}", f"Give int32 of shape {shape} on the CPU."
            )


class Prepared:
    """`decode` for tensors of one layout, unchecked: everything but addresses is put together once.

    Args:
        batch: B.
        heads: Hkv.
        rows: R.
        keys: S.
        width: D.
        value_width: Dv.
        strides: of q, k and v, but for the last, which is 1.
        dtype: of q, k and v.
        scale: factor of the scores.
        softcap: 0 for none.
        bias: one of the layout, (B, Hkv, R, S) by its strides, float32, a half type, or bool, which hides a key where it is False; None.
        out_dtype: of out: float32, or `dtype`.
        instruction_set: one of `instruction_sets()`, for tests; None: the best.
        threads: None: as torch.get_num_threads().
    """

    __slots__ = ("_rest", "_run", "_set", "_sizes")
    # `DecodeCall` of src/call.h: addresses, then the rest.
    _addresses = struct.Struct("11P").pack
    _others = struct.Struct("13q6q2f5i4x").pack

    def __init__(
        self, batch: int, heads: int, rows: int, keys: int, width: int, value_width: int, *, strides: tuple[int, ...], dtype: torch.dtype,
        scale: float, softcap: float, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32,
        instruction_set: str | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        number = number_of(instruction_set)
        of_bias = 0 if bias is None else _BIAS_DTYPES[bias.dtype]
        how = _DTYPES[dtype], threads or torch.get_num_threads(), number, _DTYPES[out_dtype], of_bias
        strides = *strides, *((0,) * 4 if bias is None else bias.stride())
        self._rest = self._others(*strides, batch, heads, rows, keys, width, value_width, scale, softcap, *how)
        self._sizes, self._set = (batch, heads, rows, value_width, keys), instruction_set
        self._run = library().torchwrap_decode

    def __call__(
        self, q: int, k: int, v: int, out: int, lse: int, first: int = 0, end: int = 0, limits: int = 0, runs: int = 0, run_of: int = 0,
        bias: int = 0,
    ) -> None:  # fmt: skip
        """Write out and lse, contiguous, lse in float32. All are addresses, of what `decode` and `decode_runs` say, or 0.

        Raises:
            BudgetError: no memory for partial results.
            UnsupportedModelError: the processor does not have the instruction set.
        """
        status = self._run(self._addresses(q, k, v, first, end, limits, runs, run_of, bias, out, lse) + self._rest)
        if status == 1:
            batch, heads, rows, value_width, keys = self._sizes
            needed = batch * heads * rows * (value_width + 2) * 4
            raise BudgetError(
                f"no memory for partial results of {batch} x {heads} x {rows} rows of {value_width} over {keys} keys, at least {needed} "
                "bytes",
                needed=needed,
                available=0,
                where="torchwrap.native.decode",
                fix="Free memory, or use a smaller batch or a shorter cache.",
            )
        if status:
            raise UnsupportedModelError(f"this processor cannot run {self._set}", where="torchwrap.native.decode")


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    limits: Tensor | None,
    scale: float,
    softcap: float,
    instruction_set: str | None = None,
    threads: int | None = None,
    runs: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The call itself, for callers that have made the checks of `decode` themselves: what does not fit is read as addresses.

    Args:
        q: as in `decode`, and so on.
        k: keys.
        v: values.
        first: first columns.
        end: ends of columns.
        limits: of rows.
        scale: factor of the scores.
        softcap: 0 for none.
        instruction_set: one of `instruction_sets()`, for tests; None: the best.
        threads: None: as torch.get_num_threads().
        runs: runs of columns and those of each entry, as in `decode_runs`; k and v are expanded over the batch, and there are no ranges.
        bias: as in `Prepared`, (B, Hkv, R, S), its numbers in memory.

    Raises:
        UnsupportedModelError: the library is not available.
        BudgetError: no memory for partial results.
    """
    q, k, v = in_memory(q), in_memory(k), in_memory(v)
    batch, heads, rows, width = q.shape
    keys, value_width = k.shape[2], v.shape[3]
    work = Prepared(
        batch, heads, rows, keys, width, value_width, strides=(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), dtype=q.dtype,
        scale=scale, softcap=softcap, bias=bias, instruction_set=instruction_set, threads=threads,
    )  # fmt: skip
    out, lse = (q.new_empty(shape, dtype=torch.float32) for shape in ((batch, heads, rows, value_width), (batch, heads, rows)))
    # Held in a list until the call is over: a copy made here has no other owner.
    ranges = [None if tensor is None else tensor.contiguous() for tensor in (first, end, limits, *runs)]
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (*ranges, bias))
    work(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), *addresses)
    return out, lse


@torch.library.custom_op("torchwrap::decode", mutates_args=(), device_types="cpu")
def _decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    limits: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return run(q, k, v, first, end, limits, scale, softcap)


@_decode_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    end: Tensor | None,
    limits: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    return q.new_empty(batch, heads, rows, v.shape[3], dtype=torch.float32), q.new_empty(batch, heads, rows, dtype=torch.float32)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    *tensors, scale, softcap = inputs
    ctx.save_for_backward(*tensors)  # type: ignore[arg-type]
    ctx.scalars = (scale, softcap)  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, of_out: Tensor, of_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Through the reference: generation needs no gradients, correctness does not depend on that."""
    q, k, v, first, end, limits = ctx.saved_tensors  # type: ignore[attr-defined]
    scale, softcap = ctx.scalars  # type: ignore[attr-defined]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        outputs = decode_reference(leaves[0], leaves[1], leaves[2], first, end, limits, scale=scale, softcap=softcap or None)
        gradients = torch.autograd.grad(outputs, leaves, (of_out, of_lse))
    return (*gradients, None, None, None, None, None)


_decode_op.register_autograd(_gradient, setup_context=_keep)

"""Attention of many queries in float32 or halves, and its gradients, with every sum in float32.

Each query sees an interval of keys, less those that are hidden one by one; a bias may be added to the scores.

Halves are widened block by block, and multiplied in float32; bfloat16 is multiplied as it is where the processor is faster at that. Torch's
CPU kernel adds gradients up in bfloat16, over the heads of a group, blocks of rows and blocks of keys; here all sums stay in float32 until
the end. Neither function has an operator of torch around it: they are the inside of one (`torchwrap.attention.attend`), which knows about
autograd and has checked what it is given.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchwrap.core.errors import BudgetError, UnsupportedModelError
from torchwrap.native.library import library, number_of

__all__ = ["Backward", "Forward", "Hidden", "gradients", "in_memory", "prefill", "readable"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BIAS_DTYPES = {**_DTYPES, torch.bool: 3}
_HIDING = ("shown", "q_segments", "k_segments", "codes", "tiles")
_POINTERS = ("q", "k", "v", "out", "lse", "limits", "sinks", "grad_out", "grad_lse", "dq", "dk", "dv", "delta", "bias", "dbias", *_HIDING)
_FIRST = struct.Struct(f"{len(_POINTERS)}PQ")  # what is another in each call: addresses and the seed
_STRIDED = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hidden:
    """What hides keys one by one; a query sees a key if everything that is given shows it.

    Attributes:
        shown: bool (B, Hq, Sq, Sk) of any strides, so expanded is enough; True: visible.
        q_segments: int32 (B, Sq), rows contiguous. Only tokens of equal number see each other.
        k_segments: int32 (B, Sk), likewise.
        codes: int32 (B, Hq, down, across), columns contiguous: a number of `tiles` for each tile of the mask.
        tiles: uint8 (N, height, width / 8), contiguous: 8 columns in a byte, the leftmost in the lowest bit.
        start: row and column of the first query and key in the first tile.
    """

    shown: Tensor | None = None
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None
    codes: Tensor | None = None
    tiles: Tensor | None = None
    start: tuple[int, int] = (0, 0)

    def _fields(self) -> Iterator[tuple[str, object]]:
        """Of `_Call`, what does not change with addresses."""
        if self.shown is not None:
            yield "shown_strides", self.shown.stride()
        if self.q_segments is not None and self.k_segments is not None:
            yield "segment_strides", (self.q_segments.stride(0), self.k_segments.stride(0))
        if self.codes is not None and self.tiles is not None:
            yield "code_strides", self.codes.stride()[:3]
            yield from zip(("tile_rows", "tile_columns"), (self.tiles.shape[1], 8 * self.tiles.shape[2]), strict=True)
            yield from zip(("first_row", "first_column"), self.start, strict=True)

    def _addresses(self) -> tuple[int, ...]:
        found = (self.shown, self.q_segments, self.k_segments, self.codes, self.tiles)
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in found)


class _Call(ctypes.Structure):
    """`PrefillCall` of src/call.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("seed", ctypes.c_uint64),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in _STRIDED),
        *((f"{name}_strides", ctypes.c_int64 * 4) for name in ("bias", "dbias", "shown")),
        ("segment_strides", ctypes.c_int64 * 2),
        ("code_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("tile_rows", "tile_columns", "first_row", "first_column")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "q_length", "k_length", "width", "value_width")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "keep")),
        ("threshold", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("limits_shared", "threads", "instruction_set", "dtype", "bias_dtype", "dbias_wide")),
        *((name, ctypes.c_int32) for name in ("some_keys", "few")),
        *((name, ctypes.c_int64) for name in ("part", "group")),
        *((name, ctypes.c_void_p) for name in ("dk_sums", "dv_sums")),
    )


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    hidden: Hidden | None = None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    instruction_set: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, with the log-sum-exp that merging and gradients need.

    Args:
        q: queries.
        k: keys.
        v: values.
        limits: first visible column and the one behind the last, for each query; None: all.
        sinks: a score for each head that takes weight and has no value; None: none.
        bias: added to the scores after the cap; None: nothing.
        hidden: what hides keys inside the intervals; None: nothing.
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`; None: they stay.
        dropout: probability with which a weight becomes 0; the others are multiplied with `1 / (1 - dropout)`.
        seed: of the weights that become 0, which are those of `torchwrap.attention.dropout.factors`; 64 bits.
        instruction_set: one of `instruction_sets()`, for tests; None: the best.
        threads: None: as torch.get_num_threads().

    Returns:
        `(out, lse)`: in the type of q, laid out as q where widths agree, and float32. Rows that see no key have out 0 and lse -inf, or
        the sink.

    Raises:
        UnsupportedModelError: the native library is not available.
        BudgetError: no memory for a block of keys.

    Shapes: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), all float32, bfloat16 or float16; limits (B or 1, Sq, 2) int32;
        sinks (Hq); bias (B or 1, Hq or 1, Sq or 1, Sk or 1), floating, of any strides; none of the sizes 0, D and Dv <= 512.
        out (B, Hq, Sq, Dv), lse (B, Hq, Sq). Nothing is checked here: what does not fit is read as addresses.

    Exactness: scores and all sums in float32; where the processor is fastest at products of bfloat16 as it is, weights are rounded to it.
        Independent of the number of threads and of strides, not of the instruction set: sums are in another order.

    Cost: `4 * (visible pairs) * D` operations for each query head; about half a megabyte for each thread.

    Source: Tri Dao, "FlashAttention-2", 2023, algorithm 1.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    bias = None if bias is None else readable(bias)
    how = dict(scale=scale, softcap=softcap, dropout=dropout, instruction_set=instruction_set, threads=threads)
    work = Forward(q, k, v, limits, bias, hidden, **how)  # type: ignore[arg-type]
    out, lse = work(q, k, v, None if sinks is None else in_memory(sinks.detach().float().contiguous()), bias, seed=seed)
    assert lse is not None
    return out, lse


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    limits: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    hidden: Hidden | None = None,
    wants_bias: bool = False,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    some_keys: bool = False,
    few: bool = False,
    instruction_set: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias, given the results of the forward.

    Args:
        q: as in `prefill`, and so k, v, limits, scale, softcap, instruction_set, threads.
        k: keys.
        v: values.
        out: result of the forward.
        lse: log-sum-exp of the scores, sinks included.
        grad_out: gradient of out.
        grad_lse: gradient of lse; None: zeros.
        limits: intervals of columns.
        bias: added to the scores.
        hidden: what hides keys inside the intervals.
        wants_bias: whether the gradient of the bias is wanted, which costs `4 * (visible pairs)` bytes of traffic.
        scale: factor of the scores.
        softcap: bound of the scores.
        dropout: of the forward.
        seed: of the forward.
        some_keys: out and lse are over more keys than these, so delta can only come from out; no dropout then.
        few: by the kernel for few rows (queries times heads of a group), which reads neither out nor lse. No sinks, softcap, dropout,
            `hidden` and gradient of the bias then; a bias of bool hides a key where it is False.
        instruction_set: as in `prefill`, and so threads.
        threads: how many.

    Returns:
        `(dq, dk, dv, delta, dbias)`: dbias is float32, float64 where its numbers are for many, or None; delta is
        `sum(grad_out * out) - grad_lse` of each row, from an out that was not rounded; gradients of sinks are
        `-sum(exp(sink - lse) * delta)`.

    Raises:
        UnsupportedModelError: the native library is not available.
        BudgetError: no memory for sums.

    Shapes: as in `prefill`; out and grad_out (B, Hq, Sq, Dv) in the type of q, lse, grad_lse and delta
        (B, Hq, Sq) float32. Results as q, k, v and bias.

    Exactness: as in `prefill`; gradients of scores are rounded where weights are. In halves delta
        is not taken from out, which was rounded, with dropout and in short calls. With `few` all is in float32.

    Cost: `10 * (visible pairs) * D` operations for each query head, 14 with dropout in halves; about a megabyte for each thread,
        and in halves `4 * min(B * Hkv, threads) * Sk * (D + Dv)` bytes for sums. With `few`, `8 * rows * Sk` bytes for each thread.

    Source: Tri Dao, "FlashAttention-2", 2023, algorithm 2.
    """
    q, k, v, out, grad_out = (_rows(tensor) for tensor in (q, k, v, out, grad_out))
    bias = None if bias is None else readable(bias)
    how = dict(scale=scale, softcap=softcap, dropout=dropout, instruction_set=instruction_set, threads=threads)
    work = Backward(q, k, v, out, grad_out, limits, bias, hidden, some_keys=some_keys, few=few, **how)  # type: ignore[arg-type]
    of_lse = None if grad_lse is None else in_memory(grad_lse.contiguous())
    dq, dk, dv, delta, dbias = work(q, k, v, out, in_memory(lse.contiguous()), grad_out, of_lse, bias, wants_bias=wants_bias, seed=seed)
    assert delta is not None
    return dq, dk, dv, delta, dbias


def _like(tensor: Tensor, width: int) -> Tensor:
    """Memory laid out as that of a tensor if that has a contiguous last dimension: models that keep heads innermost get results so too."""
    like = torch.empty_like(tensor) if width == tensor.shape[3] else tensor.new_empty(*tensor.shape[:3], width)
    return like if like.stride(3) == 1 else torch.empty(like.shape, dtype=like.dtype, device=like.device)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor with its numbers at its address: torch keeps a sign still to be applied, and zeros that have no memory, as marks of it."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def readable(bias: Tensor) -> Tensor:
    """A bias as the kernels read it, without gradient: its numbers in memory, in float32, a half type, or bool."""
    bias = in_memory(bias.detach() if bias.requires_grad else bias)
    return bias if bias.dtype in _BIAS_DTYPES else bias.float()


def _rows(tensor: Tensor) -> Tensor:
    """The numbers in memory, rows contiguous."""
    tensor = in_memory(tensor)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


class _Prepared:
    """One of the two functions for tensors of one layout: everything but addresses is put together once.

    Args:
        tensors: that have strides, by their names in `_Call`.
        limits: intervals of columns; kept.
        bias: one of the layout, `readable`; None: there is none.
        hidden: what hides keys; kept.
        scale: as in `prefill`, and so softcap, dropout, instruction_set, threads.
        softcap: bound of the scores.
        dropout: of weights.
        instruction_set: for tests.
        threads: how many.
    """

    __slots__ = ("_hidden", "_hidden_at", "_limits", "_limits_at", "_rest", "_rows", "_set", "_sizes")
    _pack = _FIRST.pack
    _name = ""

    def __init__(
        self, tensors: dict[str, Tensor], limits: Tensor | None, bias: Tensor | None, hidden: Hidden | None, scale: float,
        softcap: float | None, dropout: float, instruction_set: str | None, threads: int | None, some_keys: bool = False,
        few: bool = False,
    ) -> None:  # fmt: skip
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        self._limits = None if limits is None else in_memory(limits).contiguous()
        self._limits_at = 0 if self._limits is None else self._limits.data_ptr()
        self._hidden, self._hidden_at = hidden, (0,) * len(_HIDING) if hidden is None else hidden._addresses()
        self._set, self._rows, self._sizes = instruction_set, q.shape[:3], (tuple(k.shape), k.numel() + v.numel())
        more = {} if hidden is None else dict(hidden._fields())
        if bias is not None:
            scores = *q.shape[:3], k.shape[2]
            summed = torch.empty(bias.shape, dtype=torch.float32, device="meta").expand(scores)  # laid out as the gradient
            more |= {"bias_strides": bias.expand(scores).stride(), "dbias_strides": summed.stride(), "bias_dtype": _BIAS_DTYPES[bias.dtype]}
            more["dbias_wide"] = bias.shape != scores
        call = _Call(
            **{f"{key}_strides": tensor.stride()[:3] for key, tensor in tensors.items()},
            **dict(zip(("batch", "heads", "q_length", "width"), q.shape, strict=True)),
            **dict(zip(("kv_heads", "k_length", "value_width"), (*k.shape[1:3], v.shape[3]), strict=True)),
            scale=scale,
            softcap=softcap or 0.0,
            keep=1.0 / (1.0 - dropout),
            threshold=int(dropout * 2**32),
            limits_shared=limits is None or limits.shape[0] == 1,
            threads=threads or torch.get_num_threads(),
            instruction_set=number_of(instruction_set),
            dtype=_DTYPES[q.dtype],
            some_keys=some_keys,
            few=few,
            **more,
        )
        self._rest = bytes(call)[_FIRST.size :]

    def _failed(self, status: int) -> Exception:
        where = f"torchwrap.native.{self._name}"
        if status == 1:
            keys, numbers = self._sizes
            return BudgetError(
                f"no memory for sums over {keys} keys, about {4 * numbers} bytes", needed=4 * numbers, available=0, where=where,
                fix="Free memory, or use a smaller batch or a shorter sequence.",
            )  # fmt: skip
        return UnsupportedModelError(f"this processor cannot run {self._set}", where=where)


class Forward(_Prepared):
    """`prefill` for tensors of one layout, with rows contiguous and numbers in memory."""

    __slots__ = ("_alike", "_run", "_width")
    _name = "prefill"

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, limits: Tensor | None = None, bias: Tensor | None = None, hidden: Hidden | None = None, *,
        scale: float, softcap: float | None = None, dropout: float = 0.0, instruction_set: str | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        self._width = v.shape[3]
        self._alike = self._width == q.shape[3] and torch.empty_like(q).stride(3) == 1
        tensors = {"q": q, "k": k, "v": v, "out": _like(q, self._width)}
        super().__init__(tensors, limits, bias, hidden, scale, softcap, dropout, instruction_set, threads)
        self._run = library().torchwrap_prefill

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, bias: Tensor | None = None, shown: Tensor | None = None, *,
        wants_lse: bool = True, seed: int = 0,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `prefill`; sinks are contiguous, in float32, the bias is `readable`, `shown` is in place of that of `hidden`.

        An lse that is not wanted is None.
        """
        out = torch.empty_like(q) if self._alike else _like(q, self._width)
        lse = torch.empty(self._rows, dtype=torch.float32, device=q.device) if wants_lse else None
        hidden = self._hidden_at if shown is None else (shown.data_ptr(), *self._hidden_at[1:])
        addresses = self._pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), self._limits_at,
            0 if sinks is None else sinks.data_ptr(), 0, 0, 0, 0, 0, 0, 0 if bias is None else bias.data_ptr(), 0, *hidden, seed,
        )  # fmt: skip
        if status := self._run(addresses + self._rest):
            raise self._failed(status)
        return out, lse


class Backward(_Prepared):
    """`gradients` for tensors of one layout, with rows contiguous and numbers in memory."""

    __slots__ = ("_alike", "_run")
    _name = "gradients"

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad_out: Tensor, limits: Tensor | None = None, bias: Tensor | None = None,
        hidden: Hidden | None = None, *, scale: float, softcap: float | None = None, dropout: float = 0.0,
        instruction_set: str | None = None, threads: int | None = None, some_keys: bool = False, few: bool = False,
    ) -> None:  # fmt: skip
        read = {"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out}
        found = {f"d{name}": _like(read[name], read[name].shape[3]) for name in ("q", "k", "v")}
        super().__init__(read | found, limits, bias, hidden, scale, softcap, dropout, instruction_set, threads, some_keys, few)
        self._alike = all(torch.empty_like(tensor).stride(3) == 1 for tensor in (q, k, v))
        self._run = library().torchwrap_gradients

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None = None,
        bias: Tensor | None = None, *, wants_bias: bool = False, seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """As `gradients`; lse and its gradient are contiguous, the bias is `readable`."""
        delta, dbias = torch.empty(self._rows, dtype=torch.float32, device=q.device), None
        if wants_bias and bias is not None:
            dbias = q.new_zeros(bias.shape, dtype=torch.float32 if bias.shape == (*q.shape[:3], k.shape[2]) else torch.float64)
        found = self.of_tensors(
            q, k, v, out, lse, grad_out, grad_lse, bias, None, seed, delta.data_ptr(), 0 if dbias is None else dbias.data_ptr()
        )
        return *found, delta, dbias

    def of_tensors(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
        bias: Tensor | None, shown: Tensor | None, seed: int, delta_at: int = 0, dbias_at: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v alone; `shown` is in place of that of `hidden`, the others go where they are said to, if anywhere."""
        if self._alike:
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        else:
            dq, dk, dv = _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3])
        hidden = self._hidden_at if shown is None else (shown.data_ptr(), *self._hidden_at[1:])
        addresses = self._pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if out is None else out.data_ptr(), 0 if lse is None else lse.data_ptr(),
            self._limits_at, 0, grad_out.data_ptr(), 0 if grad_lse is None else grad_lse.data_ptr(), dq.data_ptr(), dk.data_ptr(),
            dv.data_ptr(), delta_at, 0 if bias is None else bias.data_ptr(), dbias_at, *hidden, seed,
        )  # fmt: skip
        if status := self._run(addresses + self._rest):
            raise self._failed(status)
        return dq, dk, dv

"""What one call of attention consists of, checked before any work, and what every way to compute it must return.

Letters: B batch, Hq query heads, Hkv key heads, G = Hq / Hkv, Sq and Sk query and key lengths, D and Dv widths of keys and of values.
A call is `softmax(scores) @ v`, where `scores = cap(scale * q @ k^T) + bias` with `cap(s) = softcap * tanh(s / softcap)`, hidden keys are
left out, and each head may have one more logit, its sink, that takes probability and gives nothing. Query head h reads key head h // G.

A back end returns `out[B, Hq, Sq, Dv]` in the dtype of q and `lse[B, Hq, Sq]`: the natural logarithm of the sum of exponentials, sink
included, in float32 (float64 for float64 inputs). A row that sees no key has out 0 and lse -inf (with a sink: lse = sink), and passes
no gradient on. No back end but "eager" stores anything of Sq * Sk elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from torchwrap.attention.merge import logits_of
from torchwrap.attention.transforms import recorded
from torchwrap.core import errors

if TYPE_CHECKING:
    from torchwrap.attention.masks.mask import TileMask

__all__ = ["SMALL", "Backend", "Call", "Drawing", "Gradients", "Mode", "Prepared", "checked"]

SMALL = 128
"""Rows and columns up to which a mask that is a tensor is taken whole: looking for what it hides costs more than that (measured)."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
Mode = Literal["decode", "chunked", "prefill"]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Of q, k, v, the sinks and the bias; the last two are None where the call has none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Call:
    """The arguments of one call, known to fit together.

    Attributes:
        q: `[B, Hq, Sq, D]`.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, Dv]`.
        mask: what each query sees; None: everything.
        scale: factor of the scores.
        softcap: bound of the scaled scores, or None.
        sinks: `[Hq]`, one logit for each head, or None.
        bias: added to the scores after the cap; `[B | 1, Hq | 1, Sq | 1, Sk]`, or None. Where a graph is recorded it may be bool: a mask
            that only the operator in the graph can sort into tiles.
        dropout: probability with which a weight becomes 0 (the others grow by `1 / (1 - dropout)`).
        seed: int64 scalar that picks the dropped weights; None without dropout.
        some_keys: for a backward over a part of the keys: out and lse are those of all of them.
        wants_lse: False: nobody reads lse, and a back end that has to go out of its way for it may return an empty one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: TileMask | None = None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    some_keys: bool = False
    wants_lse: bool = True

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """Hq."""
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """G, query heads that share a key head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def q_length(self) -> int:
        """Sq."""
        return self.q.shape[2]

    @property
    def kv_length(self) -> int:
        """Sk."""
        return self.k.shape[2]

    @property
    def width(self) -> int:
        """D."""
        return self.q.shape[3]

    @property
    def value_width(self) -> int:
        """Dv."""
        return self.v.shape[3]

    @property
    def mode(self) -> Mode:
        """One query ("decode"), several at the end of a longer row of keys ("chunked"), or neither ("prefill")."""
        if self.q_length == 1:
            return "decode"
        return "chunked" if self.q_length < self.kv_length else "prefill"

    def for_gradients(self, bias: bool) -> Call:
        """The call whose bias says whether it requires a gradient, which is as large as the scores and left out where it is not wanted.

        Args:
            bias: whether it does. Under compilers and `torch.func` the tensor itself has forgotten.
        """
        if self.bias is None or self.bias.requires_grad == bias:
            return self
        return replace(self, bias=self.bias.detach().requires_grad_(bias))

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of sums and of lse: float32, or float64 where the inputs are."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """There is nothing to add up: no row, no key or no width."""
        return 0 in (*self.q.shape, *self.v.shape)

    def empty_result(self) -> tuple[Tensor, Tensor]:
        """What a call returns in which no row sees a key, with sinks counted.

        Returns:
            out `[B, Hq, Sq, Dv]` of zeros and lse `[B, Hq, Sq]` of -inf or of the sinks.
        """
        out = self.q.new_zeros(self.batch, self.heads, self.q_length, self.value_width)
        lse = self.q.new_full(out.shape[:3], -math.inf, dtype=self.accumulate)
        if self.sinks is not None:
            lse.copy_(self.sinks.detach()[:, None])
        return out, lse


class Backend(Protocol):
    """One way to compute a call.

    Attributes:
        name: what `attend(..., backend=)` calls it.
    """

    name: str

    def refuses(self, call: Call) -> str | None:
        """Why this call cannot be computed here: the failed check with its value, or None."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """The result.

        Returns:
            out `[B, Hq, Sq, Dv]` and lse `[B, Hq, Sq]`.
        """

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """The gradients of everything.

        Args:
            call: as given to `forward`.
            out: what `forward` returned.
            lse: what `forward` returned.
            grad_out: gradient of out.
            grad_lse: gradient of lse; None: zeros.
        """


class Prepared(Protocol):
    """What computes calls of one layout of tensors: shapes, strides, dtype, mask and numbers are known.

    Attributes:
        name: of the back end.
        trains: whether gradients are wanted, and `backward` can be called.
        again: `backward` works out again what it needs of the forward: it is given None for out and lse.
        kind: what calls of this kind are called in records; empty until somebody says it.
    """

    name: str
    trains: bool
    again: bool
    kind: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
        """As `Backend.forward`; an lse that is not wanted may be None. Only masks that are no `TileMask` are looked at again."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, as `Backend.backward`."""


class Drawing(Prepared, Protocol):
    """What is prepared for calls with dropout."""

    def drawn(self) -> Prepared:
        """For one call: its seed is drawn now."""


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: TileMask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    wants_lse: bool = True,
) -> Call:
    """The call, or an error that names what does not fit.

    Args:
        q: `[B, Hq, Sq, D]`, floating.
        k: `[B, Hkv, Sk, D]`, Hq a multiple of Hkv.
        v: `[B, Hkv, Sk, Dv]`.
        mask: a `TileMask`, a bool tensor that broadcasts to `[B, Hq, Sq, Sk]` (True: visible), or a float one that is added to the scores.
        scale: None: `1 / sqrt(D)`. This, softcap and dropout may be numbers of numpy, or tensors of one element.
        softcap: positive, or None.
        sinks: `[Hq]`.
        bias: broadcasts to `[B, Hq, Sq, Sk]`.
        dropout: in [0, 1).
        wants_lse: as in `Call`.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit together, or a number is out of its range.
    """
    _check_tensors(q, k, v)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    factor = max(q.shape[3], 1) ** -0.5 if scale is None else _number(scale, "scale")
    softcap, dropout = None if softcap is None else _number(softcap, "softcap"), _number(dropout, "dropout")
    for name, given in {"sinks": sinks, "bias": bias}.items():
        if given is not None:
            _check_dense(given, name)
    # Scores are computed in float32, in which other numbers are infinite, or 0 and no cap. float64 is not asked for more.
    if softcap is not None and not _LEAST <= softcap <= _MOST:
        raise errors.ConfigError(
            f"softcap is {softcap}", where="attend", fix=f"Give a positive number of {_LEAST:.1g} to {_MOST:.1g}, or None for no cap."
        )
    if not -_MOST <= factor <= _MOST:  # math.isfinite knows no symbolic numbers
        raise errors.ConfigError(
            f"scale is {factor}", where="attend", fix=f"Give a finite number of at most {_MOST:.1g}, or None for 1 / sqrt(D)."
        )
    if not 0.0 <= dropout < 1.0:
        raise errors.ConfigError(f"dropout is {dropout}", where="attend", fix="Give a probability in [0, 1).")
    if sinks is not None:
        if sinks.shape != (q.shape[1],) or not sinks.is_floating_point():
            raise errors.ConfigError(
                f"sinks are {_said(sinks)}, and q has {q.shape[1]} heads", where="attend", fix="Give one number for each query head."
            )
        _same_device(q, sinks, "sinks")
        sinks = logits_of(sinks)
    seen, added = _masks(mask, shape, q)
    if bias is not None:
        _check_added(bias, shape, "bias")
        _same_device(q, bias, "bias")
        if added is not None and added.dtype == torch.bool:
            added = bias.masked_fill(~added, -math.inf)
        else:
            added = bias if added is None else bias + added
    return Call(
        q=q, k=k, v=v, mask=seen, scale=factor, softcap=softcap, sinks=sinks,
        bias=None if added is None else added[(None,) * (4 - added.dim())], dropout=dropout,
        seed=torch.randint(2**62, (), dtype=torch.int64, device="cpu") if dropout else None, wants_lse=wants_lse,
    )  # fmt: skip


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, given in (("q", q), ("k", k), ("v", v)):
        _check_dense(given, name)
    wrong = _mismatch(q, k, v)
    if wrong:
        raise errors.ConfigError(
            f"{wrong}: q {_said(q)}, k {_said(k)}, v {_said(v)}",
            where="attend",
            fix="Shapes are q[B, Hq, Sq, D], k[B, Hkv, Sk, D], v[B, Hkv, Sk, Dv], of one floating dtype, on one device.",
        )
    _same_device(q, k, "k")
    _same_device(q, v, "v")


def _check_dense(given: object, name: str) -> None:
    if not isinstance(given, Tensor):
        fix = "Give tensors (torch.tensor, torch.from_numpy)."
        raise errors.ConfigError(f"{name} is a {type(given).__name__}", where="attend", fix=fix)
    if given.is_nested or given.layout != torch.strided:
        fix = "Give dense tensors, nested ones padded (torch.nested.to_padded_tensor) and with a mask."
        raise errors.ConfigError(f"{name} is a sparse or nested tensor", where="attend", fix=fix)


def _number(given: object, name: str) -> float:
    """A number of Python; models also give those of numpy, and tensors of one element."""
    if type(given) is float:
        return given
    if isinstance(given, Tensor) and given.numel() == 1 and given.requires_grad and torch.is_grad_enabled():
        fix = f"Give {name}.detach(); a scale that is learned is multiplied into q, with scale=1.0."
        raise errors.ConfigError(f"{name} asks for a gradient, and numbers get none", where="attend", fix=fix)
    said = f"{_said(given)} on {given.device}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
    wrong = errors.ConfigError(f"{name} is {said}", where="attend", fix="Give one number.")
    if isinstance(given, bool | str | bytes) or (isinstance(given, Tensor) and (given.numel() != 1 or given.dtype == torch.bool)):
        raise wrong
    try:
        if type(given) is int:
            return float(given)  # also where it is symbolic, of which complex() knows nothing
        number: complex = complex(given)  # type: ignore[call-overload]  # float() would drop what is imaginary in a number of numpy
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # tensors without numbers: on meta, or mapped over
        raise wrong from error
    if number.imag:
        raise errors.ConfigError(f"{name} is {number}", where="attend", fix="Give a real number.")
    return number.real


def _mismatch(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.dim() == k.dim() == v.dim() == 4:
        return "q, k and v must have four dimensions"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        return "q, k and v must be of one floating dtype of at least 16 bits"
    (batch, heads, _, width), key_shape, value_shape = q.shape, k.shape, v.shape
    if not batch == key_shape[0] == value_shape[0]:
        return "q, k and v have different batch sizes"
    if key_shape[1:3] != value_shape[1:3]:
        return "k and v have different heads or lengths"
    if width != key_shape[3]:
        return "q and k have different widths"
    kv_heads = key_shape[1]
    return f"{heads} query heads cannot share {kv_heads} key heads evenly" if (heads % kv_heads if kv_heads else heads) else None


def _masks(mask: TileMask | Tensor | None, shape: tuple[int, int, int, int], q: Tensor) -> tuple[TileMask | None, Tensor | None]:
    """What hides keys, and what is added to scores."""
    if mask is None:
        return None, None
    from torchwrap.attention.masks.mask import TileMask  # here, so that calls without a mask need nothing of it

    if isinstance(mask, TileMask):
        fits = mask.shape[0] in (1, shape[0]) and mask.shape[1] in (1, shape[1]) and mask.shape[2:] == shape[2:]
        if not fits:
            raise errors.ConfigError(
                f"the mask is {tuple(mask.shape)} and the scores are {shape}", where="attend", fix="Build the mask for these lengths."
            )
        if mask.is_meta:
            _same_device(q, mask, "the mask")
        return (mask if q.is_meta == mask.is_meta else cast("TileMask", mask.to(q.device))), None  # shapes need no numbers of it
    _check_dense(mask, "the mask")
    _check_added(mask, shape, "mask")
    _same_device(q, mask, "the mask")
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        return None, mask
    if mask.is_cpu and mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] == shape[3]:
        # Padding, whole or with holes: nothing has to be looked for in tiles. A copy, as masks never change.
        return TileMask(mask.shape[0], *shape[2:], key_mask=mask[:, 0, 0].clone()), None
    if mask.is_meta:
        return None, torch.zeros_like(mask, dtype=q.dtype)  # shapes alone
    if recorded():
        return None, mask
    return TileMask.from_dense(mask.expand(mask.shape[0], mask.shape[1], *shape[2:])), None


def _check_added(given: Tensor, shape: tuple[int, int, int, int], name: str) -> None:
    said = f"the {name} is {_said(given)} and the scores are {shape}"
    if not given.is_floating_point() and (name != "mask" or given.dtype != torch.bool):
        fix = "Give a mask of booleans (mask.bool()) or of numbers that are added (mask.float())." if name == "mask" else "Give floats."
        raise errors.ConfigError(said, where="attend", fix=fix)
    if given.dim() > 4 or any(size not in (1, full) for size, full in zip(reversed(given.shape), reversed(shape), strict=False)):
        batches = given.shape == (shape[0], shape[3])
        fix = f"{name}[:, None, None] is one row for each batch entry." if batches else "Each size must be 1 or that of the scores."
        raise errors.ConfigError(said, where="attend", fix=fix)


def _same_device(q: Tensor, other: Tensor, name: str) -> None:
    if q.device != other.device:
        raise errors.ConfigError(f"q is on {q.device} and {name} on {other.device}", where="attend", fix=f"Move {name} to {q.device}.")


def _said(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

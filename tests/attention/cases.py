"""Calls of attention of every kind, their exact results, and the law of errors that all back ends are held to."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchwrap.attention.contract import Call, Gradients, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import Eager, attention

HEADS = ((4, 4), (8, 2), (9, 3), (8, 1))
LENGTHS = (1, 2, 17, 64, 127, 128, 300)
WIDTHS = (16, 40, 64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _segments(batch: int, length: int, size: int) -> Tensor:
    return (torch.arange(length, dtype=torch.int32) // size).expand(batch, -1).contiguous()


def _starts(batch: int, kv: int) -> Tensor:
    return torch.tensor([(row * kv) // 3 for row in range(batch)], dtype=torch.int32)


MASKS: dict[str, Callable[[int, int, int], TileMask | Tensor | None]] = {
    "none": lambda batch, sq, sk: None,
    "causal": TileMask.causal,
    "top left": lambda batch, sq, sk: TileMask.causal(1, sq, sk, q_offset=0),
    "window 1": lambda batch, sq, sk: TileMask.window(1, sq, sk, 1),
    "window 7": lambda batch, sq, sk: TileMask.window(batch, sq, sk, 7),
    "window 128": lambda batch, sq, sk: TileMask.window(1, sq, sk, 128),
    "both ways": lambda batch, sq, sk: TileMask(1, sq, sk, left=20, right=13),
    "left only": lambda batch, sq, sk: TileMask(1, sq, sk, left=20),
    "chunks": lambda batch, sq, sk: TileMask(batch, sq, sk, chunk=50, right=0, shift=_starts(batch, sk)),
    "padded left": lambda batch, sq, sk: TileMask(batch, sq, sk, right=0, kv_start=_starts(batch, sk)),
    "padded right": lambda batch, sq, sk: TileMask(batch, sq, sk, right=0, kv_end=sk - _starts(batch, sk)),
    "padded window": lambda batch, sq, sk: TileMask(batch, sq, sk, right=0, left=30, kv_start=_starts(batch, sk)),
    "packed": lambda batch, sq, sk: TileMask(
        batch, sq, sk, right=0, q_segments=_segments(batch, sk, 37)[:, -sq:] if sq <= sk else _segments(batch, sq, 37),
        k_segments=_segments(batch, sk, 37),
    ),
    "segments that return": lambda batch, sq, sk: TileMask(
        batch, sq, sk, q_segments=_segments(batch, sq, 13) % 3, k_segments=_segments(batch, sk, 11) % 3
    ),
    "holes": lambda batch, sq, sk: TileMask(batch, sq, sk, right=0, key_mask=torch.rand(batch, sk) < 0.7),
    "dense": lambda batch, sq, sk: torch.rand(batch, 1, sq, sk) < 0.5,
    "function": lambda batch, sq, sk: TileMask.from_function(
        lambda b, h, q, k: (k <= q) & ((k + q) % 5 != 0), batch=batch, q_length=sq, kv_length=sk
    ),
}  # fmt: skip
EXTRAS = ("plain", "softcap", "sinks", "bias", "bias with gradient", "dropout", "gradient of lse", "wide values", "strided", "scale")


def make(seed: int, **given: Any) -> tuple[Call, str]:
    """A random call of the grid, and what is special about it. `given` fixes some of: heads, q_length, past, width, dtype, mask, extra."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    heads, kv_heads = given.get("heads", pick.choice(HEADS))
    batch, sq, past = given.get("batch", pick.choice((1, 3))), given.get("q_length", pick.choice(LENGTHS)), pick.choice((0, 0, 333))
    sk = sq + given.get("past", past)
    width, dtype = given.get("width", pick.choice(WIDTHS[:4])), given.get("dtype", torch.float32)
    mask, extra = given.get("mask", pick.choice(list(MASKS))), given.get("extra", pick.choice(EXTRAS))
    options: dict[str, Any] = {}
    value_width = width + 8 if extra == "wide values" else width
    q, k, v = torch.randn(batch, heads, sq, width), torch.randn(batch, kv_heads, sk, width), torch.randn(batch, kv_heads, sk, value_width)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if extra == "strided":
        q, k, v = q.transpose(2, 3).contiguous().transpose(2, 3), k.transpose(1, 2).contiguous().transpose(1, 2), v[:, :1].expand_as(v)
    options |= {
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.randn(heads)},
        "dropout": {"dropout": 0.3},
        "scale": {"scale": 0.2},
    }.get(extra, {})
    if extra.startswith("bias"):
        shape = pick.choice([(1, heads, sq, sk), (batch, 1, 1, sk), (heads, 1, sk), (sq, sk)])
        options["bias"] = torch.randn(shape).to(dtype).requires_grad_(extra == "bias with gradient")
    return checked(q, k, v, mask=MASKS[mask](batch, sq, sk), **options), f"{mask}, {extra}, {heads}/{kv_heads}, {batch}x{sq}x{sk}x{width}"


def widened(call: Call) -> Call:
    """The same numbers in float64."""
    tensors = {name: getattr(call, name).detach().double() for name in ("q", "k", "v", "sinks", "bias") if getattr(call, name) is not None}
    return replace(call, **tensors)


def gradients(call: Call, grad_out: Tensor, grad_lse: Tensor) -> Gradients:
    """By autograd through the definition, in the dtype of the call."""
    return Eager().backward(call, *Eager().forward(call), grad_out, grad_lse)


def distance(found: Tensor, exact: Tensor) -> float:
    """Greatest difference; infinities must agree."""
    if not found.numel():
        return 0.0
    found = found.double()
    same = found == exact
    assert torch.equal(found.isinf(), exact.isinf())
    return float(torch.where(same, 0.0, found - exact).abs().max())


def scale_of(*tensors: Tensor | None) -> float:
    """The greatest finite number, at least 1."""
    finite = [tensor[tensor.isfinite()].abs() for tensor in tensors if tensor is not None]
    return max([1.0, *(float(part.max()) for part in finite if part.numel())])


def assert_law(found: Tensor, same_dtype: Tensor, exact: Tensor, what: str, magnitude: float) -> None:
    """`error(found) <= 2 * error(torch's math in the same dtype) + 1e-6 * magnitude`.

    The magnitude is that of all gradients of a call: a row that sees one key has dS = P * (dP - delta) = 0 by the definition, exactly, and
    dP - delta is a difference of two large numbers in every form that does not store P.
    """
    ours, theirs = distance(found, exact), distance(same_dtype, exact)
    assert ours <= 2 * theirs + 1e-6 * magnitude, f"{what}: {ours:.2e} where torch has {theirs:.2e}"


def assert_correct(backend: Any, call: Call, what: str, *, with_lse: bool = False) -> None:
    """Out, lse and all gradients of a back end against float64."""
    wide = widened(call)
    exact_out, exact_lse = attention(wide)
    with torch.no_grad():
        math_out, math_lse = attention(call)
    out, lse = backend.forward(call)
    assert out.dtype == call.q.dtype and out.shape == exact_out.shape and lse.dtype == call.accumulate
    assert_law(out, math_out, exact_out, f"{what}: out", scale_of(exact_out))
    assert_law(lse, math_lse, exact_lse, f"{what}: lse", scale_of(exact_lse))
    dead = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, dead) and not out[dead].any()
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse) if with_lse else torch.zeros_like(lse)
    exact = gradients(wide, grad_out.double(), grad_lse.double())
    same = gradients(call, grad_out, grad_lse)
    found = backend.backward(call, out, lse, grad_out, grad_lse if with_lse else None)
    for name, ours, theirs, true in zip(("dq", "dk", "dv", "dsinks", "dbias"), found, same, exact, strict=True):
        if ours is None:
            assert true is None or (name == "dbias" and call.bias is not None and not call.bias.requires_grad)
            continue
        assert theirs is not None and true is not None
        assert_law(ours, theirs, true, f"{what}: {name}", scale_of(*exact))


class _Largest(TorchDispatchMode):
    """The most elements that any tensor made here has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if type(leaf) is Tensor}
        for leaf in tree_leaves(result):
            if type(leaf) is Tensor and leaf.untyped_storage().data_ptr() not in inputs:
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.elements:
                    self.elements, self.operation = elements, str(func)
        return result


@contextmanager
def largest_tensor() -> Iterator[_Largest]:
    """Watches every tensor whose memory is allocated inside; views count as nothing."""
    with _Largest() as seen:
        yield seen

"""One call of torch's fused CPU kernel, made safe to compose.

`aten::_scaled_dot_product_flash_attention_for_cpu` (torch 2.13) returns out and lse, takes grouped heads, and its backward takes out and
lse as arguments: given those of the whole call, every part returns its exact share of the gradients, and shares add up. What it leaves
to its caller, each with a test that fails when it changes (tests/attention/test_kernel.py):

* rows that see no key get lse 0.0, and any part of one would change a merge: `live` says which rows are real;
* no query or no key at all divides by zero and ends the process;
* a last stride other than 1 is ignored, and the result is wrong;
* of a causal square it hides keys before it multiplies by the scale: one that is not positive shows them, and rows become NaN;
* keys and values must have one width; zeros in the missing columns change nothing;
* with fewer than 16 keys, a NaN among the scores gives zeros: keys that nobody sees make up the number;
* `added` hides a key by -inf, so one that holds no numbers is none still, in out, lse and all gradients (backend.py computes such again);
* in float16 and bfloat16 its exponentials are approximate, which moves lse by up to 7e-5 (float32: 1e-6): a hundredth of what the
  definition in bfloat16 loses, a tenth in float16, so it is reported as it is;
* in bfloat16, with 16 keys or more, a row with an infinite score gets zeros, where the definition has NaN: its lse is infinite;
* scores, and with them sums of many terms, are in float32 for bfloat16 and float16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEWEST", "backward", "flash", "flash_backward", "forward"]

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FEWEST = 16
"""Keys from which on a NaN is not lost."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, added: Tensor | None = None, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of some rows over some columns.

    Args:
        q: `[B, Hq, Sq, D]`.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, Dv]`.
        scale: factor of the scores.
        causal: row i sees columns 0 to i.
        added: to the scores, `[Sq, Sk]` or `[B, Hq, Sq, Sk]`, expanded is enough; not together with `causal`.
        live: bool, broadcasts to `[B, Hq, Sq]`: rows that see a key; None: all.

    Returns:
        out `[B, Hq, Sq, Dv]` in the dtype of q and lse `[B, Hq, Sq]`; dead rows 0 and -inf.
    """
    if 0 in q.shape or 0 in v.shape:
        return q.new_zeros(*q.shape[:3], v.shape[3]), _empty_lse(q)
    width = v.shape[3]
    q, k, v = _ready(q, k, v)
    if k.shape[2] < FEWEST:
        k, v, added = _made_up(q, k, v, causal, added)
        causal = False
    if causal and scale <= 0:
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    out, lse = flash(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
    if out.dtype == torch.bfloat16 and not bool((lse < math.inf).all()):
        out = out.masked_fill(~(lse < math.inf)[..., None], math.nan)
    if live is not None:
        lse = lse.masked_fill(~live, -math.inf)
    return out[..., :width], lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool = False,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of these columns in the gradients of q, k and v.

    Args:
        grad_out: `[B, Hq, Sq, Dv]`.
        q: as in `forward`, and so k, v, scale, causal, added.
        out: of the whole call, not of these columns.
        lse: of the whole call; `[B, Hq, Sq]`, with 0 in place of -inf, since `exp(-inf - 0)` is 0.
    """
    if 0 in q.shape or 0 in v.shape:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q_width, v_width = q.shape[3], v.shape[3]
    q, k, v = _ready(q, k, v)
    out, grad_out = (_unit(F.pad(tensor, (0, v.shape[3] - v_width)) if v.shape[3] > v_width else tensor) for tensor in (out, grad_out))
    dq, dk, dv = flash_backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale)
    return dq[..., :q_width], dk[..., :q_width], dv[..., :v_width]


def _made_up(q: Tensor, k: Tensor, v: Tensor, causal: bool, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with hidden ones behind them, and what is added to the scores of all."""
    rows, keys = q.shape[2], k.shape[2]
    missing = FEWEST - keys
    if added is None:
        added = q.new_zeros(rows if causal else 1, keys)
        if causal:
            added.masked_fill_(torch.ones_like(added, dtype=torch.bool).triu(1), -math.inf)
    added = F.pad(added, (0, missing), value=-math.inf)
    k, v = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (k, v))
    return k, v, added.expand(*added.shape[:-2], rows, FEWEST)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_full(q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))


def _ready(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one width, with unit last stride."""
    missing = k.shape[3] - v.shape[3]
    if missing > 0:
        v = F.pad(v, (0, missing))
    elif missing < 0:
        q, k = F.pad(q, (0, -missing)), F.pad(k, (0, -missing))
    return _unit(q), _unit(k), _unit(v)


def _unit(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()

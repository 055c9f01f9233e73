"""Torch's attention functions for CUDA, computed on the CPU as they are documented: what they take, and what they return.

Arguments are bound by the functions' own schemas, so that a call in the wrong order or with an unknown name fails here as it would on a
card. Backward computes `exp(score - lse)` from the lse that it is given, so a wrong lse (of rows without a key, of rows that fill up) is
seen as NaN or as a wrong gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def bound(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as the schema of `aten::name` has them."""
    schema = getattr(torch.ops.aten, name).default._schema.arguments
    places = [argument for argument in schema if not argument.kwarg_only]
    assert len(args) <= len(places), f"{name} takes {len(places)} arguments by place"
    found = {argument.name: value for argument, value in zip(places, args, strict=False)}
    assert not found.keys() & kwargs.keys() and kwargs.keys() <= {argument.name for argument in schema}
    found |= kwargs
    for argument in schema:
        if argument.name not in found:
            assert argument.has_default_value(), f"{name} needs {argument.name}"
            found[argument.name] = argument.default_value
    return found


class Emulated:
    """In place of `torch.ops.aten`.

    Args:
        statistics: dimensions of cuDNN's lse, in which releases of torch differ.

    Attributes:
        calls: name and arguments of every call.
    """

    def __init__(self, statistics: int = 4) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.statistics = statistics

    def __getattr__(self, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            given = bound(name, args, kwargs)
            self.calls.append((name, given))
            return getattr(self, f"do{name}")(given)

        return run

    def do_flash_attention_forward(self, given: dict[str, Any]) -> Any:
        q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
        assert q.shape[3] == k.shape[3] == v.shape[3] and q.shape[3] % 8 == 0 and not given["return_debug_mask"]
        assert (given["max_q"], given["max_k"], given["cum_seq_q"]) == (q.shape[2], k.shape[2], None)
        out, lse = _forward(_scores(q, k, _last_corner(given, q, k), given["scale"]), v)
        return out.to(q.dtype).transpose(1, 2), torch.where(lse == -math.inf, math.inf, lse).float(), None, None, None

    def do_flash_attention_backward(self, given: dict[str, Any]) -> Any:
        q, k, v, out, grad = (given[name].transpose(1, 2) for name in ("query", "key", "value", "out", "grad_out"))
        assert given["logsumexp"].shape == q.shape[:3] and given["logsumexp"].is_contiguous()
        grads = _backward(q, k, v, out, grad, given["logsumexp"], _last_corner(given, q, k), given["scale"])
        return tuple(tensor.transpose(1, 2) for tensor in grads)

    def do_efficient_attention_forward(self, given: dict[str, Any]) -> Any:
        q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
        assert given["compute_log_sumexp"] and q.shape[1] == k.shape[1] and q.shape[3] % 8 == v.shape[3] % 8 == 0
        out, lse = _forward(_scores(q, k, _corner(given, q, k), given["scale"]), v)
        fill = math.inf * torch.ones(*lse.shape[:2], -lse.shape[2] % 32)
        return out.to(q.dtype).transpose(1, 2), torch.cat([lse, fill.to(lse)], 2).float(), None, None, q.shape[2], k.shape[2]

    def do_efficient_attention_backward(self, given: dict[str, Any]) -> Any:
        q, k, v, out, grad = (given[name].transpose(1, 2) for name in ("query", "key", "value", "out", "grad_out_"))
        lse = given["logsumexp"]
        assert given["out"].is_contiguous(), "strides of out are not looked at"
        assert lse.shape == (*q.shape[:2], -(-q.shape[2] // 32) * 32) and lse.is_contiguous()
        assert bool((lse[..., q.shape[2] :] == math.inf).all())
        assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (q.shape[2], k.shape[2]) and not given["bias_requires_grad"]
        grads = _backward(q, k, v, out, grad, lse[..., : q.shape[2]], _corner(given, q, k), given["scale"])
        return *(tensor.transpose(1, 2) for tensor in grads), None

    def do_scaled_dot_product_cudnn_attention(self, given: dict[str, Any]) -> Any:
        q, k, v = given["query"], given["key"], given["value"]
        assert given["attn_bias"] is None and given["compute_log_sumexp"] and not given["return_debug_mask"]
        out, lse = _forward(_scores(q, k, _first_corner(given["is_causal"], q, k), given["scale"]), v)
        lse = lse.float().view(*lse.shape, *(1,) * (self.statistics - 3))
        return out.to(q.dtype), lse, None, None, q.shape[2], k.shape[2], None, None, None

    def do_scaled_dot_product_cudnn_attention_backward(self, given: dict[str, Any]) -> Any:
        q, k, v = given["query"], given["key"], given["value"]
        assert given["logsumexp"].dim() == self.statistics and (given["max_q"], given["max_k"]) == (q.shape[2], k.shape[2])
        lse = given["logsumexp"].reshape(q.shape[:3])
        seen = _first_corner(given["is_causal"], q, k)
        return _backward(q, k, v, given["out"], given["grad_out"], lse, seen, given["scale"])


def _last_corner(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    """What FlashAttention hides, as what is added to scores: bands at the last query and the last key."""
    left = -1 if given["window_size_left"] is None else given["window_size_left"]
    right = 0 if given["is_causal"] else -1 if given["window_size_right"] is None else given["window_size_right"]
    left, right = (-1 if reach >= k.shape[2] else reach for reach in (left, right))
    rows, columns = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    seen = ((left < 0) | (columns >= rows - left)) & ((right < 0) | (columns <= rows + right))
    return torch.where(seen, 0.0, -math.inf).double()


def _first_corner(causal: bool, q: Tensor, k: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return torch.where(seen.tril_() if causal else seen, 0.0, -math.inf).double()


def _corner(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    """What the efficient kernel hides by its word, and what is added."""
    added = torch.zeros(q.shape[2], k.shape[2], dtype=torch.float64)
    word = given["custom_mask_type"]
    if word:
        shift = 0 if word == 1 else k.shape[2] - q.shape[2]
        added.masked_fill_(~torch.ones_like(added, dtype=torch.bool).tril_(shift), -math.inf)
    bias = given["bias"]
    if bias is None:
        return added
    assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype and bias.stride(3) == 1
    assert all(stride % 16 == 0 for stride in bias.stride()[:3]), "rows of what is added are aligned"
    return added + bias.double()


def _scores(q: Tensor, k: Tensor, added: Tensor, scale: float) -> Tensor:
    for tensor in (q, k):
        assert tensor.stride(3) == 1 and tensor.storage_offset() * tensor.element_size() % 16 == 0
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
    return q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * scale + added


def _forward(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    return weights @ v.double().repeat_interleave(scores.shape[1] // v.shape[1], 1), lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor, added: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (tensor.double().repeat_interleave(group, 1) for tensor in (k, v))
    weights = torch.exp(_scores(q, k, added, scale) - lse[..., None].double())
    delta = (grad.double() * out.double()).sum(-1, keepdim=True)
    grad_scores = weights * (grad.double() @ wide_v.transpose(2, 3) - delta)
    dq = grad_scores @ wide_k * scale
    dk, dv = grad_scores.transpose(2, 3) @ q.double() * scale, weights.transpose(2, 3) @ grad.double()
    dk, dv = (tensor.unflatten(1, (-1, group)).sum(2) for tensor in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)

"""Attention of a few tokens at random shapes: how often it is slower than torch's, and by how much.

Calls of 10 to 3000 microseconds, where what is done around the kernels counts: 1 to 128 queries over 8 to 200 keys, float32, one thread,
with and without gradients. Contenders take turns in one process, after their results were compared; figures are medians over turns, of
processor time, so that other processes disturb less. Turns are short and many, because a shared processor's speed changes by the second,
and torch is also its own rival: what those two differ in is noise. Shapes come from a seed, so that no kernel can be made for them alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchwrap.attention.attend import attend

TITLE = "attention-short"
NOISE = 0.95
"""A call that takes torch less than this part of our time counts as slower."""
_TURNS, _TURN_NS = 61, 300_000


def measure_short(calls: int = 120, seed: int = 1) -> dict[str, Any]:
    """The comparison, one row for each call.

    Args:
        calls: random shapes, each forward alone and with gradients.
        seed: of the shapes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {name: _measured(name == "training", calls, seed) for name in ("forward", "training")}
    finally:
        torch.set_num_threads(before)
    return {"calls": calls, "seed": seed, "threads": 1, **found}


def table(summary: dict[str, Any]) -> str:
    """Lines for people: of each kind the counts, and the slowest calls."""
    lines = []
    for kind in ("forward", "training"):
        found = summary[kind]
        counts = f"{found['slower']} of {summary['calls']} under {NOISE} x torch"
        lines.append(f"{kind}: {counts}, median {found['median']:.2f}, worst {found['worst']:.2f}")
        lines.append(f"  torch against itself: {found['noise']['slower']} under {NOISE}, worst {found['noise']['worst']:.2f}")
        slowest = sorted(found["rows"], key=lambda row: row["ratio"])[:12]
        lines += [f"  {row['ratio']:.2f}  {row['call']}  ours {row['ours_us']:.1f} torch {row['torch_us']:.1f} us" for row in slowest]
    return "\n".join(lines)


def _measured(trains: bool, calls: int, seed: int) -> dict[str, Any]:
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    rows = [_row(trains, chosen) for _ in range(calls)]
    return {**_counted([row["ratio"] for row in rows]), "noise": _counted([row["noise"] for row in rows]), "rows": rows}


def _counted(ratios: list[float]) -> dict[str, float]:
    return {"slower": sum(ratio < NOISE for ratio in ratios), "median": median(ratios), "worst": min(ratios)}


def _row(trains: bool, chosen: random.Random) -> dict[str, Any]:
    queries = chosen.choice([1, 1, 2, 4, chosen.randint(3, 16), chosen.randint(8, 128), chosen.randint(8, 128), chosen.randint(16, 64)])
    keys = chosen.choice([queries if queries > 7 else chosen.randint(8, 200), chosen.randint(8, 200)])
    width = chosen.choice([16, 24, 32, 32, 40, 48, 64, 64, 64, 80, 96, 128])
    heads = kv_heads = chosen.randint(1, 16)
    if chosen.random() < 0.2:
        heads = max(3, heads // 3 * 3)
        kv_heads = heads // 3
    batch = chosen.choice([1, 1, 2, 4, 8])
    inner, with_bias = chosen.random() < 0.5, chosen.random() < 0.4

    def made(count: int, length: int) -> Tensor:
        flat = torch.randn(batch, length, count, width).transpose(1, 2) if inner else torch.randn(batch, count, length, width)
        return flat.requires_grad_(trains)

    q, k, v = made(heads, queries), made(kv_heads, keys), made(kv_heads, keys)
    bias = torch.randn(1, heads, queries, keys) if with_bias else None
    call = f"{batch}x{heads}/{kv_heads}x{queries}x{keys}x{width}{' heads innermost' if inner else ''}{' bias' if with_bias else ''}"
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: attend(q, k, v, bias=bias),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=heads != kv_heads),
    }
    out = attend(q, k, v, bias=bias).detach()
    torch.testing.assert_close(out, runs["torch"](), rtol=1e-4, atol=1e-5, msg=lambda text: f"{call}: {text}")  # type: ignore[arg-type]
    if trains:
        grad = torch.randn_like(out)
        runs = {name: _with_gradients(run, (q, k, v), grad) for name, run in runs.items()}
        for ours, theirs in zip(*(run() for run in runs.values()), strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text: f"{call}: {text}")
    with torch.set_grad_enabled(trains):
        times = _times({**runs, "again": runs["torch"]})
    ratios = {"ratio": times["torch"] / times["ours"], "noise": times["torch"] / times["again"]}
    return {"call": call, "ours_us": times["ours"], "torch_us": times["torch"], **ratios}


def _with_gradients(run: Callable[[], object], inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(run(), inputs, grad)  # type: ignore[arg-type]


def _times(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each, the median over turns."""
    counts = {name: max(2, int(_TURN_NS / max(1000, min(_turn(run, 3) for _ in range(3))))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_TURNS):
        for name, run in runs.items():
            found[name].append(_turn(run, counts[name]) / 1000)
    return {name: median(times) for name, times in found.items()}


def _turn(run: Callable[[], object], count: int) -> float:
    started = time.thread_time_ns()
    for _ in range(count):
        run()
    return (time.thread_time_ns() - started) / count

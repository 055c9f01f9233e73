"""Attention on the CPU: what the dispatcher chooses by itself, against torch and against what transformers makes of torch.

Every row is one shape. Contenders take turns in one process, after their results were compared; a turn that would be shorter than 40
milliseconds is repeated within itself. Ratios are of medians: above 1, ours is faster. Rivals:

* `sdpa`: `F.scaled_dot_product_attention` on the tensors as they are, with `enable_gqa`, and with a bool mask where there is one;
* `transformers`: its sdpa function, with the mask that its models make: none, or bool (B, 1, Sq, Sk); it packs or copies heads itself;
* `packed`: the same with a mask for one query, which then goes without copies of heads;
* `eager`: the textbook form in transformers' way, for softcap and sinks, which no other form of torch has on CPUs.

Masks are made before the clock starts, for all of them: a model makes one for all its layers. Peak memory is measured with the mask, one
process for each figure: `python -m benchmarks.attention ours padded 8192` prints the bytes that one call adds to what is resident.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from statistics import geometric_mean, median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchwrap.attention.attend import attend
from torchwrap.attention.contract import checked
from torchwrap.attention.dispatch import choose
from torchwrap.attention.masks.mask import TileMask

__all__ = ["TITLE", "measure_attention", "table"]

TITLE = "attention[cpu]"
LENGTHS = (1024, 8192)
TURN_S = 0.04
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_DTYPES = {**DTYPES, "float16": torch.float16}
DECODE = ((9, 3, 64, 16384), (9, 3, 64, 65536), (32, 8, 128, 32768), (8, 1, 128, 65536))
"""Hq, Hkv, D, S of single queries: the rows with groups in section 9 of the specification."""
SINGLE = ((1, (8, 8), 64, 64), (1, (8, 8), 64, 512), (4, (12, 12), 64, 128), (1, (9, 3), 64, 2048), (1, (32, 8), 128, 4096))
"""Batch, Hq and Hkv, D, S of single queries with a bias or with gradients."""
DROPOUT = (
    (1, 64, 12, "causal", False), (4, 512, 12, "padded", False), (1, 16, 12, "whole", True), (1, 64, 12, "causal", True),
    (8, 128, 12, "padded", True), (4, 512, 12, "padded", True), (1, 1024, 12, "causal", True), (1, 4096, 2, "causal", True),
)  # fmt: skip
"""Batch, S, H, what is seen, whether with gradients: attention as BERT and GPT-2 train it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One shape: tensors, what each query sees, and who takes part."""

    group: str
    name: str
    heads: tuple[int, int]
    width: int
    q_length: int
    kv_length: int
    dtype: str = "float32"
    batch: int = 1
    mask: Callable[[], TileMask] | None = None
    causal: bool = False
    train: bool = False
    dropout: float = 0.0
    added: tuple[int, ...] | None = None
    """Sizes of a bias that is added to the scores; torch gets it as a float mask, with -inf where keys are hidden."""
    options: dict[str, Any] = field(default_factory=dict)
    rivals: tuple[str, ...] = ("sdpa", "transformers")


def rows() -> Iterator[Row]:
    """All rows, by group."""
    for dtype in DTYPES:
        for heads, kv_heads, width, length in DECODE:
            yield Row(
                group=f"decode {dtype}", name=f"{heads}/{kv_heads}/{width}/{length}", heads=(heads, kv_heads), width=width, q_length=1,
                kv_length=length, dtype=dtype, rivals=("sdpa", "transformers", "packed"),
            )  # fmt: skip
        yield Row(
            group=f"decode without groups {dtype}", name="32/32/128/8192", heads=(32, 32), width=128, q_length=1, kv_length=8192,
            dtype=dtype,
        )  # fmt: skip
    small: dict[str, Any] = {"heads": (9, 3), "width": 64}
    for dtype in DTYPES:
        lengths = (16384, 4096, 8192, 2048)
        yield Row(
            group="decode, padded batch", name=f"{'/'.join(map(str, lengths))} {dtype}", batch=4, q_length=1, kv_length=16384, dtype=dtype,
            mask=lambda: TileMask.padded((16384, 4096, 8192, 2048), 1, 16384), rivals=("sdpa", "packed"), **small,
        )  # fmt: skip
        yield Row(
            group="window 1024 at 8192", name=dtype, q_length=8192, kv_length=8192, dtype=dtype,
            mask=lambda: TileMask.window(1, 8192, 8192, 1024), **small,
        )  # fmt: skip
        yield Row(
            group="padded batch", name=f"2048/256/512/1024 {dtype}", batch=4, q_length=2048, kv_length=2048, dtype=dtype,
            mask=lambda: TileMask.padded((2048, 256, 512, 1024), 2048, 2048), **small,
        )  # fmt: skip
        for queries in (8, 64, 256):
            yield Row(
                group="chunked", name=f"{queries} over 16384 {dtype}", q_length=queries, kv_length=16384, dtype=dtype,
                mask=lambda queries=queries: TileMask.causal(1, queries, 16384), **small,  # type: ignore[misc]
            )  # fmt: skip
        for length in (512, 2048, 4096):
            yield Row(group="dense causal", name=f"{length} {dtype}", q_length=length, kv_length=length, dtype=dtype, causal=True, **small)
        yield Row(
            group="training, window 512 at 4096", name=dtype, q_length=4096, kv_length=4096, dtype=dtype, train=True,
            mask=lambda: TileMask.window(1, 4096, 4096, 512), **small,
        )  # fmt: skip
        yield Row(
            group="training, dense causal", name=f"2048 {dtype}", q_length=2048, kv_length=2048, dtype=dtype, causal=True, train=True,
            **small,
        )  # fmt: skip
    for dtype in DTYPES:
        for batch, length, heads, kind, train in DROPOUT:
            lengths = [length - row * length // (2 * batch) for row in range(batch)]
            yield Row(
                group="training, dropout" if train else "dropout", name=f"{batch}x{heads}x{length} {kind} {dtype}", batch=batch,
                heads=(heads, heads), width=64, q_length=length, kv_length=length, dtype=dtype, dropout=0.1, causal=kind == "causal",
                mask=(lambda lengths=lengths: TileMask.padded(lengths, lengths[0], lengths[0])) if kind == "padded" else None,  # type: ignore[misc]
                train=train, rivals=("sdpa",),
            )  # fmt: skip
    for dtype in DTYPES:
        for windows, heads, places, pictures in ((256, 3, 49, 4), (64, 12, 49, 16), (64, 24, 64, 16)):
            sizes: dict[str, Any] = {
                "batch": windows, "heads": (heads, heads), "width": 32, "q_length": places, "kv_length": places, "dtype": dtype,
                "added": (1, heads, places, places), "rivals": ("sdpa",),
                "mask": lambda windows=windows, places=places, pictures=pictures: _shifted(windows, places, pictures),
            }  # fmt: skip
            for train in (False, True):
                group = "training, windows of pictures" if train else "windows of pictures"
                yield Row(group=group, name=f"{windows}x{heads}x{places} {dtype}", train=train, **sizes)
        for batch, heads, length in ((1, 8, 128), (4, 8, 512), (1, 12, 1024)):
            sizes = {
                "batch": batch, "heads": (heads, heads), "width": 64, "q_length": length, "kv_length": length, "dtype": dtype,
                "rivals": ("sdpa",),
            }  # fmt: skip
            for train in (False, True):
                group = "training, bias or hidden keys" if train else "bias or hidden keys"
                name = f"{batch}x{heads}x{length} {dtype}"
                yield Row(group=group, name=f"bias {name}", train=train, added=(1, heads, length, length), **sizes)
                yield Row(group=group, name=f"padding as numbers {name}", train=train, added=(batch, 1, 1, length), **sizes)
                yield Row(group=group, name=f"noise {name}", train=train, mask=lambda length=length: _noise(length, 1), **sizes)  # type: ignore[misc]
                yield Row(group=group, name=f"blocks {name}", train=train, mask=lambda length=length: _noise(length, 64), **sizes)  # type: ignore[misc]
    for dtype in ALL_DTYPES:
        for batch, (heads, kv_heads), width, length in SINGLE:
            sizes = {
                "batch": batch, "heads": (heads, kv_heads), "width": width, "q_length": 1, "kv_length": length, "dtype": dtype,
                "rivals": ("sdpa",),
            }  # fmt: skip
            name = f"{batch}x{heads}/{kv_heads}x{width}x{length} {dtype}"
            yield Row(group="training, one query", name=name, train=True, **sizes)
            for train in (False, True):
                group = "training, one query with a bias" if train else "one query with a bias"
                yield Row(group=group, name=name, train=train, added=(1, heads, 1, length), **sizes)
    causal: dict[str, Any] = {"q_length": 4096, "kv_length": 4096, "mask": lambda: TileMask.causal(1, 4096, 4096), "rivals": ("eager",)}
    yield Row(group="softcap and sinks at 4096", name="softcap", options={"softcap": 50.0}, **causal, **small)
    yield Row(group="softcap and sinks at 4096", name="sinks", options={"sinks": torch.linspace(-1, 1, 9)}, **causal, **small)


def measure_attention(*, rounds: int = 5, only: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Seconds of every row and contender.

    Args:
        rounds: turns of each contender; at least 5 for figures.
        only: rows whose group or name contains this.
        say: told of each row when it is done.

    Returns:
        `rows`: by "group: name", seconds of all turns, ratios of medians to each rival and to the best, and the greatest difference of
        results; `geometric`: by group, the geometric means of the ratios; `worst`: by group, the least ratios; `peak_bytes`: what one call
        adds to the resident memory (batch of 2, 9/3 heads, float32; only if all rows are measured) and `peak_ratio`: ours / transformers'.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[dict[str, float]]] = {}
    try:
        for row in rows():
            title = f"{row.group}: {row.name}"
            if only is not None and only not in title:
                continue
            found[title] = _measured(row, rounds)
            groups.setdefault(row.group, []).append(found[title]["ratio"])
            say(
                f"{title}: "
                + ", ".join(f"{name} {value:.2f}x" for name, value in found[title]["ratio"].items())
                + f"; {found[title]['by']}"
            )
    finally:
        torch.set_num_threads(threads)
    peaks = (
        {}
        if only is not None
        else {f"{kind} {length}": _peaks(kind, length) for kind in ("padded", "window", "causal") for length in LENGTHS}
    )
    names = {group: sorted(set.intersection(*(set(ratios) for ratios in many))) for group, many in groups.items()}
    return {
        "title": TITLE,
        "threads": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "rows": found,
        "geometric": {group: {name: geometric_mean(row[name] for row in groups[group]) for name in names[group]} for group in groups},
        "worst": {group: {name: min(row[name] for row in groups[group]) for name in names[group]} for group in groups},
        "peak_bytes": peaks,
        "peak_ratio": {kind: sizes["ours"] / sizes["transformers"] for kind, sizes in peaks.items()},
        "equal": all(row["difference"] <= row["tolerance"] for row in found.values()),
    }


def table(summary: dict[str, Any]) -> str:
    """Every row, and the geometric means, as text."""
    lines = [f"{'row':<62}{'ours, ms':>10}  ratio to each rival (quartiles of ours, ms)"]
    for title, row in summary["rows"].items():
        ours = sorted(row["seconds"]["ours"])
        ratios = "  ".join(f"{name} {value:.2f}x" for name, value in row["ratio"].items())
        lines.append(
            f"{title:<62}{median(ours) * 1e3:>10.3f}  {ratios}  ({ours[len(ours) // 4] * 1e3:.3f} to {ours[-1 - len(ours) // 4] * 1e3:.3f})"
        )
    for group, means in summary["geometric"].items():
        lines.append(f"geometric mean, {group:<46}  " + "  ".join(f"{name} {value:.2f}x" for name, value in means.items()))
    for kind, peaks in summary["peak_bytes"].items():
        lines.append(f"peak memory of one call, {kind:<37}  " + "  ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in peaks.items()))
    return "\n".join(lines)


def _measured(row: Row, rounds: int) -> dict[str, Any]:
    contenders, live, by = _contenders(row)
    # Each drops other weights: results are compared where none are dropped.
    compared = _contenders(replace(row, dropout=0.0))[0] if row.dropout else contenders
    # Rows that see nothing differ by contract: ours are 0.
    results = {
        name: [tensor.float() * (live if tensor.shape[1] == row.q_length else 1.0) for tensor in run()] for name, run in compared.items()
    }
    tolerance = 2e-4 if row.dtype == "float32" else 6e-2
    difference = max(
        float((mine - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
        for name, other in results.items()
        if name != "ours"
        for mine, theirs in zip(results["ours"], other, strict=True)
    )
    del results, compared
    assert difference <= tolerance, f"{row.group}: {row.name}: results differ by {difference}, not timed"
    repeats = {name: max(1, math.ceil(TURN_S / _seconds(run, 1))) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for index in range(rounds):
        for name in (*names[index % len(names) :], *names[: index % len(names)]):
            seconds[name].append(_seconds(contenders[name], repeats[name]))
    medians = {name: median(values) for name, values in seconds.items()}
    ratio = {name: value / medians["ours"] for name, value in medians.items() if name != "ours"}
    ratio["best"] = min(ratio.values())
    return {"seconds": seconds, "ratio": ratio, "difference": difference, "tolerance": tolerance, "by": by}


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def _contenders(row: Row) -> tuple[dict[str, Callable[[], tuple[Tensor, ...]]], Tensor, str]:
    """What each contender runs, which rows see a key (as out), and whom the dispatcher chose."""
    torch.manual_seed(0)
    dtype, (heads, kv_heads) = ALL_DTYPES[row.dtype], row.heads
    q = torch.randn(row.batch, row.q_length, heads, row.width).to(dtype).transpose(1, 2).requires_grad_(row.train)
    k, v = (torch.randn(row.batch, kv_heads, row.kv_length, row.width).to(dtype).requires_grad_(row.train) for _ in range(2))
    tile = row.mask() if row.mask is not None else TileMask.causal(1, row.q_length, row.kv_length) if row.causal else None
    live = torch.ones(1, row.q_length, dtype=torch.bool) if tile is None else tile.live_rows()
    seen = None if row.mask is None or tile is None else tile.rectangles((0, row.q_length), (0, row.kv_length))
    options = dict(row.options)
    if row.added is not None:
        options["bias"] = bias = torch.randn(row.added).to(dtype)
        seen = (bias if seen is None else torch.where(seen, bias, -math.inf)).expand(-1, -1, row.q_length, -1)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    forms: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: attend(q, k, v, mask=tile, dropout=row.dropout, **options).transpose(1, 2).contiguous(),
        "sdpa": lambda: _sdpa(q, k, v, seen, row.causal, row.dropout).transpose(1, 2).contiguous(),
        "transformers": lambda: _transformers()(module, q, k, v, seen)[0],
        "packed": lambda: _transformers()(module, q, k, v, seen if seen is not None else _everything(row))[0],
        "eager": lambda: _eager(q, k, v, seen, **row.options).transpose(1, 2).contiguous(),
    }  # fmt: skip
    call = checked(q, k, v, mask=tile, dropout=row.dropout, **options)

    def of(form: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            if row.train:
                out = form()
                return (out.detach(), *torch.autograd.grad(out.sum(), (q, k, v)))
            with torch.no_grad():
                return (form(),)

        return run

    return {name: of(forms[name]) for name in ("ours", *row.rivals)}, live[:, :, None, None], choose(call).reason


def _shifted(windows: int, places: int, pictures: int) -> TileMask:
    """Windows of pictures after a shift by half a window: what comes from opposite edges does not see each other (Swin)."""
    side, across = math.isqrt(places), math.isqrt(windows // pictures)
    place = torch.arange(side * across)
    band = (place >= side * across - side).int() + (place >= side * across - side // 2).int()
    regions = (band[:, None] * 3 + band).view(across, side, across, side).transpose(1, 2).reshape(across * across, places)
    regions = regions.repeat(pictures, 1)
    return TileMask(windows, places, places, q_segments=regions, k_segments=regions)


def _noise(length: int, block: int) -> TileMask:
    """Half of the squares of `block` places hidden, none of the diagonal."""
    seen = (torch.rand(length // block, length // block) < 0.5) | torch.eye(length // block, dtype=torch.bool)
    return TileMask.from_dense(seen.repeat_interleave(block, 0).repeat_interleave(block, 1)[None, None])


def _everything(row: Row) -> Tensor:
    return torch.ones(row.batch, 1, row.q_length, row.kv_length, dtype=torch.bool)


def _transformers() -> Callable[..., tuple[Tensor, None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal, enable_gqa=True)


def _eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """As the models of transformers with softcap (Gemma 2) and sinks (gpt-oss) do it."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if seen is not None:
        scores = scores + torch.where(seen, 0.0, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], -1)
    return torch.softmax(scores, -1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype) @ v


def _peaks(kind: str, length: int) -> dict[str, int]:
    """Bytes of one call of ours and of transformers', each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.attention"]
    names = ("ours", "transformers")
    return {
        name: int(subprocess.run([*command, name, kind, str(length)], check=True, capture_output=True, text=True).stdout) for name in names
    }


@torch.no_grad()
def _peak(name: str, kind: str, length: int) -> int:
    """What one call with its mask adds to the resident memory of this process."""
    whole_q = torch.randn(2, length, 9, 64).transpose(1, 2)
    whole_k, whole_v = torch.randn(2, 3, length, 64), torch.randn(2, 3, length, 64)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)

    def run(length: int) -> Tensor:
        q, k, v = (tensor[:, :, :length] for tensor in (whole_q, whole_k, whole_v))
        shorter = length * 2 // 3
        if name == "ours":
            masks = {
                "causal": lambda: TileMask.causal(1, length, length),
                "padded": lambda: TileMask.padded((length, shorter), length, length),
                "window": lambda: TileMask.window(1, length, length, 512),
                "none": lambda: None,
            }
            return attend(q, k, v, mask=masks[kind]()).transpose(1, 2).contiguous()
        position = torch.arange(length)
        seen = None if kind in ("causal", "none") else (position <= position[:, None])[None, None]
        if kind == "window":
            seen = seen & (position > position[:, None] - 512)
        if kind == "padded":
            seen = seen & (position >= torch.tensor([0, length - shorter])[:, None, None, None])
        return _transformers()(module, q, k, v, seen)[0]

    run(32)  # loads code, also that of the mask (4 MiB of torch's pages), and starts threads
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak begins at what is resident now
    before = _status("VmRSS")
    run(length)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(_peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))

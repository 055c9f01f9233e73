"""Attention on one CUDA card: `attend` by the shipped table, by measurement, with our Triton kernels and by name, beside torch's.

Contenders take turns in one process on the same tensors. A sample is the time between two events around as many calls as take 10 ms;
figures are medians of samples. Operations are those of visible pairs of query and key (4 D for each in a forward, 10 D in a backward), so
that a kernel which computes hidden pairs shows fewer per second; decoding is stated as the rate at which keys and values are read. Rivals
that cannot run a case are recorded with their reason. Masks of rivals are built before timing.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.statistics import ratio_of_medians, spread
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import checked
from torchwrap.attention.dispatch import choose
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.settings import Settings

__all__ = ["CASES", "Case", "measure"]

Contender = Callable[[], Any]
FIGURES = f"{tempfile.gettempdir()}/torchwrap-figures-{os.getpid()}"
SETTINGS = {"auto": Settings(tune="off"), "tuned": Settings(tune="measure", tune_dir=FIGURES)}
OWN = ("auto", "tuned", "triton")
BY_NAME = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flash_attn", "flex")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed.

    Attributes:
        rows: Sq.
        columns: Sk.
        batch: B.
        heads: Hq.
        kv_heads: Hkv.
        width: D.
        mask: makes the mask; None: everything is visible.
        options: softcap, or sinks=True.
        backward: the backward is timed instead of the forward.
    """

    rows: int
    columns: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    mask: Callable[[], TileMask] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    backward: bool = False


def _causal(length: int, batch: int = 1) -> Callable[[], TileMask]:
    return lambda: TileMask.causal(batch, length, length, device="cuda")


def _window(length: int, window: int) -> Callable[[], TileMask]:
    return lambda: TileMask.window(1, length, length, window, device="cuda")


def _padded(lengths: list[int], length: int) -> Callable[[], TileMask]:
    return lambda: TileMask.padded(lengths, length, length, device="cuda")


_LENGTHS = [512, 1024, 1536, 2048, 2560, 3072, 3584, 4096]
CASES: dict[str, Case] = {
    **{f"causal {length // 1024}K": Case(rows=length, columns=length, mask=_causal(length)) for length in (4096, 8192, 16384, 32768)},
    "causal 8K MHA width 64": Case(rows=8192, columns=8192, heads=16, kv_heads=16, width=64, mask=_causal(8192)),
    "window 1K at 32K": Case(rows=32768, columns=32768, heads=16, kv_heads=4, mask=_window(32768, 1024)),
    "padded 1:8": Case(rows=4096, columns=4096, batch=8, mask=_padded(_LENGTHS, 4096)),
    "softcap 8K": Case(rows=8192, columns=8192, heads=8, kv_heads=4, mask=_causal(8192), options={"softcap": 50.0}),
    "sinks 8K": Case(rows=8192, columns=8192, heads=8, kv_heads=4, mask=_window(8192, 1024), options={"sinks": True}),
    **{f"decode {length // 1024}K": Case(rows=1, columns=length) for length in (16384, 65536, 262144)},
    "decode 64K batch 8": Case(rows=1, columns=65536, batch=8),
    "assisted 8 tokens at 64K": Case(rows=8, columns=65536, mask=lambda: TileMask.causal(1, 8, 65536, device="cuda")),
    "causal 8K backward": Case(rows=8192, columns=8192, heads=16, kv_heads=16, mask=_causal(8192), backward=True),
    "window 1K at 16K backward": Case(rows=16384, columns=16384, heads=16, kv_heads=4, mask=_window(16384, 1024), backward=True),
}


def measure(name: str, *, rounds: int = 5, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One case, all contenders.

    Args:
        name: of `CASES`.
        rounds: samples of each contender, taken in turns.
        dtype: of the inputs.

    Returns:
        seconds, rate and peak device bytes of each contender; `ratio`, time of a rival over ours ("triton"), `auto_ratio` and
        `tuned_ratio`, time of the fastest rival over that of the dispatcher's choice by table and by measurement; `chosen`, what those
        were and why; `error`, of ours against float32.
    """
    case = CASES[name]
    made = _Inputs(case, dtype)
    contenders, failed = made.contenders()
    samples: dict[str, list[float]] = {contender: [] for contender in contenders}
    counts, peaks = {}, {}
    for contender, run in list(contenders.items()):
        try:
            counts[contender], peaks[contender] = _warm(run)
        except Exception as error:  # a rival that cannot run here is a result to record; our own failure is raised
            if contender in OWN:
                raise
            failed[contender] = f"{type(error).__name__}: {str(error)[:200]}"
            del contenders[contender], samples[contender]
    order = list(contenders)
    for _ in range(rounds):
        for contender in order:
            samples[contender].append(_sample(contenders[contender], counts[contender]))
        order.append(order.pop(0))
    work = made.bytes_read() if case.rows == 1 else made.operations()
    unit = "bytes_per_s" if case.rows == 1 else "operations_per_s"
    rivals = [contender for contender in contenders if contender not in OWN]
    best = min(rivals, key=lambda rival: median(samples[rival])) if rivals else None
    return {
        "title": f"attention-cuda[{name}]",
        "contenders": {
            contender: {"seconds": spread(seconds), unit: work / median(seconds), "peak_device_bytes": peaks[contender]}
            for contender, seconds in samples.items()
        },
        "failed": failed,
        "best_rival": best,
        "ratio": {rival: ratio_of_medians(samples[rival], samples["triton"]) for rival in rivals},
        "auto_ratio": ratio_of_medians(samples[best], samples["auto"]) if best else None,
        "tuned_ratio": ratio_of_medians(samples[best], samples["tuned"]) if best else None,
        "chosen": made.chosen(),
        "error": made.error(),
    }


class _Inputs:
    """Tensors of a case and what is run on them."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        source = torch.Generator(device="cuda").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source, device="cuda").to(dtype).requires_grad_(case.backward)

        self.case = case
        self.q = random(case.batch, case.heads, case.rows, case.width)
        self.k = random(case.batch, case.kv_heads, case.columns, case.width)
        self.v = random(case.batch, case.kv_heads, case.columns, case.width)
        self.mask = case.mask() if case.mask else None
        self.options = dict(case.options)
        if self.options.get("sinks"):
            self.options["sinks"] = torch.randn(case.heads, generator=source, device="cuda").to(dtype)
        self.grad = torch.randn(case.batch, case.heads, case.rows, case.width, generator=source, device="cuda").to(dtype)

    def contenders(self) -> tuple[dict[str, Contender], dict[str, str]]:
        """What is timed, and why some rivals are not."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        found = {name: self._timed(lambda name=name: self._ours(SETTINGS.get(name, name))) for name in OWN}
        # What `attend` adds to a kernel of torch's shows beside `sdpa-...` below; the last two are rivals that only it calls here.
        found |= {f"attend {name}": self._timed(lambda name=name: self._ours(name)) for name in BY_NAME}
        if self.options:
            found["eager"] = self._timed(lambda: self._ours("eager"))
            return found, {}
        is_causal = self.mask is not None and self.mask.plain == "causal" and self.case.rows == self.case.columns
        pairs = self.case.batch * self.case.rows * self.case.columns
        if self.mask is not None and not is_causal and pairs > 1 << 34:
            return found, {"sdpa": "its mask would need more than 16 GiB"}
        dense = None
        if self.mask is not None and not is_causal:
            dense = self.mask.rectangles((0, self.case.rows), (0, self.case.columns))

        def torch_attention(backend: SDPBackend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=dense, is_causal=is_causal, enable_gqa=True)

        kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
        for name, kernel in kernels.items():
            found[f"sdpa-{name}"] = self._timed(lambda kernel=kernel: torch_attention(kernel))
        return found, {}

    def error(self) -> float:
        """Largest difference of our output from that in float32, on the first queries: all of them would need all scores."""
        rows = min(self.case.rows, 256)
        with torch.no_grad():
            wide = [tensor.detach().float() for tensor in (self.q[:, :, -rows:], self.k, self.v)]
            options = {key: value.float() if isinstance(value, Tensor) else value for key, value in self.options.items()}
            part = None if self.mask is None else self.mask.sub(rows=(self.case.rows - rows, self.case.rows))
            exact = attend(wide[0], wide[1], wide[2], mask=part, backend="eager", **options)
            return float((self._ours("triton")[:, :, -rows:].float() - exact).abs().max())

    def operations(self) -> float:
        """Multiplications and additions of visible pairs."""
        visible = self.case.batch * self.case.rows * self.case.columns
        if self.mask is not None:
            spans = self.mask.spans()
            visible = int((spans.end - spans.first).clamp(min=0).sum(dtype=torch.int64)) * (self.case.batch // spans.first.shape[0])
        return visible * self.case.heads * self.case.width * (10 if self.case.backward else 4)

    def bytes_read(self) -> float:
        """Keys and values, once."""
        return float(self.k.nbytes + self.v.nbytes)

    def chosen(self) -> dict[str, str]:
        """Why the dispatcher took what it took."""
        with torch.no_grad():
            call = checked(self.q, self.k, self.v, mask=self.mask, **self.options)
        return {name: choose(call, SETTINGS[name], "backward" if self.case.backward else "forward").reason for name in SETTINGS}

    def _ours(self, backend: str | Settings) -> Tensor:
        return attend(self.q, self.k, self.v, mask=self.mask, backend=backend, **self.options)

    def _timed(self, forward: Callable[[], Tensor]) -> Contender:
        if not self.case.backward:
            return forward
        outputs: list[Tensor] = []

        def backward() -> Any:
            if not outputs:
                outputs.append(forward())
            return torch.autograd.grad(outputs[0], (self.q, self.k, self.v), self.grad, retain_graph=True)

        return backward


def _warm(run: Contender) -> tuple[int, int]:
    """Calls that take 10 ms together, and the peak of one call in bytes."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    once = _sample(run, 3)
    return max(1, round(0.01 / once)), peak


def _sample(run: Contender, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / count

"""How often a product computed in tiles differs from the whole one, and by how much: the figures of docs/offload.md, no timing.

`python -m benchmarks.tile_rounding float32 --threads 1 2 16 --seconds 60`
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from itertools import pairwise

import torch
from torch.nn.functional import linear

from torchwrap.stream.tiles import ROWS

WIDTHS = (64, 512, 576, 1000, 1536, 3072, 4096, 4099, 8192, 11008, 14336, 16384)
OUTPUTS = (1024, 1536, 2000, 5000, 8192, 10007, 16384, 30522, 50257)
BATCHES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 64, 65, 96, 100, 128, 200, 256)
TILES = tuple(ROWS * times for times in (1, 2, 3, 4, 8, 10, 16, 32, 64, 128))
ELEMENTS = 70_000_000


def tiled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
    """`linear(x, weight, bias)` in blocks of `rows` rows; no block has fewer than 64. Shapes: x (M, K), weight (N, K), bias (N,)."""
    edges = [*range(0, weight.shape[0] - ROWS, rows), weight.shape[0]]
    spans = [slice(first, last) for first, last in pairwise(edges)]
    return torch.cat([linear(x, weight[span], None if bias is None else bias[span]) for span in spans], -1)


def main() -> None:
    """Compare random shapes for a while and print counts by threads and tile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    dtype, draw = getattr(torch, asked.dtype), random.Random(asked.seed)
    torch.manual_seed(asked.seed)
    compared: Counter[tuple[int, int]] = Counter()
    differ: Counter[tuple[int, int]] = Counter()
    largest, end = 0.0, time.monotonic() + asked.seconds
    while time.monotonic() < end:
        width = draw.choice(WIDTHS)
        outputs = min(draw.choice(OUTPUTS), max(1024, ELEMENTS // width))
        weight = torch.randn(outputs, width).to(dtype)
        bias = torch.randn(outputs).to(dtype) if draw.random() < 0.5 else None
        for _ in range(4):
            threads, x = draw.choice(asked.threads), torch.randn(draw.choice(BATCHES), width).to(dtype)
            torch.set_num_threads(threads)
            whole = linear(x, weight, bias)
            for rows in draw.sample([rows for rows in TILES if 2 * rows <= outputs], 3):
                compared[threads, rows] += 1
                if not torch.equal(got := tiled(x, weight, bias, rows), whole):
                    differ[threads, rows] += 1
                    largest = max(largest, float((got.double() - whole.double()).abs().max() / whole.double().abs().max()))
    for threads, rows in sorted(compared):
        print(f"{threads:>3} threads, tiles of {rows:>5} rows: {differ[threads, rows]:>4} of {compared[threads, rows]:>4} differ")
    print(f"largest difference: {largest:.1e} of the largest output; {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    main()

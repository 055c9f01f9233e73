"""How close the native decode kernel comes to the speed of the memory, and to torch, on the shapes of single queries.

`python -m benchmarks.native_decode` prints one line per shape: bytes of K and V over the kernel's time, the machine's reading speed with
the same threads in the same minute, and the time of `F.scaled_dot_product_attention(enable_gqa=True)` over ours. Turns alternate;
figures are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from torchwrap import native
from torchwrap.native.library import library

SHAPES = ((9, 3, 64, 16384), (9, 3, 64, 65536), (32, 8, 128, 32768), (8, 1, 128, 65536), (32, 32, 128, 8192))
READ_BYTES = 256 << 20


def seconds(action: Callable[[], object]) -> float:
    """One turn, on the clock on the wall."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> str:
    """One line of the table."""
    heads, kv_heads, width, keys = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, count, length, width, generator=generator).to(dtype)
        for count, length in ((heads, 1), (kv_heads, keys), (kv_heads, keys))
    )
    rows = q.view(1, kv_heads, heads // kv_heads, width)
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    turns: dict[str, Callable[[], object]] = {
        "ours": lambda: native.decode(rows, k, v, scale=width**-0.5),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "read": lambda: library().torchwrap_read(memory.data_ptr(), memory.numel(), torch.get_num_threads()),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, action in turns.items():
            taken = seconds(action)
            if number:  # the first turn finds cold pages
                times[name].append(taken)
    ours, torchs, read = (median(times[name]) for name in ("ours", "torch", "read"))
    rate, most = (k.nbytes + v.nbytes) / ours / 1e9, READ_BYTES / read / 1e9
    name = "/".join(map(str, shape))
    kind = str(dtype).removeprefix("torch.")
    return f"{kind:9} {name:16} {ours * 1e3:8.2f} ms  {rate:6.1f} of {most:5.1f} GB/s ({rate / most:4.0%})  torch {torchs / ours:5.1f}x"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native_decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"threads {arguments.threads}, {native.describe()}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES:
            print(measure(shape, dtype, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()

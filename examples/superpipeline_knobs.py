"""Peak and time over (k, k'): predicted from one measured pass, held against runs, drawn as superpipeline_knobs.png.

A stack of transformer blocks runs under several windows. What is present is counted, passes are timed, and the outputs are compared with
those of the plain model. `python superpipeline_knobs.py [width] [blocks]`.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import torch

import torchwrap as tw
from torchwrap.superpipeline.picture import draw, grid

width = int(sys.argv[1]) if len(sys.argv) > 1 else 256
depth = int(sys.argv[2]) if len(sys.argv) > 2 else 10
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)
model = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()
x = torch.randn(4, 64, width)


def seconds(passes: int) -> float:
    """Median of single passes."""
    times = []
    for _ in range(passes):
        began = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - began)
    return sorted(times)[passes // 2]


with torch.inference_mode():
    expected = model(x)
    equal, runs = True, {}
    tw.superpipeline(model, k=1)
    handle = tw.handle_of(model, "superpipeline")
    model(x)
    handle.tune()
    model(x)
    predicted = [handle.predict(k=k, k_prime=k_prime) for k, k_prime in grid(depth)]
    print(handle.explain())
    tw.unwrap(model)
    print(f"{'k':>3} {'k_prime':>7} {'predicted MiB':>14} {'held MiB':>9} {'predicted':>10} {'measured':>9}")
    for guess in predicted:
        if guess.k_prime not in (1, guess.k) or guess.k % 3 != 1:
            continue
        tw.superpipeline(model, k=guess.k, k_prime=guess.k_prime, record=True)
        equal &= all(torch.equal(model(x), expected) for _ in range(2))
        record = tw.handle_of(model, "superpipeline").timeline
        held = max((present for _, present in record.samples), default=record.base_bytes)
        runs[guess.k, guess.k_prime] = (held, seconds(7))
        tw.unwrap(model)
        print(
            f"{guess.k:>3} {guess.k_prime:>7} {guess.device_bytes / 2**20:>14.2f} {held / 2**20:>9.2f} "
            f"{guess.seconds_per_pass:>9.4f}s {runs[guess.k, guess.k_prime][1]:>8.4f}s"
        )
if importlib.util.find_spec("matplotlib"):
    Path("superpipeline_knobs.png").write_bytes(draw(predicted, title=f"{depth} blocks of width {width}", runs=runs))
print(f"outputs equal: {equal}")
sys.exit(not equal)

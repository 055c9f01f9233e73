"""Is attention right on this machine, and how fast? Every back end that runs here against float64, into one JSON file.

For owners of cards the project has never seen, above all V100 and T4: `python verify_on_device.py [results.json]`. Law: at most twice the
error of the definition in the same dtype. Times are medians of seven, interleaved, on cards only. The hash tells an edited file.
What the dispatcher measures is kept for this machine.
"""

import functools
import hashlib
import itertools
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from torchwrap.attention.contract import Call, checked
from torchwrap.attention.dispatch import BACKENDS, backend, choose
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.settings import Settings
from torchwrap.attention.tune import tune
from torchwrap.core.errors import TorchwrapError

device, size = ("cuda", 8) if torch.cuda.is_available() else ("cpu", 1)
CASES = {  # batch, heads, key heads, queries, keys, width, window
    "causal": (1, 8, 2, 128 * size, 128 * size, 64, None),
    "causal, 128 wide": (2, 4, 4, 100 * size, 100 * size, 128, None),
    "window": (1, 4, 4, 128 * size, 128 * size, 64, 50),
    "decoding": (2, 8, 2, 1, 512 * size, 128, None),
}


def everything(name: str, call: Call, grad: torch.Tensor) -> list[torch.Tensor]:
    out, lse = backend(name).forward(call)
    return [out, *backend(name).backward(call, out, lse, grad.to(out.dtype), None)[:3]]


def milliseconds(runs: dict[str, functools.partial[object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(7 if device == "cuda" else 0), runs.items()):
        times[name].append(1e3 * Timer("run()", globals={"run": run}).timeit(1).median)
    return {name: statistics.median(taken) for name, taken in times.items() if taken}


torch.manual_seed(0)
results, equal = [], True
for dtype, (case, shape) in itertools.product((torch.float16, torch.bfloat16, torch.float32), CASES.items()):
    batch, heads, kv_heads, queries, keys, width, window = shape
    q, grad = torch.randn(2, batch, heads, queries, width, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, keys, width, device=device, dtype=dtype)
    mask = TileMask(batch, queries, keys, right=0, left=None if window is None else window - 1, device=device)
    call = checked(q, k, v, mask=mask)
    exact = everything("eager", replace(call, q=q.double(), k=k.double(), v=v.double()), grad)
    rounded = everything("eager", call, grad)
    laws = [2 * (low.double() - high).abs().max().item() + 1e-6 for low, high in zip(rounded, exact, strict=True)]
    shares, refused = {"eager": 0.5}, {name: backend(name).refuses(call) for name in BACKENDS if name != "eager"}
    for name in (name for name in list(refused) if refused[name] is None):
        try:
            made = zip(everything(name, call, grad), exact, laws, strict=True)
            shares[name] = max((our.double() - high).abs().max().item() / law for our, high, law in made)
        except (TorchwrapError, RuntimeError) as error:
            refused[name], equal = str(error), False
    runs = {name: functools.partial(everything, name, call, grad) for name in shares}
    dense = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    runs["torch, forward"] = functools.partial(dense, q, k, v, mask.rectangles((0, queries), (0, keys)))
    runs |= {f"{name}, forward": functools.partial(backend(name).forward, call) for name in shares}
    equal &= all(shares.get(name, 0) <= 1 for name in ("cpu", "triton", "cuda_mma", "eager"))  # others are shown, not judged
    results.append({"case": [case, *shape, str(dtype)], "share of the law": shares, "refused": refused, "ms": milliseconds(runs)})
    tuned = tune([call], train=True) if device == "cuda" else []
    results[-1] |= {"by the table": choose(call, Settings(tune="off")).backend.name, "measured": [*map(str, tuned)]}
    print(case, dtype, {name: round(share, 2) for name, share in shares.items()}, results[-1]["ms"])
card = str(torch.cuda.get_device_properties() if device == "cuda" else device)
content = {"device": card, "torch": torch.__version__, "results": results}
content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
Path(*sys.argv[1:] or ["verify_on_device.json"]).write_text(json.dumps(content, indent=1))
print(f"outputs equal: {equal}")

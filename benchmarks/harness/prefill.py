"""Superpipeline in real time on the CPU: a prompt of prefill size through the whole model in memory, and through 0.4 n of its blocks.

The window reads its blocks from the checkpoint on disk past the page cache. The batch is so large that computing a block takes longer
than reading it. Turns alternate A B B A in one process; outputs are compared first. What is compared lies at the same addresses modulo
64, as in fits.py, and for the same reason.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.harness.checkpoints import SHAPES, checkpoint, weight_files
from benchmarks.harness.disk import drop_cached_pages, raw_read_rate
from benchmarks.harness.fits import load_resident
from benchmarks.harness.statistics import ratio_of_medians, spread

__all__ = ["measure_prefill", "title_of"]

SHAPE = "llama-352M-fp32"


def title_of(shape: str = SHAPE) -> str:
    """Title of the run."""
    return f"superpipeline[{shape} prefill]"


@torch.inference_mode()
def measure_prefill(
    *, shape: str = SHAPE, rounds: int = 5, batch: int = 4, tokens: int = 512, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Seconds of a forward with all blocks present and with k = 0.4 n of them, k' being the one that superpipeline chooses.

    Returns:
        `slowdown`: ratio of medians; `saved`: fraction of the blocks' bytes that the slots leave out; `predicted_slowdown` by the measured
        pass; `transfer_over_compute` by the same; `equal_outputs`: logits of all positions.
    """
    import torchwrap

    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = checkpoint(shape)
    files = weight_files(folder)
    drop_cached_pages(files)
    before = raw_read_rate(files)
    try:
        plain = load_resident(folder, aligned=False)
        k = int(0.4 * SHAPES[shape].blocks)
        window = torchwrap.superpipeline.from_pretrained(folder, k=k)
        handle = torchwrap.handle_of(window, "superpipeline")
        ids = torch.randint(3, SHAPES[shape].vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(7))
        models = {"resident": plain, "window": window}
        expected = plain(input_ids=ids, use_cache=False).logits
        # The second pass is measured and k' chosen by it; the third is the first with what was chosen.
        equal = all([torch.equal(window(input_ids=ids, use_cache=False).logits, expected) for _ in range(3)])
        del expected
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for index in range(rounds):
            names = list(models) if index % 2 else list(reversed(models))
            for name in (*names, *reversed(names)):
                began = time.perf_counter()
                models[name](input_ids=ids, use_cache=False, logits_to_keep=1)
                seconds[name].append(time.perf_counter() - began)
            say(f"{title_of(shape)} round {index}: " + ", ".join(f"{name} {median(values):.3f} s" for name, values in seconds.items()))
        profile, stats = handle.profile, handle.stats()
        assert profile is not None
        return {
            "title": title_of(shape),
            "batch": batch,
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "k": handle.knobs.k,
            "k_prime": handle.knobs.k_prime,
            "blocks": handle.knobs.units,
            "equal_outputs": equal,
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "slowdown": ratio_of_medians(seconds["window"], seconds["resident"]),
            "predicted_slowdown": handle.predict().slowdown,
            "transfer_over_compute": sum(profile.transfer_s) / sum(profile.compute_s),
            "saved": 1 - stats["slot_bytes"] / handle.room.block_bytes,
            "held_bytes": stats["held_bytes"],
            "stall_s": stats["stall_s"],
            "raw_bytes_per_s": [before.memory, raw_read_rate(files).memory],
        }
    finally:
        torch.set_num_threads(threads)

"""The rates that a plan needs, measured with the parts that it is for.

A small cache of one layer is attended on the device, on the host, over the link, and with one token on the host; medians of a few steps
give bytes per second of each and the time to wake the host. Measured this way, kernels, threads and copies are those of the later steps.
"""

from __future__ import annotations

import statistics

import torch

from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import Machine
from torchwrap.attention.cooperative.planner import CacheShape, Rates
from torchwrap.attention.cooperative.query import Attend
from torchwrap.attention.cooperative.tiers import Room

__all__ = ["measure_rates"]

ROWS = 512  # queries of the step that measures arithmetic


def measure_rates(
    machine: Machine, shape: CacheShape, dtype: torch.dtype, *, sample_bytes: int = 64 << 20, chunk_bytes: int = 8 << 20, repeats: int = 5,
    workers: int = 1, partial: Attend | None = None,
) -> Rates:  # fmt: skip
    """Measure a machine.

    Args:
        machine: the device and its host.
        shape: of the cache that will be planned; its number of layers does not matter.
        dtype: of keys and values.
        sample_bytes: keys and values to read in one step. Should exceed every cache of the processors.
        chunk_bytes: staging buffer, as for `plan_cache`.
        repeats: steps of each kind, of which the median counts.
        workers: threads of the host.
        partial: as for `TieredCache`.

    Raises:
        BudgetError: the machine has no memory for the sample.

    Cost: `2 * sample_bytes` on the host and `sample_bytes + 2 * chunk_bytes` on the device, for a moment; about `4 * repeats` steps.
    """
    tokens = max(2, sample_bytes // shape.token_bytes)
    chunk = max(1, min(chunk_bytes // shape.token_bytes, tokens))

    def seconds(on_device: int, held: int, streamed: float, rows: int = 1) -> float:
        cache = TieredCache(
            [Room(on_device, 0)], machine=machine, streamed=streamed, chunk_tokens=chunk, workers=workers, partial=partial
        )
        try:
            keys = torch.zeros(shape.batch, shape.kv_heads, held, shape.width, dtype=dtype, device=machine.device)
            values = torch.zeros(shape.batch, shape.kv_heads, held, shape.value_width, dtype=dtype, device=machine.device)
            cache.append(0, keys, values)
            del keys, values
            q = torch.zeros(shape.batch, shape.heads, rows, shape.width, dtype=dtype, device=machine.device)
            times = []
            for _ in range(repeats + 1):
                begin = machine.now()
                cache.attend(0, q)
                times.append(machine.now() - begin)
            return max(statistics.median(times[1:]), 1e-9)
        finally:
            cache.release()

    nbytes = tokens * shape.token_bytes
    near = seconds(tokens, tokens, 0.0)
    wake = seconds(0, 1, 0.0)
    far = seconds(0, tokens, 0.0)
    link = seconds(0, tokens, 1.0)
    device = nbytes / near
    flops = 4 * ROWS * tokens * shape.batch * shape.heads * shape.width / seconds(tokens, tokens, 0.0, ROWS)
    return Rates(
        device=device,
        host=nbytes / max(far - wake, 1e-9),
        # The last chunk is attended after it has arrived.
        link=nbytes / max(link - chunk * shape.token_bytes / device, 1e-9),
        wake_s=wake,
        flops=flops,
    )

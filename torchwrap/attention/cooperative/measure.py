"""The rates that a plan needs, measured with the parts that it is for.

A small cache of one layer is attended on the device, on the host, over the link, and with one token on the host; medians of a few steps
give bytes per second of each and the time to wake the host. Measured this way, kernels, threads and copies are those of the later steps.
"""

from __future__ import annotations

import statistics
import time

import torch

from torchwrap.attention.cooperative.arena import Arena
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.disk import Disk, Shelf
from torchwrap.attention.cooperative.machine import Machine
from torchwrap.attention.cooperative.planner import CacheShape, Rates
from torchwrap.attention.cooperative.query import Attend
from torchwrap.attention.cooperative.tiers import Room

__all__ = ["measure_disk", "measure_rates"]

ROWS = 512  # queries of the step that measures arithmetic
CHUNKS = 64  # of the step that measures the link: with tiny staging buffers all of the sample would take minutes
_LONG_S = 0.002  # such a step is seen beside what its start costs


def measure_rates(
    machine: Machine, shape: CacheShape, dtype: torch.dtype, *, sample_bytes: int = 64 << 20, chunk_bytes: int = 8 << 20, repeats: int = 5,
    workers: int = 1, partial: Attend | None = None, storage: torch.dtype | None = None,
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
        storage: as for `TieredCache`.

    Raises:
        BudgetError: the machine has no memory for the sample.

    Cost: `2 * sample_bytes` on the host and `sample_bytes + 2 * chunk_bytes` on the device, for a moment; about `5 * repeats` steps.
    """
    tokens = max(2, sample_bytes // shape.token_bytes)
    chunk = max(1, min(chunk_bytes // shape.token_bytes, tokens))

    def seconds(on_device: int, held: int, streamed: float, rows: int = 1) -> float:
        cache = TieredCache(
            [Room(on_device, 0)],
            machine=machine,
            streamed=streamed,
            chunk_tokens=chunk,
            workers=workers,
            partial=partial,
            storage=storage,
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

    nbytes, stored = tokens * shape.token_bytes, tokens * shape.host_token_bytes
    near = seconds(tokens, tokens, 0.0)
    wake = seconds(0, 1, 0.0)
    far = seconds(0, tokens, 0.0)
    crossing = min(tokens, CHUNKS * chunk)
    link = seconds(0, crossing, 1.0)
    device = nbytes / near
    # Few keys are enough where that takes long: on a processor all of them would take many seconds.
    many = max(1, tokens // 16)
    prompt = seconds(many, many, 0.0, ROWS)
    if prompt < _LONG_S:
        many, prompt = tokens, seconds(tokens, tokens, 0.0, ROWS)
    flops = 4 * ROWS * many * shape.batch * shape.heads * shape.width / prompt
    return Rates(
        device=device,
        host=stored / max(far - wake, 1e-9),
        # The last chunk is attended after it has arrived.
        link=crossing * shape.host_token_bytes / max(link - chunk * shape.token_bytes / device, 1e-9),
        wake_s=wake,
        flops=flops,
    )


def measure_disk(disk: Disk, *, sample_bytes: int = 32 << 20, repeats: int = 3) -> float:
    """Bytes per second at which blocks come from a disk.

    Args:
        disk: to measure.
        sample_bytes: written once and read `repeats` times.
        repeats: of which the median counts.

    Raises:
        DiskFullError: there is no room for the sample.

    Cost: `sample_bytes` of memory and of the disk, for a moment.
    """
    shelf = Shelf(disk)
    half = torch.ones(1, 1, max(1, sample_bytes // 8), 1, device="cpu")
    shelf.put(Arena(half, half, half.shape[2]))
    try:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            with shelf.pieces(0, half.shape[2])[0].fetched():
                times.append(time.perf_counter() - begin)
        return 2 * half.nbytes / max(statistics.median(times), 1e-9)
    finally:
        shelf.clear()

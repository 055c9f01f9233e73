"""Keys and values on a card and its host: exact, in its memory, with rates measured on the machine itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import CudaMachine
from torchwrap.attention.cooperative.measure import measure_rates
from torchwrap.attention.cooperative.planner import CacheShape, plan_cache
from torchwrap.attention.masks.mask import TileMask

SHAPE = CacheShape(layers=2, batch=1, heads=8, kv_heads=2, width=64, value_width=64, itemsize=4)


@pytest.mark.parametrize("split", ["token", "layer", "upload"])
@pytest.mark.parametrize("rows", [1, 200])
def test_a_divided_cache_gives_what_the_card_alone_gives(split: Any, rows: int) -> None:
    torch.manual_seed(0)
    machine, tokens = CudaMachine(torch.device("cuda")), 20_000
    whole = SHAPE.layers * tokens * SHAPE.token_bytes
    rates = measure_rates(machine, SHAPE, torch.float32, sample_bytes=8 << 20, chunk_bytes=1 << 20, repeats=2)
    plan = plan_cache(
        SHAPE, tokens, device_bytes=whole // 4 + (2 << 20), host_bytes=4 * whole, rates=rates, split=split, recent=512, chunk_bytes=1 << 20
    )
    cache = TieredCache.from_plan(plan, machine, torch.float32)
    keys, values = (torch.randn(1, 2, tokens, 64, device="cuda") for _ in range(2))
    for index in range(SHAPE.layers):
        for first in range(0, tokens, 3000):
            cache.append(index, keys[:, :, first : first + 3000], values[:, :, first : first + 3000])
    q, mask = torch.randn(1, 8, rows, 64, device="cuda"), TileMask.causal(1, rows, tokens, device="cuda")
    expected = attend(q.double(), keys.double(), values.double(), mask=mask)
    for _ in range(3):  # staging buffers are used again
        for index in range(SHAPE.layers):
            found, _ = cache.attend(index, q, mask=mask)
            # The card's own partials may be computed in TF32-like steps; the merge adds nothing to that.
            alone = attend(q, keys, values, mask=mask)
            assert (found - expected).abs().max() <= 2 * (alone - expected).abs().max() + 1e-6
    assert cache.device_bytes == plan.device_bytes and cache.host_bytes == plan.host_bytes
    cache.release()

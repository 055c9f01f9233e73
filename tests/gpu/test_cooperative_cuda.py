"""Keys and values on a card and its host: exact, in its memory, with rates measured on the machine itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.disk import Disk
from torchwrap.attention.cooperative.machine import CudaMachine
from torchwrap.attention.cooperative.measure import measure_rates
from torchwrap.attention.cooperative.planner import CacheShape, plan_cache
from torchwrap.attention.cooperative.training import host_attend
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


@pytest.mark.parametrize("form", ["head", "half", "disk"])
def test_other_forms_give_what_the_card_alone_gives(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    machine, tokens = CudaMachine(torch.device("cuda")), 20_000
    storage = torch.float16 if form == "half" else None
    shape = replace(SHAPE, host_itemsize=2 if storage else None)
    whole = shape.layers * tokens * shape.token_bytes
    rates = measure_rates(machine, shape, torch.float32, sample_bytes=8 << 20, chunk_bytes=1 << 20, repeats=2, storage=storage)
    plan = plan_cache(
        shape, tokens, device_bytes=whole * 5 // 8 + (4 << 20), host_bytes=whole // 6 if form == "disk" else whole, disk_bytes=whole,
        rates=rates, split="head" if form == "head" else "token", recent=512, chunk_bytes=1 << 20, block_bytes=1 << 20,
    )  # fmt: skip
    assert (plan.disk_bytes > 0) == (form == "disk")
    disk = Disk(tmp_path, nbytes=plan.disk_bytes) if plan.disk_bytes else None
    cache = TieredCache.from_plan(plan, machine, torch.float32, workers=2, storage=storage, disk=disk)
    # Numbers that half storage holds exactly: what differs is not the storage.
    keys, values = (torch.randn(1, 2, tokens, 64, device="cuda").half().float() for _ in range(2))
    for index in range(shape.layers):
        for first in range(0, tokens, 3000):
            cache.append(index, keys[:, :, first : first + 3000], values[:, :, first : first + 3000])
    for rows in (1, 200):
        q, mask = torch.randn(1, 8, rows, 64, device="cuda").half().float(), TileMask.causal(1, rows, tokens, device="cuda")
        expected = attend(q.double(), keys.double(), values.double(), mask=mask)
        alone = attend(q, keys, values, mask=mask)
        for _ in range(3):
            for index in range(shape.layers):
                found, _ = cache.attend(index, q, mask=mask)
                assert (found - expected).abs().max() <= 2 * (alone - expected).abs().max() + 1e-6
    cache.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_keys_on_the_host_are_those_of_the_card_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 8, 300, 64, device="cuda", dtype=dtype).requires_grad_()
    k, v = (torch.randn(1, 2, 9000, 64, dtype=dtype, pin_memory=True).requires_grad_() for _ in range(2))
    mask = TileMask.causal(1, 300, 9000, device="cuda")
    near = [leaf.detach().to("cuda").requires_grad_() for leaf in (q, k, v)]
    true = [leaf.detach().double().requires_grad_() for leaf in near]
    weight = torch.randn(1, 8, 300, 64, device="cuda", dtype=dtype)
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad((host_attend(q, k, v, mask=mask, chunk_bytes=1 << 18)[0] * weight).sum(), (q, k, v))
    assert torch.cuda.memory_allocated() - before <= 4 * q.nbytes
    alone = torch.autograd.grad((attend(*near, mask=mask) * weight).sum(), near)
    expected = torch.autograd.grad((attend(*true, mask=mask) * weight.double()).sum(), true)
    for one, other, exact in zip(found, alone, expected, strict=True):
        assert (one.cuda() - exact).abs().max() <= 2 * (other - exact).abs().max() + 1e-6

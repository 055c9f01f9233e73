"""A host that stores keys and values in fewer bytes: what is lost is measured, bounded and reported, and nothing is lost unasked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.attention.cooperative_cases import RATES, error, make, queries, tokens, whole
from tests.attention.virtual import VirtualMachine
from torchwrap import native
from torchwrap.attention.cooperative import cache as cache_module
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import OneMemory
from torchwrap.attention.cooperative.planner import CacheShape, Rates, plan_cache
from torchwrap.attention.cooperative.rounding import Loss
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.masks.mask import TileMask

SHAPE = CacheShape(layers=3, batch=2, heads=4, kv_heads=2, width=8, value_width=8, itemsize=4, host_itemsize=2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("count", "streamed"), [(1, 0.0), (1, 0.5), (40, 0.0)], ids=["host", "host and link", "prompt"])
def test_results_stay_within_the_bound_that_is_reported(storage: torch.dtype, count: int, streamed: float) -> None:
    keys, values = tokens(200)
    q = queries(count)
    exact = whole(q, keys, values)[0]
    cache = make(Room(30, 10, 4), VirtualMachine(RATES), streamed=streamed, storage=storage, workers=2)
    for first in range(0, 200, 50):
        cache.append(0, keys[:, :, first : first + 50], values[:, :, first : first + 50])
    cache.attend(0, q[:, :, :1], mask=None)  # a query on the host is measured there
    found = cache.attend(0, q, mask=None)[0]
    loss = cache.losses[0]
    assert loss is not None and loss.dtype == storage
    off = float((found - exact).abs().max())
    assert 1e-5 < off < loss.bound
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[storage]
    assert loss.bound < 25 * step, "a bound that says nothing"
    assert loss.key_error <= step * loss.key_size * 1.01 and 0 < loss.value_error <= step * loss.value_size * 1.01
    assert "results of this layer by at most" in loss.explain()


def test_no_choice_of_weights_exceeds_the_bound_and_one_reaches_it() -> None:
    """Two groups of keys, of which the scores of one move up by e and those of the other down: the worst case of the formula."""
    found = []
    for weight in torch.linspace(-4, 4, 81, dtype=torch.float64).tolist():
        for e in (1e-3, 0.1, 1.0, 5.0):
            before, after = torch.tensor(weight).sigmoid(), torch.tensor(weight + 2 * e).sigmoid()
            moved = 2 * float(after - before)  # values 1 and -1
            loss = Loss(
                dtype=torch.bfloat16, key_error=e, key_size=1.0, value_error=0.0, value_size=1.0, query_error=0.0, query_size=1.0, scale=1.0
            )
            found.append(moved / loss.bound)
    assert max(found) <= 1 + 1e-6 and max(found) > 0.99


def test_the_hosts_part_is_what_its_dtype_makes_of_it_and_nothing_else_is_lost() -> None:
    """Keys, values and queries that the storage holds exactly come out as exactly as ever."""
    keys, values, q = (one.bfloat16().float() for one in (*tokens(120), queries(1)))
    cache = make(Room(20, 10, 4), OneMemory(), storage=torch.bfloat16, streamed=0.3)
    cache.append(0, keys, values)
    assert error(cache.attend(0, q), whole(q, keys, values)) < 1e-6
    mask = TileMask.from_dense(torch.rand(2, 1, 1, 120) > 0.5)  # which the native kernel does not take
    assert error(cache.attend(0, q, mask=mask), whole(q, keys, values, mask=mask)) < 1e-6
    loss = cache.losses[0]
    assert loss is not None and (loss.key_error, loss.value_error, loss.query_error, loss.bound) == (0.0, 0.0, 0.0, 0.0)
    assert loss.value_size in values.abs().amax((0, 2, 3)).tolist()


def test_numbers_beyond_the_storage_become_its_largest_and_are_counted() -> None:
    keys, values = tokens(40)
    values[0, 0, 3, 2] = 1e6
    cache = make(Room(4, 2), OneMemory(), storage=torch.float16)
    cache.append(0, keys, values)
    out, _ = cache.attend(0, queries(1))
    loss = cache.losses[0]
    assert loss is not None and loss.value_error == pytest.approx(1e6 - 65504) and bool(out.isfinite().all())


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_rows_are_exchanged_and_tokens_forgotten_in_any_dtype(storage: torch.dtype) -> None:
    keys, values = (one.to(storage).float() for one in tokens(60))
    cache = make(Room(8, 4), OneMemory(), storage=storage)
    cache.append(0, keys, values)
    rows = torch.tensor([1, 1, 0])
    for chosen in (torch.tensor([1, 0]), rows):
        cache.select(chosen)
        keys, values = keys[chosen], values[chosen]
    cache.crop(33)
    q = queries(1, 3).to(storage).float()
    assert error(cache.attend(0, q), whole(q, keys[:, :, :33], values[:, :, :33])) < 1e-6


def test_half_compute_with_the_same_half_on_the_host_loses_nothing() -> None:
    cache = make(Room(4, 2), OneMemory())
    cache.append(0, *(one.bfloat16() for one in tokens(40)))
    assert cache.losses == [None] and cache.layers[0].pieces()[1].keys.dtype == torch.bfloat16


@pytest.mark.skipif(not native.available(), reason=native.reason() or "")
def test_the_hosts_kernel_reads_the_storage_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    partial = cache_module._attend

    def watched(q: Any, k: Any, *others: Any, **options: Any) -> Any:
        seen.add((q.dtype, k.dtype, k.shape[2]))
        return partial(q, k, *others, **options)

    cache = make(Room(0, 0), OneMemory(), storage=torch.bfloat16, partial=watched)
    cache.append(0, *tokens(3000))
    cache.attend(0, queries(1))
    assert seen == {(torch.bfloat16, torch.bfloat16, 3000)}


@pytest.mark.parametrize("split", ["token", "head", "upload"])
def test_half_the_bytes_are_planned_allocated_and_gain_the_time_that_was_predicted(split: Any) -> None:
    rates = Rates(device=700.0, host=60.0, link=12.0, wake_s=0.0)
    count = 2048
    nbytes = SHAPE.layers * count * SHAPE.token_bytes
    budget: dict[str, Any] = {"device_bytes": nbytes // 2, "host_bytes": nbytes, "chunk_bytes": 64 * SHAPE.token_bytes, "recent": 128}
    plan = plan_cache(SHAPE, count, rates=rates, split=split, **budget)
    wide = plan_cache(dataclasses.replace(SHAPE, host_itemsize=None), count, rates=rates, split=split, **budget)
    machine = VirtualMachine(rates)
    cache = TieredCache.from_plan(plan, machine, torch.float32, workers=2, storage=torch.bfloat16)
    assert cache.device_bytes == plan.device_bytes == machine.allocated["device"] and cache.host_bytes == plan.host_bytes
    for index in range(SHAPE.layers):
        for _ in range(0, count, 512):
            cache.append(index, torch.randn(2, 2, 512, 8), torch.randn(2, 2, 512, 8))
    begin = machine.now()
    for index in range(SHAPE.layers):
        cache.attend(index, torch.randn(2, 4, 1, 8), mask=TileMask.causal(1, 1, count))
    assert machine.now() - begin == pytest.approx(plan.seconds, rel=0.2)
    assert plan.seconds < 0.6 * wide.seconds

"""Key heads divided between device and host: exact, in memory as planned, and as consistent as tokens divided."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from tests.attention.cooperative_cases import DV, HKV, RATES, D, error, life, machines, make, queries, tokens, whole
from tests.attention.virtual import VirtualMachine
from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.heads import HeadLayer, HeadRoom
from torchwrap.attention.cooperative.machine import OneMemory
from torchwrap.attention.cooperative.planner import CacheShape, Plan, Rates, plan_cache
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention
from torchwrap.core import errors

SHAPE = CacheShape(layers=5, batch=2, heads=12, kv_heads=6, width=8, value_width=8, itemsize=4)
ROOM = HeadRoom(1, Room(1 << 40, 0, host_allowed=False), Room(0, 0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("machine", machines())
@pytest.mark.parametrize(("count", "streamed"), [(1, 0.0), (1, 0.4), (3, 1.0), (40, 0.0)])
def test_heads_on_two_sides_give_what_one_memory_gives(machine: Any, count: int, streamed: float) -> None:
    keys, values = tokens(60)
    q, sinks = queries(count), torch.randn(4)
    cache = make(ROOM, machine(), streamed=streamed, workers=2)
    for first, end in ((0, 11), (11, 60 - count), (60 - count, 60)):
        cache.append(0, keys[:, :, first:end], values[:, :, first:end])
    for mask in (None, TileMask.causal(1, count, 60), TileMask.window(1, count, 60, 7)):
        assert error(cache.attend(0, q, mask=mask, sinks=sinks), whole(q, keys, values, mask=mask, sinks=sinks)) < 1e-6
    assert cache.layers[0].host_tokens == 60
    cache.release()


def test_a_random_life_stays_exact() -> None:
    chance = random.Random(1)
    for _ in range(5):
        cache = make(ROOM, VirtualMachine(RATES), streamed=chance.choice([0.0, 0.5]), workers=2)
        for keys, values in life(cache, chance, 12):
            q = queries(chance.choice([1, 3]), keys.shape[0])
            assert error(cache.attend(0, q), whole(q, keys, values)) < 1e-6


def test_handles_have_all_heads_and_gather_them() -> None:
    keys, values = tokens(20)
    cache = make(ROOM, OneMemory())
    cache.append(0, keys, values)
    handle = TieredTensor(cache, 0, "values")
    assert handle.shape == values.shape
    with pytest.warns(errors.TorchwrapWarning, match="gathers"):
        assert torch.equal(handle.gathered(), values)


def test_a_host_without_memory_costs_one_token_of_both_sides() -> None:
    token = 2 * (D + DV) * 4
    machine = VirtualMachine(RATES, host_bytes=4096 * token + 4000)
    cache = make(ROOM, machine, layers=2)
    keys, values = tokens(4096)
    cache.append(0, keys, values)
    with pytest.raises(errors.BudgetError, match=r"1 more tokens behind 4096.*layer 0"):
        cache.append(0, *tokens(1))
    layer = cache.layers[0]
    assert isinstance(layer, HeadLayer) and layer.kept.length == layer.moved.length == 4096


def test_a_worker_that_dies_costs_one_token_of_both_sides() -> None:
    fails = False

    def partial(*given: Any) -> Any:
        if fails and threading.current_thread().name.startswith("torchwrap-host-attention"):
            raise ValueError("the worker is gone")
        return attention(checked(*given[:3], mask=given[3], scale=given[4], softcap=given[5]))

    cache = make(ROOM, OneMemory(), layers=2, partial=partial)
    keys, values = tokens(30)
    for index in range(2):
        cache.append(index, keys, values)
        cache.attend(index, queries(1))
    one = tokens(1)
    cache.append(0, *one)
    cache.attend(0, queries(1))
    cache.append(1, *one)
    fails = True
    with pytest.raises(errors.WorkError, match=r"the worker is gone.*layer 1"):
        cache.attend(1, queries(1))
    fails = False
    q = queries(1)
    for index in range(2):
        assert cache.layers[index].length == 30
        cache.append(index, *one)
        expected = whole(q, torch.cat([keys, one[0]], 2), torch.cat([values, one[1]], 2))
        assert error(cache.attend(index, q), expected) < 1e-6


def test_rows_without_memory_leave_an_empty_cache() -> None:
    machine = VirtualMachine(RATES, host_bytes=5 << 20)
    cache = make(ROOM, machine, layers=2)
    for index in range(2):
        cache.append(index, *tokens(20))
    with pytest.raises(errors.BudgetError, match="60 rows"):
        cache.select(torch.arange(2).repeat_interleave(30))
    assert machine.allocated["host"] == 0 and [layer.length for layer in cache.layers] == [0, 0]


def test_what_cannot_be_divided_by_heads_is_refused() -> None:
    cache = make(ROOM, OneMemory())
    with pytest.raises(errors.ConfigError, match="leave none for the host"):
        cache.append(0, torch.zeros(1, 1, 3, D), torch.zeros(1, 1, 3, DV))
    cache.append(0, *tokens(20))
    with pytest.raises(errors.ConfigError, match=r"\(1, 2, 8, 6\), the cache \(2, 2, 8, 6\)"):
        cache.append(0, *tokens(3, 1))
    by_head = TileMask.from_dense(torch.rand(1, 2 * HKV, 1, 20) > 0.5)
    with pytest.raises(errors.UnsupportedModelError, match="a mask of 4 heads"):
        cache.attend(0, queries(1), mask=by_head)


def planned(share: float, rates: Rates, tokens: int = 2048, **options: Any) -> Plan:
    whole = SHAPE.layers * tokens * SHAPE.token_bytes
    staging = 2 * 64 * SHAPE.token_bytes
    return plan_cache(
        SHAPE, tokens, device_bytes=int(share * whole) + staging, host_bytes=4 * whole, rates=rates, split="head",
        chunk_bytes=64 * SHAPE.token_bytes, **options,
    )  # fmt: skip


def built(plan: Plan, machine: VirtualMachine) -> TieredCache:
    cache = TieredCache.from_plan(plan, machine, torch.float32, workers=2)
    for index in range(plan.shape.layers):
        cache.append(index, torch.randn(2, 6, plan.tokens, 8), torch.randn(2, 6, plan.tokens, 8))
    return cache


RATES_OF = {
    "V100": Rates(device=700.0, host=60.0, link=12.0, wake_s=0.0),
    "slow to wake": Rates(device=3000.0, host=200.0, link=50.0, wake_s=30.0),
    "all alike": Rates(device=100.0, host=80.0, link=90.0, wake_s=1.0),
}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("rates", list(RATES_OF))
def test_predicted_and_measured_agree(share: float, rates: str) -> None:
    """Time within a fifth, bytes exactly; heads that do not go evenly into the budget are one more in some layers."""
    plan = planned(share, RATES_OF[rates])
    machine = VirtualMachine(RATES_OF[rates])
    cache = built(plan, machine)
    assert cache.device_bytes == plan.device_bytes == machine.allocated["device"] and cache.host_bytes == plan.host_bytes
    begin = machine.now()
    for index in range(SHAPE.layers):
        cache.attend(index, torch.randn(2, 12, 1, 8))
    assert machine.now() - begin == pytest.approx(plan.seconds, rel=0.2)


def test_heads_are_never_predicted_to_be_faster_than_tokens() -> None:
    for share in (0.1, 0.3, 0.7):
        for rates in RATES_OF.values():
            whole = SHAPE.layers * 2048 * SHAPE.token_bytes
            budget: dict[str, Any] = {"host_bytes": 4 * whole, "chunk_bytes": 64 * SHAPE.token_bytes}
            budget["device_bytes"] = int(share * whole) + 128 * SHAPE.token_bytes
            by = {split: plan_cache(SHAPE, 2048, rates=rates, split=split, **budget) for split in ("head", "token")}
            assert by["head"].seconds >= 0.99 * by["token"].seconds
    assert "of 5 of 6 key heads" in planned(0.2, RATES_OF["V100"]).explain()

"""Keys and values in two memories give what one memory gives, at every cut, in any order of copies, and after any failure."""

from __future__ import annotations

import itertools
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cooperative_cases import DV, HKV, HQ, RATES, B, D, error, life, machines, make, queries, tokens, whole
from tests.attention.virtual import VirtualMachine
from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import OneMemory, machine_for
from torchwrap.attention.cooperative.planner import CacheShape, plan_cache
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention
from torchwrap.core import errors


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("machine", machines())
@pytest.mark.parametrize("streamed", [0.0, 0.4, 1.0])
def test_every_cut_gives_what_one_memory_gives(machine: Any, streamed: float) -> None:
    keys, values = tokens(23)
    q = queries(1)
    expected = whole(q, keys, values)
    for device, recent in itertools.combinations_with_replacement(range(25), 2):
        cache = make(Room(device=recent, recent=device, spill=2), machine(), streamed=streamed, workers=2)
        cache.append(0, keys[:, :, :9], values[:, :, :9])
        cache.append(0, keys[:, :, 9:], values[:, :, 9:])
        found = cache.attend(0, q)
        assert error(found, expected) < 1e-6, (device, recent)
        cache.release()


def masks(count: int, length: int) -> dict[str, tuple[TileMask | None, dict[str, Any]]]:
    return {
        "causal": (TileMask.causal(1, count, length), {}),
        "window": (TileMask.window(1, count, length, 7), {}),
        "padded": (TileMask.padded([length, length // 3], count, length), {}),
        "no key": (TileMask.padded([length, 0], count, length), {}),
        "softcap and sinks": (TileMask.causal(1, count, length), {"softcap": 2.0, "sinks": torch.randn(HQ)}),
        "scale": (None, {"scale": 0.3}),
    }


@pytest.mark.parametrize("kind", list(masks(1, 9)))
@pytest.mark.parametrize("count", [1, 3, 40], ids=["one query", "few", "many"])
def test_masks_reach_every_part(kind: str, count: int) -> None:
    length = 60
    keys, values = tokens(length)
    q = queries(count)
    mask, options = masks(count, length)[kind]
    cache = make(Room(device=20, recent=8, spill=3), VirtualMachine(RATES), streamed=0.3, workers=2)
    for first, end in ((0, 11), (11, length - count), (length - count, length)):
        cache.append(0, keys[:, :, first:end], values[:, :, first:end])
    assert error(cache.attend(0, q, mask=mask, **options), whole(q, keys, values, mask=mask, **options)) < 1e-6


def test_half_precision_is_merged_in_single() -> None:
    keys, values = (one.bfloat16() for one in tokens(200))
    q = queries(1).bfloat16()
    cache = make(Room(device=50, recent=20, spill=8), OneMemory(), streamed=0.5)
    cache.append(0, keys, values)
    out, lse = cache.attend(0, q)
    expected, expected_lse = whole(q, keys, values)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    baseline = float((attention(checked(q, keys, values))[0] - expected).abs().max())
    assert float((out - expected).abs().max()) <= 2 * baseline + 1e-6 and float((lse - expected_lse).abs().max()) < 2e-2


def test_a_random_life_of_a_cache_stays_exact() -> None:
    """Appends of all sizes, crops and selections of rows, with attention after each, against tensors that are simply concatenated."""
    chance = random.Random(3)
    for _ in range(20):
        room = Room(device=chance.randrange(0, 30), recent=chance.randrange(0, 20), spill=chance.randrange(1, 6))
        cache = make(room, VirtualMachine(RATES), streamed=chance.choice([0.0, 0.5]), workers=chance.choice([1, 3]))
        for keys, values in life(cache, chance, 14):
            count = chance.choice([1, 1, min(40, keys.shape[2])])
            q = queries(count, keys.shape[0])
            mask = chance.choice([None, TileMask.causal(1, count, keys.shape[2])])
            assert error(cache.attend(0, q, mask=mask), whole(q, keys, values, mask=mask)) < 1e-6


def test_first_and_recent_tokens_stay_on_the_device() -> None:
    cache = make(Room(device=12, recent=8, spill=2), OneMemory())
    for _ in range(30):
        cache.append(0, *tokens(1))
    layer = cache.layers[0]
    found = [(piece.tier, piece.first, piece.end) for piece in layer.pieces()]
    assert found[0] == ("device", 0, 4) and found[-1][0] == "device" and found[-1][2] == 30
    assert 6 < found[-1][2] - found[-1][1] <= 8
    assert [piece[0] for piece in found] == ["device", "host", "device"]


def test_an_empty_cache_gives_zeros() -> None:
    cache = make(Room(device=4, recent=2), OneMemory())
    out, lse = cache.attend(0, queries(2))
    assert torch.equal(out, torch.zeros(B, HQ, 2, D)) and bool((lse == -torch.inf).all())


def test_a_long_prompt_is_attended_on_the_device_without_coming_back() -> None:
    """What is on the device anyway does not cross the link, even if its place is on the host."""
    machine = VirtualMachine(RATES)
    cache = make(Room(device=10, recent=4), machine)
    keys, values = tokens(80)
    cache.append(0, keys[:, :, :40], values[:, :, :40])
    cache.attend(0, queries(40), mask=TileMask.causal(1, 40, 40))
    assert machine.uploaded == 0
    cache.append(0, keys[:, :, 40:], values[:, :, 40:])
    q = queries(40)
    mask = TileMask.causal(1, 40, 80)
    assert error(cache.attend(0, q, mask=mask), whole(q, keys, values, mask=mask)) < 1e-6
    token = B * HKV * (D + DV) * 4
    # Of the first 40 tokens 6 are still on the device: the first ones. Its recent ones are of this prompt.
    assert machine.uploaded == 34 * token


def test_a_prompt_that_sees_everything_counts_its_own_tokens_once() -> None:
    keys, values = tokens(140)
    q = queries(40)
    cache = make(Room(device=60, recent=50), VirtualMachine(RATES))
    cache.append(0, keys[:, :, :100], values[:, :, :100])
    cache.append(0, keys[:, :, 100:], values[:, :, 100:])
    assert error(cache.attend(0, q), whole(q, keys, values)) < 1e-6


def test_gradients_are_refused() -> None:
    cache = make(Room(device=4, recent=2), OneMemory())
    cache.append(0, *tokens(9))
    with pytest.raises(errors.ConfigError, match="layer 0"):
        cache.attend(0, queries(1).requires_grad_())


def test_threads_are_no_one_elses_business() -> None:
    """The threads of torch, the default dtype and the grad mode of the caller are what they were."""
    before = torch.get_num_threads(), torch.is_grad_enabled()
    cache = make(Room(device=4, recent=2), OneMemory(), workers=3)
    with torch.inference_mode():
        cache.append(0, *tokens(30))
        cache.attend(0, queries(1))
    cache.append(0, *tokens(1))
    cache.attend(0, queries(1))
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before


def test_only_cpu_and_cuda_have_two_tiers() -> None:
    with pytest.raises(errors.UnsupportedModelError, match="meta"):
        machine_for(torch.device("meta"))


class Failing:
    """Attention that fails on a host tensor when told to."""

    def __init__(self) -> None:
        self.fails: type[BaseException] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        if self.fails is not None and threading.current_thread().name.startswith("torchwrap-host-attention"):
            raise self.fails("the worker is gone")
        return attention(checked(q, k, v, mask=mask, scale=scale, softcap=softcap))


@pytest.mark.parametrize("cause", [ValueError, SystemExit, MemoryError])
def test_a_worker_that_dies_is_an_error_of_the_caller_and_costs_one_token(cause: type[BaseException]) -> None:
    partial = Failing()
    cache = make(Room(device=8, recent=4), OneMemory(), layers=3, partial=partial, workers=2)
    keys, values = tokens(30)
    for index in range(3):
        cache.append(index, keys, values)
        cache.attend(index, queries(1))
    one = tokens(1)
    cache.append(0, *one)
    cache.attend(0, queries(1))
    cache.append(1, *one)
    partial.fails = cause
    with pytest.raises(errors.WorkError, match=r"the worker is gone.*layer 1") as raised:
        cache.attend(1, queries(1))
    assert isinstance(raised.value.__cause__, cause) and isinstance(raised.value, RuntimeError)
    assert [layer.length for layer in cache.layers] == [30, 30, 30]
    partial.fails = None
    q = queries(1)
    for index in range(3):
        cache.append(index, *one)
        expected = whole(q, torch.cat([keys, one[0]], 2), torch.cat([values, one[1]], 2))
        assert error(cache.attend(index, q), expected) < 1e-6


def test_a_host_without_memory_costs_one_token() -> None:
    machine = VirtualMachine(RATES, host_bytes=100_000)
    cache = make(Room(device=8, recent=4), machine, layers=2)
    keys, values = tokens(8)
    cache.append(0, keys, values)
    cache.append(1, keys, values)
    with pytest.raises(errors.BudgetError, match=r"1 more tokens behind 8.*layer 0"):
        cache.append(0, *tokens(1))
    assert [layer.length for layer in cache.layers] == [8, 8]
    q = queries(1)
    assert error(cache.attend(1, q), whole(q, keys, values)) < 1e-6


def test_a_device_that_gives_no_more_spills_its_oldest_tokens() -> None:
    token = B * HKV * (D + DV) * 4
    machine = VirtualMachine(RATES, device_bytes=300 * token)
    cache = make(Room(device=1000, recent=16, spill=4), machine)
    keys, values = tokens(0)
    for _ in range(30):
        new = tokens(13)
        cache.append(0, *new)
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
    layer = cache.layers[0]
    assert layer.host_tokens > 0 and machine.allocated["device"] <= 300 * token
    q = queries(1)
    assert error(cache.attend(0, q), whole(q, keys, values)) < 1e-6


def test_a_device_that_gives_no_more_is_an_error_where_nothing_may_go_to_the_host() -> None:
    token = B * HKV * (D + DV) * 4
    machine = VirtualMachine(RATES, device_bytes=300 * token)
    cache = make(Room(device=1000, recent=16, host_allowed=False), machine)
    cache.append(0, *tokens(64))
    cache.append(0, *tokens(64))
    with pytest.raises(errors.BudgetError, match="behind 128") as raised:
        cache.append(0, *tokens(200))
    assert isinstance(raised.value, MemoryError) and isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert cache.layers[0].length == 128


def test_a_plan_that_finds_no_memory_is_refused_before_anything_is_moved() -> None:
    shape = CacheShape(layers=3, batch=1, heads=4, kv_heads=2, width=8, value_width=8, itemsize=4)
    plan = plan_cache(shape, 500, device_bytes=80_000, host_bytes=1 << 30, rates=RATES, chunk_bytes=1000)
    machine = VirtualMachine(RATES, host_bytes=plan.host_bytes - 1)
    with pytest.raises(errors.PlanError, match=rf"{plan.device_bytes} bytes.*{plan.host_bytes} on the host") as raised:
        TieredCache.from_plan(plan, machine, torch.float32)
    assert isinstance(raised.value, ValueError) and machine.allocated["host"] == 0

"""What the planner promises, against its formulas in closed form, brute force, and a machine with a virtual clock."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.virtual import VirtualMachine
from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.disk import Disk
from torchwrap.attention.cooperative.machine import OneMemory
from torchwrap.attention.cooperative.measure import ROWS, measure_rates
from torchwrap.attention.cooperative.planner import CacheShape, Plan, Rates, Split, plan_cache
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention
from torchwrap.core import errors

GIB = 1 << 30
LLAMA = CacheShape(layers=32, batch=1, heads=32, kv_heads=8, width=128, value_width=128, itemsize=2)
V100 = Rates(device=700e9, host=60e9, link=12e9)
SMALL = CacheShape(layers=4, batch=2, heads=4, kv_heads=2, width=8, value_width=8, itemsize=4)


def plan(split: Split, device_gib: float, **options: Any) -> Plan:
    return plan_cache(LLAMA, 256 * 1024, device_bytes=int(device_gib * GIB), host_bytes=64 * GIB, rates=V100, split=split, **options)


@pytest.mark.parametrize(
    ("split", "device_gib", "seconds"),
    [
        pytest.param("upload", 14.016, 32 * 50.3e-3, id="upload"),
        pytest.param("layer", 14.016, 14 * 1.534e-3 + 18 * 17.94e-3, id="layer split"),
        pytest.param("token", 14.016, 32 * 8.39e-3, id="token split"),
    ],
)
def test_plans_agree_with_the_worked_example(split: Split, device_gib: float, seconds: float) -> None:
    """32 layers, 8 key heads of 128, half precision, 256 Ki tokens: a GiB per layer, 14 GiB on the device; rates 700, 60, 12 GB/s.

    Seconds of one layer, by hand: a GiB takes 1.534 ms on the device, 17.94 on the host, 89.5 over the link.
    """
    found = plan(split, device_gib)
    assert found.seconds == pytest.approx(seconds, rel=0.01)
    assert found.device_bytes <= device_gib * GIB


def test_token_split_gains_more_the_less_is_on_the_host() -> None:
    gains = [plan("layer", gib).seconds / plan("token", gib).seconds for gib in (14, 20, 26)]
    assert gains[0] >= 1.25 and gains[2] >= 1.7 and gains == sorted(gains)


def seconds_of(shape: CacheShape, tokens: int, kept: float, streamed: float, rates: Rates) -> float:
    """The formula as the opening comment has it, for a share of the tokens."""
    nbytes = shape.token_bytes * tokens
    f, g = 1 - kept, (1 - kept) * streamed
    host = nbytes * (f - g) / rates.host_while(g > 0) + rates.wake_s if f > g else 0.0
    return shape.layers * max(nbytes * (1 - f + g) / rates.device, host, nbytes * g / rates.link)


def test_no_other_division_is_predicted_to_be_faster() -> None:
    chance = random.Random(0)
    for _ in range(60):
        rates = Rates(
            device=10 ** chance.uniform(10, 12), host=10 ** chance.uniform(9.5, 11.5), link=10 ** chance.uniform(9.5, 11),
            wake_s=chance.choice([0.0, 40e-6, 1e-3]), shared_memory=chance.random() < 0.3,
        )  # fmt: skip
        tokens = chance.choice([1000, 30_000, 262_144])
        share = chance.choice([0.1, 0.5, 0.9, 1.2])
        budget = int(share * tokens * LLAMA.token_bytes * LLAMA.layers)
        found = plan_cache(LLAMA, tokens, device_bytes=budget, host_bytes=1 << 45, rates=rates, split="token", chunk_bytes=4096)
        most = min(1.0, budget / (tokens * LLAMA.token_bytes * LLAMA.layers))
        best = min(seconds_of(LLAMA, tokens, most * a / 40, b / 40, rates) for a in range(41) for b in range(41))
        wakeups = 4 * rates.wake_s * LLAMA.layers  # waking the host for less than that is not worth its risk
        assert found.seconds <= best * 1.03 + wakeups


def test_automatic_choice_is_the_fastest_of_all() -> None:
    chosen = plan_cache(LLAMA, 262_144, device_bytes=14 * GIB, host_bytes=64 * GIB, rates=V100)
    assert chosen.seconds == min(plan(split, 14).seconds for split in ("token", "layer", "upload"))


def test_what_fits_on_the_device_stays_there() -> None:
    found = plan_cache(LLAMA, 1000, device_bytes=4 * GIB, host_bytes=64 * GIB, rates=V100)
    assert found.device_tokens == (1000,) * 32 and found.host_bytes == 0 and found.staging_bytes == 0


def test_shared_memory_slows_the_host_while_something_is_uploaded() -> None:
    shared = dataclasses.replace(V100, shared_memory=True)
    found = plan_cache(LLAMA, 262_144, device_bytes=14 * GIB, host_bytes=64 * GIB, rates=shared, split="token")
    assert found.seconds > plan("token", 14).seconds and found.seconds <= seconds_of(LLAMA, 262_144, 14 / 32, 0.0, shared) * 1.01


def test_prompt_chunks_are_long_enough_to_hide_the_link() -> None:
    def chunk(flops: float, link: float, heads: int) -> int:
        shape = dataclasses.replace(LLAMA, heads=heads)
        rates = dataclasses.replace(V100, flops=flops, link=link)
        return plan_cache(shape, 262_144, device_bytes=14 * GIB, host_bytes=64 * GIB, rates=rates).prefill_tokens

    assert chunk(60e12, 12e9, 8) == 5120 and chunk(60e12, 12e9, 32) == 2048 and chunk(0.0, 12e9, 8) == 2048


def test_a_cache_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    with pytest.raises(errors.PlanError, match=r"262144 tokens take 32.00 GiB.*4.00 GiB on the device.*9.00 GiB may be used"):
        plan_cache(LLAMA, 262_144, device_bytes=4 * GIB, host_bytes=10 * GIB, rates=V100)
    with pytest.raises(errors.PlanError, match=r"1.00 MiB.*two staging buffers alone take 16.00 MiB"):
        plan_cache(LLAMA, 262_144, device_bytes=1 << 20, host_bytes=64 * GIB, rates=V100)
    with pytest.raises(errors.ConfigError, match="0 tokens"):
        plan_cache(LLAMA, 0, device_bytes=GIB, host_bytes=GIB, rates=V100)


def test_a_plan_explains_itself_with_its_numbers() -> None:
    text = plan("token", 14).explain()
    for part in ("262144 tokens", "split by token", "14.00 GiB on the device", "32 of 32 layers", "16.7% are read over the link", "270 ms"):
        assert part in text


def filled(found: Plan, machine: VirtualMachine) -> TieredCache:
    cache = TieredCache.from_plan(found, machine, torch.float32, workers=2)
    shape = found.shape
    for index in range(shape.layers):
        for first in range(0, found.tokens, 512):
            count = min(512, found.tokens - first)
            cache.append(index, *(torch.randn(shape.batch, shape.kv_heads, count, width) for width in (shape.width, shape.value_width)))
    return cache


def step_seconds(cache: TieredCache, found: Plan, machine: VirtualMachine) -> float:
    begin = machine.now()
    for index in range(found.shape.layers):
        cache.attend(index, torch.randn(found.shape.batch, found.shape.heads, 1, found.shape.width))
    return machine.now() - begin


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
@pytest.mark.parametrize("split", ["token", "layer", "upload"])
@pytest.mark.parametrize(
    "rates",
    [
        pytest.param(Rates(device=700.0, host=60.0, link=12.0, wake_s=0.0), id="V100"),
        pytest.param(Rates(device=3000.0, host=200.0, link=50.0, wake_s=30.0), id="slow to wake"),
        pytest.param(Rates(device=100.0, host=80.0, link=90.0, wake_s=1.0), id="all alike"),
    ],
)
def test_predicted_and_measured_time_agree_within_a_fifth(share: float, split: Split, rates: Rates) -> None:
    tokens = 4096
    whole = SMALL.layers * tokens * SMALL.token_bytes
    chunk_bytes = 64 * SMALL.token_bytes
    found = plan_cache(
        SMALL, tokens, device_bytes=int(share * whole) + 2 * chunk_bytes, host_bytes=4 * whole, rates=rates, split=split, recent=256,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    machine = VirtualMachine(rates)
    measured = step_seconds(filled(found, machine), found, machine)
    assert measured == pytest.approx(found.seconds, rel=0.2)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_token_split_is_at_least_as_fast_as_the_papers_layer_split(share: float) -> None:
    tokens, rates = 4096, Rates(device=700.0, host=60.0, link=12.0, wake_s=0.0)
    whole = SMALL.layers * tokens * SMALL.token_bytes
    measured = {}
    for split in ("token", "layer"):
        found = plan_cache(
            SMALL, tokens, device_bytes=int(share * whole) + 2 * 64 * SMALL.token_bytes, host_bytes=4 * whole, rates=rates, split=split,
            chunk_bytes=64 * SMALL.token_bytes, recent=256,
        )  # fmt: skip
        machine = VirtualMachine(rates)
        measured[split] = step_seconds(filled(found, machine), found, machine)
    assert measured["token"] <= measured["layer"]


def test_rates_measured_on_the_virtual_machine_are_its_own() -> None:
    rates = Rates(device=700e6, host=60e6, link=12e6, wake_s=1e-3)
    found = measure_rates(VirtualMachine(rates), SMALL, torch.float32, sample_bytes=1 << 20, chunk_bytes=1 << 16, repeats=2)
    for name in ("device", "host", "link", "wake_s"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=0.01), name


def test_a_real_machine_can_be_measured() -> None:
    """Of the figures only their order is known: there is one memory, so both sides read about as fast as each other."""
    found = measure_rates(OneMemory(), SMALL, torch.float32, sample_bytes=1 << 20, chunk_bytes=1 << 16, repeats=1)
    assert min(found.device, found.host, found.link, found.wake_s, found.flops) > 0


@pytest.mark.parametrize(("flops", "tokens"), [(1e9, {256}), (1e15, {256, 4096})], ids=["processor", "card"])
def test_arithmetic_is_measured_with_few_keys_where_all_would_take_long(flops: float, tokens: set[int]) -> None:
    now, asked = [0.0], set()

    class Clock(OneMemory):
        def now(self) -> float:
            return now[0]

    def partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if q.shape[2] == ROWS:
            asked.add(k.shape[2])
        now[0] += 4 * q.numel() * k.shape[2] / flops
        return torch.zeros(*q.shape[:3], v.shape[3]), torch.zeros(q.shape[:3])

    sample = 4096 * SMALL.token_bytes
    found = measure_rates(Clock(), SMALL, torch.float32, sample_bytes=sample, chunk_bytes=1 << 16, repeats=1, partial=partial)
    assert asked == tokens and found.flops == pytest.approx(flops)


def test_256k_tokens_with_a_sixteenth_on_the_device() -> None:
    """Planned, allocated, filled by chunks and attended; what is allocated is what was planned."""
    shape = CacheShape(layers=2, batch=1, heads=2, kv_heads=1, width=16, value_width=16, itemsize=4)
    tokens = 256 * 1024
    whole = shape.layers * tokens * shape.token_bytes
    found = plan_cache(shape, tokens, device_bytes=whole // 16, host_bytes=2 * whole, rates=V100, split="token", chunk_bytes=1 << 20)
    machine = VirtualMachine(V100, device_bytes=whole // 16, host_bytes=whole + whole // 16)
    cache = TieredCache.from_plan(found, machine, torch.float32)
    torch.manual_seed(0)
    keys, values = torch.randn(1, 1, tokens, 16), torch.randn(1, 1, tokens, 16)
    chunk = 16 * 1024
    for first in range(0, tokens, chunk):
        for index in range(2):
            cache.append(index, keys[:, :, first : first + chunk], values[:, :, first : first + chunk])
    # The last queries of the last chunk: many enough that all of the host's tokens cross the link.
    for count in (1, 40):
        q = torch.randn(1, 2, count, 16)
        mask = TileMask.causal(1, count, tokens)
        out, lse = cache.attend(1, q, mask=mask)
        expected, expected_lse = attention(checked(q, keys, values, mask=mask), torch.float64)
        assert float((out - expected).abs().max()) < 1e-6 and float((lse - expected_lse).abs().max()) < 1e-5
    assert machine.allocated["device"] == cache.device_bytes <= whole // 16
    assert cache.device_bytes == pytest.approx(found.device_bytes, rel=0.03)
    assert cache.host_bytes == pytest.approx(found.host_bytes, rel=0.03)
    assert machine.allocated["host"] == pytest.approx(found.host_bytes, rel=0.03)


@pytest.mark.parametrize("tokens", [256 << 10, 512 << 10, 1 << 20])
def test_planned_bytes_are_allocated_bytes_at_any_length(tokens: int) -> None:
    shape = CacheShape(layers=8, batch=1, heads=8, kv_heads=4, width=128, value_width=128, itemsize=2)
    whole = shape.layers * tokens * shape.token_bytes
    found = plan_cache(shape, tokens, device_bytes=whole // 16, host_bytes=2 * whole, rates=V100)

    class Untouched(VirtualMachine):
        """Address space is all that is needed to count bytes."""

        def _allocate(self, tier: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            self.allocated[tier] += torch.Size(shape).numel() * dtype.itemsize
            return torch.empty(shape, dtype=dtype, device="meta")

    machine = Untouched(V100)
    cache = TieredCache.from_plan(found, machine, torch.bfloat16)  # which gives its memory back when nobody holds it any more
    assert machine.allocated["device"] == pytest.approx(found.device_bytes, rel=0.03)
    assert machine.allocated["host"] == pytest.approx(found.host_bytes, rel=0.03)
    del cache
    assert machine.allocated["host"] == 0


class Counted(OneMemory):
    """Both memories are counted and none is touched: tensors without numbers, which can be as long as any."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = {"device": 0, "host": 0}
        self.device = torch.device("meta")

    def device_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._count("device", shape, dtype)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._count("host", shape, dtype)

    def _count(self, tier: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.allocated[tier] += torch.Size(shape).numel() * dtype.itemsize
        return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("tokens", [256 << 10, 512 << 10, 1 << 20])
@pytest.mark.parametrize("split", ["token", "layer", "head"])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16], ids=str)
def test_a_cache_that_is_full_takes_what_was_planned(tokens: int, split: Split, storage: torch.dtype) -> None:
    """Prompts of that length in chunks, and a few tokens more: nothing beyond the plan is allocated on the way."""
    shape = CacheShape(layers=3, batch=1, heads=8, kv_heads=4, width=64, value_width=64, itemsize=4, host_itemsize=storage.itemsize)
    whole = shape.layers * tokens * shape.token_bytes
    found = plan_cache(shape, tokens, device_bytes=whole // 3, host_bytes=2 * whole, rates=V100, split=split)
    machine = Counted()
    cache = TieredCache.from_plan(found, machine, torch.float32, storage=storage)
    begun = dict(machine.allocated)
    for index in range(shape.layers):
        for first in range(0, tokens, 64 << 10):
            count = min(64 << 10, tokens - first)
            cache.append(index, *(torch.empty(1, 4, count, 64, device="meta") for _ in range(2)))
    assert machine.allocated == begun and {layer.length for layer in cache.layers} == {tokens}
    assert machine.allocated["device"] == pytest.approx(found.device_bytes, rel=0.03) and found.device_bytes <= whole // 3
    assert machine.allocated["host"] == pytest.approx(found.host_bytes, rel=0.03)


@pytest.mark.parametrize("split", ["token", "head"])
def test_a_million_tokens_reserve_their_place_on_the_disk(split: Split, tmp_path: Path) -> None:
    shape = CacheShape(layers=2, batch=1, heads=2, kv_heads=2, width=8, value_width=8, itemsize=4)
    tokens = 1 << 20
    whole = shape.layers * tokens * shape.token_bytes
    found = plan_cache(
        shape, tokens, device_bytes=whole * 9 // 16, host_bytes=whole // 4, disk_bytes=whole, rates=V100, split=split, chunk_bytes=1 << 20,
        block_bytes=1 << 20,
    )  # fmt: skip
    machine = Counted()
    cache = TieredCache.from_plan(found, machine, torch.float32, disk=Disk(tmp_path, nbytes=found.disk_bytes))
    assert cache.disk is not None and cache.disk.nbytes == found.disk_bytes
    on_disk = sum(found.disk_tokens(layer) * found.host_heads(layer) for layer in range(2)) * shape.token_bytes // 2
    assert found.disk_bytes == pytest.approx(on_disk, rel=0.03) and on_disk > whole // 8
    buffers = 2 * found.block * found.host_heads(0) * shape.token_bytes // 2
    assert machine.allocated["host"] + buffers == pytest.approx(found.host_bytes, rel=0.03) and found.host_bytes < 0.9 * whole / 4
    cache.release()


def test_prompt_chunks_fit_into_the_memory_there_is_for_them() -> None:
    def chunk(prefill_bytes: int, given: Any = "auto") -> int:
        return plan_cache(
            LLAMA, 262_144, device_bytes=14 * GIB, host_bytes=64 * GIB, rates=dataclasses.replace(V100, flops=60e12),
            prefill_bytes=prefill_bytes, prefill_tokens=given,
        ).prefill_tokens  # fmt: skip

    # A token of a prompt: 32 heads of 128 for queries and results in two bytes, results twice in four, and its keys and values.
    token = 32 * (2 * 128 * 2 + 2 * 4 * 128) + LLAMA.token_bytes
    assert LLAMA.prompt_bytes == token
    assert [chunk(count * token) for count in (10_000, 2048, 2047, 700, 100)] == [2048, 2048, 1536, 512, 100]
    assert chunk(0, 4000) == 4000


def test_what_is_on_the_host_crosses_the_link_once_for_each_chunk_of_a_prompt_and_layer() -> None:
    count, tokens, layers = 64, 512, 2
    shape = CacheShape(layers=layers, batch=1, heads=8, kv_heads=1, width=8, value_width=8, itemsize=4)
    whole = layers * tokens * shape.token_bytes
    found = plan_cache(
        shape, tokens, device_bytes=whole // 4 + 32 * shape.token_bytes, host_bytes=2 * whole, rates=V100, split="token", recent=32,
        chunk_bytes=16 * shape.token_bytes, prefill_tokens=count,
    )  # fmt: skip
    machine = VirtualMachine(V100)
    cache = TieredCache.from_plan(found, machine, torch.float32)
    expected = 0
    for first in range(0, tokens, found.prefill_tokens):
        for index in range(layers):
            cache.append(index, torch.randn(1, 1, count, 8), torch.randn(1, 1, count, 8))
            expected += sum(piece.end - piece.first for piece in cache.layers[index].pieces(first) if piece.tier == "host")
            cache.attend(index, torch.randn(1, 8, count, 8), mask=TileMask.causal(1, count, first + count))
    assert machine.uploaded == expected * shape.token_bytes > 0


@pytest.mark.parametrize("split", ["auto", "token", "layer", "head", "upload"])
@pytest.mark.parametrize("tokens", [19, 4096])
def test_what_may_be_kept_bounds_the_device_whatever_room_it_has(split: Any, tokens: int) -> None:
    whole = SMALL.layers * tokens * SMALL.token_bytes
    found = plan_cache(SMALL, tokens, device_bytes=GIB, host_bytes=GIB, rates=V100, split=split, kept_bytes=whole // 2)
    assert found.device_bytes - found.staging_bytes <= whole // 2
    assert found.host_bytes >= whole // 2

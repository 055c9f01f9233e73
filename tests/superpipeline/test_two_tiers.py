"""Windows on a device of their own, simulated: right bytes and no missing order, whenever copies are done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.models import by_name, run
from tests.stream.fake_arena import FakeArena, Machine
from tests.stream.simulated_cuda import WatchedCuda
from tests.stream.test_two_tiers import ORDERS, Bench
from tests.stream.test_two_tiers import run as use_all
from tests.superpipeline.device import separate
from tests.weights.training import different_gradients, loss_of
from torchwrap.stream.batches import Batches

every_arena = pytest.mark.parametrize("make", [FakeArena, WatchedCuda], ids=["fake", "cuda"])
every_mode = pytest.mark.parametrize("mode", ["late", "early", "random"])
every_window = pytest.mark.parametrize(("k", "k_prime"), [(2, 2), (3, 2), (4, 3)], ids=lambda value: str(value))


@every_arena
@every_mode
@every_window
@pytest.mark.parametrize("home", ["disk", "host", "mixed"])
@pytest.mark.parametrize("uses", [ORDERS["cycle"], ORDERS["deviations"]], ids=["cycle", "deviations"])
def test_batches_of_uses(
    patch: pytest.MonkeyPatch, tmp_path: Any, make: Any, mode: Any, home: str, uses: list[int], k: int, k_prime: int
) -> None:
    machine, bench = Machine(mode), Bench(tmp_path, patch)
    engine, stored = bench.engine(machine, make, slots=k, home=home)
    engine.batches = Batches(k_prime)
    use_all(engine, stored, uses)
    assert len(engine._slots) == k
    engine.close()
    machine.check()


@every_arena
@every_mode
@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("name", ["llama", "t5", "llava"])
def test_outputs_and_gradients(patch: pytest.MonkeyPatch, name: str, make: Any, mode: Any, store: str) -> None:
    machine, fixture = Machine(mode), by_name(name)
    separate(patch, machine, make)
    plain, model = fixture.build(), tw.superpipeline(fixture.build(), k=3, k_prime=2, store=store)
    expected = run(plain, fixture.inputs()).logits
    for _ in range(3):
        assert torch.equal(run(model, fixture.inputs()).logits, expected)
    for each in (plain.train(), model.train()):
        for seed in range(2):
            torch.manual_seed(seed)
            loss_of(each, fixture.inputs()).backward()
    assert different_gradients(model, plain) == []
    assert machine.copied_bytes > 0
    tw.unwrap(model)
    machine.check()


def test_the_default_store_follows_the_device(patch: pytest.MonkeyPatch) -> None:
    fixture = by_name("llama")
    alone = tw.superpipeline(fixture.build(), k=2)
    assert tw.handle_of(alone, "superpipeline").stats()["disk_bytes"] > 0
    separate(patch, Machine())
    beside = tw.superpipeline(fixture.build(), k=2)
    stats = tw.handle_of(beside, "superpipeline").stats()
    assert stats["host_bytes"] > 0 and stats["disk_bytes"] == 0

"""Several batches through one window: the results of one call after another, and every block brought in once for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.models import ModelFixture, by_name, run
from tests.stream.fake_arena import Machine
from tests.superpipeline.device import counted_slots, handle_of, separate
from tests.weights.training import different_gradients, loss_of
from torchwrap.stream.arena import HostArena
from torchwrap.weights.many import forward_many, generate_many

MODELS = ["llama", "t5", "mixtral", "llava", "vit", "albert"]
every_model = pytest.mark.parametrize("fixture", [by_name(name) for name in MODELS], ids=MODELS)
CALLS = 5


def calls_of(fixture: ModelFixture) -> list[dict[str, Any]]:
    """The fixture's inputs with other content each."""
    return [
        {
            name: value.roll(number, dims=-1) if value.is_floating_point() or name.endswith("input_ids") else value
            for name, value in fixture.inputs().items()
        }
        for number in range(CALLS)
    ]


def first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output.to_tuple()[0]
    return found


@pytest.mark.parametrize("k_prime", [1, 2])
@every_model
def test_results_and_transfers(patch: pytest.MonkeyPatch, fixture: ModelFixture, k_prime: int) -> None:
    slots = counted_slots(patch, HostArena)
    calls, model = calls_of(fixture), fixture.build()
    expected = [first(run(model, call)) for call in calls]
    k = 1 if fixture.name in ("mixtral", "albert") else 2  # of two blocks, of one that is used again, of four and more
    tw.superpipeline(model, k=k, k_prime=min(k, k_prime))
    handle = handle_of(model)
    for _ in range(2):
        with torch.no_grad():
            got = handle.forward_many(calls)
        assert all(torch.equal(first(a), b) for a, b in zip(got, expected, strict=True))
    before = handle.stats()["transfers"]
    with torch.no_grad():
        for _ in range(k_prime):
            handle.forward_many(calls)
    assert handle.stats()["transfers"] - before == handle.knobs.moved_per_pass * k_prime  # not once per call
    assert slots.peak == handle.knobs.k * handle.room.slot_bytes or handle.knobs.k == handle.knobs.units
    with torch.no_grad():
        assert torch.equal(first(model(**calls[0])), expected[0])


def test_tokens(patch: pytest.MonkeyPatch) -> None:
    fixture = by_name("llama")
    calls, model = calls_of(fixture), fixture.build()
    expected = [model.generate(**call, max_new_tokens=5, do_sample=False) for call in calls]
    tw.superpipeline(model, k=2, k_prime=2)
    got = generate_many(model, calls, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_of_each_call() -> None:
    fixture = by_name("vit")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), k=2, k_prime=1)
    calls = calls_of(fixture)
    for output in forward_many(model, calls, seeds=range(CALLS)):
        first(output).square().mean().backward()
    for seed, call in enumerate(calls):
        torch.manual_seed(seed)
        loss_of(plain, call).backward()
    assert different_gradients(model, plain) == []


def test_the_knobs_are_not_chosen_by_what_such_a_pass_takes() -> None:
    fixture = by_name("llama")
    calls, model = calls_of(fixture), fixture.build()
    expected = [first(run(model, call)) for call in calls]
    tw.superpipeline(model)
    handle = handle_of(model)
    for _ in range(4):
        with torch.no_grad():
            handle.forward_many(calls)
        assert handle.profile is None and handle.chosen is None
    for _ in range(3):
        run(model, calls[0])
    assert handle.chosen is not None
    with torch.no_grad():
        assert all(torch.equal(first(a), b) for a, b in zip(handle.forward_many(calls), expected, strict=True))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_any_window_and_a_bound_on_calls_in_flight(k: int) -> None:
    fixture = by_name("vit")
    calls, model = calls_of(fixture), fixture.build()
    expected = [first(run(model, call)) for call in calls]
    tw.superpipeline(model, k=k, k_prime=k)
    for most in (1, 2, None):
        with torch.no_grad():
            got = forward_many(model, calls, max_batches_in_flight=most)
        assert all(torch.equal(first(a), b) for a, b in zip(got, expected, strict=True))


def test_a_call_that_fails_leaves_the_window_usable() -> None:
    fixture = by_name("vit")
    calls, model = calls_of(fixture), fixture.build()
    expected = first(run(model, calls[0]))
    tw.superpipeline(model, k=2, k_prime=2)
    with torch.no_grad(), pytest.raises(ValueError, match="channel"):
        forward_many(model, [calls[0], {"pixel_values": torch.randn(2, 5, 16, 16)}, calls[1]])
    for _ in range(2):
        assert torch.equal(first(run(model, calls[0])), expected)
    tw.unwrap(model)
    assert torch.equal(first(run(model, calls[0])), expected)


@pytest.mark.parametrize("order", ["late", "early", "random"])
def test_beside_a_device(patch: pytest.MonkeyPatch, order: Any) -> None:
    fixture, machine = by_name("llama"), Machine(order)
    calls, model = calls_of(fixture), fixture.build()
    expected = [first(run(model, call)) for call in calls]
    separate(patch, machine)
    tw.superpipeline(model, k=2, k_prime=2)
    for _ in range(2):
        with torch.no_grad():
            got = forward_many(model, calls)
        assert all(torch.equal(first(a), b) for a, b in zip(got, expected, strict=True))
    machine.check()

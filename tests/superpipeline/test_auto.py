"""Measuring, predicting and choosing on the simulated device: what is predicted is what a pass takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import torchwrap as tw
from tests.stream.fake_arena import Machine
from tests.superpipeline.device import BLOCK_BYTES, WIDTH, Blocks, on_device, pass_seconds
from torchwrap.superpipeline import technique

DEPTH = 10
LINKS = [0.2, 0.6, 0.95, 1.5, 4.0]


@pytest.mark.parametrize("transfer_s", LINKS)
@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (3, 2), (4, 1), (4, 4), (8, 3), (9, 9)])
def test_a_pass_takes_what_was_predicted(patch: pytest.MonkeyPatch, k: int, k_prime: int, transfer_s: float) -> None:
    model, handle, machine = on_device(
        patch, depth=DEPTH, compute_s=1.0, transfer_s=transfer_s, rest_s=0.5, k=k, k_prime=k_prime, store="host"
    )
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        model(x)
        handle.tune()
        model(x)
    assert handle.profile is not None
    assert handle.profile.compute_s == pytest.approx([1.0] * DEPTH)
    assert handle.profile.transfer_s == pytest.approx([transfer_s] * DEPTH)
    assert handle.profile.rest_s == pytest.approx(0.5)
    predicted = handle.predict()
    assert predicted.resident_seconds == pytest.approx(DEPTH + 0.5)
    assert pass_seconds(model, machine, 9) == pytest.approx(predicted.seconds_per_pass, rel=0.02)
    machine.check()


@pytest.mark.parametrize("transfer_s", LINKS)
@pytest.mark.parametrize("max_slowdown", [1.02, 1.10, 1.5])
def test_auto_keeps_the_slowdown_it_was_given(patch: pytest.MonkeyPatch, transfer_s: float, max_slowdown: float) -> None:
    model, handle, machine = on_device(patch, depth=DEPTH, compute_s=1.0, transfer_s=transfer_s, max_slowdown=max_slowdown)
    measured = pass_seconds(model, machine, 9) / DEPTH
    assert handle.chosen is not None
    assert (handle.knobs.k, handle.knobs.k_prime) == (handle.chosen.k, handle.chosen.k_prime)
    assert measured <= max_slowdown + 0.05
    assert measured == pytest.approx(handle.chosen.slowdown, abs=0.02)
    if handle.knobs.k > 2:
        with pytest.MonkeyPatch.context() as other:
            smaller, _, clock = on_device(other, depth=DEPTH, compute_s=1.0, transfer_s=transfer_s, k=handle.knobs.k - 1)
            assert pass_seconds(smaller, clock, 9) / DEPTH > max_slowdown
    machine.check()


def test_auto_stays_within_device_memory(patch: pytest.MonkeyPatch) -> None:
    room = 6 * (BLOCK_BYTES + 8192) + BLOCK_BYTES  # the head, and six slots with their pages
    model, handle, _ = on_device(patch, depth=DEPTH, compute_s=1.0, transfer_s=5.0, device_memory=room)
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, WIDTH))
    assert handle.chosen is not None and handle.chosen.slowdown > 1.10
    assert handle.knobs.k <= 6
    assert handle.predict().device_bytes <= room


def test_auto_ends_with_all_blocks_where_the_link_is_slow(patch: pytest.MonkeyPatch) -> None:
    model, handle, machine = on_device(patch, depth=4, compute_s=1.0, transfer_s=50.0)
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert handle.knobs.k == 4 and handle.plan.slots == 0
    copied = machine.copied_bytes
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert machine.copied_bytes == copied
    with pytest.raises(tw.ConfigError, match="cannot be sent away"):
        handle.turn(2, 1)
    tw.unwrap(model)
    assert torch.equal(model(x), expected)
    machine.check()


def test_an_error_in_the_measured_pass_is_followed_by_another_measurement(patch: pytest.MonkeyPatch) -> None:
    model, handle, _ = on_device(patch, depth=DEPTH, compute_s=1.0, transfer_s=0.5)
    x = torch.ones(1, WIDTH)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(x)
        hook = model.blocks[5].map.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        hook.remove()
        assert handle.profile is None and handle.chosen is None
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert handle.chosen is not None


def test_tune_measures_again_for_other_inputs(patch: pytest.MonkeyPatch) -> None:
    model, handle, _ = on_device(patch, depth=DEPTH, compute_s=1.0, transfer_s=0.5)
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, WIDTH))
        assert handle.knobs.k == 2
        for block in model.blocks:
            block.seconds = 0.47  # type: ignore[assignment]
        handle.tune()
        model(torch.ones(1, WIDTH))
    assert handle.profile is not None and handle.profile.compute_s == pytest.approx([0.47] * DEPTH)
    assert handle.chosen is not None and handle.chosen.slowdown <= 1.10


def test_host_memory_that_does_not_hold_all_blocks_is_refused(patch: pytest.MonkeyPatch) -> None:
    on_device(patch, depth=2, compute_s=1.0, transfer_s=1.0, k=1)
    inner = technique.weight_budget
    patch.setattr(technique, "weight_budget", lambda *args: dataclasses.replace(inner(*args), host=BLOCK_BYTES))
    model = Blocks(Machine(), 4, 1.0)
    with pytest.raises(tw.BudgetError):
        tw.superpipeline(model, k=1, store="host")
    assert tw.wrappers_of(model) == {}

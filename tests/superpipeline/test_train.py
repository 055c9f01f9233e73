"""`train`: what a training pass takes on the simulated device is what was predicted, and "auto" chooses by that and by what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.models import by_name
from tests.stream.fake_arena import Machine
from tests.superpipeline.device import BLOCK_BYTES, WIDTH, Blocks, handle_of, on_device, pass_seconds, step_seconds
from tests.weights.training import different_gradients, loss_of
from torchwrap.superpipeline import technique
from torchwrap.superpipeline.policy import Knobs, Profile, choose
from torchwrap.superpipeline.room import Room
from torchwrap.weights.budget import Budget
from torchwrap.weights.footprint import Footprint

DEPTH, BACKWARD = 10, 2.0
FULL = DEPTH * (1.0 + BACKWARD)


def step(model: nn.Module) -> torch.Tensor:
    """Gradients of a step, in a row."""
    model.zero_grad()
    model(torch.ones(1, WIDTH)).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize("transfer_s", [0.6, 1.5, 4.0])
@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (4, 1), (4, 2), (8, 3)])
def test_a_step_takes_what_was_predicted(patch: pytest.MonkeyPatch, k: int, k_prime: int, transfer_s: float) -> None:
    times: dict[str, Any] = {"depth": DEPTH, "compute_s": 1.0, "backward_s": BACKWARD, "transfer_s": transfer_s, "rest_s": 0.5}
    model, handle, machine = on_device(patch, training=True, k=k, k_prime=k_prime, train=True, **times)
    step(model)
    handle.tune()
    step(model)
    profile = handle.profile
    assert profile is not None
    assert profile.compute_s == pytest.approx([1.0] * DEPTH) and profile.backward_s == pytest.approx([BACKWARD] * DEPTH)
    assert profile.transfer_s == pytest.approx([transfer_s] * DEPTH)
    assert (profile.rest_s, profile.rest_backward_s) == (pytest.approx(0.5), pytest.approx(1.0))
    predicted = handle.predict()
    assert predicted.resident_seconds == pytest.approx(FULL + 1.5)
    assert predicted.moved_per_pass == 2 * (DEPTH - k) == Knobs(k, k_prime, DEPTH).moved_per_step
    # Where a batch begins within a step is settled by the first steps, so with several blocks a batch there is more than one rhythm.
    assert step_seconds(model, machine, 2 * k_prime) == pytest.approx(predicted.seconds_per_pass, rel=0.02 if k_prime == 1 else 0.08)
    machine.check()


@pytest.mark.parametrize("train", [True, None], ids=["asked", "seen"])
@pytest.mark.parametrize(("transfer_s", "max_slowdown"), [(0.6, 1.02), (1.5, 1.10), (2.5, 1.02), (4.0, 1.5), (8.0, 1.25)])
def test_auto_keeps_the_slowdown_of_a_step(patch: pytest.MonkeyPatch, transfer_s: float, max_slowdown: float, train: bool | None) -> None:
    times: dict[str, Any] = {"depth": DEPTH, "compute_s": 1.0, "backward_s": BACKWARD, "transfer_s": transfer_s, "training": True}
    model, handle, machine = on_device(patch, max_slowdown=max_slowdown, train=train, **times)
    torch.manual_seed(1)
    expected = step(Blocks(Machine(), DEPTH, 0.0))
    for number in range(3):
        assert torch.equal(step(model), expected)
        assert (handle.chosen is not None) == (number == 2)  # by the second and before the third: no gradient waits for a step then
    model.zero_grad()
    measured = step_seconds(model, machine, 6) / FULL
    assert handle.chosen is not None and handle.trains
    assert measured <= max_slowdown + 0.05
    assert measured == pytest.approx(handle.chosen.slowdown, abs=0.02)
    if handle.knobs.k > 1:
        with pytest.MonkeyPatch.context() as other:
            smaller, _, clock = on_device(other, k=handle.knobs.k - 1, k_prime=1, **times)
            assert step_seconds(smaller, clock, 6) / FULL > max_slowdown
    machine.check()


def test_equal_bits_while_auto_measures_chooses_and_an_optimizer_steps() -> None:
    fixture = by_name("llama")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), max_slowdown=1.0, train=True)
    handle = handle_of(model)
    ours = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, overlap=False)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for number in range(5):
        for each in (plain, model):
            loss_of(each, fixture.inputs()).backward()
        assert different_gradients(model, plain) == []
        assert (handle.chosen is not None) == (number > 1)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert handle.profile is not None and handle.profile.trains and len(handle.profile.update_s) == 4
    tw.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


# --- what counts as training -----------------------------------------------------------------------------------------------------


def auto(patch: pytest.MonkeyPatch, **fields: Any) -> Any:
    return on_device(patch, depth=DEPTH, compute_s=1.0, backward_s=BACKWARD, transfer_s=1.5, **fields)


def test_without_training_a_step_is_measured_as_the_forward_it_begins_with(patch: pytest.MonkeyPatch) -> None:
    model, handle, _ = auto(patch, training=True, train=False)
    for number in range(2):
        step(model)
        assert (handle.chosen is not None) == (number == 1)
    assert handle.profile is not None and not handle.profile.trains and not handle.predict().trains


@pytest.mark.parametrize("training", [False, True])
def test_forwards_without_a_backward_are_no_training(patch: pytest.MonkeyPatch, training: bool) -> None:
    """In training mode that is known when the next forward comes."""
    model, handle, machine = auto(patch, training=training)
    other, expected, clock = auto(patch, training=False)
    for _ in range(3):
        model(torch.ones(1, WIDTH))
    pass_seconds(other, clock, 2)
    assert handle.chosen == expected.chosen is not None
    assert not handle.trains and handle.predict().reserved_bytes == 0
    machine.check()


def test_an_evaluation_before_the_second_step_is_not_what_is_measured(patch: pytest.MonkeyPatch) -> None:
    model, handle, machine = auto(patch, training=True, train=True)
    step(model)
    pass_seconds(model, machine, 3)
    assert handle.profile is None and handle.chosen is None
    for _ in range(3):
        step(model)
    assert handle.chosen is not None and handle.chosen.slowdown == handle.predict().slowdown


def test_tune_decides_anew_whether_it_is_training(patch: pytest.MonkeyPatch) -> None:
    model, handle, machine = auto(patch, training=True)
    for _ in range(3):
        step(model)
    assert handle.trains
    handle.tune()
    pass_seconds(model.eval(), machine, 1)
    assert not handle.trains and handle.chosen is not None
    assert handle.predict().resident_seconds == pytest.approx(DEPTH)


def test_a_backward_of_two_forwards_is_not_taken_for_that_of_one(patch: pytest.MonkeyPatch) -> None:
    model, handle, _ = auto(patch, training=True)
    for _ in range(2):
        (model(torch.ones(1, WIDTH)) + model(torch.ones(1, WIDTH))).sum().backward()
    assert handle.profile is not None and not handle.profile.trains


def test_an_error_in_the_measured_backward_leaves_the_forward_to_choose_by(patch: pytest.MonkeyPatch) -> None:
    model, handle, machine = auto(patch, training=True)
    expected = step(model)

    def fail(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[5].map.weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        step(model)
    hook.remove()
    for _ in range(2):
        assert torch.equal(step(model), expected)
    assert handle.chosen is not None and handle.profile is not None and not handle.profile.trains
    handle.tune()
    assert torch.equal(step(model), expected)
    assert handle.profile.trains
    machine.check()


def test_blocks_that_the_backward_does_not_reach_are_not_brought_back(patch: pytest.MonkeyPatch) -> None:
    model, handle, machine = on_device(patch, depth=6, compute_s=1.0, backward_s=BACKWARD, transfer_s=3.0, training=True, k=2, k_prime=1)
    for block in model.blocks[:3]:
        block.requires_grad_(False)
    for _ in range(2):
        handle.tune()
        model(torch.ones(1, WIDTH)).sum().backward()
    assert handle.profile is not None and [bool(seconds) for seconds in handle.profile.backward_s] == [False] * 3 + [True] * 3
    assert step_seconds(model, machine, 4) == pytest.approx(handle.predict().seconds_per_pass, rel=0.05)


@pytest.mark.parametrize("value", [1, 0, "yes", "auto", 1.0, ()], ids=repr)
def test_values_of_train_that_are_none(value: object) -> None:
    with pytest.raises(tw.ConfigError) as caught:
        tw.Superpipeline(train=value)  # type: ignore[arg-type]
    assert caught.value.where == "Superpipeline.train"


# --- memory ----------------------------------------------------------------------------------------------------------------------


def room(**changes: Any) -> Room:
    plain, training = Budget(100, 0, 10, {}, 100), Budget(60, 0, 20, {}, 60)
    fields: dict[str, Any] = {"forward": plain, "step": training, "optimizer": 30, "gradient_bytes": 40, "shared": True}
    return Room(**{"units": 4, "fixed_bytes": 10, "slot_bytes": 15, "block_bytes": 48, **fields, **changes})


def opened(nbytes: int) -> Footprint:
    return Footprint(ring=nbytes, gradients=0, kept=0, read=0, written=0, overlaps=True)


def test_what_an_optimizer_takes_is_left_to_it() -> None:
    assert room().allowed(trains=False) == (1, 2, 3, 4)
    assert room().allowed(trains=True) == (1, 2, 3)  # all four would keep their gradients too
    assert room(gradient_bytes=0).allowed(trains=True) == (1, 2, 3, 4)
    assert room().allowed(trains=True, opened=opened(50)) == (1, 2)  # 20 more than was left
    assert room().allowed(
        trains=True,
        opened=opened(10),
    ) == (1, 2, 3)
    assert room().allowed(trains=False, opened=opened(50)) == (1, 2)
    assert room(shared=False).allowed(trains=True, opened=opened(1000)) == (1, 2, 3)
    assert room(step=Budget(0, 0, 20, {"device_memory": 28}, -5)).allowed(trains=True) == ()
    assert room(step=Budget(28, 0, 20, {"device_memory": 28}, 60)).allowed(trains=True) == (1,)


def little(patch: pytest.MonkeyPatch, blocks: int) -> None:
    """Memory for so many blocks beside what is left to a training step."""
    plain = technique.weight_budget

    def weight_budget(
        config: Any, model: nn.Module, integration: Any, device: Any, scratch: int, training: Any = None, trial: Any = None
    ) -> Budget:
        budget = plain(config, model, integration, device, scratch, training, trial)
        left = blocks * (BLOCK_BYTES + 8192) + BLOCK_BYTES + (0 if training else 3 * (BLOCK_BYTES + 8192))
        return Budget(left, budget.host, budget.reserve, budget.asked, left)

    patch.setattr(technique, "weight_budget", weight_budget)


@pytest.mark.parametrize("train", [True, None], ids=["asked", "seen"])
def test_auto_takes_no_more_blocks_than_training_leaves_room_for(patch: pytest.MonkeyPatch, train: bool | None) -> None:
    little(patch, 3)
    model, handle, _ = auto(patch, training=True, train=train, max_slowdown=1.0)
    for _ in range(4):
        step(model)
        assert handle.knobs.k <= 3
    assert handle.chosen is not None and handle.knobs.k == 3
    with pytest.raises(tw.BudgetError, match="k=4 blocks need"):
        handle.turn(4, 1)
    assert "left to a training step" in handle.explain() and handle.predict().reserved_bytes > 0
    assert handle.predict().peak_bytes == handle.predict().device_bytes + handle.predict().reserved_bytes


def test_blocks_of_forwards_make_room_when_an_optimizer_trains(patch: pytest.MonkeyPatch) -> None:
    little(patch, 2)
    model, handle, machine = auto(patch, max_slowdown=1.0)
    pass_seconds(model, machine, 2)
    assert handle.chosen is not None and not handle.trains
    handle.turn(5, 1)
    optimizer = tw.OffloadedOptimizer(model.train(), torch.optim.SGD, lr=1e-3, overlap=False)
    handle.room.optimizer = sum((optimizer.footprint().ring, optimizer.footprint().gradients, optimizer.footprint().kept))
    for _ in range(4):
        model(torch.ones(1, WIDTH)).sum().backward()
        optimizer.step()
        assert handle.knobs.k <= 2 and handle.trains
    assert handle.profile is not None and handle.profile.update_s
    assert handle.predict().moved_per_pass == 2 * DEPTH - handle.knobs.k
    optimizer.close()


def test_too_little_for_training_is_refused_with_what_training_takes(patch: pytest.MonkeyPatch) -> None:
    little(patch, 0)
    model = Blocks(Machine(), 4, 0.0)
    with pytest.raises(tw.BudgetError, match="for a backward") as caught:
        tw.superpipeline(model, k=2, train=True)
    assert caught.value.where == "k" and tw.wrappers_of(model) == {}
    tw.superpipeline(model, k=2)


def test_blocks_that_all_stay_are_neither_moved_nor_counted_twice() -> None:
    torch.manual_seed(0)
    model = tw.superpipeline(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).train(), k=4, train=True)
    handle = handle_of(model)
    before = handle.predict().reserved_bytes
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3)
    now = handle.predict()
    assert (now.moved_per_pass, now.streamed_bytes) == (0, 0)
    assert now.reserved_bytes <= before
    optimizer.close()


# --- the choice -----------------------------------------------------------------------------------------------------------------


def test_an_optimizer_on_the_same_link_slows_a_window_down() -> None:
    profile = Profile((1.0,) * 8, (1.5,) * 8, backward_s=(2.0,) * 8)
    driven = Profile((1.0,) * 8, (1.5,) * 8, backward_s=(2.0,) * 8, update_s=(0.0,) * 8)
    busy = Profile((1.0,) * 8, (1.5,) * 8, backward_s=(2.0,) * 8, update_s=(1.0,) * 8)
    seconds = [each.pass_seconds(4, 1) for each in (profile, driven, busy)]
    assert seconds == sorted(seconds) and len(set(seconds)) == 3
    assert busy.resident_s == profile.resident_s == 24.0
    assert Profile((1.0,) * 8, (1.5,) * 8, backward_s=(2.0,) * 8, update_s=(4.0,) * 8).resident_s == 32.0
    assert choose(profile, max_slowdown=1.1).k <= choose(busy, max_slowdown=1.1).k
    assert choose(busy, max_slowdown=1.0, allowed=(1, 2)).k <= 2

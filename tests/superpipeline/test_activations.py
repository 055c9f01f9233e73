"""What blocks of a window save for the backward: kept, recomputed, moved out and back. The numbers are those of training in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.models import ModelFixture, by_name
from tests.pairs import every_two
from tests.stream.fake_arena import FakeArena, Machine
from tests.superpipeline.device import handle_of, separate
from tests.weights.training import different_gradients, loss_of
from torchwrap.activations import swap
from torchwrap.core import tensors

FAMILIES = ["llama-tied", "mixtral", "t5", "llava", "vit", "convnet"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ["keep", "recompute", "disk", "auto"]
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are small, so that everything they save would stay."""
    monkeypatch.setattr(swap, "SMALLEST", 64)


def inputs_of(fixture: ModelFixture, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fixture.inputs().items()}
    return {**inputs, "use_cache": False} if fixture.generates else inputs


def step(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    loss = loss_of(model, inputs)
    loss.backward()
    return loss.detach()


@every_two(fixture={name: by_name(name) for name in FAMILIES}, dtype=DTYPES, mode={mode: mode for mode in MODES})
def test_gradients_are_those_of_training_in_memory(fixture: ModelFixture, dtype: torch.dtype, mode: str) -> None:
    plain, model = fixture.build().to(dtype).train(), fixture.build().to(dtype).train()
    tw.superpipeline(model, k=1, k_prime=1, activations=mode)
    inputs = inputs_of(fixture, dtype)
    for seed in range(3):  # "auto" recomputes in the first step and then does what it chose
        assert torch.equal(step(model, inputs, seed), step(plain, inputs, seed))
    assert different_gradients(model, plain) == []
    if mode == "disk":
        stats = handle_of(model).stats()
        assert 0 < stats["activation_bytes_read"] <= stats["activation_bytes_written"] < stats["activation_bytes_saved"]
    tw.unwrap(model)
    model.zero_grad()
    plain.zero_grad()
    assert torch.equal(step(model, inputs), step(plain, inputs))
    assert different_gradients(model, plain) == []


@every_mode
def test_the_window_keeps_its_size(mode: str) -> None:
    fixture = by_name("llama-tied")
    model = tw.superpipeline(fixture.build().train(), k=2, k_prime=2, activations=mode)
    handle = handle_of(model)
    engine = handle.engine
    assert engine is not None

    def look(*_: Any) -> None:
        assert len(engine._fetches) <= 2 and len(engine._slots) <= 2
        seen.append(len(engine._fetches))

    seen: list[int] = []
    hooks = [p.parameter.register_post_accumulate_grad_hook(look) for unit in handle.units for p in unit.pieces]
    for seed in range(3):
        step(model, inputs_of(fixture), seed)
    assert len(seen) >= len(hooks) and max(seen) <= 2
    assert any(mode in line for line in handle.explain().splitlines()) or mode in ("keep", "auto")


@pytest.mark.parametrize("mode", ["recompute", "disk", "auto"])
def test_knobs_are_chosen_while_activations_are(mode: str) -> None:
    fixture = by_name("llama-tied")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), activations=mode, max_slowdown=1.5)
    for seed in range(4):
        assert torch.equal(step(model, inputs_of(fixture), seed), step(plain, inputs_of(fixture), seed))
    assert handle_of(model).chosen is not None
    assert different_gradients(model, plain) == []


def test_what_activations_may_take_follows_the_knobs() -> None:
    """With `device_memory`, "auto" has what the window leaves of it: less after more blocks came to stay."""
    fixture = by_name("llama-tied")
    room, reserve = 4 << 20, 1 << 20
    model = tw.superpipeline(fixture.build().train(), k=1, activations="auto", device_memory=room, reserve=reserve)
    handle = handle_of(model)
    for k in (1, 3, 2, 4):
        handle.turn(k, 1)
        for seed in range(2):
            step(model, inputs_of(fixture), seed)
        assert handle.plan.slots == (k if k < 4 else 0)
        assert handle.activations.choices.keys() == {unit.index for unit in handle.units}
        assert handle.activations.allowed == reserve + room - handle.predict().device_bytes


def test_little_memory_for_activations_is_kept_to() -> None:
    fixture = by_name("llama-tied")
    plain = fixture.build().train()
    model = tw.superpipeline(fixture.build().train(), k=1, activations="auto", activation_memory="8KiB")
    for seed in range(3):
        assert torch.equal(step(model, inputs_of(fixture), seed), step(plain, inputs_of(fixture), seed))
    assert different_gradients(model, plain) == []
    assert handle_of(model).activations.allowed == 8 << 10
    assert list(handle_of(model).activations.choices.values()).count("keep") <= 1  # the last block's wait for nobody
    assert "8.00 KiB" in handle_of(model).explain()


def test_the_host_is_no_other_place_on_a_cpu() -> None:
    model = by_name("vit").build()
    with pytest.raises(tw.ConfigError, match=r'^superpipeline: activations="host"') as caught:
        tw.superpipeline(model, k=2, activations="host")
    assert caught.value.where == "activations" and tw.wrappers_of(model) == {}


@pytest.mark.parametrize("order", ["late", "early", "random"])
@pytest.mark.parametrize("mode", ["recompute", "disk"])
def test_beside_a_device(patch: pytest.MonkeyPatch, mode: str, order: Any) -> None:
    fixture, machine = by_name("vit"), Machine(order)
    separate(patch, machine, FakeArena)
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), k=2, k_prime=2, activations=mode)
    for seed in range(3):
        assert torch.equal(step(model, inputs_of(fixture), seed), step(plain, inputs_of(fixture), seed))
    assert different_gradients(model, plain) == []
    tw.unwrap(model)
    machine.check()


@every_mode
def test_with_the_optimizer_on_disk(mode: str) -> None:
    fixture = by_name("llama-tied")
    plain, model = fixture.build().train(), tw.superpipeline(fixture.build().train(), k=2, k_prime=1, activations=mode)
    optimizers = [torch.optim.AdamW(plain.parameters(), lr=1e-2), tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2)]
    for seed in range(4):
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            losses.append(step(each, inputs_of(fixture), seed))
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(*losses)
    with tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())

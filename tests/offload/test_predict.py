"""`predict` and `predict_training` against what passes take, on clocks that no machine has a part in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.stream.fake_arena import FakeArena, Machine, stand_in
from torchwrap.storage import aio
from torchwrap.stream import slots
from torchwrap.stream.passes import Passes, Times, Used
from torchwrap.stream.simulator import simulate
from torchwrap.weights.timing import Update

WIDTH = 64
BLOCK = 2 * WIDTH * WIDTH * 4


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class ManyLayers(nn.Module):
    """Forty small blocks, and a head as large as one of them, which is a unit by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(40))
        self.head = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def many_layers() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    x = torch.ones(3, WIDTH)
    return ManyLayers(), lambda model: model(x)


def smollm2() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """SmolLM2-135M with its thirty blocks, nine heads over three, and its tied embedding, an eighth as wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
        tie_word_embeddings=True,
    )
    ids = torch.arange(12)[None]
    return LlamaForCausalLM(config), lambda model: model(ids, use_cache=False).logits


every_model = pytest.mark.parametrize("build", [many_layers, smollm2], ids=["many-layers", "smollm2"])
every_link = pytest.mark.parametrize("share", [0.3, 1.0, 3.0], ids=["computing", "even", "moving"])


class VirtualDisk:
    """A disk and a clock: reads end in the order in which they were asked for, each after `nbytes / bandwidth` seconds."""

    def __init__(self, patch: pytest.MonkeyPatch, model: nn.Module, bandwidth: float) -> None:
        handle = tw.handle_of(model, "offload")
        self.now = self.free = 0.0
        submit, stats = handle.reader.submit, handle.reader.stats

        def submitted(reads: Sequence[aio.Read]) -> Any:
            ticket = submit(reads)
            ticket.wait()
            self.free = ready = max(self.free, self.now) + ticket.nbytes / bandwidth
            stats.bytes, stats.busy_s = 1 << 30, (1 << 30) / bandwidth
            return SimpleNamespace(
                wait=lambda *_: setattr(self, "now", max(self.now, ready)),
                done=lambda: self.now >= ready,
                **{name: getattr(ticket, name) for name in ("sums", "codes", "nbytes", "interval", "seconds")},
            )

        patch.setattr(handle.reader, "submit", submitted)
        patch.setattr(slots, "time", SimpleNamespace(monotonic=lambda: self.now, **{"perf_counter": time.perf_counter}))
        handle.meter.clock = lambda: self.now

    def spend(self, model: nn.Module, block_s: float, head_s: float) -> None:
        """From now on blocks take `block_s` virtual seconds, twice that backward, the head `head_s`."""

        def computing(seconds: float) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.now += seconds
                shown = output[0] if isinstance(output, tuple) else output
                if shown.requires_grad:
                    shown.grad_fn.register_prehook(lambda _: setattr(self, "now", self.now + 2 * seconds))

            return hook

        for name, module in model.named_modules():
            if type(module).__name__ in ("_Block", "LlamaDecoderLayer"):
                module.register_forward_hook(computing(block_s))
            elif name in ("head", "lm_head"):
                module.register_forward_hook(computing(head_s))


def wrapped(build: Callable[[], Any], patch: pytest.MonkeyPatch, share: float) -> tuple[nn.Module, Callable[[nn.Module], Any], VirtualDisk]:
    """Under `offload`, each block computing one second and coming in `share` seconds."""
    torch.manual_seed(0)
    model, call = build()
    block = sum(p.nbytes for p in next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0].parameters())
    tw.offload(model.eval(), params="disk")
    disk = VirtualDisk(patch, model, block / share)
    disk.spend(model, 1.0, 4.0)
    return model, call, disk


@every_model
@every_link
def test_a_forward_from_disk_takes_what_was_predicted(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any], share: float) -> None:
    model, call, disk = wrapped(build, monkeypatch, share)
    handle = tw.handle_of(model, "offload")
    assert handle.predict().computing_s is None and handle.predict().seconds_per_pass is None
    passes = []
    with torch.no_grad():
        for _ in range(4):
            began = disk.now
            call(model)
            passes.append(disk.now - began)
    predicted = handle.predict()
    blocks = sum(unit.kind == "block" for unit in handle.units)
    assert predicted.computing_s == pytest.approx(blocks + 4.0)
    streaming = handle.plan.streamed_bytes / handle.stats()["bandwidth"]
    assert streaming <= predicted.moving_s <= 1.13 * streaming  # nine pages are read for eight
    assert predicted.seconds_per_pass == pytest.approx(passes[-1], rel=0.03)
    assert predicted.seconds_per_pass >= max(predicted.computing_s, predicted.moving_s) - 1e-6
    assert predicted.bottleneck == ("compute" if predicted.computing_s >= predicted.moving_s else "read")
    assert share == 1.0 or predicted.bottleneck == ("compute" if share < 1.0 else "read")


@every_model
@every_link
def test_a_step_takes_what_was_predicted(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any], share: float) -> None:
    model, call, disk = wrapped(build, monkeypatch, share)
    handle = tw.handle_of(model, "offload")
    steps = []
    for _ in range(4):
        began = disk.now
        call(model.train()).square().mean().backward()
        steps.append(disk.now - began)
    route, rate = handle.route(), handle.stats()["bandwidth"]
    assert route.step is not None and len(route.step.backward) == len(route.step.forward)
    assert route.step.computing_s == pytest.approx(3 * route.step.forward_s)
    assert route.step_seconds(rate, None) == pytest.approx(steps[-1], rel=0.03)
    promised = handle.predict_training()
    assert promised.computing_s == pytest.approx(route.step.computing_s)
    assert promised.seconds_per_step >= steps[-1] * 0.97  # an optimizer's traffic comes on top
    with torch.no_grad():  # a forward alone does not make it forget the step
        call(model)
    assert handle.predict_training().seconds_per_step == pytest.approx(promised.seconds_per_step)


@every_model
def test_beside_a_separate_device_a_pass_is_measured_when_asked_for(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any]) -> None:
    machine = Machine("late", bandwidth=BLOCK / 1.5)
    stand_in(monkeypatch, machine, FakeArena)
    torch.manual_seed(0)
    model, call = build()
    tw.offload(model.eval(), params="host", k=3)
    handle = tw.handle_of(model, "offload")
    for unit in handle.units:
        if unit.kind in ("block", "leaf"):
            model.get_submodule(unit.name).register_forward_hook(lambda *_: machine.work(machine.compute, 1.0))
    handle.meter.settle = lambda: [machine.synchronize(machine.record(queue)) for queue in machine._queues]
    handle.meter.clock = lambda: machine._host_time
    ends = []
    with torch.no_grad():
        call(model)
        assert handle.predict().computing_s is None and handle.predict().seconds_per_pass is None
        handle.tune()
        for _ in range(4):
            call(model)
            ends.append(machine.compute.time)
    predicted = handle.predict()
    assert predicted.seconds_per_pass == pytest.approx(ends[-1] - ends[-2], rel=0.03)
    assert predicted.computing_s == pytest.approx(sum(unit.kind in ("block", "leaf") for unit in handle.units))
    machine.check()


def test_a_model_that_is_all_there_is_timed_as_a_whole() -> None:
    model = tw.offload(ManyLayers(), params="device")
    handle = tw.handle_of(model, "offload")
    seconds = iter((0.0, 5.0, 10.0, 30.0))
    handle.meter.clock = lambda: next(seconds)
    model(torch.ones(2, WIDTH)).sum().backward()
    now = handle.predict()
    assert (now.moving_s, now.computing_s, now.seconds_per_pass, now.bottleneck) == (0.0, 5.0, 5.0, "compute")
    assert handle.predict_training().computing_s == 25.0


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"], ids=repr)
@pytest.mark.parametrize("name", ["batch", "tokens"])
def test_inputs_that_are_none(name: str, value: Any) -> None:
    handle = tw.handle_of(tw.offload(ManyLayers(), params="disk"), "offload")
    for ask in (handle.predict, handle.predict_training):
        with pytest.raises(tw.ConfigError) as caught:
            ask(**{name: value})
        assert caught.value.where == name


# --- the step of an optimizer -------------------------------------------------------------------------------------------------------

N = 8
STEP = Times(
    forward=tuple(Used(unit, 1.0) for unit in range(N)), backward=tuple(Used(unit, 2.0) for unit in reversed(range(N))), rest_s=1.0
)


def step_seconds(*, transfer: float, read: float = 0.0, written: float = 0.0, **more: Any) -> float:
    share = {unit: 1.0 / N for unit in range(N)}
    return Passes(
        times=STEP,
        slots=3,
        transfer_s=dict.fromkeys(range(N), transfer),
        read_s={unit: read * part for unit, part in share.items()},
        written_s={unit: written * part for unit, part in share.items()},
        renewed=True,
        **more,
    ).seconds


def test_the_longest_of_computing_reading_and_writing_decides() -> None:
    computing = 1.0 + 3.0 * N
    assert step_seconds(transfer=0.1) == pytest.approx(computing, rel=0.02)
    assert step_seconds(transfer=0.1, read=8.0, written=12.0) == pytest.approx(computing, rel=0.1)
    assert step_seconds(transfer=0.1, written=100.0) == pytest.approx(100.0 + N + 3.0, rel=0.02)  # begins with the first backward
    assert step_seconds(transfer=0.1, read=100.0) == pytest.approx(100.0 + N + 3.0, rel=0.05)
    assert step_seconds(transfer=0.1, closing_s=7.0) == pytest.approx(computing + 7.0, rel=0.02)
    # What is left to move when backward ends goes on beside other work.
    assert step_seconds(transfer=0.1, written=100.0, closing_s=7.0) == pytest.approx(step_seconds(transfer=0.1, written=100.0))


def test_several_backwards_per_step_move_weights_for_each_and_update_once() -> None:
    once, thrice = (step_seconds(transfer=0.1, written=4.0, repeats=repeats) for repeats in (1, 3))
    assert thrice == pytest.approx(3 * once, rel=0.05)
    assert step_seconds(transfer=0.1, written=100.0, repeats=3) == pytest.approx(100.0 + 2 * 25.0 + N + 3.0, rel=0.05)


def test_updates_behind_the_backward_come_on_top_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call, _ = wrapped(many_layers, monkeypatch, 0.3)
    for _ in range(3):
        call(model.train()).square().mean().backward()
    route = tw.handle_of(model, "offload").route()
    assert route.step is not None
    rate = tw.handle_of(model, "offload").stats()["bandwidth"]
    update = Update(read_s=50.0, written_s=40.0, computing_s=route.step.computing_s + 5.0)
    beside = route.step_seconds(rate, update)
    behind = route.step_seconds(rate, Update(read_s=50.0, written_s=40.0, computing_s=update.computing_s, overlaps=False))
    assert route.step.computing_s < beside < behind == pytest.approx(route.step_seconds(rate, None) + 50.0, rel=0.05)
    known = route.step_seconds(rate, Update(read_s=0.0, written_s=0.0, computing_s=update.computing_s, overlaps=False))
    assert known == pytest.approx(route.step_seconds(rate, None) + 5.0, rel=0.05)


# --- what the simulator learned -----------------------------------------------------------------------------------------------------


def test_nothing_is_read_ahead_during_a_use_that_wants_the_memory() -> None:
    run = simulate([0, 1, 2, 3] * 3, slots=3, longer_s=dict.fromkeys(range(12), 1.0), transfer_s=[0.5] * 4, alone={3, 7, 11})
    for position in (3, 7, 11):
        assert run.uses[position].present == {3}
    assert run.uses[8].stall_s > 0 == run.uses[10].stall_s


def test_a_unit_that_is_always_there_takes_no_slot_and_no_transfer() -> None:
    run = simulate([0, 1, 2, 3] * 3, slots=2, transfer_s=[1.0] * 4, longer_s=dict.fromkeys(range(12), 1.0), present={1})
    assert all(1 not in use.present for use in run.uses) and run.peak_units <= 2
    assert not any(use.stall_s for use in run.uses if use.unit == 1)

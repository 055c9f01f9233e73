"""What a recorded training step shows: every lane, in the order in which things depend on each other; nothing where it is off."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.core.config import format_bytes
from torchwrap.stream.timeline import Event, Timeline
from torchwrap.weights.budget import optimizer_rows
from torchwrap.weights.handle import WeightsHandle

WIDTH, ROWS, CHUNK = 128, 256, 32 << 10  # two chunks for each weight


def stack(record: bool = True, **options: object) -> tuple[nn.Module, WeightsHandle]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))
    tw.offload(model, record=record, **({"params": "disk", "activations": "disk"} | options))
    handle = tw.handle_of(model, "offload")
    assert isinstance(handle, WeightsHandle)
    return model, handle


def adam(model: nn.Module, **options: object) -> tw.OffloadedOptimizer:
    return tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3, chunk=CHUNK, **options)  # type: ignore[arg-type]


def step(model: nn.Module, optimizer: tw.OffloadedOptimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(ROWS, WIDTH)).square().mean().backward()
    optimizer.step()


def recorded_step(model: nn.Module, handle: WeightsHandle, optimizer: tw.OffloadedOptimizer) -> tuple[list[Event], float, float]:
    """Events of one step, and when it began and ended, on the timeline's clock."""
    assert handle.timeline is not None
    before, begin = len(handle.events), time.monotonic() - handle.timeline.zero
    step(model, optimizer)
    return handle.events[before:], begin, time.monotonic() - handle.timeline.zero


def test_a_recorded_step_has_every_lane_and_lies_within_the_step() -> None:
    model, handle = stack()
    optimizer = adam(model)
    step(model, optimizer)
    events, begin, end = recorded_step(model, handle, optimizer)
    assert {event.lane for event in events} >= {"read", "compute", "backward", "save", "load", "state", "update", "write"}
    # A read for the forward may have begun when the step before had ended.
    assert all(event.start <= event.end <= end and (event.start >= begin or event.lane == "read") for event in events)
    assert handle.timeline is not None and not handle.timeline._open
    optimizer.close()


def test_a_chunk_is_read_then_updated_then_written_and_the_bytes_are_those_that_were_moved() -> None:
    model, handle = stack()
    optimizer = adam(model)
    step(model, optimizer)
    before = optimizer.stats()
    events, _, _ = recorded_step(model, handle, optimizer)
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    for name in weights:
        read, updated, written = ([e for e in events if (e.lane, e.unit) == (lane, name)] for lane in ("state", "update", "write"))
        assert len(read) == len(updated) == len(written) == 2
        for first, second, third in zip(read, updated, written, strict=True):
            assert first.end <= second.start and second.end <= third.start
    moved = {lane: sum(e.nbytes for e in events if e.lane == lane) for lane in ("state", "write")}
    after = optimizer.stats()
    assert moved["write"] == after["bytes_written"] - before["bytes_written"]
    assert moved["state"] == after["bytes_read"] - before["bytes_read"]
    values = moved["state"] + after["bytes_reused"] - before["bytes_reused"]
    assert values == 4 * 3 * (WIDTH * WIDTH + WIDTH) * 4  # weights and two moments of four layers
    optimizer.close()


def test_updates_run_during_the_backward_with_overlap_and_after_it_without() -> None:
    for overlap in (True, False):
        model, handle = stack()
        optimizer = adam(model, overlap=overlap)
        step(model, optimizer)
        events, _, _ = recorded_step(model, handle, optimizer)
        backward = max(event.end for event in events if event.lane == "backward")
        first = min(event.start for event in events if event.lane == "update")
        assert (first < backward) is overlap
        optimizer.close()


def test_what_is_computed_again_lies_within_the_backward_of_its_unit() -> None:
    model, handle = stack(activations="recompute")
    optimizer = adam(model)
    events, _, _ = recorded_step(model, handle, optimizer)
    computed = [event for event in events if event.lane == "compute"]
    backwards = {event.unit: event for event in events if event.lane == "backward"}
    assert len(backwards) == 4 and len(computed) == 8
    for again in computed[4:]:
        outer = backwards[again.unit]
        assert outer.start <= again.start and again.end <= outer.end
    optimizer.close()


def test_gradients_that_wait_on_the_disk_and_commits_are_writes(tmp_path: object) -> None:
    model, handle = stack()
    optimizer = adam(model, max_grad_norm=1.0, gradients="disk", path=tmp_path, durability="step")
    events, _, _ = recorded_step(model, handle, optimizer)
    parked = [e for e in events if e.lane == "write" and e.nbytes == WIDTH * WIDTH * 4]
    assert {event.unit for event in parked} >= {f"{layer}.0.weight" for layer in range(4)}
    assert [event.unit for event in events][-1] == "commit"
    optimizer.close()


def test_weights_that_all_stay_in_memory_have_the_lanes_of_the_optimizer() -> None:
    model, handle = stack(params="device", activations="keep")
    optimizer = adam(model)
    step(model, optimizer)
    events, _, _ = recorded_step(model, handle, optimizer)
    assert {event.lane for event in events} >= {"state", "update", "write"}
    assert [event.unit for event in events].count("in memory") == 1  # the biases
    optimizer.close()


@pytest.mark.parametrize("activations", ["keep", "disk"])
def test_nothing_is_recorded_unless_asked_for(activations: str) -> None:
    model, handle = stack(record=False, activations=activations)
    optimizer = adam(model)
    step(model, optimizer)
    assert handle.timeline is None and handle.events == []
    optimizer.close()


def test_undoing_and_closing_leave_nothing() -> None:
    threads = set(threading.enumerate())
    model, handle = stack()
    optimizer = adam(model)
    step(model, optimizer)
    optimizer.close()
    model(torch.ones(ROWS, WIDTH)).sum().backward()
    assert handle.timeline is not None and not handle.timeline._open
    timeline, count = handle.timeline, len(handle.events)
    tw.unwrap(model)
    model(torch.ones(ROWS, WIDTH)).sum().backward()
    assert len(timeline.events) == count and set(threading.enumerate()) <= threads


def test_a_backward_that_raises_leaves_no_interval_for_the_next() -> None:
    model, handle = stack(activations="keep")
    fail = [True]

    def once(gradient: torch.Tensor) -> None:
        if fail.pop() if fail else False:
            raise RuntimeError("stopped")

    hidden = model[:2](torch.ones(ROWS, WIDTH))  # type: ignore[index]
    hidden.register_hook(once)
    with pytest.raises(RuntimeError, match="stopped"):
        model[2:](hidden).sum().backward()  # type: ignore[index]
    count, moment = len(handle.events), time.monotonic()
    model(torch.ones(ROWS, WIDTH)).sum().backward()
    assert handle.timeline is not None and not handle.timeline._open
    backwards = [event for event in handle.events[count:] if event.lane == "backward"]
    assert len(backwards) == 4 and all(event.start >= moment - handle.timeline.zero for event in backwards)


@pytest.mark.parametrize("technique", ["offload", "superpipeline"])
def test_explain_has_what_an_open_optimizer_takes_and_moves(technique: str) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    getattr(tw, technique)(model, **({"params": "disk"} if technique == "offload" else {"k": 1, "store": "disk"}))
    handle = tw.handle_of(model, technique)
    assert isinstance(handle, WeightsHandle)
    before = handle.explain()
    assert "optimizer" not in before
    optimizer = adam(model)
    for _ in range(2):
        moved = optimizer.stats()
        step(model, optimizer)
    rows = dict(optimizer_rows(handle))
    now = optimizer.stats()
    assert rows["optimizer: chunks under way"] == 3 * 3 * CHUNK  # weight and two moments, three times
    assert rows["optimizer reads per step"] == now["bytes_read"] - moved["bytes_read"]
    assert rows["optimizer writes per step"] == now["bytes_written"] - moved["bytes_written"]
    lines = handle.explain().splitlines()
    assert all(any(line.startswith(label) and line.endswith(format_bytes(nbytes)) for line in lines) for label, nbytes in rows.items())
    optimizer.close()
    assert "optimizer" not in handle.explain()


def test_one_interval_within_another_of_the_same_unit_is_part_of_it() -> None:
    timeline = Timeline()
    for _ in range(2):
        timeline.begin("compute", "a")
    timeline.begin("backward", "a")
    for lane in ("backward", "compute", "compute", "compute"):
        timeline.end(lane, "a")  # type: ignore[arg-type]
    assert [event.lane for event in timeline.events] == ["backward", "compute"]


def test_threads_that_record_at_once_lose_nothing() -> None:
    timeline = Timeline()

    def work(unit: str) -> None:
        for _ in range(2000):
            timeline.begin("compute", unit)
            timeline.end("compute", unit)

    threads = [threading.Thread(target=work, args=(name,)) for name in "aabb"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.events) == 4 * 2000 and not timeline._open

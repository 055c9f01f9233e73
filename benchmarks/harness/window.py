"""Superpipeline over (k, k') on a simulated device with a virtual clock: peak, time and transfers that no machine has a part in.

The device is the one of the tests: the library's engine, its slots and its order of requests are real, copies and computation take
virtual seconds. A ratio is the time to bring a block in over the time to compute it; inputs of prefill size have ratios around 1 and less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.stream.fake_arena import FakeArena
from tests.superpipeline.device import Blocks, SlotCount, counted_slots, on_device, pass_seconds
from torchwrap import OffloadedOptimizer
from torchwrap.superpipeline.handle import SuperpipelineHandle
from torchwrap.superpipeline.picture import draw, grid

__all__ = ["PREFILL", "TITLE", "measure_window", "picture", "table"]

TITLE = "superpipeline[virtual clock]"
RATIOS = (0.5, 0.9, 1.0, 1.15, 1.5, 2.0)
PREFILL = 1.15
"""Ratios up to this one are of prefill size: the link keeps up with the computation, or nearly."""
SLOWDOWNS = (1.02, 1.10, 1.25, 1.5)
TRAINED = (0.9, 1.5, 4.0)
"""Ratios at which training is run: its blocks compute three times as long as those of a forward, so the link keeps up at higher ones."""
BACKWARD = 2.0  # virtual seconds of a block's backward, its forward being one
WIDTH = 512  # blocks of 1 MiB, beside which the pages that a slot has to spare are few
NARROW = 64  # of blocks whose bytes are not looked at: virtual seconds do not depend on it


def measure_window(
    *, depths: Sequence[int] = (10, 24), ratios: Sequence[float] = RATIOS, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Every (k, k') of the grid at every ratio, and "auto" for several limits.

    Returns:
        `depths.<n>.rows`: one per (k, k'), figures that depend on the ratio by ratio; those named `step` are of training passes: forward,
        backward and the update of every block. `depths.<n>.auto`, `auto_step`: what was chosen and what a pass took. `forty_percent.<n>`:
        the fastest k' at the largest k <= 0.4 n. `worst`: the figures that the bars are about.
    """
    found: dict[str, Any] = {"title": TITLE, "ratios": list(ratios), "depths": {}, "forty_percent": {}}
    for depth in depths:
        rows = []
        for k, k_prime in grid(depth):
            rows.append(_row(depth, k, k_prime, ratios))
            row = rows[-1]
            say(f"{TITLE} {depth} blocks k={k} k'={k_prime} saved {row['saved']:.0%} slow-down {row['slowdown']} training {row['step_s']}")
        found["depths"][str(depth)] = {
            "rows": rows,
            "auto": [_auto(depth, ratio, limit) for ratio in ratios for limit in SLOWDOWNS],
            "auto_step": [_auto_step(depth, ratio, limit) for ratio in TRAINED for limit in SLOWDOWNS],
        }
        found["forty_percent"][str(depth)] = _fastest([row for row in rows if row["k"] == int(0.4 * depth)], ratios)
    rows = [row for each in found["depths"].values() for row in each["rows"]]
    chosen, trained = ([each for depth in found["depths"].values() for each in depth[name]] for name in ("auto", "auto_step"))
    found["worst"] = {
        "peak_error": max(abs(row["held_bytes"] / row["predicted_bytes"] - 1) for row in rows),
        "slowdown_error": max(abs(row["slowdown"][key] / row["predicted_slowdown"][key] - 1) for row in rows for key in row["slowdown"]),
        "step_error": max(abs(row["transfers_per_step"] - 2 * (row["units"] - row["k"])) for row in rows),
        "step_seconds_error": max(abs(row["step_s"][key] / row["predicted_step_s"][key] - 1) for row in rows for key in row["step_s"]),
        "step_peak_error": max(abs(row["step_held_bytes"] / row["step_predicted_bytes"] - 1) for row in rows),
        "auto_step_excess": max(each["slowdown"] - max(each["max_slowdown"], each["fastest"]) for each in trained),
        "auto_excess": max(each["slowdown"] - each["max_slowdown"] for each in chosen),
        "saved_at_forty_percent": min(each["saved"] for each in found["forty_percent"].values()),
        "prefill_slowdown_at_forty_percent": max(
            each["slowdown"][str(ratio)] for each in found["forty_percent"].values() for ratio in ratios if ratio <= PREFILL
        ),
    }
    found["equal_outputs"] = all(row["equal"] for row in rows)
    return found


def table(summary: dict[str, Any]) -> str:
    """The rows of docs/superpipeline.md, as Markdown: forwards, then training passes in times of one with all blocks present."""
    ratios = [str(ratio) for ratio in summary["ratios"]]
    trained = [f"training {ratio}" for ratio in TRAINED]
    lines = [
        "| n | k | k' | saved | blocks per pass | per training step | " + " | ".join([*ratios, *trained]) + " |",
        "|" + "---:|" * (6 + len(ratios) + len(trained)),
    ]
    for depth, found in summary["depths"].items():
        wanted = {int(share * int(depth)) for share in (0.2, 0.4, 0.6, 0.8)}
        for row in found["rows"]:
            k = row["k"]
            largest = 1 << (k.bit_length() - 1)
            if k not in wanted or row["k_prime"] not in (1, largest // 2, largest):
                continue
            steps = [row["step_s"][str(ratio)] / (int(depth) * (1 + BACKWARD)) for ratio in TRAINED]
            slowdowns = " | ".join(f"{ratio:.2f}" for ratio in [*(row["slowdown"][ratio] for ratio in ratios), *steps])
            lines.append(
                f"| {depth} | {k} | {row['k_prime']} | {row['saved']:.0%} | {row['transfers_per_pass']:g} | {row['transfers_per_step']:g} "
                f"| {slowdowns} |"
            )
    return "\n".join(lines)


def picture(summary: dict[str, Any], *, depth: int = 24, ratio: float = 1.15) -> bytes:
    """Predictions of one model after one measured pass, and the runs of `measure_window` as crosses; a PNG file."""
    with _device(depth, ratio, k=2, k_prime=1, width=WIDTH) as (model, handle, _, _):
        handle.tune()
        pass_seconds(model, _machine(model), 1)
        guesses = [handle.predict(k=k, k_prime=k_prime) for k, k_prime in grid(depth)]
    runs = {
        (row["k"], row["k_prime"]): (row["held_bytes"], row["slowdown"][str(ratio)] * depth)
        for row in summary["depths"][str(depth)]["rows"]
        if row["k"] < depth
    }
    return draw(guesses, title=f"{depth} equal blocks; bringing one in takes {ratio:g} of the time to compute it", runs=runs)


def _row(depth: int, k: int, k_prime: int, ratios: Sequence[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"units": depth, "k": k, "k_prime": k_prime, "slowdown": {}, "predicted_slowdown": {}, "equal": True}
    passes, steps = max(4, k_prime // math.gcd(depth, k_prime)), k_prime // math.gcd(2 * depth, k_prime)  # whole numbers of batches
    for ratio in ratios:
        looked_at = ratio == ratios[0]
        with _device(depth, ratio, k=k, k_prime=k_prime, width=WIDTH if looked_at else NARROW) as (model, handle, count, expected):
            if k < depth:
                handle.tune()
            with torch.no_grad():
                row["equal"] &= torch.equal(model(torch.ones(1, model.width)), expected)
            seconds = pass_seconds(model, _machine(model), passes) / depth
            row["slowdown"][str(ratio)] = round(seconds, 6)
            row["predicted_slowdown"][str(ratio)] = round(handle.predict().slowdown or 1.0, 6)
            if looked_at:
                row["held_bytes"], row["predicted_bytes"], row["saved"] = _held(model, handle, count)
            before = handle.stats()["transfers"]
            pass_seconds(model, _machine(model), k_prime)
            row["transfers_per_pass"] = (handle.stats()["transfers"] - before) / (2 * k_prime)
    with _device(depth, 1.0, k=k, k_prime=k_prime, width=NARROW) as (model, handle, _, _):
        _train(model, 3 * steps)
        before = handle.stats()["transfers"]
        _train(model, steps)
        row["transfers_per_step"] = (handle.stats()["transfers"] - before) / steps
    row |= {"step_s": {}, "predicted_step_s": {}}
    for ratio in TRAINED:
        with _training(depth, ratio, width=NARROW, k=k, k_prime=k_prime) as (model, handle, _, update):
            row["step_s"][str(ratio)] = round(_step_seconds(model, update, steps), 6)
            row["predicted_step_s"][str(ratio)] = round(handle.predict().seconds_per_pass or depth * (1 + BACKWARD), 6)
    with _training(depth, TRAINED[0], width=WIDTH, k=k, k_prime=k_prime) as (model, handle, count, _):
        row["step_held_bytes"], row["step_predicted_bytes"], _ = _held(model, handle, count)
    return row


def _held(model: Blocks, handle: SuperpipelineHandle, count: SlotCount) -> tuple[int, int, float]:
    """Bytes of weights present at most, as counted and as predicted, and the part of the blocks that was saved."""
    blocks, whole = handle.room.block_bytes, sum(block.map.weight.nbytes for block in [*model.blocks, model.head])
    held = count.peak if handle.knobs.k < handle.knobs.units else blocks
    return whole - blocks + held, handle.predict().device_bytes, round(1 - held / blocks, 3)


@contextmanager
def _training(depth: int, ratio: float, **fields: Any) -> Iterator[tuple[Blocks, SuperpipelineHandle, SlotCount, Callable[[], None]]]:
    """A model that is trained, after the steps that are measured and chosen by, and what updates all of its blocks."""
    with _device(depth, ratio, backward_s=BACKWARD, training=True, train=True, **fields) as (model, handle, count, _):
        optimizer = OffloadedOptimizer(model, torch.optim.SGD, lr=1e-3, overlap=False)

        machine = _machine(model)

        def update() -> None:
            machine.synchronize(machine.record(machine.compute))  # the host waits for gradients
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            if handle.config.k != "auto":
                handle.tune()
            _train(model, 1, update)
        yield model, handle, count, update
        optimizer.close()


def _step_seconds(model: Blocks, update: Callable[[], None], steps: int) -> float:
    """Virtual seconds of a training pass, over `steps` or a few more, after as many others."""
    steps, ends = max(3, steps), []
    for _ in range(2):
        _train(model, steps, update)
        ends.append(_machine(model).compute.time)
    return (ends[1] - ends[0]) / steps


def _auto_step(depth: int, ratio: float, max_slowdown: float) -> dict[str, Any]:
    with _training(depth, ratio, width=NARROW, max_slowdown=max_slowdown) as (model, handle, _, update):
        _train(model, 1, update)
        chosen, profile = handle.knobs, handle.profile
        assert profile is not None and profile.trains
        return {
            "ratio": ratio,
            "max_slowdown": max_slowdown,
            "k": chosen.k,
            "k_prime": chosen.k_prime,
            "saved": round(chosen.saved, 3),
            "slowdown": round(_step_seconds(model, update, chosen.k_prime) / (depth * (1 + BACKWARD)), 6),
            "fastest": round(min(profile.slowdown(k, 1) for k in handle.allowed), 6),
        }


def _auto(depth: int, ratio: float, max_slowdown: float) -> dict[str, Any]:
    with _device(depth, ratio, max_slowdown=max_slowdown, width=NARROW) as (model, handle, _, _):
        pass_seconds(model, _machine(model), 1)
        knobs = handle.knobs
        seconds = pass_seconds(model, _machine(model), max(4, knobs.k_prime))
        return {
            "ratio": ratio,
            "max_slowdown": max_slowdown,
            "k": knobs.k,
            "k_prime": knobs.k_prime,
            "saved": round(knobs.saved, 3),
            "slowdown": round(seconds / depth, 6),
        }


def _fastest(rows: Sequence[dict[str, Any]], ratios: Sequence[float]) -> dict[str, Any]:
    """At each ratio the fastest of some rows."""
    best = {str(ratio): min(rows, key=lambda row: (row["slowdown"][str(ratio)], row["k_prime"])) for ratio in ratios}
    return {
        "k": rows[0]["k"],
        "saved": rows[0]["saved"],
        "k_prime": {ratio: row["k_prime"] for ratio, row in best.items()},
        "slowdown": {ratio: row["slowdown"][ratio] for ratio, row in best.items()},
    }


@contextmanager
def _device(depth: int, ratio: float, **fields: Any) -> Iterator[tuple[Blocks, SuperpipelineHandle, SlotCount, torch.Tensor]]:
    """A model on the device, its handle, a count of the slots, and what the model without a window returns."""
    with pytest.MonkeyPatch.context() as patch:
        count = counted_slots(patch, FakeArena)
        model, handle, machine = on_device(patch, depth=depth, compute_s=1.0, transfer_s=ratio, **fields)
        torch.manual_seed(1)
        plain = Blocks(machine, depth, 0.0, width=model.width).eval()
        with torch.no_grad():
            expected = plain(torch.ones(1, model.width))
        yield model, handle, count, expected
        machine.check()


def _machine(model: Blocks) -> Any:
    return model.head.machine


def _train(model: Blocks, steps: int, update: Callable[[], None] = lambda: None) -> None:
    for _ in range(steps):
        model(torch.ones(1, model.width)).square().mean().backward()
        update()

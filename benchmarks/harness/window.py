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
from torchwrap.superpipeline.handle import SuperpipelineHandle
from torchwrap.superpipeline.picture import draw, grid

__all__ = ["PREFILL", "TITLE", "measure_window", "picture", "table"]

TITLE = "superpipeline[virtual clock]"
RATIOS = (0.5, 0.9, 1.0, 1.15, 1.5, 2.0)
PREFILL = 1.15
"""Ratios up to this one are of prefill size: the link keeps up with the computation, or nearly."""
SLOWDOWNS = (1.02, 1.10, 1.25, 1.5)
WIDTH = 512  # blocks of 1 MiB, beside which the pages that a slot has to spare are few


def measure_window(
    *, depths: Sequence[int] = (10, 24), ratios: Sequence[float] = RATIOS, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Every (k, k') of the grid at every ratio, and "auto" for several limits.

    Returns:
        `depths.<n>.rows`: one per (k, k'), figures that depend on the ratio by ratio. `depths.<n>.auto`: what was chosen and what a pass
        took. `forty_percent.<n>`: the fastest k' at the largest k <= 0.4 n. `worst`: the figures that the bars are about.
    """
    found: dict[str, Any] = {"title": TITLE, "ratios": list(ratios), "depths": {}, "forty_percent": {}}
    for depth in depths:
        rows = []
        for k, k_prime in grid(depth):
            rows.append(_row(depth, k, k_prime, ratios))
            say(f"{TITLE} {depth} blocks k={k} k'={k_prime} saved {rows[-1]['saved']:.0%} slow-down {rows[-1]['slowdown']}")
        auto = [_auto(depth, ratio, limit) for ratio in ratios for limit in SLOWDOWNS]
        found["depths"][str(depth)] = {"rows": rows, "auto": auto}
        found["forty_percent"][str(depth)] = _fastest([row for row in rows if row["k"] == int(0.4 * depth)], ratios)
    rows = [row for each in found["depths"].values() for row in each["rows"]]
    chosen = [each for depth in found["depths"].values() for each in depth["auto"]]
    found["worst"] = {
        "peak_error": max(abs(row["held_bytes"] / row["predicted_bytes"] - 1) for row in rows),
        "slowdown_error": max(abs(row["slowdown"][key] / row["predicted_slowdown"][key] - 1) for row in rows for key in row["slowdown"]),
        "step_error": max(abs(row["transfers_per_step"] - 2 * (row["units"] - row["k"])) for row in rows),
        "auto_excess": max(each["slowdown"] - each["max_slowdown"] for each in chosen),
        "saved_at_forty_percent": min(each["saved"] for each in found["forty_percent"].values()),
        "prefill_slowdown_at_forty_percent": max(
            each["slowdown"][str(ratio)] for each in found["forty_percent"].values() for ratio in ratios if ratio <= PREFILL
        ),
    }
    found["equal_outputs"] = all(row["equal"] for row in rows)
    return found


def table(summary: dict[str, Any]) -> str:
    """The rows of docs/superpipeline.md, as Markdown."""
    ratios = [str(ratio) for ratio in summary["ratios"]]
    lines = [
        "| n | k | k' | saved | blocks per pass | per training step | " + " | ".join(f"{ratio}" for ratio in ratios) + " |",
        "|" + "---:|" * (6 + len(ratios)),
    ]
    for depth, found in summary["depths"].items():
        wanted = {int(share * int(depth)) for share in (0.2, 0.4, 0.6, 0.8)}
        for row in found["rows"]:
            k = row["k"]
            largest = 1 << (k.bit_length() - 1)
            if k not in wanted or row["k_prime"] not in (1, largest // 2, largest):
                continue
            slowdowns = " | ".join(f"{row['slowdown'][ratio]:.2f}" for ratio in ratios)
            lines.append(
                f"| {depth} | {k} | {row['k_prime']} | {row['saved']:.0%} | {row['transfers_per_pass']:g} | {row['transfers_per_step']:g} "
                f"| {slowdowns} |"
            )
    return "\n".join(lines)


def picture(summary: dict[str, Any], *, depth: int = 24, ratio: float = 1.15) -> bytes:
    """Predictions of one model after one measured pass, and the runs of `measure_window` as crosses; a PNG file."""
    with _device(depth, ratio, k=2, k_prime=1) as (model, handle, _, _):
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
    passes = max(4, k_prime // math.gcd(depth, k_prime))
    for ratio in ratios:
        with _device(depth, ratio, k=k, k_prime=k_prime) as (model, handle, count, expected):
            blocks, whole = handle.room.block_bytes, sum(p.nbytes for p in model.parameters())
            if k < depth:
                handle.tune()
            with torch.no_grad():
                row["equal"] &= torch.equal(model(torch.ones(1, WIDTH)), expected)
            seconds = pass_seconds(model, _machine(model), passes) / depth
            row["slowdown"][str(ratio)] = round(seconds, 6)
            row["predicted_slowdown"][str(ratio)] = round(handle.predict().slowdown or 1.0, 6)
            row["held_bytes"] = whole - blocks + (count.peak if k < depth else blocks)
            row["predicted_bytes"] = handle.predict().device_bytes
            row["saved"] = round(1 - (count.peak if k < depth else blocks) / blocks, 3)
            before = handle.stats()["transfers"]
            pass_seconds(model, _machine(model), k_prime)
            row["transfers_per_pass"] = (handle.stats()["transfers"] - before) / (2 * k_prime)
    with _device(depth, 1.0, k=k, k_prime=k_prime) as (model, handle, _, _):
        _train(model, 3 * k_prime)
        before = handle.stats()["transfers"]
        _train(model, k_prime)
        row["transfers_per_step"] = (handle.stats()["transfers"] - before) / k_prime
    return row


def _auto(depth: int, ratio: float, max_slowdown: float) -> dict[str, Any]:
    with _device(depth, ratio, max_slowdown=max_slowdown) as (model, handle, _, _):
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
        model, handle, machine = on_device(patch, depth=depth, compute_s=1.0, transfer_s=ratio, width=WIDTH, **fields)
        torch.manual_seed(1)
        plain = Blocks(machine, depth, 0.0, width=WIDTH).eval()
        with torch.no_grad():
            expected = plain(torch.ones(1, WIDTH))
        yield model, handle, count, expected
        machine.check()


def _machine(model: Blocks) -> Any:
    return model.head.machine


def _train(model: Blocks, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(1, WIDTH)).square().mean().backward()

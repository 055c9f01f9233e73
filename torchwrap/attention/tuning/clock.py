"""How long back ends need for the same call: they take turns, and the median counts.

A call runs twice before the clock counts: the first may compile. A back end that then needs more than three times what the fastest does is
not timed further. One whose first call takes longer than a limit is not called again, and no sample begins after as much time in all, so
that a measurement ends; a call that has begun cannot be stopped. A sample is as many calls as fill a few milliseconds, from start to the
end of what they queued.
Memory: that of the calls themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

__all__ = ["LIMIT_S", "ROUNDS", "median_seconds"]

ROUNDS = 5
LIMIT_S = 60.0
"""Longest first call that is worth another one, and longest time for all samples (chosen)."""
_SAMPLE_S = 0.004
_HOPELESS = 3.0


def median_seconds(
    runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each, and why some have none.

    Args:
        runs: what is timed, by name.
        device: where it runs.
        rounds: samples of each.
    """
    once: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        try:
            once[name] = _sample(run, 1, device)
            if once[name] < LIMIT_S:
                once[name] = _sample(run, 1, device)
        except Exception as error:  # no memory, no compiler, a fault of it: a reason not to choose it, and nobody asked for it
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    timed = [name for name in once if once[name] <= min(_HOPELESS * min(once.values()), LIMIT_S)]
    samples: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + LIMIT_S
    for _ in range(rounds if len(timed) > 1 else 0):
        for name in timed:
            if time.perf_counter() >= end:
                break
            samples[name].append(_sample(runs[name], max(1, min(200, round(_SAMPLE_S / once[name]))), device))
        timed.append(timed.pop(0))
    return {name: median(samples[name]) if samples.get(name) else seconds for name, seconds in once.items()}, failed


def _sample(run: Callable[[], object], count: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    _wait(device)
    return (time.perf_counter() - began) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

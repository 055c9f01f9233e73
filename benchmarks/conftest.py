"""Fixtures of the benchmarks: `compare` alternates contenders under pytest-benchmark, `results` stores and judges what was measured.

pytest-benchmark times one function and cannot alternate tests, so rivals run inside the `setup` of each round, in rotating order,
and the ratios of medians are put into `extra_info`, from where they reach its JSON.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.results import RESULTS, judge, machine, verdict_lines, write_results
from benchmarks.harness.statistics import ratio_of_medians, spread

Contender = Callable[[], Any]
Compare = Callable[..., dict[str, float]]


@pytest.fixture
def compare(benchmark: Any) -> Compare:
    """`compare(ours, {"rival": function}, rounds=n, group="technique[shape]")` -> ratio of medians per rival (above 1: ours is faster).

    A function that returns a float has measured its own seconds, for instance in a child process; otherwise its wall time counts.
    """

    def run(ours: Contender, rivals: Mapping[str, Contender], *, rounds: int, group: str) -> dict[str, float]:
        seconds: dict[str, list[float]] = defaultdict(list)
        order = list(rivals)

        def timed(name: str, contender: Contender) -> None:
            started = time.perf_counter()
            measured = contender()
            elapsed = time.perf_counter() - started
            seconds[name].append(measured if isinstance(measured, float) else elapsed)

        def setup() -> None:
            for name in order:
                timed(name, rivals[name])
            order.append(order.pop(0)) if order else None

        benchmark.group = group
        benchmark.pedantic(timed, args=("ours", ours), setup=setup, rounds=rounds, iterations=1)
        ratios = {name: ratio_of_medians(seconds[name], seconds["ours"]) for name in rivals}
        benchmark.extra_info.update(ratios=ratios, seconds={name: spread(values) for name, values in seconds.items()}, machine=machine())
        return ratios

    return run


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """A dict, title -> summary; written to docs/results (or `TORCHWRAP_RESULTS`) and judged when the session ends."""
    runs: dict[str, dict[str, Any]] = {}
    yield runs
    if not runs:
        return
    target = write_results(runs, folder=Path(os.environ.get("TORCHWRAP_RESULTS", RESULTS)))
    lines = verdict_lines([verdict for title, summary in runs.items() for verdict in judge(title, summary)])
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line("")
        for line in (*lines, f"written: {target}"):
            reporter.write_line(line)


@pytest.fixture
def rounds() -> int:
    """Alternating rounds, `TORCHWRAP_BENCH_ROUNDS` or 3."""
    return int(os.environ.get("TORCHWRAP_BENCH_ROUNDS", "3"))

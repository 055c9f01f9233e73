"""Superpipeline over (k, k') on a virtual clock, and in real time with a prompt of prefill size.

`python -m benchmarks superpipeline` and `superpipeline-prefill` run the same without pytest.
"""

from __future__ import annotations

from typing import Any

import pytest


def test_peak_and_time_over_the_knobs(results: dict[str, dict[str, Any]]) -> None:
    from benchmarks.harness.window import TITLE, measure_window

    summary = measure_window()
    results[TITLE] = summary
    assert summary["equal_outputs"]


def test_a_prompt_through_two_fifths_of_the_blocks(results: dict[str, dict[str, Any]], rounds: int) -> None:
    pytest.importorskip("transformers")
    from benchmarks.harness.prefill import measure_prefill

    summary = measure_prefill(rounds=rounds)
    results[summary["title"]] = summary
    assert summary["equal_outputs"], "the window computed other logits"

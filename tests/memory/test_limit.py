"""A model far above the memory limit of its process: it finishes, it is right, and the peak is what was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.checkpoints import SHAPES, Shape, write_checkpoint

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("limits")

MIB = 1 << 20
TOKENS = 3
# Interpreter, torch and transformers take about 260 MiB of the group; the embedding and two slots of 35 MB come on top.
LIMIT = 400 * MIB
WINDOW_LIMIT = 500 * MIB  # three slots, and what one pass may take besides


OPTIONS = {"explicit": (f"host_memory={110 * MIB}",), "buffered": ("io_backend=buffered",)}


def test_model_above_the_limit_finishes_with_the_right_tokens_and_takes_what_was_promised(
    child: Any, large_checkpoint: Path, reference_tokens: list[int]
) -> None:
    result = child("generate", large_checkpoint, TOKENS, limit=LIMIT).check()
    assert SHAPES["llama-0.9GB"].nbytes() > 2 * LIMIT
    assert result.data["ids"] == reference_tokens
    assert result.peak_bytes <= LIMIT
    assert result.data["streamed_bytes"] > 0
    promised = result.data["peak_process"]
    assert abs(promised - result.peak_bytes) <= 0.10 * result.peak_bytes, (promised, result.peak_bytes, result.data["explain"])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_other_settings_finish_with_the_right_tokens_as_well(
    child: Any, large_checkpoint: Path, reference_tokens: list[int], options: tuple[str, ...]
) -> None:
    result = child("generate", large_checkpoint, TOKENS, *options, limit=LIMIT).check()
    assert result.data["ids"] == reference_tokens
    assert result.peak_bytes <= LIMIT
    assert result.data["streamed_bytes"] > 0


@pytest.mark.parametrize("knobs", [("k=2", "k_prime=1"), ("k=3", "k_prime=3")], ids=["2-1", "3-3"])
def test_a_window_over_the_model_above_the_limit(
    child: Any, large_checkpoint: Path, reference_tokens: list[int], knobs: tuple[str, ...]
) -> None:
    result = child("windowed", large_checkpoint, TOKENS, *knobs, limit=WINDOW_LIMIT).check()
    assert result.data["ids"] == reference_tokens
    promised = result.data["peak_process"]
    assert result.peak_bytes <= WINDOW_LIMIT
    assert abs(promised - result.peak_bytes) <= 0.10 * result.peak_bytes, (promised, result.peak_bytes, result.data["explain"])


def test_a_window_that_is_chosen_stays_below_the_limit(child: Any, large_checkpoint: Path, reference_tokens: list[int]) -> None:
    result = child("windowed", large_checkpoint, TOKENS, limit=WINDOW_LIMIT).check()
    assert result.data["ids"] == reference_tokens
    assert result.data["k"] < SHAPES["llama-0.9GB"].blocks / 2
    assert result.peak_bytes <= WINDOW_LIMIT


def test_budget_below_the_minimum_is_refused_before_anything_is_taken(child: Any, large_checkpoint: Path) -> None:
    result = child("refuse", large_checkpoint, 1 * MIB, limit=LIMIT).check()
    assert result.data["error"] is not None
    assert result.data["memory_error"]
    assert result.data["threads"] == 1


@pytest.mark.slow
def test_a_head_that_no_slot_can_hold(child: Any, tmp_path: Path) -> None:
    """256 MiB of head, of which the limit leaves room for a fifth: refused whole, right in tiles."""
    shape = Shape(name="wide", hidden=1024, mlp=2048, blocks=3, heads=16, kv_heads=4, vocabulary=131072, tied=False, shards=1)
    limit = 450 * MIB
    write_checkpoint(shape, tmp_path / "wide")
    refused = child("generate", tmp_path / "wide", TOKENS, limit=limit)
    assert "tile_above=16777216" in str(refused)
    result = child("generate", tmp_path / "wide", TOKENS, "tile_above=16MiB", limit=limit).check()
    assert result.data["ids"] == child("plain", tmp_path / "wide", TOKENS).check().data["ids"]
    promised = result.data["peak_process"]
    assert result.peak_bytes <= limit
    assert abs(promised - result.peak_bytes) <= 0.10 * result.peak_bytes, (promised, result.peak_bytes, result.data["explain"])

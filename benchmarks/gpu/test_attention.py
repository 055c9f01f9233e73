"""Attention on a CUDA card beside torch's own kernels; see `benchmarks.gpu.attention`. About 16 GB of device memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.attention import CASES, measure

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, results: dict[str, dict[str, Any]], rounds: int) -> None:
    summary = measure(name, rounds=max(rounds, 5))
    results[summary["title"]] = summary
    assert summary["error"] < 0.05, "ours computed something else"

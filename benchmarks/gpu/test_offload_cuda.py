"""Offload on a CUDA card beside resident weights, accelerate and diffusers.

`TORCHWRAP_BENCH_CUDA_SHAPE` names a smaller shape for a smaller card (default llama-8B: 16 GB on the card for the resident model,
about 50 GB of host memory for the page-locked copies of all contenders).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_weights_on_the_host(results: dict[str, dict[str, Any]], rounds: int) -> None:
    from benchmarks.gpu.cuda_offload import measure_host

    summary = measure_host(shape=os.environ.get("TORCHWRAP_BENCH_CUDA_SHAPE", "llama-8B"), rounds=rounds)
    results[summary["title"]] = summary
    assert summary["equal_tokens"], "contenders computed different tokens"


def test_weights_on_disk(results: dict[str, dict[str, Any]], rounds: int, tmp_path: Path) -> None:
    from benchmarks.gpu.cuda_offload import measure_disk

    summary = measure_disk(tmp_path / "accelerate", rounds=rounds)
    results[summary["title"]] = summary
    assert summary["equal_tokens"], "contenders computed different tokens"

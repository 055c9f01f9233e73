"""A model that fits: wrapping it must not cost speed. Unwrapped and wrapped models alternate in one process.

`python -m benchmarks offload-fits` runs the same without pytest and with more rounds per model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.harness.checkpoints import checkpoint
from benchmarks.harness.fits import TITLE, generate_timed, load_models, measure_fits

TOKENS = 16


@pytest.fixture
def all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(threads)


def test_decode_when_the_model_fits(compare: Any, benchmark: Any, all_cores: None) -> None:
    models = load_models(checkpoint("llama-135M"))
    ids = torch.randint(3, 49152, (1, 64), generator=torch.Generator().manual_seed(7))
    tokens = {name: generate_timed(model, ids, TOKENS)[2] for name, model in models.items()}
    assert all(torch.equal(chosen, tokens["unwrapped"]) for chosen in tokens.values())
    rivals = {name: lambda model=model: generate_timed(model, ids, TOKENS)[1] for name, model in models.items() if name != "torchwrap"}
    compare(lambda: generate_timed(models["torchwrap"], ids, TOKENS)[1], rivals, rounds=10, group=TITLE)


def test_summary_when_the_model_fits(results: dict[str, dict[str, Any]]) -> None:
    summary = measure_fits()
    results[TITLE] = summary
    assert summary["equal_tokens"]
